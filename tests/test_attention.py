"""The denoiser's attention by our own operator, on a CPU: which layers it takes, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

from diffusion_fast import attention, onestep, operators, plan
from diffusion_fast.attention import KernelAttnProcessor
from diffusion_fast.eight_bits import RowwiseLinear
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, layers
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.plan import plan_recipe
from diffusion_fast.projections import Projection
from diffusion_fast.recipes import LADDERS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.test_models import small
from tests.test_onestep import recorded_in


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(*names: str) -> tuple[Build, dict[str, dict[str, Any]]]:
    ordered = plan_recipe(MODELS["tiny"], Recipe("mine", names), CPU)
    return build_pipeline(replace(planned(steps=4).rungs[0], optimizations=ordered), lambda stage: None)


def image(build: Build) -> torch.Tensor:
    return torch.tensor(list(call(build)[0].tobytes())).float()


def processors(network: Any) -> list[type]:
    return [type(layer.processor) for layer in attention.attention_layers(network)]


def attends(**how: Any) -> Attention:
    return Attention(query_dim=64, heads=4, dim_head=16, processor=AttnProcessor2_0(), **how).to(torch.bfloat16)


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("keys", (None, 9))
def test_a_layer_attends_as_by_diffusers(keys: int | None, fused: bool) -> None:
    torch.manual_seed(0)
    layer = attends(cross_attention_dim=48 if keys else None)
    x = torch.randn(2, 21, 64).bfloat16()
    given = (x,) if keys is None else (x, torch.randn(2, keys, 48).bfloat16())
    if fused:
        layer.fuse_projections()
        layer.set_processor(FusedAttnProcessor2_0())
    plain = layer(*given)
    assert KernelAttnProcessor.can_take(layer)
    attention.take_over([layer])
    made = layer(*given)
    assert made.dtype == x.dtype and (made - plain).norm() / plain.norm() < 1e-2
    mask = torch.zeros(2, 1, keys or 21).bfloat16()
    mask[..., 3:] = -10000.0
    masked = layer(*given, attention_mask=mask)  # honoured, by diffusers
    assert (masked - made).norm() / made.norm() > 0.1
    layer.set_processor((FusedAttnProcessor2_0 if fused else AttnProcessor2_0)())
    assert torch.equal(masked, layer(*given, attention_mask=mask))


@pytest.mark.parametrize(
    "how",
    [
        {"norm_num_groups": 8},
        {"qk_norm": "layer_norm"},
        {"residual_connection": True},
        {"rescale_output_factor": 2.0},
        {"cross_attention_norm": "layer_norm", "cross_attention_dim": 64},
    ],
    ids=str,
)
def test_a_layer_that_does_more_is_left(how: dict[str, Any]) -> None:
    assert KernelAttnProcessor.can_take(attends()) and not KernelAttnProcessor.can_take(attends(**how))


def test_heads_that_the_kernel_does_not_take_are_left() -> None:
    for dim_head, taken in ((8, True), (40, True), (128, True), (12, False), (160, False)):
        layer = Attention(query_dim=64, heads=2, dim_head=dim_head, processor=AttnProcessor2_0())
        assert KernelAttnProcessor.can_take(layer) is taken


@pytest.mark.parametrize("beside", [(), ("fused_qkv",), ("prompt_projections",), ("fused_qkv", "prompt_projections")])
def test_every_layer_of_the_unet_attends_by_it_and_the_picture_stays(
    beside: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = build("bf16", "sdpa")
    before = image(plain)
    calls = 0
    attend = operators.attention

    def counted(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        made: torch.Tensor = attend(*given)
        return made

    monkeypatch.setattr(operators, "attention", counted)
    made, applied = build("bf16", "sdpa", "attention_kernel", *beside)
    layers = attention.attention_layers(made.denoiser)
    assert processors(made.denoiser) == [KernelAttnProcessor] * len(layers)
    assert KernelAttnProcessor not in processors(made.pipe.vae)
    account = {"attention_layers": len(layers), "slower": 0, "masked": 0, "others": 0}
    assert {name: applied["attention_kernel"][name] for name in account} == account
    assert made.proofs["attention_kernel"]() == {"attention_layers": len(layers)}
    calls = 0
    found = image(made)
    assert calls % len(layers) == 0 and calls > 0
    assert (found - before).norm() / before.norm() < 0.02
    hoisted = sum(isinstance(module, Projection) for module in made.denoiser.modules())
    crossing = sum(layer.is_cross_attention for layer in layers)
    each = 1 if "fused_qkv" in beside else 2
    assert hoisted == (crossing * each if "prompt_projections" in beside else 0)
    layers[0].set_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError, match=f"{len(layers) - 1} of {len(layers)} layers still attend by it"):
        made.proofs["attention_kernel"]()


def test_single_steps_lose_nothing() -> None:
    reference, _ = build()
    steps = recorded_in(reference, set())
    eager, _ = build("bf16", "sdpa")
    for step, output in zip(steps, onestep.replay(eager, steps), strict=True):
        step["eager"]["bfloat16"] = output
    made, _ = build("bf16", "sdpa", "fused_qkv", "attention_kernel")
    found = onestep.compare(made.spec, onestep.replay(made, steps), steps)
    assert found["ok"] is True, found


@pytest.mark.parametrize("name", ("fp8_rows", "int8_rows"))
def test_it_goes_with_projections_in_eight_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    names = ("bf16", "sdpa", "fused_qkv", "regional_compile", name)
    (without, _), (made, applied) = build(*names), build(*names, "attention_kernel")
    assert applied["attention_kernel"]["attention_layers"] == len(attention.attention_layers(made.denoiser))
    within = [layer for layer in attention.attention_layers(made.denoiser) if not layer.is_cross_attention]
    assert within and all(isinstance(layer.to_qkv, RowwiseLinear) for layer in within)
    before, found = image(without), image(made)
    assert (found - before).norm() / before.norm() < 0.1


def test_blocks_of_a_shape_take_it_into_one_graph() -> None:
    made, _ = build("bf16", "sdpa", "fused_qkv", "attention_kernel")
    blocks = [module for module in made.denoiser.modules() if type(module).__name__ == "BasicTransformerBlock"]
    width = blocks[-1].attn1.query_dim
    alike = [block for block in blocks if block.attn1.query_dim == width]
    graphs: list[str] = []

    def noting(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    x, prompt = torch.randn(2, 16, width).bfloat16(), torch.randn(2, 77, 128).bfloat16()
    assert len(alike) > 1
    for block in alike:
        compiled = torch.compile(block, fullgraph=True, dynamic=False, backend=noting)
        assert torch.equal(compiled(x, encoder_hidden_states=prompt), block(x, encoder_hidden_states=prompt))
    assert len(graphs) == 1 and graphs[0].count("diffusion_fast.attention.default") == 2


def test_layers_with_a_mask_stay_with_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, applied = small("pixart-alpha", tmp_path, monkeypatch, "bf16", "sdpa", "attention_kernel")
    account = applied["attention_kernel"]
    assert (account["attention_layers"], account["masked"], account["others"]) == (2, 2, 0)
    assert (
        sorted(each.__name__ for each in processors(made.denoiser))
        == ["AttnProcessor2_0"] * 2 + ["KernelAttnProcessor"] * 2
    )


def test_where_it_can_take_none_it_says_so() -> None:
    made, _ = build("bf16", "sdpa", "attention_kernel")
    with pytest.raises(RuntimeError, match="of 10 attention layers of UNet2DConditionModel 0 have heads"):
        OPTIMIZATIONS["attention_kernel"].apply(made)  # all are taken already


def test_only_layers_that_are_faster_by_it_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = build("bf16", "sdpa", "fused_qkv")
    asked: dict[str, set[Any]] = {}

    def timed(by: str, layouts: Any) -> dict[Any, float]:
        asked[by] = set(layouts)
        faster = 1e-6 if by == "own" else 2e-6
        return {each: faster if each[1][0][2] == 77 else 3e-6 - faster for each in layouts}  # where it is a prompt

    monkeypatch.setattr(layers, "_attention_seconds", timed)
    made.spec = replace(made.spec, device="cuda")
    account = layers.attention_kernel(made)
    every = attention.attention_layers(made.denoiser)
    crossing = [layer for layer in every if layer.is_cross_attention]
    assert [layer for layer in every if isinstance(layer.processor, KernelAttnProcessor)] == crossing
    assert asked["own"] == asked["allowed"] and all(mask is None for *_, mask in asked["own"])
    assert {"attention_layers", "slower", "masked", "others", "step_ms", "calibration_s"} == set(account)
    assert (account["attention_layers"], account["slower"]) == (len(crossing), len(every) - len(crossing))
    count = len(crossing)
    assert account["step_ms"] == {"own": pytest.approx(count * 1e-3), "allowed": pytest.approx(count * 2e-3)}
    assert made.proofs["attention_kernel"]() == {"attention_layers": count}
    # As scaled_dot_product_attention is called.
    q, k, v = (torch.randn(2, 3, tokens, 16).bfloat16() for tokens in (9, 5, 5))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (attention.own(q, k, v) - plain).norm() / plain.norm() < 1e-2


def test_layers_beside_those_that_fit_are_not_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = build("bf16", "sdpa")
    every = attention.attention_layers(made.denoiser)
    fitting = every[::3]  # as in SD 1.5, where heads of 160 come after those of 40 and 80
    monkeypatch.setattr(KernelAttnProcessor, "can_take", lambda layer: layer in fitting)
    alone = layers._attention_calls(made, fitting)
    assert sorted(every.index(layer) for (_, layer) in alone if layer) == list(range(0, len(every), 3))
    counted = sum(count for (_, layer), count in alone.items() if layer)
    assert (counted, sum(alone.values())) == (len(fitting), len(every))
    account = layers.attention_kernel(made)
    assert (account["attention_layers"], account["others"]) == (len(fitting), len(every) - len(fitting))


def test_it_is_for_bf16_and_hopper_and_goes_beside_pytorchs_kernels() -> None:
    def planned_by(*names: str, device: plan.Device = H100) -> tuple[str, ...]:
        return plan.plan_recipe(MODELS["sdxl"], Recipe("mine", names), device)

    assert "attention_kernel" in planned_by("bf16", "sdpa", "attention_kernel")
    with pytest.raises(ValueError, match="attention_kernel requires bf16"):
        planned_by("sdpa", "attention_kernel")
    with pytest.raises(ValueError, match="attention_kernel requires sdpa"):
        planned_by("bf16", "attention_kernel")
    both = planned_by("bf16", "sdpa", "attention_kernel", "attention_backend")
    assert both.index("attention_backend") < both.index("attention_kernel")  # compared with what was chosen
    with pytest.raises(ValueError, match=r"attention_kernel needs compute capability 9\.0"):
        planned_by("bf16", "sdpa", "attention_kernel", device=plan.Device("cuda", "NVIDIA A100", (8, 0)))
    rungs = [each.name for each in LADDERS["fast"] if "attention_kernel" in each.optimizations]
    assert rungs == ["attention-kernel", "int8", "fp8", "convolutions"]
