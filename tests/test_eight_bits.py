"""Layers of eight bits against exact ones, their place in a network, and the pass that says which lose most."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.models.attention import FeedForward
from peft import LoraConfig

from diffusion_fast import plan, sensitivity
from diffusion_fast.cli import main
from diffusion_fast.eight_bits import (
    FORMATS,
    ImagewiseConvolution,
    RowwiseFeedForward,
    RowwiseLinear,
    quantizable_convolutions,
    quantize,
    quantize_convolutions,
)
from diffusion_fast.models import MODELS
from diffusion_fast.norms import ImageGroupNorm
from diffusion_fast.optimizations import OPTIMIZATIONS, Optimization, quantization
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.sensitivity import Layer, choose
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.miniatures import miniature
from tests.test_optimizations import build

# Half a unit in the last place, relative to the number (fp8, 3 bits of mantissa) or to the row's largest (int8).
HALF_A_UNIT = {"fp8": 2.0**-4, "int8": 0.5 / 127}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FORMATS)
def test_a_layers_error_is_that_of_its_numbers(name: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32)
    x = torch.randn(2, 5, 48) * torch.tensor([1.0, 30.0, 1e-3, 1.0, 0.0])[:, None]  # a scale a row, none of them lost
    exact = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    found = RowwiseLinear(linear, FORMATS[name])(x)
    # Each product of two numbers, each off by half a unit at most; in int8 a unit is the row's, in fp8 the number's.
    unit = HALF_A_UNIT[name]
    if name == "fp8":
        smallest = 2.0**-10 / 448  # half of the smallest number's distance, of the row's largest
        sizes = x.abs() @ linear.weight.abs().t()
    else:
        smallest = 0.0
        sizes = (x.abs().amax(-1, keepdim=True) + x.abs()) @ (
            linear.weight.abs().amax(-1, keepdim=True) + linear.weight.abs()
        ).t()
    bound = sizes * (2 * unit + unit**2) + 48 * smallest * x.abs().amax(-1, keepdim=True)
    assert ((found - exact).abs() <= bound + 1e-6).all()
    assert (found - exact).norm() / exact.norm() > 1e-4  # it was quantized
    assert found[:, 4].equal(linear.bias.expand(2, -1))


def test_eight_bits_are_no_parameters_and_keep_the_input_dtype() -> None:
    layer = RowwiseLinear(torch.nn.Linear(32, 16, bias=False).to(torch.bfloat16), FORMATS["fp8"])
    assert not list(layer.parameters())
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == {
        "weight": torch.float8_e4m3fn,
        "weight_scale": torch.float32,
    }
    assert layer(torch.ones(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_a_feed_forward_is_what_its_layers_are_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    whole = torch.nn.Module()
    whole.ff = FeedForward(32, activation_fn="geglu").eval()
    linears = [whole.ff.net[0].proj, whole.ff.net[2]]
    x = torch.randn(2, 7, 32)
    exact = whole.ff(x)
    first, second = (RowwiseLinear(each, FORMATS[name]) for each in linears)
    hidden, gate = first(x).chunk(2, -1)
    one_by_one = second(hidden * torch.nn.functional.gelu(gate))
    assert quantize(whole, set(linears), FORMATS[name])["fused_feed_forwards"] == 1
    assert isinstance(whole.ff, RowwiseFeedForward)
    torch.testing.assert_close(whole.ff(x), one_by_one, rtol=1e-5, atol=1e-5)
    assert 0 < (whole.ff(x) - exact).norm() / exact.norm() < 0.1


def test_where_one_layer_is_kept_the_feed_forward_stays_as_it_is() -> None:
    whole = torch.nn.Module()
    whole.ff = FeedForward(32, activation_fn="geglu")
    assert quantize(whole, {whole.ff.net[2]}, FORMATS["int8"])["fused_feed_forwards"] == 0
    assert isinstance(whole.ff, FeedForward)
    assert isinstance(whole.ff.net[2], RowwiseLinear)
    other = torch.nn.Module()
    other.ff = FeedForward(32, activation_fn="gelu")
    assert quantize(other, {other.ff.net[0].proj, other.ff.net[2]}, FORMATS["int8"])["fused_feed_forwards"] == 0


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
def test_a_convolutions_error_is_that_of_its_numbers(stride: int, padding: int) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(64, 32, 3, stride, padding)
    x = torch.randn(2, 64, 8, 12) * torch.tensor([1.0, 100.0])[:, None, None, None]  # a scale an image
    exact = convolution.double()(x.double())
    found = ImagewiseConvolution(convolution.float(), FORMATS["int8"])(x)
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Uniform rounding errors of both factors, independent of each other: their sum's deviation, and not ten of it.
    units = x.abs().amax((1, 2, 3)) / 127, convolution.weight.abs().amax((1, 2, 3)) / 127
    sums = torch.nn.functional.conv2d(x**2, torch.ones(1, 64, 3, 3), stride=stride, padding=padding)
    energy = (convolution.weight**2).sum((1, 2, 3))
    deviation = ((units[0] ** 2)[:, None] * energy + sums.amax((1, 2, 3))[:, None] * units[1] ** 2).div(12).sqrt()
    assert ((found - exact).std((2, 3)) < 1.5 * deviation).all()
    assert ((found - exact).abs() < 10 * deviation[:, :, None, None]).all()
    assert (found - exact).abs().max() > 1e-3


def test_convolutions_with_few_channels_groups_or_odd_strides_stay() -> None:
    def can(*sizes: int, **how: Any) -> bool:
        return ImagewiseConvolution.can_be(torch.nn.Conv2d(*sizes, **how))

    assert can(32, 48, 3, padding=1)
    assert can(64, 48, 3, stride=2, padding=1)
    assert not can(4, 32, 3, padding=1)
    assert not can(32, 4, 3, padding=1)
    assert not can(32, 48, 3, stride=2, padding=1)
    assert not can(32, 32, 3, groups=2)
    assert not can(32, 32, 3, dilation=2)
    assert not can(32, 32, 3, padding=1, padding_mode="circular")


def test_behind_a_norm_with_silu_int8_uses_all_of_its_steps() -> None:
    torch.manual_seed(0)
    norm, convolution = torch.nn.GroupNorm(8, 64), torch.nn.Conv2d(64, 32, 3, padding=1)
    x = torch.randn(2, 64, 24, 24)
    made = torch.nn.functional.silu(norm(x))
    exact, layer = convolution(made), ImagewiseConvolution(convolution, FORMATS["int8"])
    shifted = ImageGroupNorm(norm, silu=True).convolved(layer, x)
    around_zero = layer(made)
    errors = [(found - exact).norm() / exact.norm() for found in (shifted, around_zero)]
    # Steps are half as wide; what the rounding of weights costs stays.
    assert 0.001 < errors[0] < 0.65 * errors[1]
    edge = (shifted - exact)[:, :, 0].norm() / exact[:, :, 0].norm()  # where some of the pixels are no image's
    assert edge < 1.3 * errors[0]


@pytest.mark.parametrize("name", ["fp8_convolutions", "int8_convolutions"])
def test_convolutions_in_eight_bits_keep_the_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, applied = eight_bit(name, monkeypatch, "channels_last")
    left = [name for name, module in made.denoiser.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert {"conv_in", "conv_out"} <= set(left)
    assert applied[name]["quantized_convolutions"] > 20
    assert len(left) == applied[name]["convolutions"] - applied[name]["quantized_convolutions"]
    exact = torch.tensor(list(call(build("bf16", "sdpa")[0])[0].tobytes())).float()
    found = torch.tensor(list(call(made)[0].tobytes())).float()
    assert 0 < (found - exact).norm() / exact.norm() < 0.1


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    whole = torch.nn.Module()
    whole.one = torch.nn.Conv2d(16, 16, 3, padding=1)
    whole.other = whole.one  # as diffusers' Downsample2D(name="conv") has it
    found = quantizable_convolutions(whole)
    assert len(found) == 1
    quantize_convolutions(whole, found.values(), FORMATS["fp8"])
    assert whole.one is whole.other
    assert isinstance(whole.one, ImagewiseConvolution)


def eight_bit(name: str, monkeypatch: pytest.MonkeyPatch, *more: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The bundled model in bf16 and eight bits, compiled by nobody."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return build("bf16", "sdpa", "regional_compile", name, *more, **changes)


def test_layers_behind_attention_are_quantized_where_they_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("bf16", "sdpa")[0]
    narrow = set(quantization.eligible(made, "fp8_rows")[1])
    widths = {layer.in_features for name, layer in made.denoiser.named_modules() if name.endswith("to_out.0")}
    monkeypatch.setattr(quantization, "LEAST_FEATURES_BEHIND_ATTENTION", max(widths))
    more = set(quantization.eligible(made, "fp8_rows")[1]) - narrow
    assert more
    assert {made.denoiser.get_submodule(each).in_features for each in more} == {max(widths)}
    assert all(each.endswith("to_out.0") for each in more)


@pytest.mark.parametrize(
    ("model", "between"),
    [
        ("sdxl", {"proj_in", "proj_out"}),
        ("sd15", set()),  # convolutions lead into its blocks and out of them
        ("pixart-alpha", {"caption_projection", "proj_out"}),
        ("sana", {"caption_projection", "proj_out"}),
        ("sd3.5-medium", {"context_embedder", "proj_out"}),
        ("flux-schnell", {"x_embedder", "context_embedder", "proj_out"}),
    ],
)
def test_what_lies_between_blocks_stays_in_16_bits_and_so_does_what_projects_the_prompt(
    model: str, between: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = miniature(model, tmp_path)
    monkeypatch.setitem(MODELS, model, known)
    monkeypatch.setitem(quantization.LEAST_ROWS, "cpu", 1)
    settings = plan.Settings(weights="random", steps=2)
    (spec,) = plan.plan_ladder("mine", (Recipe("mine", ("bf16", "sdpa")),), known, CPU, settings).rungs
    made = build_pipeline(spec, lambda stage: None)[0]
    chosen = quantization.eligible(made, "fp8_rows")[1]
    linears = [name for name, module in made.denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    row_a_picture = re.compile("time|resolution|ratio|norm|adaln|add_embedding")
    others = {name for name in linears if name not in chosen and not row_a_picture.search(name)}
    inside = {name for name in others if re.search(r"\.to_(add_)?out|\.attn2\.to_[kv]$", name)}
    assert {re.sub(r".*\.(?=proj)|\.linear_\d$", "", name) for name in others - inside} == between
    of_the_prompt = {name for name in chosen if re.search(r"\.attn2\.to_[kv]$", name)}
    assert bool(of_the_prompt) == (model == "sd3.5-medium")  # whose second attention is the picture's, to itself


def test_attention_to_other_tokens_is_told_by_shapes_and_a_network_without_blocks_is_one_block() -> None:
    network, attention = torch.nn.Module(), torch.nn.Module()
    network._repeated_blocks, network.attention = None, attention
    names = ("to_q", "to_k", "to_v")
    for name in names:
        setattr(attention, name, torch.nn.Linear(16, 16))
    shapes = {getattr(attention, name): (2, 300, 16) for name in names}
    assert set(quantization.worth_eight_bits(network, shapes, 256)) == {f"attention.{name}" for name in names}
    shapes |= {attention.to_k: (2, 200, 16), attention.to_v: (2, 200, 16)}
    assert set(quantization.worth_eight_bits(network, shapes, 256)) == {"attention.to_q"}


@pytest.mark.parametrize("name", ["fp8_rows", "int8_rows"])
def test_layers_that_are_worth_it_are_quantized_and_the_picture_stays(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, applied = eight_bit(name, monkeypatch, "fused_qkv")
    layers = [module for module in made.denoiser.modules() if isinstance(module, RowwiseLinear)]
    left = [each for each, module in made.denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    # Embeddings of the time step have two rows under guidance, and the prompt is the same in every step.
    # Behind attention layers as narrow as these would quantize for longer than they gain; and so between the blocks.
    behind, prompt, between = (
        [each for each in left if each.endswith(ends)] for ends in ("to_out.0", "to_kv", ("proj_in", "proj_out"))
    )
    assert all("time_emb" in each or "add_embedding" in each for each in {*left} - {*behind, *prompt, *between}), left
    assert (len(behind), len(prompt), len(between)) == (10, 5, 8)  # five blocks in four stacks
    assert applied[name]["quantized_linears"] == len(layers) == 20
    assert applied[name]["fused_feed_forwards"] == 5
    assert {layer.weight.dtype for layer in layers} == {FORMATS[name.removesuffix("_rows")]}
    exact = torch.tensor(list(call(build("bf16", "sdpa")[0])[0].tobytes())).float()
    found = torch.tensor(list(call(made)[0].tobytes())).float()
    assert 0 < (found - exact).norm() / exact.norm() < 0.1


def test_embeddings_with_a_row_a_picture_stay_in_16_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = (eight_bit("fp8_rows", monkeypatch, "time_projections", batch_size=size)[1] for size in (1, 20))
    assert one["fp8_rows"]["quantized_linears"] == many["fp8_rows"]["quantized_linears"]
    assert one["time_projections"]["projections"] == many["time_projections"]["projections"] > 2


def test_a_picture_too_small_for_eight_bits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.LEAST_ROWS, "cpu", quantization.LEAST_ROWS["cuda"])
    with pytest.raises(RuntimeError, match=r"fp8_rows: no linear layer has 256 rows.*: it takes a larger"):
        eight_bit("fp8_rows", monkeypatch)
    assert eight_bit("fp8_rows", monkeypatch, batch_size=2)[1]["fp8_rows"]["quantized_linears"] > 10


@pytest.mark.parametrize("name", ["fp8_convolutions", "int8_convolutions"])
def test_convolutions_that_make_few_pixels_stay_in_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, all_of_them = eight_bit(name, monkeypatch, "channels_last")
    pixels: dict[str, int] = {}

    def note(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        pixels[names[module]] = output.numel() // output.shape[1]

    names = {layer: each for each, layer in made.denoiser.named_modules() if isinstance(layer, ImagewiseConvolution)}
    made.short_call(*(layer.register_forward_hook(note) for layer in names))
    fewest, more, *_, most = sorted(set(pixels.values()))
    assert fewest == 2 * 4 * 4  # two rows of guidance
    monkeypatch.setitem(quantization.LEAST_PIXELS, "cpu", more)
    made, applied = eight_bit(name, monkeypatch, "channels_last")
    found = {each for each, layer in made.denoiser.named_modules() if isinstance(layer, ImagewiseConvolution)}
    assert found == {each for each, count in pixels.items() if count >= more}
    assert applied[name]["quantized_convolutions"] == len(found) < all_of_them[name]["quantized_convolutions"]
    monkeypatch.setitem(quantization.LEAST_PIXELS, "cpu", most + 1)
    with pytest.raises(RuntimeError, match=rf"{name}: no convolution .* makes {most + 1} pixels: it takes a larger"):
        eight_bit(name, monkeypatch, "channels_last")
    assert eight_bit(name, monkeypatch, "channels_last", batch_size=2)[1][name]["quantized_convolutions"]


def test_a_convolution_that_no_step_runs_stays() -> None:
    made = build("bf16", "sdpa")[0]
    before = set(quantization.eligible_convolutions(made, "int8_convolutions")[1])
    made.denoiser.spare = torch.nn.Conv2d(16, 16, 3, dtype=torch.bfloat16)
    assert set(quantization.eligible_convolutions(made, "int8_convolutions")[1]) == before


def test_layers_that_are_kept_stay_and_unknown_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    made, applied = eight_bit("fp8_rows", monkeypatch, kept=(kept,))
    assert type(made.denoiser.get_submodule(kept)) is torch.nn.Linear
    assert applied["fp8_rows"]["kept"] == 1
    with pytest.raises(RuntimeError, match="the denoiser has no layer nowhere, which was to be kept"):
        eight_bit("fp8_rows", monkeypatch, kept=("nowhere",))


@pytest.mark.parametrize("names", [("bf16", "sdpa", "fused_qkv"), ("bf16", "regional_compile", "int8_rows")])
def test_an_adapter_that_would_be_ignored_is_refused(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made, _ = build(*names)
    with pytest.raises(RuntimeError, match=f"{names[-1]} can't take an adapter any more"):
        made.denoiser.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(RuntimeError, match="attach it before"):
        made.denoiser.load_lora_adapter({})


def test_fp8_is_refused_by_name_where_the_gpu_has_none() -> None:
    a100 = plan.Device("cuda", "NVIDIA A100", (8, 0))
    with pytest.raises(ValueError, match=r"fp8_rows needs compute capability 8.9, and NVIDIA A100 has 8.0"):
        plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("bf16", "regional_compile", "fp8_rows")), a100)
    assert plan.plan_recipe(MODELS["sdxl"], Recipe("mine", ("bf16", "regional_compile", "fp8_rows")), H100)


def test_convolutions_that_are_kept_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    made, applied = eight_bit("int8_convolutions", monkeypatch, "channels_last", "fp8_rows", kept=kept)
    assert type(made.denoiser.get_submodule(kept[0])) is torch.nn.Conv2d
    assert isinstance(made.denoiser.mid_block.resnets[0].conv2, ImagewiseConvolution)
    assert type(made.denoiser.get_submodule(kept[1])) is torch.nn.Linear
    assert applied["int8_convolutions"]["kept"] == applied["fp8_rows"]["kept"] == 1


def test_the_pass_takes_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("bf16", "sdpa", "channels_last", "group_norm_kernels", "regional_compile", "int8_convolutions")
    names = plan.plan_recipe(MODELS["tiny"], Recipe("m", names), CPU)
    spec = replace(planned(steps=2).rungs[0], optimizations=names)
    alone = sensitivity.measure(spec, 0.004, lambda stage: None)
    layers = {layer["name"]: layer for layer in alone["layers"]}
    assert alone["format"] == "int8 (convolutions)" and all(layer["error"] > 0 for layer in layers.values())
    first = layers["down_blocks.0.resnets.0.conv1"]
    assert first["taps"] == 9 and first["rows"] == 2 * 16 * 16  # two rows under guidance, of 128 pixels' latents
    assert 0 < len(alone["kept"]) < len(layers) and alone["error"] <= 0.004
    both = plan.plan_recipe(MODELS["tiny"], Recipe("m", (*names, "fp8_rows")), CPU)
    found = sensitivity.measure(replace(spec, optimizations=both), None, lambda stage: None)
    assert found["format"] == "fp8 and int8 (convolutions)"
    assert layers.keys() < {layer["name"] for layer in found["layers"]}
    assert found["error"] > alone["error"]
    monkeypatch.setitem(quantization.LEAST_PIXELS, "cpu", 1 + max(layer["rows"] for layer in layers.values()))
    with pytest.raises(RuntimeError, match="int8_convolutions: no convolution has the channels"):
        sensitivity.measure(spec, None, lambda stage: None)


def test_what_stays_is_what_costs_most_for_what_it_saves() -> None:
    large, small = Layer("large", (64, 64), 64, 1, 0.04), Layer("small", (16, 16), 64, 1, 0.03)
    assert choose([large, small], 0.045) == ["small"]  # it loses less, and saves much less
    assert choose([large, small], 0.035) == ["small", "large"]


def test_the_largest_errors_are_kept_till_the_target_is_met() -> None:
    layers = [
        Layer(name, (16, 16), 64, 1, error) for name, error in (("a", 0.03), ("b", 0.04), ("c", 0.12), ("d", 0.0))
    ]
    assert choose(layers, None) == []
    assert choose(layers, 0.14) == []  # all together: 0.13
    assert choose(layers, 0.05) == ["c"]  # and 3, 4, 5
    assert choose(layers, 0.049) == ["c", "b"]
    assert set(choose(layers, 1e-9)) == {"a", "b", "c"}


def test_the_pass_finds_the_layer_that_loses_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is made worse than all others: its rows get an outlier that its weights undo."""
    names = ("bf16", "sdpa", "regional_compile", "int8_rows")
    spec = replace(planned(steps=3).rungs[0], optimizations=plan.plan_recipe(MODELS["tiny"], Recipe("m", names), CPU))
    victim = "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"

    seen: list[Any] = []

    def with_an_outlier(*args: Any) -> Any:
        made, applied = build_pipeline(*args)
        seen.append(made)
        block = made.denoiser.up_blocks[1].attentions[1].transformer_blocks[0]
        block.norm3.weight[0] *= 2000
        block.norm3.bias[0] *= 2000
        block.ff.net[0].proj.weight[:, 0] /= 2000
        return made, applied

    monkeypatch.setattr("diffusion_fast.pipeline.build_pipeline", with_an_outlier)
    found = sensitivity.measure(spec, 0.015, lambda stage: None)
    assert found["layers"][0]["name"] == victim
    assert found["layers"][0]["error"] > 1.5 * found["layers"][1]["error"]
    assert found["kept"][0] == victim
    assert found["error"] <= 0.015
    assert found["error"] == pytest.approx(found["predicted"], rel=0.3)  # squares add up
    everything = sum(layer["error"] ** 2 for layer in found["layers"]) ** 0.5
    assert found["predicted"] < everything
    assert all(type(layer) is not RowwiseLinear for layer in seen[0].denoiser.modules())  # all are put back


def test_the_pass_leaves_out_what_says_that_it_is_for_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    class InFloat32Error(Exception):
        pass

    def kernel_of_tomorrow(build: Any) -> dict[str, Any]:
        raise InFloat32Error

    for number, requires in enumerate(((("bf16",),), (("sdpa",), ("bf16", "fp16")), (("sdpa",),))):
        known = Optimization(f"kernel_{number}", kernel_of_tomorrow, "swap", requires)
        monkeypatch.setitem(OPTIMIZATIONS, known.name, known)
    names = ("bf16", "sdpa", "kernel_0", "kernel_1", "regional_compile", "int8_rows")
    spec = replace(planned(steps=3).rungs[0], optimizations=names)
    found = sensitivity.measure(spec, None, lambda stage: None)
    assert found["format"] == "int8"
    assert found["layers"]
    with pytest.raises(InFloat32Error):
        sensitivity.measure(replace(spec, optimizations=(*names, "kernel_2")), None, lambda stage: None)


def test_the_command_writes_what_keep_reads(tmp_path: Path) -> None:
    options = (
        "--with",
        "bf16,sdpa,fused_geglu,attention_kernel,regional_compile,fp8_rows",
        "--target",
        "1%",
        "--output",
        str(tmp_path / "out"),
    )
    done = CliRunner().invoke(main, ("sensitivity", "--device", "cpu", *options))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert f"{len(found['layers']) - len(found['kept'])} of {len(found['layers'])} layers in fp8" in done.output
    assert sensitivity.read_kept(tmp_path / "out" / "sensitivity.json", "tiny") == tuple(found["kept"])
    with pytest.raises(ValueError, match="it is about tiny, and this is sdxl"):
        sensitivity.read_kept(tmp_path / "out" / "sensitivity.json", "sdxl")
    assert found["kept"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sensitivity", "--with", "bf16"), "sensitivity is about a recipe for eight bits"),
        (("run", "--with", "bf16", "--keep", "{good}"), "--keep is about layers that a recipe for eight bits would"),
        (("run", "--with", "bf16", "--keep", "{bad}"), "isn't what `diffusion-fast sensitivity` writes"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    (tmp_path / "good.json").write_text('{"model": "tiny", "kept": ["a.layer"]}')
    (tmp_path / "bad.json").write_text("[]")
    files = {"good": tmp_path / "good.json", "bad": tmp_path / "bad.json"}
    chosen = [argument.format(**files) for argument in arguments]
    done = CliRunner().invoke(main, [*chosen, "--device", "cpu"])
    assert done.exit_code == 2
    assert sentence in done.output
