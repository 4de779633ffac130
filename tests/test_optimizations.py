"""Each optimization leaves the state that it claims, on the bundled model, and says so when it can't."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, compilation, layers, numbers, quantization
from diffusion_fast.pipeline import _from_configs, build_pipeline, byte_tokenizer, call
from diffusion_fast.plan import plan_recipe
from diffusion_fast.spec import Recipe
from diffusion_fast.watch import Watch
from tests.conftest import CPU, H100, planned


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(*names: str, **changes: Any) -> tuple[Build, dict[str, dict[str, Any]]]:
    ordered = plan_recipe(MODELS["tiny"], Recipe("mine", names), CPU)
    spec = replace(planned(steps=2).rungs[0], optimizations=ordered, **changes)
    return build_pipeline(spec, lambda stage: None)


def processors(network: Any) -> set[type]:
    return {type(processor) for processor in network.attn_processors.values()}


@pytest.fixture(scope="module")
def plain_image() -> bytes:
    with torch.no_grad():
        return call(build()[0])[0].tobytes()


def test_the_baseline_is_fp32_vanilla_and_without_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    made, applied = build()
    assert applied == {}
    assert processors(made.pipe.unet) == processors(made.pipe.vae) == {AttnProcessor}
    for name in ("text_encoder", "text_encoder_2"):
        assert getattr(made.pipe, name).config._attn_implementation == "eager"
    assert {p.dtype for _, network in made.networks() for p in network.parameters()} == {torch.float32}
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_the_same_seed_gives_the_same_image_and_another_seed_another(plain_image: bytes) -> None:
    assert call(build()[0])[0].tobytes() == plain_image
    assert call(build(seed=1)[0])[0].tobytes() != plain_image


def test_batches_are_as_large_as_asked() -> None:
    assert len(call(build(batch_size=2)[0])) == 2


def test_every_dtype_starts_from_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for names in ((), ("bf16",)):
        made, _ = build(*names)
        original = made.pipe.prepare_latents

        def prepared(*args: Any, latents: Any = None, original: Any = original) -> Any:
            seen.append(args[-1] if latents is None else latents)
            return original(*args) if latents is None else original(*args, latents=latents)

        made.pipe.prepare_latents = prepared
        call(made)
    assert torch.equal(seen[0].to(torch.bfloat16), seen[1])


def test_bf16_reaches_every_parameter_and_proves_it() -> None:
    made, _ = build("bf16")
    assert made.proofs["bf16"]() == {"dtype": "bfloat16"}
    made.pipe.vae.decoder.conv_out.to(torch.float32)
    with pytest.raises(RuntimeError, match="bf16: vae still has parameters"):
        made.proofs["bf16"]()


def test_tf32_is_switched_on_by_name_alone() -> None:
    made, _ = build()
    assert OPTIMIZATIONS["tf32"].apply(made) == {"matmul": "high", "cudnn": True}
    build()
    assert torch.get_float32_matmul_precision() == "highest"


def test_sdpa_reaches_unet_vae_and_text_encoders() -> None:
    made, applied = build("sdpa")
    assert processors(made.pipe.unet) == processors(made.pipe.vae) == {AttnProcessor2_0}
    assert made.pipe.text_encoder_2.config._attn_implementation == "sdpa"
    attending = sum(isinstance(m, Attention) for part in (made.pipe.unet, made.pipe.vae) for m in part.modules())
    text = sum(encoder.config.num_hidden_layers for encoder in (made.pipe.text_encoder, made.pipe.text_encoder_2))
    assert applied["sdpa"] == {"attention_layers": attending + text}


def test_channels_last_changes_every_convolution_and_not_the_image(plain_image: bytes) -> None:
    made, applied = build("channels_last")
    weights = [p for part in (made.pipe.unet, made.pipe.vae) for p in part.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert sum(applied["channels_last"].values()) == len(weights)
    assert applied["channels_last"]["convolutions_changed"] > 0
    difference = torch.tensor(list(call(made)[0].tobytes())) - torch.tensor(list(plain_image))
    assert difference.abs().max() <= 1


def test_fused_projections_are_bit_identical_and_free_what_they_replace() -> None:
    separate, _ = build("sdpa")
    parameters = sum(p.numel() for p in separate.pipe.unet.parameters())
    fused, applied = build("sdpa", "fused_qkv")
    assert processors(fused.pipe.unet) == processors(fused.pipe.vae) == {FusedAttnProcessor2_0}
    assert sum(p.numel() for p in fused.pipe.unet.parameters()) == parameters
    assert applied["fused_qkv"]["freed_parameters"] > 0
    assert call(fused)[0].tobytes() == call(separate)[0].tobytes()


def test_conv_as_linear_swaps_what_has_128_channels() -> None:
    plain, _ = build()
    small = [
        module
        for network in (plain.pipe.unet, plain.pipe.vae)
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d)
        and module.kernel_size == (1, 1)
        and 128 in (module.in_channels, module.out_channels)
    ]
    made, applied = build("conv_as_linear")
    assert applied["conv_as_linear"] == {"convolutions": len(small)}
    assert small
    image = torch.rand(1, 128, 4, 4)
    made.pipe.vae.extra = torch.nn.Sequential(torch.nn.Conv2d(128, 32, 1), torch.nn.Conv2d(32, 64, 1))
    before = made.pipe.vae.extra(image)
    assert layers.conv_as_linear(made) == {"convolutions": 1}
    assert isinstance(made.pipe.vae.extra[1], torch.nn.Conv2d)
    assert not isinstance(made.pipe.vae.extra[0], torch.nn.Conv2d)
    torch.testing.assert_close(made.pipe.vae.extra(image), before)


def test_int8_takes_the_linears_that_have_the_rows_and_the_features() -> None:
    made, _ = build("bf16", "sdpa")
    account = quantization.int8_dynamic(made)
    unet = made.pipe.unet
    plain = {name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and _is_plain(m)}
    assert all("time" in name or "add_embedding" in name for name in plain), plain
    assert not _is_plain(unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2])
    assert 0 < account["quantized_linears"] < account["linears"]


def test_int8_leaves_the_shapes_alone_that_a_model_lists() -> None:
    made, _ = build("bf16", "sdpa")
    everything = quantization.int8_dynamic(made)["quantized_linears"]
    other, _ = build("bf16", "sdpa")
    other.model = replace(other.model, int8_excluded_shapes=((128, 128),))
    assert quantization.int8_dynamic(other)["quantized_linears"] < everything
    assert _is_plain(other.pipe.unet.mid_block.attentions[0].proj_in)


def _is_plain(linear: Any) -> bool:
    return type(linear.weight.data) is torch.Tensor


def test_int8_sets_no_global_inductor_flag() -> None:
    from torch._inductor import config

    before = config.get_config_copy()
    quantization.int8_dynamic(build("bf16")[0])
    assert config.get_config_copy() == before


def test_inductor_flags_are_the_seeds_and_the_fifth_comes_with_int8() -> None:
    made, applied = build("compile", "inductor_tuning")
    flags = {
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }
    assert applied["inductor_tuning"] == flags
    assert applied["compile"]["options"] == flags  # mode default adds none
    _, applied = build("bf16", "sdpa", "compile", "inductor_tuning", "int8_dynamic")
    assert applied["inductor_tuning"] == flags | {"force_fuse_int_mm_with_mul": True}
    assert made.pipe.unet._compiled_call_impl is not None
    assert made.pipe.vae.decoder._compiled_call_impl is not None


def test_compiling_proves_that_something_was_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made, _ = build("compile")
    with pytest.raises(RuntimeError, match="0 graphs"):  # nothing has been called yet
        made.proofs["compile"]()


def test_max_autotune_is_what_pytorch_says_it_is() -> None:
    _, applied = build("compile", compile_mode="max-autotune")
    assert applied["compile"]["options"] == torch._inductor.list_mode_options("max-autotune")


def test_the_account_of_compiling_ahead_is_recorded_where_the_gpu_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    from diffusion_fast.inductor import Prefetch

    monkeypatch.setattr(compilation, "parallel_coordinate_descent", lambda: Prefetch(kernels=3))
    monkeypatch.setitem(counters["stats"], "unique_graphs", 2)
    made, _ = build("compile", "inductor_tuning")
    assert "compiled_ahead" not in made.proofs["compile"]()  # a CPU has no descent
    made.spec = replace(made.spec, device="cuda")
    OPTIMIZATIONS["compile"].apply(made)
    assert made.proofs["compile"]()["compiled_ahead"]["kernels"] == 3


def test_the_fp16_fix_proves_that_the_vae_was_replaced() -> None:
    made, _ = build()
    assert numbers.vae_fp16_fix(made) == {}
    made.proofs["vae_fp16_fix"]()
    made.pipe.vae.register_to_config(force_upcast=True)
    with pytest.raises(RuntimeError, match="still asks to be upcast"):
        made.proofs["vae_fp16_fix"]()


def test_an_upcast_vae_decodes_in_fp32_what_was_denoised_in_16_bits() -> None:
    made, _ = build("bf16", "sdpa", "upcast_vae")
    seen: list[torch.dtype] = []
    made.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    made.denoiser.register_forward_hook(lambda *given: seen.append(given[-1][0].dtype))
    picture = call(made)[0]
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert made.proofs["upcast_vae"]() == {"vae_dtype": "float32"}
    assert made.proofs["bf16"]() == {"dtype": "bfloat16"}
    # What it decodes are the same latents, by the same weights.
    half, _ = build("bf16", "sdpa")
    given: list[torch.Tensor] = []
    half.pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    assert call(half)[0].tobytes() != picture.tobytes()
    vae = half.pipe.vae.to(torch.float32)
    (expected,) = half.pipe.image_processor.postprocess(vae.decode(given[0].float(), return_dict=False)[0])
    assert expected.tobytes() == picture.tobytes()
    made.pipe.vae.decoder.conv_out.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="upcast_vae: the VAE has parameters in"):
        made.proofs["upcast_vae"]()


def test_fp16_on_sdxl_takes_a_vae_in_fp32_for_one_that_was_fixed() -> None:
    names = plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16", "upcast_vae")), H100)
    assert names == ("fp16", "upcast_vae")
    with pytest.raises(ValueError, match="fp16 requires vae_fp16_fix or tiny_vae or upcast_vae on sdxl"):
        plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16",)), H100)
    with pytest.raises(ValueError, match="upcast_vae and vae_fp16_fix exclude each other"):
        plan_recipe(MODELS["sdxl"], Recipe("mine", ("fp16", "upcast_vae", "vae_fp16_fix")), H100)


def test_sdxl_is_built_at_its_full_size() -> None:
    """On the meta device, which has no memory: the published parameter counts."""
    spec = replace(planned(model="sdxl", weights="random").rungs[0], device="meta")  # type: ignore[arg-type]
    pipe = _from_configs(Build(MODELS["sdxl"], spec))
    sizes = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "vae")}
    sizes |= {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("text_encoder", "text_encoder_2")
    }
    assert sizes == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }


def test_the_seeds_list_leaves_537_of_sdxls_743_linears() -> None:
    spec = replace(planned(model="sdxl", weights="random").rungs[0], device="meta")  # type: ignore[arg-type]
    unet = _from_configs(Build(MODELS["sdxl"], spec)).unet
    shapes = [(m.in_features, m.out_features) for m in unet.modules() if isinstance(m, torch.nn.Linear)]
    assert len(shapes) == 743
    assert sum(shape not in MODELS["sdxl"].int8_excluded_shapes for shape in shapes) == 537


def test_the_byte_tokenizer_reads_any_text_and_ends_with_its_highest_id() -> None:
    ids = byte_tokenizer()("a café, 城", padding="max_length").input_ids
    assert len(ids) == 77
    assert ids[0] == 49406
    assert max(ids) == 49407
    assert 49407 not in ids[1:10]


@pytest.mark.parametrize("name", [pytest.param("compile", marks=pytest.mark.full), "regional_compile"])
def test_a_shape_that_comes_again_is_not_compiled_again(by_eager: list[dict[str, Any]], name: str) -> None:
    """Shapes in turn in one process, as a server gets them. The points of a sweep have a process each."""
    made, _ = build(name, height=96, width=96)

    def graphs(**changes: int) -> float:
        with Watch("cpu") as watch:
            call(replace(made, spec=replace(made.spec, **changes)))
        return float(watch.account(1)["recompilations"])

    assert graphs() > 0
    graphs(batch_size=2, height=64, width=64)
    assert [graphs(), graphs(batch_size=2, height=64, width=64)] == [0, 0]
    assert all(chosen["options"] == {} for chosen in by_eager)


def test_blocks_of_one_shape_share_a_graph(by_eager: list[dict[str, Any]], plain_image: bytes) -> None:
    made, applied = build("regional_compile")
    assert torch._dynamo.config.recompile_limit == compilation.MOST_GRAPHS
    assert torch._dynamo.config.accumulated_recompile_limit == compilation.MOST_GRAPHS
    assert call(made)[0].tobytes() == plain_image
    regions = applied["regional_compile"]["regions"]
    norms = regions.pop("GroupNorm")  # those outside of the blocks: one a transformer, and the last
    blocks = [module for module in made.pipe.unet.modules() if type(module).__name__ in regions]
    assert regions == {"ResnetBlock2D": 11, "BasicTransformerBlock": 5, "Downsample2D": 2, "Upsample2D": 2}
    assert norms == 5
    assert sum(module._compiled_call_impl is not None for module in blocks) == sum(regions.values())
    assert made.pipe.unet._compiled_call_impl is None
    found = made.proofs["regional_compile"]()
    assert 6 <= found["graphs"] < sum(regions.values()) + norms
    assert found["graph_breaks"] == 0


def test_a_denoiser_without_known_blocks_is_refused() -> None:
    made, _ = build()
    made.pipe.unet = torch.nn.Sequential(torch.nn.Linear(2, 4))
    made.pipe.unet._repeated_blocks = []  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="has none of the blocks"):
        OPTIMIZATIONS["regional_compile"].apply(made)


@torch.compiler.config.patch(cache_key_tag="")
def test_the_fastest_attention_kernel_replaces_slower_ones_but_not_the_one_that_takes_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    allowed: dict[str, bool] = {}
    seconds = {"cudnn": float("inf"), "flash": 0.002, "mem_efficient": 0.003}

    def timed(name: str, calls: Any) -> dict[Any, float]:
        asked.append(calls)
        return dict.fromkeys(calls, seconds[name] / sum(calls.values()))

    monkeypatch.setattr(layers, "_attention_seconds", timed)
    for name in layers.KERNELS:
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", functools.partial(allowed.__setitem__, name))
    made, _ = build("bf16", "sdpa")
    attend = torch.nn.functional.scaled_dot_product_attention
    account = layers.attention_backend(made)
    assert torch.compiler.config.cache_key_tag == " attention by flash"
    assert account["backend"] == "flash"
    # What cuDNN can't do the last one does.
    assert account["step_ms"] == pytest.approx({"cudnn": 3.0, "flash": 2.0, "mem_efficient": 3.0})
    assert allowed == {"cudnn": False, "flash": True, "mem_efficient": True}
    # Each of the UNet's layers once, and none of the text encoders' or the VAE's: two rows under guidance.
    assert sum(asked[0].values()) == len(made.pipe.unet.attn_processors)
    assert {shape[0] for *tensors, _ in asked[0] for shape, _ in tensors} == {2}
    assert all(torch.empty_strided(*each).shape == each[0] for *tensors, _ in asked[0] for each in tensors)
    assert {mask for *_, mask in asked[0]} == {None}
    assert torch.nn.functional.scaled_dot_product_attention is attend
    seconds["flash"] = seconds["mem_efficient"] = float("inf")
    with pytest.raises(RuntimeError, match="none of PyTorch's fused kernels"):
        layers.attention_backend(made)
