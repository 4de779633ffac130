"""Attention as one explicit matrix of scores, for networks of which diffusers knows fused kernels alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch.overrides import TorchFunctionMode


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What scaled_dot_product_attention computes, in its inputs' dtype: scores, softmax, and the product with `value`.

    query: (..., heads, tokens, features); key and value: (..., heads, other tokens, features), with `enable_gqa` fewer
    heads, each for several of the queries'. attn_mask is added to the scores, or of booleans: False where there is no
    attention, and zeros come of a row without any. Raises NotImplementedError for what no denoiser asks for.
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """
    if dropout_p or is_causal:
        raise NotImplementedError("attention with dropout or a causal mask isn't written out")
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = scores.masked_fill(~attn_mask, -torch.inf).softmax(dim=-1)
        return weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0) @ value
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1) @ value


class _WrittenOut(TorchFunctionMode):
    """Within, scaled_dot_product_attention is `attend`. torch.compile can't trace all that is within."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class WithScores:
    """An attention processor, or a network's forward, that does what another does, with its scores written out."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _WrittenOut():
            return self.processor(*args, **kwargs)


def write_out(network: Any) -> None:
    """Have a network of diffusers attend by explicit scores: layer by layer, or all of it where they can't be set."""
    if not hasattr(network, "set_attn_processor"):
        network.forward = WithScores(network.forward)
        return
    found = network.attn_processors
    network.set_attn_processor({name: each if _linear(each) else WithScores(each) for name, each in found.items()})


def fuse(network: Any) -> int:
    """Have it attend by fused kernels again, as it was made. Returns how many layers do: linear attention has none."""
    if not hasattr(network, "set_attn_processor"):
        if isinstance(network.__dict__.get("forward"), WithScores):  # else it is somebody's own, or the class's
            network.forward = network.forward.processor
        return sum(hasattr(module, "processor") for module in network.modules())
    own = {name: getattr(each, "processor", each) for name, each in network.attn_processors.items()}
    network.set_attn_processor(dict(own))
    return sum(not _linear(each) for each in own.values())


def _linear(processor: Any) -> bool:
    return isinstance(processor, SanaLinearAttnProcessor2_0)
