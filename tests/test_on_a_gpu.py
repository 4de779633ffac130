"""The whole of the fast ladder's last rungs, compiled and captured in earnest, for which there has to be a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusion_fast import plan
from diffusion_fast.fidelity import median_psnr_db
from diffusion_fast.optimizations import Build
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.recipes import CONVOLUTIONS, LOSSLESS
from tests.test_graphs import CHANGES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(ladder: str, name: str) -> Build:
    """A rung of a ladder, without what `tiny` has no use for; four images make its layers worth eight bits."""
    model, device = plan.find_model("tiny"), plan.find_device("cuda")
    recipes = [each for each in plan.find_ladder(ladder, device, model)[0] if each.name == name]
    settings = plan.Settings(steps=6, batch_size=4, accuracy_prompts=0)
    return build_pipeline(plan.plan_ladder(ladder, recipes, model, device, settings).rungs[0], print)[0]


def pictures(made: Build, **changes: Any) -> Any:
    return numpy.stack([numpy.asarray(each) for each in call(replace(made, spec=replace(made.spec, **changes)))])


@pytest.mark.parametrize(("recipe", "least_db"), ((LOSSLESS.name, 38), (CONVOLUTIONS.name, 28)))
def test_whatever_changes_between_calls_the_picture_is_that_of_eager(recipe: str, least_db: float) -> None:
    """Two eager recipes in bf16 are 44 to 60 dB apart in these pictures; any two of these calls at most 22."""
    plain, made = build("progressive", "sdpa"), build("fast", recipe)
    for change in CHANGES:
        found = median_psnr_db(pictures(made, **change), pictures(plain, **change))
        print(change, f"{found:.1f} dB")
        assert found > least_db, change
    for each in (plain, made):
        each.pipe.scheduler = DPMSolverMultistepScheduler.from_config(each.pipe.scheduler.config)
    found = median_psnr_db(pictures(made), pictures(plain))
    print("DPM-Solver", f"{found:.1f} dB")
    assert found > least_db
    account = made.proofs["cuda_graph"]()
    print(account)
    # As planned, another size, a batch of two, no guidance; time steps are in no graph, by time_projections.
    assert account["unet step"]["captures"] == 4 and account["unet step"]["eager_calls"] == 0
