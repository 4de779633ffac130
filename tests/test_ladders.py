"""Every ladder of every model, rung by rung, on the model's miniature: traced by torch.compile, and run as it is.

A recipe that several ladders share is run once. What a device other than a CPU is needed for is left out of them, as
in any ladder there; test_plan.py has that all of it can be planned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_fast import plan
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import same_work
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.recipes import LADDERS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU
from tests.miniatures import NAMES, miniature
from tests.test_models import TWINS

STEPS = 4


def cases() -> Iterator[Any]:
    """Each model's recipes. The last rungs of two ladders, which have nearly all of the names, are in every run."""
    for model in ("tiny", *NAMES):
        if model in TWINS:
            continue
        seen: set[tuple[str, ...]] = set()
        for ladder in LADDERS:
            recipes, _ = plan.find_ladder(ladder, CPU, MODELS[model])
            for recipe in recipes:
                names = plan.plan_recipe(MODELS[model], recipe, CPU)
                if model == "sana" and "vae_tiling" in names:
                    continue  # a picture of this size is a single tile
                if names not in seen:
                    seen.add(names)
                    last = recipe == recipes[-1] and ladder in ("fast", "turbo")
                    marks = () if last else pytest.mark.full
                    yield pytest.param(model, recipe, id=f"{model}-{ladder}-{recipe.name}", marks=marks)


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return {}


@pytest.fixture(autouse=True)
def room_for_graphs(by_eager: list[dict[str, Any]]) -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=512):
        yield


@pytest.mark.parametrize(("model", "recipe"), cases())
def test_a_rung_paints_the_models_picture(
    model: str, recipe: Recipe, plain: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = MODELS["tiny"] if model == "tiny" else miniature(model, tmp_path)
    monkeypatch.setitem(MODELS, model, known)

    def painted(recipe: Recipe) -> torch.Tensor:
        settings = plan.Settings(weights="embedded" if model == "tiny" else "random", steps=STEPS)
        (spec,) = plan.plan_ladder("mine", (recipe,), known, CPU, settings).rungs
        with torch.no_grad():
            made, applied = build_pipeline(spec, lambda stage: None)
            picture = call(made)[0]
            for proof in made.proofs.values():
                proof()
        assert set(applied) >= set(spec.optimizations) - {"bf16", "fp16"} and picture.getbbox() is not None
        return torch.tensor(list(picture.tobytes())).float()

    if model not in plain:
        plain[model] = painted(Recipe("baseline"))
    found = painted(replace(recipe, steps_share=1.0))
    if "tiny_vae" in recipe.optimizations and model != "tiny":
        return  # random weights are another picture's
    off = (found - plain[model]).norm() / plain[model].norm()
    # A tile of these pictures is a few latents wide, and its group norms know no more than that.
    limit = 0.4 if "vae_tiling" in recipe.optimizations else 0.25 if same_work(recipe.optimizations) else 0.6
    assert off < limit, off
