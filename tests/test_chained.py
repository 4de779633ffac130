"""Transformer blocks in a row that leave their last sum to the next one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from diffusion_fast import chained, own, plan
from diffusion_fast.chained import ChainedTransformerBlock
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import compilation
from diffusion_fast.pipeline import call
from diffusion_fast.spec import Recipe
from tests.conftest import CPU
from tests.test_models import small
from tests.test_optimizations import build


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Row(torch.nn.Module):
    """What a transformer does with its blocks."""

    def __init__(self, count: int, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = (BasicTransformerBlock(32, 2, 16, cross_attention_dim=24, **changes) for _ in range(count))
        self.blocks = torch.nn.ModuleList(made).eval()

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=prompt)
        return x


@pytest.mark.parametrize("count", [2, 5])
def test_a_row_computes_what_it_did_to_the_last_bit(count: int) -> None:
    row, x, prompt = Row(count), torch.randn(2, 9, 32), torch.randn(2, 7, 24)
    before = row(x, prompt)
    assert chained.longest(row) == count
    assert chained.chain(row) == count - 1
    assert isinstance(row.blocks[0](x, encoder_hidden_states=prompt), tuple)
    assert torch.equal(row(x, prompt), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_type": "ada_norm_single"},
        {"attention_type": "gated"},
        {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 9},
    ],
)
def test_blocks_that_do_more_stay_what_they_are(changes: dict[str, Any]) -> None:
    row = Row(2, **changes)
    assert chained.chain(row) == chained.longest(row) == 0
    assert {type(block) for block in row.blocks} == {BasicTransformerBlock}


def test_a_block_that_stands_alone_stays_what_it_is() -> None:
    assert chained.chain(Row(1)) == chained.longest(Row(1)) == 0


def test_the_picture_is_that_of_the_recipe_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    names = ("sdpa", "regional_compile")
    made, applied = build(*names, "fused_add_norm")
    assert applied["fused_add_norm"] == {"sums": 1}
    assert call(made)[0].tobytes() == call(build(*names)[0])[0].tobytes()


def test_chained_blocks_are_regions() -> None:
    made, _ = build("sdpa")
    before = len(compilation._regions(made.denoiser))
    chained.chain(made.denoiser)
    after = compilation._regions(made.denoiser)
    assert len(after) == before
    assert sum(isinstance(region, ChainedTransformerBlock) for region in after) == 2


@pytest.mark.parametrize("name", ["sdxl", "ssd-1b", "sd15", "pixart-alpha"])
def test_a_model_says_how_many_blocks_it_has_in_a_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = small(name, tmp_path, monkeypatch)
    assert bool(chained.longest(made.denoiser)) == bool(MODELS[name].chained_blocks)
    assert own._model_of(made.pipe).chained_blocks == chained.longest(made.denoiser)


def test_a_model_without_rows_is_refused_by_name() -> None:
    recipe = Recipe("mine", ("regional_compile", "fused_add_norm"))
    with pytest.raises(ValueError, match="fused_add_norm can't be applied to sd15: it has no transformer blocks in"):
        plan.plan_recipe(MODELS["sd15"], recipe, CPU)
