"""Networks that know where they are: how many of their modules a call looks at, and what is refused for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion_fast import walks
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.plan import plan_recipe
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, planned


def build(*names: str) -> Build:
    ordered = plan_recipe(MODELS["tiny"], Recipe("mine", names), CPU)
    return build_pipeline(replace(planned(steps=2).rungs[0], optimizations=ordered), lambda stage: None)[0]


def walked(build: Build, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, int]]:
    """A call's images, and how many of each network's own modules were visited meanwhile by a look through all."""
    names = {network: name for name, network in build.networks()}
    visited = Counter[str]()
    original = torch.nn.Module.named_modules

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        for each in original(module, *args, **kwargs):
            visited[names.get(module, "")] += 1
            yield each

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.Module, "named_modules", counted)
        images = call(build)
    return images, visited


def test_a_call_walks_through_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    before, often = walked(build("sdpa"), monkeypatch)
    made = build("sdpa", "no_module_walks")
    after, seldom = walked(made, monkeypatch)
    modules = len(list(made.denoiser.modules()))
    assert often["unet"] >= 2 * modules and often["vae"] > 0 and often["text_encoder"] > 0
    assert seldom["unet"] + seldom["text_encoder"] + seldom["text_encoder_2"] < modules / 10
    assert [one.tobytes() for one in before] == [other.tobytes() for other in after]


def test_the_answers_are_diffusers_own_and_follow_a_move() -> None:
    pipe = build("no_module_walks").pipe
    where = {each.device for each in pipe.components.values() if isinstance(each, torch.nn.Module)}
    assert where == {pipe.device, pipe._execution_device} == {torch.device("cpu")}
    pipe.to("meta")
    assert pipe.device == pipe._execution_device == pipe.unet.device == torch.device("meta")


def test_other_networks_are_looked_through_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    build("no_module_walks", "sdpa")
    other = build("sdpa")
    assert walked(other, monkeypatch)[1]["unet"] >= 2 * len(list(other.denoiser.modules()))


def test_hooks_that_move_a_network_are_refused() -> None:
    made = build()
    made.denoiser.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(RuntimeError, match="no_module_walks: unet has hooks that move it"):
        OPTIMIZATIONS["no_module_walks"].apply(made)
    module = torch.nn.Linear(2, 2)
    assert not walks._is_hooked(torch.nn.Sequential(module))
    module._hf_hook = object()  # type: ignore[assignment]
    assert walks._is_hooked(torch.nn.Sequential(module))


def test_what_would_put_such_hooks_in_is_refused_afterwards() -> None:
    pipe = build("no_module_walks").pipe
    for refuse in (
        pipe.enable_model_cpu_offload,
        pipe.enable_sequential_cpu_offload,
        pipe.enable_group_offload,
        pipe.unet.enable_group_offload,
    ):
        with pytest.raises(RuntimeError, match="no_module_walks goes by where the networks are: enable_"):
            refuse(onload_device=torch.device("cpu"))


def test_it_goes_with_hooks_that_move_nothing() -> None:
    made = build("bf16", "layerwise_casting", "no_module_walks")
    assert made.denoiser.dtype == torch.bfloat16 and next(made.denoiser.parameters()).device == made.denoiser.device
