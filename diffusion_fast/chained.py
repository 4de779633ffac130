"""Transformer blocks in a row, each of which leaves its last sum to the next one, whose norm reads it anyway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock

Sum = tuple[torch.Tensor, torch.Tensor]  # two summands that are still to be added


class ChainedTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]  # diffusers has no types
    """diffusers' forward, where all norms are plain layer norms (`plain`), but for the sum at its end.

    An existing block becomes one by `become`: the same object, with its layers and their names.
    """

    leaves_sum: bool  # to the next block; the last of a row has none

    @staticmethod
    def plain(block: torch.nn.Module) -> bool:
        """Whether the block is layer norms, attention and feed-forward, and nothing else."""
        return (
            type(block) is BasicTransformerBlock
            and block.norm_type == "layer_norm"
            and block.pos_embed is None
            and block.attn2 is not None
            and not hasattr(block, "fuser")  # GLIGEN's
            and block._chunk_size is None
        )

    @classmethod
    def become(cls, block: Any, leaves_sum: bool) -> None:
        block.__class__ = cls
        block.leaves_sum = leaves_sum

    def forward(
        self,
        hidden_states: torch.Tensor | Sum,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> torch.Tensor | Sum:
        """hidden_states: (batch, tokens, features), or what the block before left. Returns the one or the other."""
        x = hidden_states[0] + hidden_states[1] if isinstance(hidden_states, tuple) else hidden_states
        given = cross_attention_kwargs or {}
        itself = encoder_hidden_states if self.only_cross_attention else None
        x = x + self.attn1(self.norm1(x), encoder_hidden_states=itself, attention_mask=attention_mask, **given)
        prompt = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        x = x + self.attn2(self.norm2(x), **prompt, **given)
        made = self.ff(self.norm3(x))
        return (made, x) if self.leaves_sum else made + x


def chain(network: Any) -> int:
    """Chain the blocks of each row. Returns how many sums are left to the next block."""
    rows = list(_rows(network))
    for blocks in rows:
        for block in blocks:
            ChainedTransformerBlock.become(block, leaves_sum=block is not blocks[-1])
    return sum(len(blocks) - 1 for blocks in rows)


def longest(network: Any) -> int:
    """How many blocks the longest row has, 0 where there is none."""
    return max(map(len, _rows(network)), default=0)


def _rows(network: Any) -> Iterator[torch.nn.ModuleList]:
    """Lists of several transformer blocks, all of which are `plain`: a transformer calls them one after the other."""
    for module in network.modules():
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module) > 1
            and all(map(ChainedTransformerBlock.plain, module))
        ):
            yield module
