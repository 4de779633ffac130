"""Recipes as plain scripts: they paint what the rung paints, bit for bit, and don't need this package."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffusion_fast import plan, script
from diffusion_fast.cli import main
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import OPTIMIZATIONS, compiles
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
    ),
    *("fp8_rows", "int8_rows", "fp8_convolutions", "int8_convolutions", "prompt_embedding_cache"),
}
EAGER = (
    (),
    ("bf16", "sdpa"),
    ("bf16", "sdpa", "fused_qkv"),
    ("guidance_cutoff",),
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


def painted_here(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """By this interpreter: quicker than by one of its own, which is tested too."""
    monkeypatch.chdir(folder)
    (folder / "script.py").write_text(text)
    with torch.no_grad():  # it turns gradients off, and this turns them on again
        runpy.run_path("script.py")
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
    spec = planned(MODELS["tiny"], EAGER[-1], batch_size=2, prompt="a 'quoted' $prompt", guidance_scale=3.0)
    found = in_a_clean_interpreter(script.write(MODELS["tiny"], spec), tmp_path)
    assert len(found) == 2
    assert found == painted_by_the_rung(spec)


@pytest.mark.full
@pytest.mark.parametrize("names", [*EAGER[:-1], ("bf16", "sdpa", "compile")], ids="-".join)
def test_every_script_in_an_interpreter_of_its_own(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is so in earnest; the script then finds the rung's kernels, if it compiles the same."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    spec = planned(MODELS["tiny"], names)
    assert in_a_clean_interpreter(script.write(MODELS["tiny"], spec), tmp_path) == painted_by_the_rung(spec)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_paints_what_the_rung_paints_by_every_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plan.find_model(str(saved(name, tmp_path)))
    spec = planned(model, ("bf16", "sdpa"), height=64, width=64, steps=2)
    assert painted_here(script.write(model, spec), tmp_path, monkeypatch) == painted_by_the_rung(spec)


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
        with pytest.raises(ValueError, match=f"^{name} can't be printed: what they do is code of this package"):
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
        (("--model", "sdxl", "--weights", "random"), "Random weights can't be printed"),
        (("--model", "sdxl-outliers"), "sdxl-outliers can't be printed"),
        (("--weights", "./nowhere"), "is neither embedded, pretrained, random nor a folder"),
        (("--with", "fused_qkv"), "fused_qkv requires sdpa"),
    ],
)
def test_what_cant_be_printed_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], reason: str) -> None:
    done = code(*arguments, "--device", "cpu")
    assert (done.exit_code, reason in done.stderr, done.stdout) == (2, True, ""), done.output
