"""Recipes for pipelines that somebody else built."""

from __future__ import annotations

import functools
import inspect
from types import CodeType
from typing import Any

import numpy
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiTPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from PIL import Image

import diffusion_fast
from diffusion_fast import plan
from diffusion_fast.models import PACKAGE
from diffusion_fast.optimizations import OPTIMIZATIONS
from diffusion_fast.projections import Projection
from tests.miniatures import hunyuan_dit

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


@pytest.fixture
def guided(pipe: Any) -> Any:
    """The same with a ControlNet that has a say."""
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet)
    with torch.no_grad():
        for block in controlnet.controlnet_down_blocks:  # as they come, their outputs are zeros
            block.weight.normal_(std=0.1)
    made = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=controlnet)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (128, 128, 3), numpy.uint8))


def auraflow() -> Any:
    """A small AuraFlowPipeline without a text encoder."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return AuraFlowPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler())


def hunyuan() -> Any:
    """A small HunyuanDiTPipeline without a text encoder, whose attention turns queries and keys by position."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    nothing = dict.fromkeys(inspect.signature(HunyuanDiTPipeline.__init__).parameters.keys() - {"self"})
    made = nothing | {"vae": vae, "transformer": hunyuan_dit(), "scheduler": DDIMScheduler()}
    return HunyuanDiTPipeline(**made | {"requires_safety_checker": False})


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


def test_every_lossless_name_that_takes_an_adapter_keeps_it(pipe: Any, by_eager: list[dict[str, Any]]) -> None:
    plain = painted(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "ff.net.2"], init_lora_weights=False))
    before = painted(pipe)
    assert abs(before - plain).mean() > 1
    model, names = plan.find_model("tiny"), []
    for name, known in OPTIMIZATIONS.items():
        fits = known.lossless and known.takes_adapters and "cpu" in known.devices and plan.applies(known, model)
        if fits and not known.for_16_bits and name not in ("bf16", "compile", "inductor_tuning"):
            names.append(name)
    assert {"regional_compile", "no_module_walks", "fused_add_norm", "device_postprocessing"} < set(names)
    diffusion_fast.optimize(pipe, *names)
    assert abs(painted(pipe) - before).max() <= 1
    assert by_eager


def test_a_compiled_pipeline_keeps_its_adapter(pipe: Any, by_eager: list[dict[str, Any]]) -> None:
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    before = painted(pipe)
    diffusion_fast.optimize(pipe, "sdpa", "channels_last", "conv_as_linear", "compile")
    assert abs(painted(pipe) - before).max() <= 1
    assert by_eager


def test_a_controlnet_says_by_an_example_what_a_call_needs(pipe: Any, guided: Any, image: Any) -> None:
    before = painted(guided, image=image)
    assert abs(before - painted(pipe)).max() > 1
    processors = dict(guided.unet.attn_processors)
    with pytest.raises(ValueError, match=r"prompt_projections would call .*TypeError: image must be .*in example=\.$"):
        diffusion_fast.optimize(guided, *LOSSLESS)
    assert guided.unet.attn_processors == processors
    diffusion_fast.optimize(guided, *LOSSLESS, example={"image": image})  # nothing was changed by the attempt before
    assert abs(painted(guided, image=image) - before).max() <= 1


def test_what_needs_no_call_makes_none(guided: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = functools.wraps(type(guided).__call__)(lambda *_, **__: pytest.fail("it was called"))
    monkeypatch.setattr(type(guided), "__call__", called)
    diffusion_fast.optimize(guided, "sdpa", "channels_last", "vae_slicing")
    assert {type(each) for each in guided.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert guided.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert guided.vae.use_slicing


@pytest.mark.parametrize("name", ("feature_reuse", "feature_forecast"))
def test_features_that_something_adds_to_are_not_reused(pipe: Any, guided: Any, image: Any, name: str) -> None:
    adapter = T2IAdapter(channels=(8, 16), num_res_blocks=1, downscale_factor=8)
    adapted = StableDiffusionXLAdapterPipeline(**pipe.components, adapter=adapter)
    for made, what in ((guided, "ControlNet"), (adapted, "T2I-Adapter")):
        with pytest.raises(ValueError, match=f"{name} can't be applied to a pipeline with a {what}"):
            diffusion_fast.optimize(made, "sdpa", name, example={"image": image})
    painted(guided, image=image)


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
        (("tiny_vae",), "it has no tiny VAE that is known here"),
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


def test_an_ip_adapter_is_lost_where_processors_are_replaced_alone(pipe: Any) -> None:
    names = {layer: AttnProcessor2_0() for layer in pipe.unet.attn_processors}
    first = next(layer for layer in names if "attn2" in layer)
    pipe.unet.set_attn_processor(names | {first: IPAdapterAttnProcessor2_0(16, 16)})
    with pytest.raises(ValueError, match=r"IPAdapterAttnProcessor2_0 computes .* take it out first, or leave sdpa out"):
        diffusion_fast.optimize(pipe, "sdpa", "fused_qkv")
    diffusion_fast.optimize(pipe, "channels_last", "vae_slicing")
    assert isinstance(pipe.unet.attn_processors[first], IPAdapterAttnProcessor2_0)


def test_a_controlnets_own_attention_is_not_thrown_away(guided: Any) -> None:
    class Watching(AttnProcessor2_0):
        pass

    guided.controlnet.set_attn_processor(Watching())
    with pytest.raises(ValueError, match="Watching computes attention in this pipeline, and would be lost"):
        diffusion_fast.optimize(guided, "sdpa")


@pytest.mark.parametrize("names", [("channels_last",), ("sdpa", "channels_last")])
def test_what_a_network_makes_for_itself_is_plain(names: tuple[str, ...]) -> None:
    pipe = auraflow()
    diffusion_fast.optimize(pipe, *names)
    assert {type(each).__name__ for each in pipe.transformer.attn_processors.values()} == {"AuraFlowAttnProcessor2_0"}


def test_what_another_puts_into_such_a_network_is_not() -> None:
    pipe = auraflow()
    own_class = type(next(iter(pipe.transformer.attn_processors.values())))
    pipe.transformer.set_attn_processor(type("Watching", (own_class,), {})())
    with pytest.raises(ValueError, match="Watching computes attention in this pipeline, and would be lost"):
        diffusion_fast.optimize(pipe, "sdpa")


def test_a_network_that_cannot_be_built_anew_is_not_known_to_be_plain() -> None:
    class Fitted(AuraFlowTransformer2DModel):
        @classmethod
        def from_config(cls, *_: Any, **__: Any) -> Any:
            raise TypeError("it takes numbers to be built")

    pipe = auraflow()
    pipe.transformer.__class__ = Fitted
    with pytest.raises(ValueError, match="AuraFlowAttnProcessor2_0 computes attention in this pipeline"):
        diffusion_fast.optimize(pipe, "sdpa")


def test_a_default_that_does_more_than_what_replaces_it_is_refused() -> None:
    with pytest.raises(ValueError, match="HunyuanAttnProcessor2_0 computes attention in this pipeline"):
        diffusion_fast.optimize(hunyuan(), "sdpa")
    diffusion_fast.optimize(hunyuan(), "channels_last")


@pytest.mark.parametrize("name", ["fused_qkv", "attention_kernel", "sliced_vae_attention"])
def test_what_else_replaces_processors_requires_sdpa(name: str) -> None:
    assert ("sdpa",) in OPTIMIZATIONS[name].requires  # so that it is enough to ask for that one's stage
    assert [each.name for each in OPTIMIZATIONS.values() if each.stage == "attention"] == ["sdpa"]


def test_all_that_call_the_pipeline_are_known_to() -> None:
    for name, known in OPTIMIZATIONS.items():
        assert ("short_call" in reached(known.apply)) == known.calls_pipeline, name


def reached(function: Any) -> set[str]:
    """Names of globals and attributes in a function's code, and in that of its module's functions that it names."""
    names: set[str] = set()
    functions = [function]
    for each in functions:  # which grows meanwhile
        codes = [each.__code__]
        for code in codes:
            names |= set(code.co_names)
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        called = [each.__globals__.get(name) for name in sorted(names)]
        functions += [found for found in called if inspect.isfunction(found) and found not in functions]
    return names


@pytest.mark.parametrize("names", [("prompt_projections",), ("regional_compile", "int8_rows")])
def test_a_call_that_fails_is_refused_before_anything_is_changed(pipe: Any, names: tuple[str, ...]) -> None:
    pipe.to(torch.bfloat16)
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(
        ValueError, match=rf"{names[-1]} would call .*`prompt` has to be of type.*in example=\.$"
    ) as told:
        diffusion_fast.optimize(pipe, "sdpa", *names, example={"prompt": 1})
    assert "`prompt` has to be of type" in str(told.value.__cause__)
    assert pipe.unet.attn_processors == processors
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    diffusion_fast.optimize(pipe, "sdpa", "channels_last")


class FailsLater(StableDiffusionXLPipeline):
    """Its first call is as any other's, and all that follow fail."""

    calls = 0

    def __call__(self, *args: Any, num_inference_steps: int = 50, guidance_scale: float = 5.0, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise KeyError("out of luck")
        how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return super().__call__(*args, **how, **kwargs)


@pytest.mark.parametrize("names", [("prompt_projections",), ("regional_compile", "int8_rows")])
def test_a_call_that_fails_leaves_no_hooks(pipe: Any, names: tuple[str, ...]) -> None:
    failing = FailsLater(**pipe.to(torch.bfloat16).components)
    with pytest.raises(KeyError, match="out of luck") as told:
        diffusion_fast.optimize(failing, "sdpa", *names)
    assert failing.calls == 2
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    (note,) = told.value.__notes__
    assert note == f"This pipeline stays half optimized, by sdpa and {names[-1]}: load it anew."
    with pytest.raises(ValueError, match=note):
        diffusion_fast.optimize(failing, "channels_last")


def test_a_call_that_takes_no_size_is_given_none(pipe: Any) -> None:
    class WithoutSize(StableDiffusionXLPipeline):
        def __call__(self, prompt: str, num_inference_steps: int = 50, guidance_scale: float = 5.0) -> Any:
            how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
            return super().__call__(prompt, **how)

    made = WithoutSize(**pipe.components)
    diffusion_fast.optimize(made, "sdpa", "prompt_projections")
    assert any(isinstance(module, Projection) for module in made.unet.modules())


def test_what_was_applied_before_a_failure_is_said_and_not_applied_again(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(pipe.vae), "tiled_decode")
    with pytest.raises(RuntimeError, match="vae_tiling: AutoencoderKL doesn't decode in tiles") as told:
        diffusion_fast.optimize(pipe, "sdpa", "channels_last", "vae_tiling")
    (note,) = told.value.__notes__
    assert note == "This pipeline stays half optimized, by sdpa and channels_last and vae_tiling: load it anew."
    with pytest.raises(ValueError, match=note):
        diffusion_fast.optimize(pipe, "sdpa", "channels_last")


def test_what_breaks_in_the_midst_of_a_first_one_has_changed_it(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.vae, "to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffusion_fast.optimize(pipe, "channels_last")
    with pytest.raises(ValueError, match="stays half optimized, by channels_last: load it anew"):
        diffusion_fast.optimize(pipe, "channels_last")


@pytest.mark.parametrize(("what", "kind"), [(None, "NoneType"), ("abc", "str"), ("unet", "UNet2DConditionModel")])
def test_what_is_no_pipeline_is_refused(pipe: Any, what: str | None, kind: str) -> None:
    given = pipe.unet if what == "unet" else what
    with pytest.raises(ValueError, match=f"takes a diffusers pipeline, not an object of type {kind}"):
        diffusion_fast.optimize(given, "sdpa")


def test_names_are_given_one_by_one_and_at_least_one(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"takes names one by one, .* not a list"):
        diffusion_fast.optimize(pipe, ["sdpa", "fused_qkv"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes names of optimizations, and none is given"):
        diffusion_fast.optimize(pipe)


def test_a_pipeline_without_a_denoiser_is_refused(pipe: Any) -> None:
    pipe.unet = None
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has neither a unet nor a transformer"):
        diffusion_fast.optimize(pipe, "sdpa")
