"""A few channels made much larger than the others, as trained transformers have them; what is computed stays the same.

Random weights have none, and scales that all channels share look free with them. In a trained model a few channels of a
layer norm's output are tens of times the others (https://arxiv.org/abs/2208.07339, section 4). Here such channels are
scaled up where they are made and down where they are used, which in exact arithmetic is the same network. Residual
blocks get none: between a norm of theirs and the convolution that would undo it is SiLU, which doesn't scale.
"""

from __future__ import annotations

from typing import Any

SHARE = 0.01  # of the channels
SCALE = 20.0
SEED = 0


def put_in(network: Any) -> int:
    """Scale channels in every transformer block: of its norms, its attentions' values and its feed-forward.

    `network` has plain linear layers, not yet fused or quantized. Returns how many channels were scaled. Raises
    RuntimeError where it has no such blocks.
    """
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    generator = torch.Generator("cpu").manual_seed(SEED)
    scaled = 0
    for block in network.modules():
        if not isinstance(block, BasicTransformerBlock):
            continue
        gate, output = block.ff.net[0].proj, block.ff.net[-1]
        pairs = [
            (block.norm1, [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]),
            (block.norm2, [block.attn2.to_q]),
            (block.norm3, [gate]),
            # What attention and GEGLU make is linear in these rows: the values, and GEGLU's first half.
            (block.attn1.to_v, [block.attn1.to_out[0]]),
            (block.attn2.to_v, [block.attn2.to_out[0]]),
            (gate, [output]),
        ]
        for maker, users in pairs:
            channels = users[0].in_features
            chosen = torch.randperm(channels, generator=generator)[: max(1, round(SHARE * channels))]
            scaled += _scale(maker, users, chosen)
    if not scaled:
        raise RuntimeError(f"{type(network).__name__} has no transformer blocks to put outliers in")
    return scaled


def _scale(maker: Any, users: list[Any], channels: Any) -> int:
    """Output `channels` of `maker` times SCALE, and the same inputs of `users` by it."""
    maker.weight.data[channels] *= SCALE
    if maker.bias is not None:
        maker.bias.data[channels] *= SCALE
    for user in users:
        user.weight.data[:, channels] /= SCALE
    return len(channels)
