"""Attention of a head too wide for fused kernels, as products over slices of its queries."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention

WIDEST = 256  # numbers of a head that flash attention and cuDNN take
SCORES = 2**23  # in a slice: 32 MiB, which stay in an H100's cache between the products
MOST_SLICES = 32  # each is three kernels of the decoder's graph, that take their time to compile


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head: query, key and value (batch, tokens, features) → (batch, tokens, features).

    Scores are fp32, and probabilities of value's dtype, as in fused kernels. On a GPU the scores of bf16 are multiplied
    in TF32, which has all their digits, where that is allowed.
    """
    batch, tokens = query.shape[:2]
    rows = max(SCORES // (batch * key.shape[1]), -(-tokens // MOST_SLICES))
    wide = key.float().transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    made = []
    for each in query.split(rows, dim=1):  # one after the other: eagerly, all scores would be there at once otherwise
        scores = torch.bmm(each.float(), wide) * scale
        made.append(torch.bmm(scores.softmax(-1).to(value.dtype), value))
    return torch.cat(made, dim=1)


class SlicedAttention:
    """An attention processor for a VAE's image with one head, fused projections or not."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """hidden_states: (images, channels, height, width). Returns the same shape. The rest is what every processor
        is called with, and a VAE has none of it."""
        tokens = hidden_states.flatten(2)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens)
        tokens = tokens.transpose(1, 2)
        if attn.fused_projections:
            given = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            given = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        out = attend(*given)
        for layer in attn.to_out:
            out = layer(out)
        image = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            image = image + hidden_states
        made: torch.Tensor = image / attn.rescale_output_factor
        return made


def slice_wide_heads(network: Any) -> int:
    """Have attention of one head, wider than WIDEST, done in slices. Returns how many layers do it."""
    found = [
        module
        for module in network.modules()
        if isinstance(module, Attention)
        and module.heads == 1
        and module.inner_dim > WIDEST
        and not module.is_cross_attention
        and module.spatial_norm is module.norm_q is module.norm_k is None
    ]
    for module in found:
        module.set_processor(SlicedAttention())
    return len(found)
