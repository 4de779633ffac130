"""Networks that know where they are: how often their modules are walked through, and what is refused for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
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


def test_a_call_walks_not_through_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    before, often = walked(build("sdpa"), monkeypatch)
    made = build("sdpa", "no_module_walks")
    after, seldom = walked(made, monkeypatch)
    modules = len(list(made.denoiser.modules()))
    assert often["unet"] >= 2 * modules and seldom["unet"] < modules / 10
    assert seldom["vae"] < often["vae"] / 2  # a pipeline looks for the decoder's hooks by itself, behind the last step
    assert [one.tobytes() for one in before] == [other.tobytes() for other in after]


def test_the_answers_are_diffusers_own_and_follow_a_move() -> None:
    pipe = build().pipe
    plain = {name: (each.device, each.dtype) for name, each in pipe.components.items() if hasattr(each, "dtype")}
    classes = type(pipe), type(pipe.unet)
    assert walks.spare(pipe) == 2
    assert isinstance(pipe, classes[0]) and type(pipe).__name__ == classes[0].__name__
    assert isinstance(pipe.unet, classes[1]) and type(pipe.unet).__module__ == classes[1].__module__
    found = {name: (each.device, each.dtype) for name, each in pipe.components.items() if hasattr(each, "dtype")}
    assert found == plain
    pipe.unet.to(torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    pipe.to("meta")
    assert pipe.device == pipe._execution_device == pipe.unet.device == torch.device("meta")


def test_a_pipeline_that_knows_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    pipe = build("no_module_walks").pipe
    pipe.unet.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.UNet2DConditionModel
    pairs = zip(loaded.parameters(), pipe.unet.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_network_with_some_modules_in_fp32_says_its_dtype_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("bf16")
    made.denoiser.conv_in.float()
    monkeypatch.setattr(type(made.denoiser), "_keep_in_fp32_modules", ["conv_in"])
    walks.spare(made.pipe)
    assert made.denoiser.dtype == torch.bfloat16 and next(made.denoiser.parameters()).dtype == torch.float32


def test_hooks_that_decide_where_or_in_what_a_network_computes_are_refused() -> None:
    made = build("bf16")
    made.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="no_module_walks: unet has hooks of layerwise_casting"):
        OPTIMIZATIONS["no_module_walks"].apply(made)
    with pytest.raises(ValueError, match=r"layerwise_casting.*no_module_walks|no_module_walks.*layerwise_casting"):
        build("bf16", "layerwise_casting", "no_module_walks")


def test_what_would_put_such_hooks_in_is_refused_afterwards() -> None:
    pipe = build("no_module_walks").pipe
    for refuse in (
        pipe.enable_model_cpu_offload,
        pipe.enable_sequential_cpu_offload,
        pipe.enable_group_offload,
        pipe.unet.enable_group_offload,
        pipe.vae.enable_layerwise_casting,
    ):
        with pytest.raises(RuntimeError, match="can't come after it"):
            refuse()


def test_it_goes_with_caches_that_have_hooks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert walks._hooked(build("feature_forecast").denoiser) == ""
    module = torch.nn.Linear(2, 2)
    module._hf_hook = object()  # type: ignore[assignment]
    assert walks._hooked(torch.nn.Sequential(module)) == "accelerate"
