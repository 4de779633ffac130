"""Outliers are there, and the network computes what it did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import Build
from diffusion_fast.outliers import SCALE, put_in
from diffusion_fast.pipeline import _from_configs
from tests.conftest import planned
from tests.test_optimizations import build


def test_channels_are_larger_and_the_output_is_the_same() -> None:
    unet = build()[0].denoiser.double()
    wide = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
    given = {
        "sample": torch.rand(2, 4, 16, 16, dtype=torch.float64),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.rand(2, 77, 128, dtype=torch.float64),
        "added_cond_kwargs": {"text_embeds": torch.rand(2, wide).double(), "time_ids": torch.ones(2, 6).double()},
    }
    seen: list[torch.Tensor] = []
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    for module in (block.norm1, block.attn1.to_v, block.ff.net[0]):
        module.register_forward_hook(lambda _, args, output: seen.append(output.abs().amax(dim=(0, 1))))
    with torch.no_grad():
        before = unet(**given).sample
        scaled = put_in(unet)
        after = unet(**given).sample
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    for plain, changed in zip(seen[:3], seen[3:], strict=True):
        ratio = changed / plain
        assert ((ratio - SCALE).abs() < 1e-6).sum() == max(1, round(0.01 * len(ratio)))
        assert ((ratio - 1).abs() < 1e-6).sum() == len(ratio) - max(1, round(0.01 * len(ratio)))
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules())
    assert scaled >= 6 * blocks


def test_a_network_without_transformer_blocks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Linear has no transformer blocks"):
        put_in(torch.nn.Linear(2, 2))


def test_sdxl_with_outliers_is_sdxl_otherwise() -> None:
    plain, changed = MODELS["sdxl"], MODELS["sdxl-outliers"]
    assert replace(changed, name=plain.name, summary=plain.summary, outliers=False) == plain
    spec = replace(planned(model="sdxl-outliers", weights="random").rungs[0], device="meta")  # type: ignore[arg-type]
    unet = _from_configs(Build(changed, spec)).unet
    # Of each block 1% of width for norms and values, of four times that for the feed-forward: 70 blocks in all.
    assert put_in(unet) == 10 * (5 * 6 + 26) + 60 * (5 * 13 + 51)
