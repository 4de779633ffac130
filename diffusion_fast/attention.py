"""Attention of diffusers' layers by one operation. What computes it is in operators.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

from diffusion_fast import operators

if torch.version.cuda is not None:
    import diffusion_fast.attention_kernels  # noqa: F401 - CUDA tensors go to it from here on


class KernelAttnProcessor:
    """What AttnProcessor2_0 and FusedAttnProcessor2_0 do for a layer that `can_take`, by `operators.attention`.

    Queries, keys and values stay where the projections wrote them. A call with a mask is left to diffusers' processor.
    """

    @staticmethod
    def can_take(layer: Attention) -> bool:
        """Whether a layer attends as a transformer's does, in a block that norms and adds, by heads of such a width."""
        return (
            type(layer.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0)
            and layer.spatial_norm is layer.group_norm is layer.norm_q is layer.norm_k is None
            and not layer.norm_cross
            and not layer.residual_connection
            and layer.rescale_output_factor == 1
            and layer.inner_dim == layer.inner_kv_dim
            and operators.takes_heads_of(layer.inner_dim // layer.heads)
        )

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (batch, tokens, features), encoder_hidden_states (batch, keys, features) or None → the first's
        shape and dtype."""
        if attention_mask is not None:
            by_diffusers = FusedAttnProcessor2_0 if attn.fused_projections else AttnProcessor2_0
            left: torch.Tensor = by_diffusers()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return left
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not attn.fused_projections:
            projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        elif encoder_hidden_states is None:
            projected = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            projected = attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, -1)
        q, k, v = (each.unflatten(-1, (attn.heads, -1)) for each in projected)
        made = attend(q, k, v).flatten(2)
        for layer in attn.to_out:  # a linear and a dropout
            made = layer(made)
        return made


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (batch, queries, heads, dim), k and v (batch, keys, heads, dim) → q's shape, by scores over √dim."""
    made: torch.Tensor = operators.attention(q, k, v, 1 / math.sqrt(q.shape[-1]))
    return made


def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: None = None) -> torch.Tensor:
    """As scaled_dot_product_attention is called: (batch, heads, tokens, dim) each, without a mask."""
    return attend(*(each.transpose(1, 2) for each in (query, key, value))).transpose(1, 2)


def attention_layers(network: Any) -> list[Attention]:
    return [module for module in network.modules() if isinstance(module, Attention)]


def take_over(layers: list[Attention]) -> None:
    """Have `layers` attend by the operator."""
    processor = KernelAttnProcessor()  # one for all, so that compiled blocks of a shape share their code
    for layer in layers:
        layer.set_processor(processor)
