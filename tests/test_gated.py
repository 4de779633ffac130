"""A feed-forward's linear and GEGLU as one layer: what it computes, its place in a network, and in eight bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward

from diffusion_fast import gated, onestep, plan
from diffusion_fast.eight_bits import (
    FORMATS,
    RowwiseFeedForward,
    RowwiseGatedLinear,
    RowwiseLinear,
    gated_limits,
    quantize,
)
from diffusion_fast.gated import FusedGEGLU, GatedLinear
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.test_eight_bits import eight_bit
from tests.test_onestep import recorded_in
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
        assert quantize(each, {each.ff.net[0].proj, each.ff.net[2]}, FORMATS[name])["fused_feed_forwards"] == 1
        assert isinstance(each.ff, RowwiseFeedForward)
    assert isinstance(whole.ff.first, RowwiseGatedLinear)
    one_by_one = whole.ff.second(whole.ff.first(x))
    torch.testing.assert_close(whole.ff(x), one_by_one)
    # The same numbers in another order; roundings to bf16 are in other places.
    assert (whole.ff(x) - other.ff(x)).norm() / exact.norm() < 0.05
    assert 0 < (whole.ff(x) - exact).norm() / exact.norm() < 0.1


def test_every_geglu_of_the_denoiser_is_fused_and_single_steps_lose_nothing() -> None:
    reference, _ = build()
    steps = recorded_in(reference, set())
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


def test_regional_compile_takes_it_into_its_graphs(by_eager: list[dict[str, Any]]) -> None:
    made, _ = build("bf16", "sdpa", "fused_geglu", "regional_compile")
    picture = call(made)[0].tobytes()
    assert by_eager and all(chosen["fullgraph"] for chosen in by_eager)
    assert made.proofs["regional_compile"]()["graph_breaks"] == 0
    assert picture == call(build("bf16", "sdpa", "fused_geglu")[0])[0].tobytes()


@pytest.mark.parametrize("name", ["fp8_rows", "int8_rows"])
def test_it_goes_with_eight_bits_and_the_same_layers_are_quantized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, of_alone = eight_bit(name, monkeypatch)
    made, applied = eight_bit(name, monkeypatch, "fused_geglu")
    limited = applied[name]["fused_feed_forwards"] if name == "fp8_rows" else 0
    same = {"calibration_s": 0, "limited_feed_forwards": limited}
    assert {**applied[name], "calibration_s": 0} == {**of_alone[name], **same}
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


def block() -> BasicTransformerBlock:
    """With activations as trained weights have them: outlier channels, shifts, columns of different sizes."""
    torch.manual_seed(0)
    made = BasicTransformerBlock(64, 2, 32, cross_attention_dim=16).eval()
    made.norm3.weight.uniform_(0.2, 2)[::32] *= 20
    made.norm3.bias.normal_(0, 0.3)
    made.ff.net[0].proj.weight[:, ::32] /= 20
    made.ff.net[0].proj.weight *= torch.randn(512).mul(0.7).exp()[:, None]
    made.ff.net[0].proj.bias.normal_(0, 0.5)
    gated.fuse(made.to(torch.bfloat16))
    return made


def test_no_input_of_a_layer_norm_passes_the_limits() -> None:
    made = block()
    linear = made.ff.net[0].proj
    limits = gated_limits(made.norm3, linear)
    assert limits.shape == (256,)
    weight, bias = linear.weight.unflatten(0, (-1, 2, 8)).float(), linear.bias.unflatten(0, (-1, 2, 8)).float()
    own = made.norm3.weight.float()
    for half in (0, 1):  # rows that lie along a column's weights are what makes it largest
        inputs = torch.cat(
            [torch.randn(300, 64), weight[:, half].flatten(0, 1) * own, -weight[:, half].flatten(0, 1) * own]
        )
        normed = made.norm3.float()(inputs)
        hidden, gate = (normed @ weight[:, side].flatten(0, 1).t() + bias[:, side].flatten() for side in (0, 1))
        found = (hidden * torch.nn.functional.gelu(gate)).abs().amax(0)
        assert (found <= limits).all()
        assert (found / limits).max() > 0.2  # and they are not far beyond what there is


def test_behind_a_layer_norm_fp8_needs_no_scales() -> None:
    x = torch.randn(2, 50, 64).to(torch.bfloat16)
    exact = block()
    normed = exact.norm3(x)
    plain = exact.ff(normed).float()
    found = {}
    for limited in (True, False):
        made = block()
        made.norm_type = "layer_norm" if limited else "another"
        linears = {made.ff.net[0].proj, made.ff.net[2]}
        account = quantize(made, linears, FORMATS["fp8"])
        assert account == {"fused_feed_forwards": 1, "limited_feed_forwards": int(limited)}
        assert (made.ff.first(normed).dtype == torch.float8_e4m3fn) == limited
        found[limited] = (made.ff(normed).float() - plain).norm() / plain.norm()
    assert found[True] < 1.05 * found[False]


@pytest.mark.parametrize("kept", ["first", "second"])
def test_where_a_layer_is_kept_the_other_has_its_scales(kept: str) -> None:
    made = block()
    first, second = made.ff.net[0].proj, made.ff.net[2]
    account = quantize(made, {second if kept == "first" else first}, FORMATS["fp8"])
    assert account == {"fused_feed_forwards": 0, "limited_feed_forwards": 0}
    assert made.ff(torch.randn(1, 5, 64).to(torch.bfloat16)).isfinite().all()


def test_int8_keeps_its_scales_and_so_does_what_is_modulated() -> None:
    for norm_type, name in (("layer_norm", "int8"), ("ada_norm_zero", "fp8")):
        made = block()
        made.norm_type = norm_type
        account = quantize(made, {made.ff.net[0].proj, made.ff.net[2]}, FORMATS[name])
        assert account == {"fused_feed_forwards": 1, "limited_feed_forwards": 0}
