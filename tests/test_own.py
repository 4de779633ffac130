"""Recipes for pipelines that somebody else built."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from PIL import Image

import diffusion_fast
from diffusion_fast.models import PACKAGE
from diffusion_fast.projections import Projection

PROMPT = "a large red circle above a small blue square on a white background"
LOSSLESS = (
    *("sdpa", "channels_last", "no_layout_copies", "group_norm_kernels", "fused_qkv"),
    *("device_postprocessing", "prompt_projections"),
)


@pytest.fixture
def pipe() -> Any:
    made = StableDiffusionXLPipeline.from_pretrained(PACKAGE / "tiny", use_safetensors=True, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def painted(pipe: Any, **how: Any) -> numpy.ndarray:
    generator = torch.Generator("cpu").manual_seed(1)
    image = pipe(PROMPT, num_inference_steps=6, guidance_scale=2.0, generator=generator, **how).images[0]
    return numpy.asarray(image).astype(int)


def test_a_pipeline_of_ones_own_paints_the_same(pipe: Any) -> None:
    before = painted(pipe)
    assert diffusion_fast.optimize(pipe, *LOSSLESS) is pipe
    assert pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.fused_projections
    assert any(isinstance(module, Projection) for module in pipe.unet.modules())
    assert abs(painted(pipe) - before).max() <= 1


def test_a_pipeline_of_ones_own_in_less_memory(pipe: Any) -> None:
    before = painted(pipe.to(torch.bfloat16))
    names = ("sdpa", "layerwise_casting", "upcast_vae", "vae_tiling", "prompt_embedding_cache")
    diffusion_fast.optimize(pipe, *names)
    assert pipe.unet.conv_in.weight.dtype == torch.float8_e4m3fn
    assert pipe.vae.dtype == torch.float32
    found = painted(pipe)
    assert 0 < abs(found - before).mean() < 15  # of 255: fp8 without a scale, and tiles of half the picture
    assert abs(painted(pipe) - found).max() == 0
    assert (pipe.encode_prompt.encoded, pipe.encode_prompt.reused) == (1, 1)


def test_what_a_pipeline_of_ones_own_has_no_use_for_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="first_block_cache can't be applied to StableDiffusionXLPipeline"):
        diffusion_fast.optimize(pipe, "first_block_cache")
    with pytest.raises(ValueError, match="int8_weight_only requires bf16 or fp16"):
        diffusion_fast.optimize(pipe, "int8_weight_only")


@pytest.mark.parametrize("example", [None, {"num_images_per_prompt": 1}, {"prompt": [PROMPT, PROMPT]}])
def test_what_is_for_batches_is_applied_whatever_an_example_has(pipe: Any, example: dict[str, Any] | None) -> None:
    before = painted(pipe, num_images_per_prompt=2)
    diffusion_fast.optimize(pipe, "vae_slicing", example=example)
    decoded: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    assert abs(painted(pipe, num_images_per_prompt=2) - before).max() <= 1
    assert decoded == [1, 1]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler])
def test_with_another_scheduler_before_and_after(pipe: Any, scheduler: Any) -> None:
    usual = painted(pipe)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = painted(pipe)
    assert abs(before - usual).max() > 1
    diffusion_fast.optimize(pipe, *LOSSLESS)
    assert abs(painted(pipe) - before).max() <= 1


def test_an_adapter_that_is_there_is_kept_or_a_reason_not_to(pipe: Any) -> None:
    plain = painted(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    before = painted(pipe)
    assert abs(before - plain).max() > 1
    with pytest.raises(ValueError, match="fused_qkv would leave the adapter out: fuse it into the weights first"):
        diffusion_fast.optimize(pipe, "sdpa", "fused_qkv")
    diffusion_fast.optimize(pipe, "sdpa", "channels_last", "group_norm_kernels")
    assert abs(painted(pipe) - before).max() <= 1


def test_a_controlnet_says_by_an_example_what_a_call_needs(pipe: Any) -> None:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet)
    with torch.no_grad():
        for block in controlnet.controlnet_down_blocks:  # as they come, their outputs are zeros
            block.weight.normal_(std=0.1)
    guided = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=controlnet)
    guided.set_progress_bar_config(disable=True)
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (128, 128, 3), numpy.uint8))
    before = painted(guided, image=image)
    assert abs(before - painted(pipe)).max() > 1
    diffusion_fast.optimize(guided, *LOSSLESS, example={"image": image})
    assert abs(painted(guided, image=image) - before).max() <= 1


def test_a_pipeline_in_bfloat16_needs_no_name_for_it(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    diffusion_fast.optimize(pipe, "sdpa", "fused_geglu")
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}
    assert painted(pipe).std() > 1


def test_our_own_attention_goes_with_another_scheduler(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    diffusion_fast.optimize(pipe, "sdpa", "attention_kernel", "prompt_projections")
    found = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    assert found == {"KernelAttnProcessor"}
    assert painted(pipe).std() > 1


def test_an_adapter_attached_behind_our_own_attention_is_honoured(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    adapter = LoraConfig(r=4, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    diffusion_fast.optimize(pipe, "sdpa", "attention_kernel")
    plain = painted(pipe)
    torch.manual_seed(0)
    pipe.unet.add_adapter(adapter)
    found = painted(pipe)
    for network in (pipe.unet, pipe.vae):
        network.set_attn_processor(AttnProcessor2_0())
    assert abs(found - plain).mean() > 4 * abs(found - painted(pipe)).mean()


def test_bf16_converts_the_pipeline(pipe: Any) -> None:
    before = painted(pipe)
    diffusion_fast.optimize(pipe, "bf16")
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    assert abs(painted(pipe) - before).mean() < 3


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("sdpaa",), "no optimization 'sdpaa'"),
        (("fused_qkv",), "fused_qkv requires sdpa: add sdpa"),
        (("bf16", "fp16"), "exclude each other"),
        (("tf32",), "tf32 runs on cuda only"),
        (("guidance_cutoff",), "it works by an argument of each call"),
        (("tiny_vae",), "it has no tiny_vae_hub_id"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_is_changed(
    pipe: Any, names: tuple[str, ...], reason: str
) -> None:
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(ValueError, match=reason):
        diffusion_fast.optimize(pipe, "sdpa" if "fused_qkv" not in names else "channels_last", *names)
    assert pipe.unet.attn_processors == processors
    assert pipe.unet.dtype == torch.float32


def test_a_second_time_is_refused(pipe: Any) -> None:
    diffusion_fast.optimize(pipe, "sdpa", "fused_qkv")
    before = painted(pipe)
    with pytest.raises(ValueError, match="has been optimized already: give all names at once"):
        diffusion_fast.optimize(pipe, "sdpa", "channels_last")
    assert (painted(pipe) == before).all()


def test_attention_that_does_more_is_not_thrown_away(pipe: Any) -> None:
    class Watching(AttnProcessor2_0):
        pass

    pipe.unet.set_attn_processor(Watching())
    with pytest.raises(ValueError, match="Watching computes attention in this pipeline, and would be lost"):
        diffusion_fast.optimize(pipe, "sdpa")


@pytest.mark.parametrize("names", [("prompt_projections",), ("regional_compile", "int8_rows")])
def test_a_call_that_fails_leaves_no_hooks(pipe: Any, names: tuple[str, ...]) -> None:
    pipe.to(torch.bfloat16)
    with pytest.raises(ValueError, match="`prompt` has to be of type"):
        diffusion_fast.optimize(pipe, "sdpa", *names, example={"prompt": 1})
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_a_pipeline_without_a_denoiser_is_refused(pipe: Any) -> None:
    pipe.unet = None
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has neither a unet nor a transformer"):
        diffusion_fast.optimize(pipe, "sdpa")
