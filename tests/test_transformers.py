"""Denoisers that are transformers: what differs between them is data, and what applies to them works on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_fast
from diffusion_fast import measure, onestep, pipeline, plan, scores, spool, worker
from diffusion_fast.models import MODELS, PACKAGE, WEIGHTS_FILE, check_weights
from diffusion_fast.optimizations import OPTIMIZATIONS, Build, compilation
from diffusion_fast.pipeline import _from_config, call, word_tokenizer
from diffusion_fast.plan import plan_recipe
from diffusion_fast.projections import Projection
from diffusion_fast.recipes import LOSSLESS
from diffusion_fast.spec import Recipe
from tests.conftest import CPU, H100, planned
from tests.miniatures import NAMES, miniature
from tests.test_models import pixels, small
from tests.test_onestep import recorded_in

TRANSFORMERS = tuple(name for name in NAMES if MODELS[name].denoiser == "transformer")
CLASSES = ("flux-dev", "sd3.5-medium", "sana", "pixart-sigma")  # a model of each denoiser's class


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Kernels(TorchDispatchMode):
    """Counts calls of fused attention kernels."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "scaled_dot_product" in str(function)
        return function(*args, **(kwargs or {}))


def kernels_in_a_step(build: Build) -> int:
    first, *_ = recorded_in(replace(build, spec=replace(build.spec, steps=build.model.least_steps)), set())
    with Kernels() as kernels:
        onestep.replay(build, [first])
    return kernels.calls


# --- planning --------------------------------------------------------------------------------------------------------


def test_what_a_model_lacks_is_named_as_optimizations_name_it() -> None:
    needed = {known.model_needs for known in OPTIMIZATIONS.values()}
    assert all(set(model.lacks) <= needed for model in MODELS.values())
    lacking = {name for model in MODELS.values() for name in model.lacks}
    assert all(need == "" or need in lacking or hasattr(MODELS["tiny"], need) for need in needed)


@pytest.mark.parametrize(
    ("model", "name", "beside"),
    [
        ("sana", "fused_qkv", ("sdpa",)),
        ("sd3.5-medium", "fused_qkv", ("sdpa",)),
        ("sana", "group_norm_kernels", ("channels_last",)),
        ("sana", "conv_as_linear", ()),
        ("sana", "tiny_vae", ()),
        ("flux-dev", "vae_fp16_fix", ()),
        ("flux-schnell", "fused_geglu", ("bf16",)),
    ],
)
def test_what_a_transformer_lacks_is_refused_in_one_sentence(model: str, name: str, beside: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} can't be applied to {model}: it has no ") as refusal:
        plan_recipe(MODELS[model], Recipe("mine", (*beside, name)), CPU)
    assert str(refusal.value).count(".") == 1 + model.count(".")


def test_what_a_model_cannot_take_at_all_is_told_before_what_would_have_to_be_added() -> None:
    cannot = [(m, name) for m in MODELS.values() for name, known in OPTIMIZATIONS.items() if plan.lacked(known, m)]
    assert len(cannot) > 50
    for model, name in cannot:
        with pytest.raises(ValueError, match=f"{name} can't be applied to {model.name}: it has no "):
            plan_recipe(model, Recipe("mine", (name,)), CPU)


@pytest.mark.parametrize("name", ["compile", "regional_compile", "ahead_of_time"])
def test_attention_that_is_written_out_is_not_compiled(name: str) -> None:
    for model in ("flux-dev", "sd3.5-medium", "sana"):
        with pytest.raises(ValueError, match=f"{name} requires sdpa on {model}: add sdpa"):
            plan_recipe(MODELS[model], Recipe("mine", ("bf16", name)), CPU)
    assert plan_recipe(MODELS["pixart-sigma"], Recipe("mine", ("bf16", name)), CPU)  # diffusers has a processor


def test_what_needs_guidance_of_two_rows_is_not_for_models_with_another_or_none() -> None:
    cutoff = replace(OPTIMIZATIONS["guidance_cutoff"], model_needs="")
    found = {name: plan.lacked(cutoff, MODELS[name]) for name in TRANSFORMERS}
    assert {name for name, lacking in found.items() if lacking == "guidance by a second row of each step"} == {
        "flux-schnell",
        "flux-dev",
    }
    with pytest.raises(ValueError, match="flux-schnell was distilled to do without guidance: leave --guidance out"):
        planned(model="flux-schnell", guidance_scale=3.5)
    assert planned(model="flux-dev", guidance_scale=2.0).rungs[0].guidance_scale == 2.0


@pytest.mark.parametrize(("model", "multiple"), [("flux-dev", 16), ("sana", 32), ("sdxl", 8)])
def test_sizes_that_a_model_would_paint_otherwise_are_refused(model: str, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"height must be a multiple of {multiple}, not {512 + multiple // 2}"):
        planned(model=model, height=512 + multiple // 2)
    assert planned(model=model, height=512 + multiple).rungs[0].height == 512 + multiple


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_the_fast_ladder_on_a_gpu_has_all_that_applies(model: str) -> None:
    rungs = {spec.recipe: set(spec.optimizations) for spec in planned("fast", H100, model).rungs}
    expected = {name for name in LOSSLESS.optimizations if plan.applies(OPTIMIZATIONS[name], MODELS[model])}
    assert expected in rungs.values()
    assert expected >= {"tf32", "bf16", "sdpa", "attention_backend", "regional_compile", "cuda_graph"}
    assert (rungs["int8"], rungs["fp8"]) == (expected | {"int8_rows"}, expected | {"fp8_rows"})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flux-dev"])
def test_what_is_said_of_a_models_layers_is_so_at_its_full_size(name: str) -> None:
    model = MODELS[name]
    modules = []
    for part in (model.denoiser, "vae"):
        with torch.device("meta"):
            config = json.loads((PACKAGE / "configs" / model.configs / f"{part}.json").read_text())
            modules += list(_from_config(config).modules())
    convolutions = [each for each in modules if isinstance(each, torch.nn.Conv2d) and each.kernel_size == (1, 1)]
    small_1x1 = any(128 in (each.in_channels, each.out_channels) for each in convolutions)
    group_norms = any(isinstance(each, torch.nn.GroupNorm) for each in modules)
    assert small_1x1 != ("small_1x1_convolutions" in model.lacks)
    assert group_norms != ("group_norms" in model.lacks)


def test_weights_in_several_files_are_found_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    index = f"transformer/{WEIGHTS_FILE}.index.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: "a path" if name == index else None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    check_weights(MODELS["flux-schnell"], "pretrained")


# --- what is built ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["flux-dev", "sd3.5-medium", "sana"])
def test_the_baseline_writes_its_scores_out_and_sdpa_does_not(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanilla, _ = small(model, tmp_path, monkeypatch)
    assert kernels_in_a_step(vanilla) == 0
    fused, applied = small(model, tmp_path, monkeypatch, "sdpa")
    own = sum(
        not isinstance(each, scores.SanaLinearAttnProcessor2_0) for each in fused.denoiser.attn_processors.values()
    )
    assert kernels_in_a_step(fused) == own > 0
    assert applied["sdpa"]["attention_layers"] >= own


def test_guidance_of_a_transformer_ends_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = small("sd3.5-medium", tmp_path, monkeypatch, "sdpa", "guidance_cutoff", steps=6)
    rows: list[int] = []
    made.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    found = pixels(made)
    assert rows == [2, 2, 2, 1, 1, 1]
    assert made.proofs["guidance_cutoff"]() == {"guided_steps": 3}
    plain = pixels(small("sd3.5-medium", tmp_path, monkeypatch, "sdpa", steps=6)[0])
    assert 0 < (found - plain).norm() / plain.norm() < 0.6


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_is_what_the_fused_kernels_compute(masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 8) for tokens in (5, 7, 7))
    mask = torch.randn(2, 1, 5, 7) if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(scores.attend(query, key, value, attn_mask=mask), expected)
    with pytest.raises(NotImplementedError, match="isn't written out"):
        scores.attend(query, key, value, is_causal=True)


def test_written_out_attention_knows_shared_keys_and_masks_of_booleans() -> None:
    numbers = torch.Generator().manual_seed(0)
    query, mask = torch.randn(2, 6, 5, 8, generator=numbers), torch.rand(2, 1, 5, 7, generator=numbers) > 0.4
    key, value = (torch.randn(2, 3, 7, 8, generator=numbers) for _ in range(2))
    mask[..., 0, :] = False  # a row without any
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(scores.attend(query, key, value, attn_mask=mask, enable_gqa=True), expected)


def test_a_text_encoder_that_caps_its_scores_keeps_its_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, applied = small("sana", tmp_path, monkeypatch, "sdpa")
    assert applied["sdpa"]["left"] == ["text_encoder"]
    assert made.pipe.text_encoder.config._attn_implementation == "eager"


def test_flux_fuses_both_kinds_of_its_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separate, _ = small("flux-dev", tmp_path, monkeypatch, "sdpa")
    fused, applied = small("flux-dev", tmp_path, monkeypatch, "sdpa", "fused_qkv")
    # Two blocks of two streams, two of one, and the VAE's encoder and decoder.
    assert applied["fused_qkv"]["attention_layers"] == 2 + 2 + 2
    names = {name.rpartition(".")[2] for name, _ in fused.denoiser.named_modules()}
    assert names >= {"to_qkv", "to_added_qkv"}
    assert not names & {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    sizes = [sum(each.numel() for each in made.denoiser.parameters()) for made in (separate, fused)]
    assert sizes[0] == sizes[1]


def test_packed_latents_are_the_same_noise_as_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = small("flux-dev", tmp_path, monkeypatch)
    seen: list[torch.Tensor] = []
    prepare = made.pipe.prepare_latents

    def noting(*args: Any) -> Any:
        seen.append(args[-1])
        return prepare(*args)

    made.pipe.prepare_latents = noting
    call(replace(made, spec=replace(made.spec, batch_size=2)))
    (rows,) = seen
    height, width = made.spec.height, made.spec.width
    noise = torch.randn((2, 16, height // 8, width // 8), generator=torch.Generator("cpu").manual_seed(made.spec.seed))
    assert rows.shape == (2, height * width // 256, 64)
    assert torch.equal(made.pipe._unpack_latents(rows, height, width, 8), noise)


def test_the_word_tokenizer_makes_as_many_tokens_as_there_are_words() -> None:
    tokenizer = word_tokenizer(512)
    ids = tokenizer("a café, 城 a", padding="max_length", max_length=8).input_ids
    assert len(ids) == 8
    assert ids[0] == ids[4] != ids[1]
    assert ids[5:] == [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id]
    assert all(2 < each < 512 for each in ids[:5])


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", ["prompt", "int8"])
@pytest.mark.parametrize("model", NAMES)
def test_the_fast_recipes_paint_the_same_picture(
    model: str, rung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    spec = next(spec for spec in planned("fast", CPU, model).rungs if spec.recipe == rung)
    plain = pixels(small(model, tmp_path, monkeypatch)[0])
    made, applied = small(model, tmp_path, monkeypatch, *spec.optimizations)
    assert tuple(applied) == spec.optimizations
    assert rung != "int8" or applied["int8_rows"]["quantized_linears"] > 0
    assert (pixels(made) - plain).norm() / plain.norm() < (0.04 if rung == "prompt" else 0.1)
    found = made.proofs["prompt_projections"]()
    assert 0 < found["projected"] < found["steps"]


@pytest.mark.parametrize("model", CLASSES)
def test_single_steps_come_back_in_the_dtypes_that_the_pipeline_gives(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was compiled would have to be compiled anew, and a scheduler's time step be rounded to bf16."""
    reference, _ = small(model, tmp_path, monkeypatch)
    steps = recorded_in(reference, {"bfloat16"})
    made, _ = small(model, tmp_path, monkeypatch, "bf16", "sdpa")
    made.denoiser.compile(fullgraph=True, backend="eager", dynamic=False)
    call(made)
    found = onestep.compare(made.spec, onestep.replay(made, steps), steps)
    assert found["ok"]
    assert all(0 < each < 0.05 for each in found["floor"])


@torch._inductor.config.patch(fx_graph_cache=False)
@pytest.mark.parametrize("model", CLASSES)
def test_a_block_of_each_denoiser_compiles_as_one_graph(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Inductor in earnest, the denoiser's last block alone: all of them, and a decoder, take minutes."""
    names = ["bf16", "sdpa", "channels_last", "prompt_projections"]
    names += ["fused_qkv"] if plan.applies(OPTIMIZATIONS["fused_qkv"], MODELS[model]) else []
    eager = pixels(small(model, tmp_path, monkeypatch, *names)[0])
    regions = compilation._regions
    monkeypatch.setattr(compilation, "_regions", lambda denoiser: regions(denoiser)[-1:])
    made, _ = small(model, tmp_path, monkeypatch, *names)
    made.pipe.vae.decoder.compile = lambda **_: None
    torch._dynamo.utils.counters.clear()
    assert sum(OPTIMIZATIONS["regional_compile"].apply(made)["regions"].values()) == 1
    found = pixels(made)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (found - eager).norm() / eager.norm() < 0.02


@pytest.mark.parametrize("model", CLASSES)
def test_a_pipeline_of_ones_own_takes_what_applies(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = small(model, tmp_path, monkeypatch, "sdpa")
    before = pixels(made)
    wanted = ("sdpa", "channels_last", "device_postprocessing", "fused_qkv", "group_norm_kernels", "prompt_projections")
    names = [name for name in wanted if plan.applies(OPTIMIZATIONS[name], MODELS[model])]
    size = {"height": made.spec.height, "width": made.spec.width}
    assert diffusion_fast.optimize(made.pipe, *names, example=size) is made.pipe
    assert (pixels(made) - before).norm() / before.norm() < 0.005
    assert any(isinstance(module, Projection) for module in made.denoiser.modules())
    if len(names) < len(wanted):
        with pytest.raises(ValueError, match=f"fused_qkv can't be applied to {MODELS[model].pipeline}: it has no "):
            diffusion_fast.optimize(small(model, tmp_path, monkeypatch, "sdpa")[0].pipe, "sdpa", "fused_qkv")


@pytest.mark.parametrize("model", ["flux-dev", "sd3.5-medium"])  # diffusers has none for PixArt
def test_a_transformer_of_ones_own_keeps_its_adapter(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_eager: list[dict[str, Any]]
) -> None:
    made, _ = small(model, tmp_path, monkeypatch, "sdpa")
    plain = pixels(made)
    made.denoiser.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    before = pixels(made)
    assert (before - plain).norm() / plain.norm() > 0.001
    size = {"height": made.spec.height, "width": made.spec.width}
    names = "sdpa", "channels_last", "regional_compile", "device_postprocessing", "no_module_walks"
    diffusion_fast.optimize(made.pipe, *names, example=size)
    assert (pixels(made) - before).norm() / before.norm() < 0.005
    assert by_eager


@pytest.mark.parametrize("model", ["flux-dev", "sana"])
def test_a_measurement_is_compared_with_its_reference(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: another wouldn't know the miniature. Ten calls, however short: it isn't about their time."""
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)
    monkeypatch.setitem(MODELS, model, miniature(model, tmp_path))
    ladder = planned("cpu", model=model, weights="random", steps=2)
    folder = spool.save_ladder(tmp_path / "spool", ladder)
    (folder / "reference").mkdir()
    called: list[str] = []
    with measure.standing_in(pipeline, "call", lambda whole: lambda made: called.append(made.dtype) or whole(made)):
        worker.make_reference(ladder.reference, folder / "reference", lambda stage: None)
    assert called == ["float32", "float32", "bfloat16"]  # an image, what it takes, an image: none for steps alone
    run_folder = spool.run_folder(folder, ladder.rungs[0])
    run_folder.mkdir(parents=True)
    result = worker.measure_rung(ladder.rungs[0], run_folder, lambda stage: None)
    assert result.problem == ""
    assert result.image_repeats
    assert result.fidelity_ok
    assert result.psnr_eager_db is not None
    assert result.psnr_eager_db > 40
    assert result.limits["mfu"] > 0  # no more: the ceiling is timed, and this machine may have other work meanwhile
    assert result.phases["text_encoding_s"] > 0
