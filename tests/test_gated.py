"""A feed-forward's linear and GEGLU as one layer: what it computes, its place in a network, and in eight bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward

from diffusion_fast import gated, onestep, plan
from diffusion_fast.eight_bits import FORMATS, RowwiseFeedForward, RowwiseGatedLinear, RowwiseLinear, quantize
from diffusion_fast.gated import FusedGEGLU, GatedLinear
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.test_eight_bits import eight_bit
from tests.test_optimizations import build


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def feed_forward(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    whole = torch.nn.Module()
    whole.ff = FeedForward(32, **{"activation_fn": "geglu", **changes}).eval().to(torch.bfloat16)
    return whole


@pytest.mark.parametrize("bias", [True, False])
def test_a_feed_forward_stays_what_it_was_but_for_roundings(bias: bool) -> None:
    whole = feed_forward(bias=bias)
    x = torch.randn(2, 7, 32).to(torch.bfloat16)
    plain = whole.ff(x)
    size = sum(parameter.numel() for parameter in whole.parameters())
    exact = whole.ff.double()(x.double())
    whole.ff.to(torch.bfloat16)
    assert gated.fuse(whole) == 1
    assert isinstance(whole.ff.net[0], FusedGEGLU)
    assert sum(parameter.numel() for parameter in whole.parameters()) == size
    assert (whole.ff(x) - exact).norm() <= 1.05 * (plain - exact).norm()  # fewer roundings


def test_other_gelus_stay_and_odd_sizes_are_refused() -> None:
    assert gated.fuse(feed_forward(activation_fn="geglu-approximate")) == 0
    assert gated.fuse(feed_forward(activation_fn="gelu")) == 0
    with pytest.raises(ValueError, match="a GEGLU of 32 to 100 features: both have to be multiples of 8"):
        gated.fuse(feed_forward(inner_dim=100))


@pytest.mark.parametrize("name", FORMATS)
def test_in_eight_bits_it_is_what_its_layers_are_one_by_one(name: str) -> None:
    whole, other = feed_forward(), feed_forward()
    gated.fuse(whole)
    x = torch.randn(2, 7, 32).to(torch.bfloat16)
    exact = other.ff(x)
    for each in (whole, other):
        assert quantize(each, {each.ff.net[0].proj, each.ff.net[2]}, FORMATS[name]) == 1
        assert isinstance(each.ff, RowwiseFeedForward)
    assert isinstance(whole.ff.first, RowwiseGatedLinear)
    one_by_one = whole.ff.second(whole.ff.first(x))
    torch.testing.assert_close(whole.ff(x), one_by_one)
    # The same numbers in another order; roundings to bf16 are in other places.
    assert (whole.ff(x) - other.ff(x)).norm() / exact.norm() < 0.05
    assert 0 < (whole.ff(x) - exact).norm() / exact.norm() < 0.1


def test_every_geglu_of_the_denoiser_is_fused_and_single_steps_lose_nothing() -> None:
    reference, _ = build()
    steps = onestep.record(reference)
    eager, _ = build("bf16", "sdpa")
    for step, output in zip(steps, onestep.replay(eager, steps), strict=True):
        step["eager"]["bfloat16"] = output
    made, applied = build("bf16", "sdpa", "fused_geglu")
    plain = [module for module in eager.denoiser.modules() if isinstance(module, GEGLU)]
    assert applied["fused_geglu"] == {"feed_forwards": len(plain)}
    assert [type(module) for module in made.denoiser.modules() if isinstance(module, GEGLU)] == [FusedGEGLU] * len(
        plain
    )
    found = onestep.compare(made.spec, onestep.replay(made, steps), steps)
    assert found["ok"] is True, found
    assert call(made)[0].size == call(reference)[0].size
    with pytest.raises(RuntimeError, match="UNet2DConditionModel has no feed-forward with GEGLU"):
        OPTIMIZATIONS["fused_geglu"].apply(made)  # all are fused already


def test_regional_compile_takes_it_into_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by_torch = torch.compile

    def compile_by_eager(function: Any, **chosen: Any) -> Any:
        chosen.pop("options")
        assert chosen["fullgraph"]
        return compile_by_torch(function, backend="eager", **chosen)

    monkeypatch.setattr(torch, "compile", compile_by_eager)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        made, _ = build("bf16", "sdpa", "fused_geglu", "regional_compile")
        picture = call(made)[0].tobytes()
    assert made.proofs["regional_compile"]()["graph_breaks"] == 0
    assert picture == call(build("bf16", "sdpa", "fused_geglu")[0])[0].tobytes()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("name", ["fp8_rows", "int8_rows"])
def test_it_goes_with_eight_bits_and_the_same_layers_are_quantized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, of_alone = eight_bit(name, monkeypatch)
    made, applied = eight_bit(name, monkeypatch, "fused_geglu")
    assert {**applied[name], "calibration_s": 0} == {**of_alone[name], "calibration_s": 0}
    layers = [module for module in made.denoiser.modules() if isinstance(module, RowwiseLinear)]
    assert sum(isinstance(layer, RowwiseGatedLinear) for layer in layers) == applied["fused_geglu"]["feed_forwards"]
    assert not any(isinstance(module, GatedLinear) for module in made.denoiser.modules())
    found, plain = (torch.tensor(list(call(each)[0].tobytes())).float() for each in (made, alone))
    assert (found - plain).norm() / plain.norm() < 0.1


def test_a_layer_that_is_kept_is_fused_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    made, applied = eight_bit("int8_rows", monkeypatch, "fused_geglu", kept=(kept,))
    assert type(made.denoiser.get_submodule(kept)) is GatedLinear
    assert applied["int8_rows"]["fused_feed_forwards"] == applied["fused_geglu"]["feed_forwards"] - 1
    call(made)


def test_it_is_for_sixteen_bits_and_hopper() -> None:
    with pytest.raises(ValueError, match="fused_geglu requires bf16 or fp16"):
        plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("fused_geglu",)), H100)
    a100 = plan.Device("cuda", "NVIDIA A100", (8, 0))
    with pytest.raises(ValueError, match=r"fused_geglu needs compute capability 9.0"):
        plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("bf16", "fused_geglu")), a100)


def test_odd_sizes_are_one_sentence() -> None:
    ordered = plan.plan_recipe(MODELS["tiny"], Recipe("mine", ("bf16",)), CPU)
    made, _ = build_pipeline(replace(planned(steps=2).rungs[0], optimizations=ordered), lambda stage: None)
    made.pipe.unet = feed_forward(inner_dim=100)
    with pytest.raises(RuntimeError, match="fused_geglu: a GEGLU of 32 to 100 features: both have to be multiples"):
        OPTIMIZATIONS["fused_geglu"].apply(made)
