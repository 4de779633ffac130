"""Every ladder of every model, rung by rung, on the model's miniature: traced by torch.compile, and run as it is.

A recipe that several ladders share is run once, in a process of its own, as in a ladder. What a device other than a
CPU is needed for is left out, as in any ladder there; test_plan.py has that all of it can be planned.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_fast import plan
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import approximation, same_work
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.recipes import LADDERS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU
from tests.miniatures import NAMES, miniature
from tests.test_models import TWINS

STEPS = 4
HOOKED = {"first_block_cache", "pyramid_attention_broadcast"}  # skip something in so many steps, and not in four
HOOKED_STEPS = 10
LONGEST_S = 300  # a rung takes some ten


def cases() -> Iterator[Any]:
    """Each model's recipes. The last rung of `fast`, which has nearly all of the names, is in every run."""
    for model in ("tiny", *NAMES):
        seen: set[tuple[str, ...]] = set()
        for ladder in LADDERS:
            recipes, _ = plan.find_ladder(ladder, CPU, MODELS[model])
            for recipe in recipes:
                names = plan.plan_recipe(MODELS[model], recipe, CPU)
                if names not in seen:
                    seen.add(names)
                    last = recipe == recipes[-1] and ladder == "fast" and model not in TWINS
                    marks = () if last else pytest.mark.full
                    yield pytest.param(model, recipe, id=f"{model}-{ladder}-{recipe.name}", marks=marks)


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return {}


@pytest.fixture(autouse=True)
def room_for_graphs(by_eager: list[dict[str, Any]]) -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=512):
        yield


def in_a_process(made: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a function makes in a process forked from this one, which other rungs haven't left their mark on."""
    here, there = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)  # the others haven't come along
        try:
            there.send(made().numpy())
        except BaseException:
            there.send(traceback.format_exc())

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(LONGEST_S) else f"not done after {LONGEST_S} s"
    except EOFError:  # it ended without a word
        process.join()
        found = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if isinstance(found, str):
        pytest.fail(found)
    return torch.from_numpy(found)


@pytest.mark.parametrize(("model", "recipe"), cases())
def test_a_rung_paints_the_models_picture(
    model: str, recipe: Recipe, plain: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = MODELS["tiny"] if model == "tiny" else miniature(model, tmp_path)
    if model == "sana" and "vae_tiling" in recipe.optimizations:
        known = replace(known, height=256, width=256)  # else a picture is a single tile
    steps = HOOKED_STEPS if HOOKED & set(recipe.optimizations) else STEPS
    monkeypatch.setattr(approximation, "FIRST_BLOCK_CHANGE", 10.0)  # random weights change more than trained ones
    monkeypatch.setitem(MODELS, model, known)

    def painted(recipe: Recipe) -> torch.Tensor:
        settings = plan.Settings(weights="embedded" if model == "tiny" else "random", steps=steps)
        (spec,) = plan.plan_ladder("mine", (recipe,), known, CPU, settings).rungs
        with torch.no_grad():
            made, applied = build_pipeline(spec, lambda stage: None)
            picture = call(made)[0]
            for proof in made.proofs.values():
                proof()
        assert set(applied) >= set(spec.optimizations) - {"bf16", "fp16"} and picture.getbbox() is not None
        return torch.tensor(list(picture.tobytes())).float()

    kind = f"{model}, {known.height} pixels, {steps} steps"
    if kind not in plain:
        plain[kind] = painted(Recipe("baseline"))
    found = in_a_process(partial(painted, replace(recipe, steps_share=1.0)))
    if "tiny_vae" in recipe.optimizations and model != "tiny":
        return  # random weights are another picture's
    off = (found - plain[kind]).norm() / plain[kind].norm()
    # A tile of these pictures is a few latents wide, and its group norms know no more than that.
    limit = 0.4 if "vae_tiling" in recipe.optimizations else 0.25 if same_work(recipe.optimizations) else 0.6
    assert off < limit, off
