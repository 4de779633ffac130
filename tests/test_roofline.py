"""Operations counted, ceilings measured, weights weighed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_fast import pipeline, roofline, spool, worker
from diffusion_fast.models import MODELS, PACKAGE
from diffusion_fast.optimizations import Build
from diffusion_fast.plan import plan_recipe
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned


def test_sdxl_takes_13_5_tflop_a_step_with_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size and without a byte of weights: on the device that has shapes alone."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def config(name: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((PACKAGE / "configs" / MODELS["sdxl"].configs / f"{name}.json").read_text())
        return data

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(config("unet")), AutoencoderKL.from_config(config("vae"))
        unet.set_default_attn_processor()
    spec = planned(device=H100, model="sdxl", weights="random").reference
    build = Build(MODELS["sdxl"], spec, pipe=SimpleNamespace(unet=unet, vae=vae, encode_prompt=lambda: None))

    def call(build: Build) -> None:
        assert build.spec.steps == 1
        with torch.device("meta"), torch.no_grad():
            build.pipe.encode_prompt()
            more = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
            text = torch.empty(2, 77, 2048)
            build.pipe.unet(torch.empty(2, 4, 128, 128), torch.empty(()), text, added_cond_kwargs=more)
            build.pipe.vae.decode(torch.empty(1, 4, 128, 128))

    monkeypatch.setattr(pipeline, "call", call)
    found = roofline.count_flops(build)
    assert sum(found["denoising_step"].values()) == pytest.approx(13.52e12, rel=0.001)
    parts = {"linear": 8.71e12, "convolution": 3.25e12, "attention": 1.57e12}
    assert found["denoising_step"] == pytest.approx(parts, rel=0.005)
    assert sum(found["vae_decode"].values()) == pytest.approx(10.47e12, rel=0.001)


@pytest.fixture(scope="module")
def tiny() -> Build:
    with torch.no_grad():
        return pipeline.build_pipeline(planned(steps=3).reference, lambda _: None)[0]


def test_a_real_call_is_counted_by_parts_whatever_its_steps(tiny: Build) -> None:
    with torch.no_grad():
        found = roofline.count_flops(tiny)
    assert set(found) == set(roofline.PARTS)
    # A step of the UNet is 0.377 GFLOP an image, here two for guidance. For no prompt SDXL takes noughts.
    assert sum(found["denoising_step"].values()) == pytest.approx(2 * 0.377e9, rel=0.01)
    assert sum(found["text_encoding"].values()) == pytest.approx(0.0545e9, rel=0.01)
    assert found["vae_decode"]["convolution"] > 1e9


def test_a_batch_takes_what_its_images_take_and_one_prompt(tiny: Build) -> None:
    with torch.no_grad():
        one, four = (roofline.count_flops(replace(tiny, spec=replace(tiny.spec, batch_size=n))) for n in (1, 4))
    assert four["text_encoding"] == one["text_encoding"]
    for part in ("denoising_step", "vae_decode"):
        assert four[part] == {kind: 4 * count for kind, count in one[part].items()}


@pytest.mark.parametrize(
    "eight_bits",
    [
        ("int8_dynamic",),
        ("int8_rows",),
        ("fp8_rows",),
        ("int8_convolutions",),
        ("fused_geglu",),
        ("fused_geglu", "int8_rows"),
        ("attention_kernel",),
    ],
    ids="+".join,
)
def test_fused_eight_bit_and_compiled_kernels_count_as_what_they_stand_for(
    tiny: Build, eight_bits: tuple[str, ...]
) -> None:
    names = ("bf16", "sdpa", "channels_last", "fused_qkv", *eight_bits, "compile")
    ordered = plan_recipe(MODELS["tiny"], Recipe("mine", names), CPU)
    with torch.no_grad():
        fast, _ = pipeline.build_pipeline(replace(tiny.spec, optimizations=ordered), lambda _: None)
        assert roofline.count_flops(fast) == roofline.count_flops(tiny)


def test_without_a_reference_a_rung_counts_for_itself(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "ceilings", lambda _: {"matmul_ceiling_tflops": 2.0, "copy_ceiling_gbs": 20.0})
    counted = tmp_path / spool.REFERENCE_FLOPS
    with torch.no_grad():
        alone = worker._limits(tiny, counted, 2.0)["limits"]
        spool.write_json(counted, roofline.count_flops(tiny))
        beside = worker._limits(tiny, counted, 2.0)["limits"]
    assert alone["tflop"] == beside["tflop"] > 0
    assert alone["mfu"] == pytest.approx(alone["tflop"] / 2.0 / alone["matmul_ceiling_tflops"])


def test_weights_are_weighed_as_they_are_stored(tiny: Build) -> None:
    sizes = roofline.weight_bytes(tiny)
    parameters = sum(parameter.numel() for parameter in tiny.denoiser.parameters())
    assert sizes["unet"] == 4 * parameters
    assert set(sizes) == {"unet", "vae", "text_encoder", "text_encoder_2"}


def test_a_quantized_weight_is_its_numbers_and_scales() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    network = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    before = roofline._bytes_of(network)
    quantize_(network, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    after = roofline._bytes_of(network)
    assert before == 2 * 64 * 32
    assert 64 * 32 <= after <= 64 * 32 + 32 * 16  # and a scale, perhaps a zero point, a row


def test_the_floor_is_what_takes_longer_and_the_utilisation_a_share(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "ceilings", lambda build: {"matmul_ceiling_tflops": 1.0, "copy_ceiling_gbs": 1.0})
    flops = {
        "text_encoding": {"linear": 0.0},
        "denoising_step": {"linear": 0.06e12, "attention": 0.04e12},
        "vae_decode": {"convolution": 0.5e12},
    }
    found = roofline.limits(tiny, flops, latency_s=2.0)
    sizes = roofline.weight_bytes(tiny)
    text_s = (sizes["text_encoder"] + sizes["text_encoder_2"]) / 1e9  # nothing to compute, and weights to read
    assert found["tflop"] == pytest.approx(0.8)
    assert found["mfu"] == pytest.approx(0.4)
    assert found["floor_s"] == pytest.approx(0.8 + text_s)
    assert found["floor_percent"] == pytest.approx(50 * (0.8 + text_s))


def test_ceilings_are_rates_of_this_device(tiny: Build) -> None:
    found = roofline.ceilings(tiny)
    assert 0.001 < found["matmul_ceiling_tflops"] < 1000
    assert 0.1 < found["copy_ceiling_gbs"] < 10_000


@pytest.mark.parametrize(("bf16_s", "fp32_s", "repeats"), [(6.0, 0.5, 1), (0.25, 0.5, roofline.REPEATS + 3)])
def test_a_cpu_is_held_to_the_faster_of_bf16_and_fp32(
    bf16_s: float, fp32_s: float, repeats: int, tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def timed(function: Callable[[], torch.Tensor], _: str) -> tuple[float, torch.Tensor]:
        value = function()
        seen.append(value.dtype)
        return (bf16_s if value.dtype == torch.bfloat16 else fp32_s), value

    monkeypatch.setattr(roofline, "timed", timed)
    monkeypatch.setitem(roofline.MATRIX, "cpu", 8)
    found = roofline.ceilings(replace(tiny, dtype="bfloat16"))
    assert found["matmul_ceiling_tflops"] == pytest.approx(2 * 8**3 / min(bf16_s, fp32_s) / 1e12)
    assert seen.count(torch.bfloat16) == repeats  # not again where one takes ten times as long
