"""Recipes as plain scripts: they paint what the rung paints, bit for bit, and don't need this package."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization.quant_api
from click.testing import CliRunner
from PIL import Image

from diffusion_fast import plan, script
from diffusion_fast.cli import main
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, approximation, compiles, quantization
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.spec import Model, Recipe, RunSpec
from tests.conftest import CPU, H100
from tests.miniatures import NAMES, saved

OURS = {
    *("feature_reuse", "feature_forecast", "persistent_reductions", "ahead_of_time", "cuda_graph", "attention_backend"),
    *(
        "fused_geglu",
        "fused_add_norm",
        "no_layout_copies",
        "group_norm_kernels",
        "device_postprocessing",
        "prompt_projections",
        "time_projections",
        "sliced_vae_attention",
        "attention_kernel",
        "no_module_walks",
    ),
    *("fp8_rows", "int8_rows", "fp8_convolutions", "int8_convolutions", "prompt_embedding_cache"),
}
EAGER = (
    (),
    ("bf16", "sdpa"),
    ("bf16", "sdpa", "fused_qkv"),
    ("guidance_cutoff",),
    ("bf16", "int8_weight_only", "upcast_vae"),
    ("bf16", "int4_weight_only", "vae_tiling"),
    ("bf16", "fp8_weight_only"),
    ("bf16", "layerwise_casting"),
    ("bf16", "sdpa", "channels_last", "fused_qkv", "conv_as_linear", "guidance_cutoff"),
)
COMPILED = (
    ("sdpa", "compile", "inductor_tuning"),
    ("regional_compile", "channels_last"),
    ("bf16", "compile", "int8_dynamic", "inductor_tuning"),
    ("bf16", "sdpa", "fused_qkv", "regional_compile", "int8_dynamic"),
)


def planned(model: Model, names: tuple[str, ...], device: plan.Device = CPU, **settings: Any) -> RunSpec:
    (spec,) = plan.plan_ladder(
        "code", (Recipe("mine", names),), model, device, plan.Settings(**{"steps": 4} | settings)
    ).rungs
    return spec


def painted_by_the_rung(spec: RunSpec) -> list[bytes]:
    with torch.no_grad():
        return [image.tobytes() for image in call(build_pipeline(spec, lambda stage: None)[0])]


RUNG = """
import json
import torch
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.spec import RunSpec
with torch.no_grad():
    images = call(build_pipeline(RunSpec.from_dict(json.load(open("spec.json"))), lambda stage: None)[0])
for number, image in enumerate(images):
    image.save(f"rung-{number}.png")
"""


def painted_by_a_rung_of_its_own(spec: RunSpec, folder: Path) -> list[bytes]:
    """In another process, as rungs are: what this one has compiled before, of other sizes, changes what it compiles."""
    (folder / "spec.json").write_text(json.dumps(spec.to_dict()))
    subprocess.run((sys.executable, "-c", RUNG), cwd=folder, check=True)
    return [Image.open(file).tobytes() for file in sorted(folder.glob("rung-*.png"))]


def run_here(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's variables, after this interpreter: quicker than one of its own, which is tested too."""
    monkeypatch.chdir(folder)
    (folder / "script.py").write_text(text)
    with torch.no_grad():  # it turns gradients off, and this turns them on again
        return runpy.run_path("script.py")


def painted_here(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    run_here(text, folder, monkeypatch)
    return pictures(folder)


def pictures(folder: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(folder.glob("image-*.png"))]


def in_a_clean_interpreter(text: str, folder: Path) -> list[bytes]:
    (folder / "script.py").write_text(text)
    alone = "import runpy, sys; sys.modules['diffusion_fast'] = None; runpy.run_path('script.py')"
    done = subprocess.run((sys.executable, "-I", "-c", alone), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pictures(folder)


@pytest.mark.parametrize("names", EAGER, ids="-".join)
def test_a_script_paints_what_the_rung_paints(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = planned(MODELS["tiny"], names, seed=5)
    assert painted_here(script.write(MODELS["tiny"], spec), tmp_path, monkeypatch) == painted_by_the_rung(spec)


@pytest.mark.parametrize("names", COMPILED, ids="-".join)
def test_a_script_has_the_same_modules_compiled_with_the_same_options(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_module(module: torch.nn.Module, **how: Any) -> None:
        compiled.append((type(module).__name__, how))

    def compile_function(function: Any, **how: Any) -> Any:
        compiled.append((type(function.args[0]).__name__, how))
        return function

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch, "compile", compile_function)
    spec = planned(MODELS["tiny"], names)
    by_the_rung = painted_by_the_rung(spec)
    of_the_rung, compiled[:] = list(compiled), []
    assert painted_here(script.write(MODELS["tiny"], spec), tmp_path, monkeypatch) == by_the_rung
    assert compiled == [(name, {key: how[key] for key in how if how[key] is not None}) for name, how in of_the_rung]
    assert len(compiled) >= 2


def test_a_script_in_a_clean_interpreter_paints_the_same_batch(tmp_path: Path) -> None:
    names = (*EAGER[-1], "vae_slicing")
    spec = planned(MODELS["tiny"], names, batch_size=2, prompt="a 'quoted' $prompt", guidance_scale=3.0)
    found = in_a_clean_interpreter(script.write(MODELS["tiny"], spec), tmp_path)
    assert len(found) == 2
    assert found == painted_by_a_rung_of_its_own(spec, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("names", [*EAGER[:-1], ("bf16", "sdpa", "compile")], ids="-".join)
def test_every_script_in_an_interpreter_of_its_own(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is so in earnest; the script then finds the rung's kernels, if it compiles the same."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    spec = planned(MODELS["tiny"], names)
    rung = painted_by_a_rung_of_its_own(spec, tmp_path)
    assert in_a_clean_interpreter(script.write(MODELS["tiny"], spec), tmp_path) == rung


@pytest.mark.parametrize("name", NAMES)
def test_a_script_paints_what_the_rung_paints_by_every_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plan.find_model(str(saved(name, tmp_path)))
    wanted = ("bf16", "sdpa", "fused_qkv")
    names = tuple(each for each in wanted if plan.applies(OPTIMIZATIONS[each], MODELS[name]))
    spec = planned(model, names, height=64, width=64, steps=2)
    assert painted_here(script.write(model, spec), tmp_path, monkeypatch) == painted_by_the_rung(spec)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("pixart-alpha", ("first_block_cache",)),
        ("flux-dev", ("sdpa", "pyramid_attention_broadcast")),
        ("sana", ("bf16", "sdpa", "int8_weight_only", "vae_tiling")),
        ("sd3.5-medium", ("bf16", "sdpa", "layerwise_casting")),
    ],
)
def test_a_transformers_script_skips_and_stores_what_the_rung_does(
    name: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = 256 if "vae_tiling" in names else 64  # a tile has four latents at least, of 32 pixels in Sana
    model = plan.find_model(str(saved(name, tmp_path)))
    without = tuple({*names, "sdpa"} - {names[-1]})
    spec, plain = (planned(model, each, height=pixels, width=pixels, steps=5) for each in (names, without))
    monkeypatch.setattr(approximation, "FIRST_BLOCK_CHANGE", 10.0)  # else too large in random networks
    text = script.write(model, spec).replace("threshold=0.05", "threshold=10.0")
    painted = painted_here(text, tmp_path, monkeypatch)
    assert painted == painted_by_the_rung(spec) != painted_by_the_rung(plain)


def test_a_script_tells_the_branches_of_guidance_apart_as_the_rung_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = (("negative_prompt", "blurred"), ("true_cfg_scale", 2.0))  # FLUX then calls its denoiser twice a step
    model: Any = replace(plan.find_model(str(saved("flux-dev", tmp_path))), call_arguments=twice)
    names = ("sdpa", "pyramid_attention_broadcast")
    spec, plain = (planned(model, each, height=64, width=64, steps=8) for each in (names, names[:1]))
    painted = painted_here(script.write(model, spec), tmp_path, monkeypatch)
    assert painted == painted_by_the_rung(spec) != painted_by_the_rung(plain)


@pytest.mark.parametrize(
    ("name", "optimization", "least"),
    [
        ("tiny", "int8_dynamic", 8),
        ("tiny", "fp8_dynamic_tensor", 40),
        ("pixart-alpha", "int8_dynamic", 8),
        ("pixart-alpha", "int8_dynamic", 18),
        ("pixart-alpha", "int8_dynamic", 1e6),
        ("pixart-alpha", "fp8_dynamic", 18),
    ],
)
def test_a_script_gives_torchao_the_layers_that_the_rung_gives_it(
    name: str, optimization: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with enough to compute, where some have, and else all that it can multiply."""
    monkeypatch.setitem(quantization.LEAST_INTENSITY, "cpu", least)
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda granularities: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    model = MODELS["tiny"] if name == "tiny" else plan.find_model(str(saved(name, tmp_path)))
    spec = planned(model, ("bf16", "sdpa", "compile"), height=64, width=64, steps=2)
    spec = replace(spec, optimizations=("bf16", "sdpa", optimization, "compile"))  # which a CPU isn't planned for
    with torch.no_grad():
        expected = quantized(build_pipeline(spec, lambda stage: None)[0].pipe)
    assert quantized(run_here(script.write(model, spec), tmp_path, monkeypatch)["pipe"]) == expected
    assert expected


def test_a_script_leaves_the_shapes_alone_that_a_model_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    model = replace(MODELS["tiny"], int8_excluded_shapes=((128, 128), (64, 512)))
    spec = planned(model, ("bf16", "sdpa", "compile", "int8_dynamic"), height=64, width=64, steps=1)
    with torch.no_grad():
        expected = quantized(build_pipeline(spec, lambda stage: None)[0].pipe)
    assert quantized(run_here(script.write(model, spec), tmp_path, monkeypatch)["pipe"]) == expected != set()


def quantized(pipe: Any) -> set[str]:
    """The linear layers whose weights torchao has made its own, by their names."""
    return {
        f"{part} {name}"
        for part, network in pipe.components.items()
        if isinstance(network, torch.nn.Module)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data).__module__.startswith("torchao")
    }


@pytest.mark.parametrize("name", ["flux-dev", "sd3.5-medium", "sana"])
def test_attention_that_this_package_writes_out_is_refused_by_name(name: str) -> None:
    model = MODELS[name]
    reason = f"{name} can't be printed without sdpa: attention that is written out is code of this package"
    with pytest.raises(ValueError, match=reason):
        script.write(model, planned(model, ("bf16",), weights="pretrained"))
    assert "_pack_latents" in script.write(model, planned(model, ("bf16", "sdpa"), weights="pretrained"))


def test_a_folder_of_ones_own_with_parts_left_out_and_another_scheduler_and_vae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny().save_pretrained(tmp_path / "vae")
    folder = saved("sd15", tmp_path)
    model = replace(
        plan.find_model(str(folder)),
        name="mine\nand 'mine'",
        tiny_vae_hub_id=str(tmp_path / "vae"),
        scheduler="DPMSolverMultistepScheduler",
    )
    spec = planned(model, ("tiny_vae", "bf16"), height=64, width=64)
    text = script.write(model, spec)
    assert "    safety_checker=None,\n" in text and "    **parts,\n" in text
    assert painted_here(text, tmp_path, monkeypatch) == painted_by_the_rung(spec)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_an_optimization_is_printed_or_refused_by_name(model: str, name: str) -> None:
    names = dict.fromkeys(["sdpa", name] if MODELS[model].written_out else [name])
    spec = replace(planned(MODELS[model], (), H100, weights="pretrained"), optimizations=tuple(names))
    if name in OURS:
        with pytest.raises(ValueError, match=f"^{name} can't be printed: that takes code of this package"):
            script.write(MODELS[model], spec)
    elif not MODELS[model].outliers:
        text = script.write(MODELS[model], spec)
        assert f"\n# {name}: {OPTIMIZATIONS[name].summary}\n" in text
        assert "diffusion_fast" not in {name.partition(".")[0] for name in imported(text)}
        assert ("compile_options = {}" in text) == (compiles([name]) or name == "inductor_tuning")


def imported(text: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def code(*arguments: str) -> Any:
    return CliRunner().invoke(main, ("code", *arguments), catch_exceptions=False)


def test_the_command_prints_a_ladders_rung_for_a_gpu_that_is_not_here() -> None:
    done = code("int8-dynamic", "--model", "sdxl", "--device", "cuda", "--steps", "7")
    assert done.exit_code == 0
    assert "'stabilityai/stable-diffusion-xl-base-1.0'" in done.stdout
    assert 'list_mode_options("max-autotune")' in done.stdout
    assert "'num_inference_steps': 7," in done.stdout
    assert "force_fuse_int_mm_with_mul" in done.stdout
    order = [done.stdout.index(f"# {name}:") for name in ("tf32", "bf16", "sdpa", "int8_dynamic", "compile")]
    assert order == sorted(order)


def test_what_a_device_lacks_is_said_beside_the_script() -> None:
    done = code("bf16", "--device", "cpu")
    assert (done.exit_code, "# tf32" in done.stdout) == (0, False)
    assert done.stderr == "Note: tf32 is left out: it runs on another device than this cpu.\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("--with", "sdpa,prompt_projections,device_postprocessing"),
            "device_postprocessing, prompt_projections can't",
        ),
        (("compiled",), "There is no recipe 'compiled': the nearest are compile"),
        (("sdpa", "--ladder", "nonsense"), "There is no ladder 'nonsense'"),
        (("--ladder", "nonsense"), "There is no ladder 'nonsense'"),
        (("--ladder", "fast"), "--ladder fast says where a recipe comes from, and none of its recipes is named"),
        (("fused-qkv", "--model", "sana"), "the rung fused-qkv is left out: here it would be compile again"),
        (("baseline", "--model", "flux-schnell"), "flux-schnell is too large for that"),
        (("--model", "sdxl", "--weights", "random"), "Random weights can't be printed"),
        (("--model", "sdxl-outliers"), "sdxl-outliers can't be printed"),
        (("--weights", "./nowhere"), "is neither embedded, pretrained, random nor a folder"),
        (("--with", "fused_qkv"), "fused_qkv requires sdpa"),
    ],
)
def test_what_cant_be_printed_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], reason: str) -> None:
    done = code(*arguments, "--device", "cpu")
    assert (done.exit_code, reason in done.stderr, done.stdout) == (2, True, ""), done.output
