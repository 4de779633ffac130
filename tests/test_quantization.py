"""Formats of torchao, on the bundled model: which layers are given to it, and what their weights have become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchao.quantization.quant_api

from diffusion_fast import roofline
from diffusion_fast.models import MODELS
from diffusion_fast.modules import stored_bytes
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, quantization
from diffusion_fast.pipeline import _from_configs, call
from diffusion_fast.plan import Device, plan_recipe
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.test_optimizations import build

WEIGHT_ONLY = {"int8_weight_only": 1.0, "fp8_weight_only": 1.0, "int4_weight_only": 0.5}  # bytes of a number
FP8 = {"fp8_dynamic": "PerRow", "fp8_dynamic_tensor": "PerTensor"}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fp8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao asks for a GPU before it quantizes to fp8; PyTorch multiplies it on a CPU, too."""
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda granularities: None)


def linears(made: Build) -> list[torch.nn.Linear]:
    networks = made.denoiser, made.pipe.vae
    return [module for network in networks for module in network.modules() if isinstance(module, torch.nn.Linear)]


def is_quantized(linear: torch.nn.Linear) -> bool:
    return type(linear.weight.data) is not torch.Tensor


def picture(made: Build) -> torch.Tensor:
    return torch.tensor(list(call(made)[0].tobytes())).float()


@pytest.fixture(scope="module")
def in_bf16() -> torch.Tensor:
    with torch.no_grad():
        return picture(build("bf16", "sdpa")[0])


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weights_alone_take_fewer_bytes_and_the_picture_stays(name: str, in_bf16: torch.Tensor) -> None:
    plain = {stored_bytes(module.weight) for module in linears(build("bf16", "sdpa")[0])}
    made, applied = build("bf16", "sdpa", name)
    account, quantized = applied[name], [module for module in linears(made) if is_quantized(module)]
    assert account["quantized_linears"] == len(quantized)
    assert account["linears"] == len(linears(made)) > len(plain)
    assert {type(module.weight.data).__name__ for module in quantized} == {account["tensor"]}
    numbers = sum(module.weight.numel() for module in quantized)
    assert account["weight_mib_before"] * quantization.MIB == 2 * numbers
    # The numbers, and beside them the scales: of these models' narrow layers they are a tenth at most.
    assert 1 < account["weight_mib"] * quantization.MIB / (WEIGHT_ONLY[name] * numbers) < 1.15
    assert all(getattr(module.weight, "act_quant_kwargs", None) is None for module in quantized)
    assert 0 < (picture(made) - in_bf16).norm() / in_bf16.norm() < 0.05


def test_int4_takes_layers_whose_features_have_the_groups() -> None:
    made, _ = build("bf16", "int4_weight_only")
    fits = {module: module.in_features % 64 == module.out_features % 16 == 0 for module in linears(made)}
    assert {module for module in fits if is_quantized(module)} == {module for module, fit in fits.items() if fit}
    assert not all(fits.values())


def test_on_a_gpu_int4_leaves_narrow_layers_that_padding_would_make_larger() -> None:
    made, _ = build("bf16")
    made.spec = replace(made.spec, device="cuda")
    suited = quantization._suited(made, multiple=16, group=64, least=quantization.INT4_LEAST["cuda"])
    assert suited == {each for each in linears(made) if each.in_features >= 320 and each.in_features % 64 == 0}


@pytest.mark.parametrize("name", FP8)
def test_fp8_by_torchao_scales_rows_or_the_whole_tensor(name: str, fp8_anywhere: None) -> None:
    made, _ = build("bf16", "sdpa", steps=1)  # PyTorch multiplies fp8 on a CPU number by number
    in_bf16 = picture(made)
    account = OPTIMIZATIONS[name].apply(made)
    quantized = [module for module in linears(made) if is_quantized(module)]
    assert len(quantized) == account["quantized_linears"] > 30
    for module in quantized:
        weight: Any = module.weight
        assert weight.qdata.dtype == torch.float8_e4m3fn
        assert weight.scale.shape == ((module.out_features, 1) if name == "fp8_dynamic" else (1, 1))
        assert type(weight.act_quant_kwargs.granularity).__name__ == FP8[name]
    assert 0 < (picture(made) - in_bf16).norm() / in_bf16.norm() < 0.05


@pytest.mark.parametrize("name", FP8)
def test_rows_of_zeros_stay_zeros_in_fp8(name: str, fp8_anywhere: None) -> None:
    made, _ = build("bf16")
    OPTIMIZATIONS[name].apply(made)
    linear = next(module for module in linears(made) if is_quantized(module))
    assert linear(torch.zeros(32, linear.in_features, dtype=torch.bfloat16)).equal(
        torch.zeros(32, linear.out_features, dtype=torch.bfloat16) + (0 if linear.bias is None else linear.bias)
    )


def test_fp8_by_torchao_is_refused_where_no_kernel_multiplies_it() -> None:
    recipe = Recipe("mine", ("bf16", "compile", "fp8_dynamic"))
    assert "fp8_dynamic" in plan_recipe(MODELS["tiny"], recipe, H100)
    with pytest.raises(ValueError, match="fp8_dynamic runs on cuda only, and this is a cpu"):
        plan_recipe(MODELS["tiny"], recipe, CPU)
    with pytest.raises(ValueError, match=r"fp8_dynamic needs compute capability 8\.9, and an A100 has 8\.0"):
        plan_recipe(MODELS["tiny"], recipe, Device("cuda", "an A100", (8, 0)))


@pytest.mark.parametrize("name", ["int4_weight_only", *FP8])
def test_a_format_of_torchao_leaves_the_count_of_operations(name: str, fp8_anywhere: None) -> None:
    made, _ = build("bf16", "sdpa", height=64, width=64)
    before = roofline.count_flops(made)
    OPTIMIZATIONS[name].apply(made)
    assert roofline.count_flops(made) == before


@pytest.mark.parametrize("name", quantization.LINEAR_FORMATS)
def test_linear_layers_have_one_format(name: str) -> None:
    others = set(quantization.LINEAR_FORMATS) - {name}
    assert others <= set(OPTIMIZATIONS[name].excludes)


def test_no_format_sets_a_global_inductor_flag(fp8_anywhere: None) -> None:
    from torch._inductor import config

    before = config.get_config_copy()
    for name in (*WEIGHT_ONLY, *FP8):
        OPTIMIZATIONS[name].apply(build("bf16")[0])
    assert config.get_config_copy() == before


def test_an_upcast_part_stays_as_it_is() -> None:
    made, _ = build("bf16")
    made.pipe.vae.to(torch.float32)
    quantization.int8_weight_only(made)
    assert not any(is_quantized(module) for module in made.pipe.vae.modules() if isinstance(module, torch.nn.Linear))
    assert any(is_quantized(module) for module in linears(made))


def test_a_format_that_finds_no_layer_says_so() -> None:
    made, _ = build("bf16")
    made.dtype = "float16"
    with pytest.raises(RuntimeError, match="Int8WeightOnlyConfig: no layer of this model has the sizes"):
        quantization.int8_weight_only(made)


def test_in_a_model_too_small_to_gain_all_layers_are_taken_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = build("bf16", "sdpa")
    usual = quantization.int8_dynamic(made)
    monkeypatch.setitem(quantization.LEAST_INTENSITY, "cpu", 1e6)
    small = quantization.int8_dynamic(build("bf16", "sdpa")[0])
    assert small["quantized_linears"] >= usual["quantized_linears"] > 30


def test_in_pixart_what_computes_more_than_it_reads_is_multiplied_in_int8() -> None:
    """At full size, on the meta device: the rows of a picture of 1024 pixels, of the prompt, and of the time step."""
    spec = replace(planned(model="sdxl", weights="random").rungs[0], model="pixart-alpha", device="meta")  # type: ignore[arg-type]
    made = Build(MODELS["pixart-alpha"], spec, dtype="float32")
    made.pipe = _from_configs(replace(made, model=replace(made.model, configs="pixart-xl-2-1024-ms")))
    made.spec = replace(spec, device="cuda")
    names = {module: name for name, module in made.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    prompt = ("attn2.to_k", "attn2.to_v", "caption_projection")
    rows = {
        module: 240 if any(part in name for part in prompt) else 2 if "adaln" in name else 8192
        for module, name in names.items()
    }
    taken = {names[module] for module in quantization._suited(made, multiple=8, rows=rows)}
    of_a_block = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"}
    of_a_block |= {"ff.net.0.proj", "ff.net.2"}
    assert taken == {f"transformer_blocks.{block}.{name}" for block in range(28) for name in of_a_block}


def test_layerwise_casting_stores_what_computes_in_fp8_also_after_a_call(in_bf16: torch.Tensor) -> None:
    made, applied = build("bf16", "sdpa", "layerwise_casting")
    computing = [module for module in made.denoiser.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    account = applied["layerwise_casting"]
    assert 0.95 * len(computing) < account["cast_layers"] <= len(computing)  # layers of norms stay
    assert {module.weight.dtype for module in computing} >= {torch.float8_e4m3fn}
    assert 0.5 <= account["weight_mib"] / account["weight_mib_before"] < 0.51
    assert made.denoiser.dtype == torch.bfloat16  # what it computes in
    assert 0 < (picture(made) - in_bf16).norm() / in_bf16.norm() < 0.1
    assert made.proofs["layerwise_casting"]() == account
    assert made.proofs["bf16"]() == {"dtype": "bfloat16"}  # of everything else
    made.denoiser.conv_in.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="layers aren't stored in fp8"):
        made.proofs["layerwise_casting"]()


@pytest.mark.parametrize("other", ["compile", "regional_compile", "ahead_of_time", "int8_weight_only"])
def test_layerwise_casting_is_refused_beside_what_holds_weights_otherwise(other: str) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        plan_recipe(MODELS["tiny"], Recipe("mine", ("bf16", "layerwise_casting", other)), CPU)
