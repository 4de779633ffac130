"""Ladders that were never measured, for tests of everything that comes after a measurement."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from diffusion_fast import plan, rows, spool, tracking
from diffusion_fast.spec import Failure, Ladder, Outcome, Result, RunSpec

CPU = plan.Device("cpu", "CPU")
H100 = plan.Device("cuda", "NVIDIA H100", (9, 0))

# Files that take longest, the longest first. They begin, so that no process is left alone with one of them at the end.
LONGEST = [f"test_{name}.py" for name in ("ladders", "ahead", "transformers", "models", "end_to_end", "judge")]


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put a file's tests into one process, or a model's where a file goes through all of them."""
    for item in items:
        chosen = getattr(item, "callspec", None)
        model = chosen.params.get("model", "") if chosen and item.path.name == "test_ladders.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {model}"))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def script(name: str) -> ModuleType:
    """A script of the project's as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def only_what_is_new_is_searched_for_garbage() -> None:
    """Libraries and what earlier tests left are millions of objects, a second and a half of each full collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_bf16_convolutions() -> Iterator[None]:
    """On a CPU without units for bf16 a convolution in it takes PyTorch a hundred times what it takes in fp32.

    There, in the tests' own processes, it is computed in fp32 and rounded, which is what the units do. Not in workers.
    """
    torch: Any = sys.modules.get("torch")  # tests that do without it aren't to wait for its import
    if torch is None or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    name = "_slow_conv2d_forward"
    kept = torch.library.get_kernel(f"aten::{name}", "CPU")

    def convolve(keys: Any, images: Any, weight: Any, size: Any, bias: Any, stride: Any, padding: Any) -> Any:
        if images.dtype is not torch.bfloat16:
            return kept.call_boxed(keys, images, weight, size, bias, stride, padding)
        in_fp32 = (images.float(), weight.float(), None if bias is None else bias.float())
        return torch.conv2d(*in_fp32, stride, padding).to(images.dtype)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        library.impl(name, convolve, "CPU", with_keyset=True)
    yield
    library._destroy()


def planned(
    name: str = "progressive", device: plan.Device = CPU, model: str = "tiny", about: str = "", **settings: Any
) -> Ladder:
    chosen = plan.Settings(**settings)
    recipes, notes = plan.find_ladder(name, device, plan.find_model(model), about)
    return plan.plan_ladder(name, recipes, plan.find_model(model), device, chosen, notes)


def result(spec: RunSpec, seconds: float = 1.0, **changes: Any) -> Result:
    """A result that nobody measured. As on a CPU, a plain rung is identical to the reference, and has no PSNR."""
    plain = not spec.optimizations
    made = Result(
        spec=spec,
        finished_at="2026-01-02T03:04:05+00:00",
        pipeline_cls="StableDiffusionXLPipeline",
        ckpt_id="tiny (embedded)",
        applied={},
        import_s=4.0,
        load_s=0.5,
        first_call_s=9.0,
        cache_state="cold" if "compile" in spec.optimizations else "none",
        warmup_s=(seconds, seconds),
        warmed_up=True,
        samples_s=(seconds * 0.9, seconds, seconds * 1.1),
        latency_median_s=seconds,
        latency_p10_s=seconds * 0.9,
        latency_p90_s=seconds * 1.1,
        phases={"denoising_s": seconds * 0.8, "denoising_step_s": seconds * 0.08, "vae_decode_s": seconds * 0.1},
        memory={"peak_rss_gib": 0.5},
        image_repeats=True,
        psnr_db=None if plain else 40.0,
        identical_to_reference=plain,
        ssim=0.99,
        accuracy={"right": 6, "prompts": 8, "accuracy": 0.75, "low": 0.41, "high": 0.93}
        if spec.accuracy_prompts
        else {},
        environment={"cpu": "a processor", "torch": "2.13.0"},
    )
    return replace(made, **changes)


def failure(spec: RunSpec, **changes: Any) -> Failure:
    made = Failure(
        spec=spec,
        finished_at="2026-01-02T03:04:05+00:00",
        reason="timeout",
        message="not done after 10 s",
        stage="first call",
        elapsed_s=10.0,
        traceback="Traceback: why",
    )
    return replace(made, **changes)


def keep(folder: Path, outcome: Outcome) -> Path:
    """Put an outcome into the spool as a worker would."""
    run_folder = spool.run_folder(folder, outcome.spec)
    spool.write_json(run_folder / spool.SPEC, outcome.spec.to_dict())
    spool.write_text(run_folder / spool.LOG, "what the libraries said\n")
    if isinstance(outcome, Failure):
        spool.write_json(run_folder / spool.FAILURE, outcome.to_dict())
        return run_folder
    hue = 40 * int(outcome.spec.rung[:2])
    for name in ("image.png", "image.jpg"):
        Image.new("HSV", (64, 64), (hue, 200, 200)).convert("RGB").save(run_folder / name)
    if outcome.accuracy:
        Image.new("RGB", (320, 240), "white").save(run_folder / spool.PROMPTS_SHEET)
    spool.write_text(run_folder / "result.csv", rows.seed_csv([rows.row(outcome, None)]))
    spool.write_json(run_folder / spool.RESULT, outcome.to_dict())
    return run_folder


@pytest.fixture
def climbed(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a spooled ladder whose rungs took the given seconds; None is a rung that failed."""

    def make(seconds: tuple[float | None, ...] = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0), name: str = "spool") -> Path:
        ladder = planned()
        folder = spool.save_ladder(tmp_path / name, ladder)
        for spec, each in zip(ladder.rungs, seconds, strict=False):
            keep(folder, failure(spec) if each is None else result(spec, each))
        return folder

    return make


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's, with all tables and nothing in them: it takes MLflow most of a second, by a hundred migrations."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM experiments")  # its first one knows the folder that it was made in
    return file


@pytest.fixture
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the test's own folder, with nothing in the environment that would have runs go to another place."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("DIFFUSION_FAST_SPOOL", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(database: Path, tmp_path: Path, nowhere_else: None) -> str:
    """The URI of an empty store in the test's own folder, where runs go unless told otherwise."""
    shutil.copy(database, tmp_path)
    return f"sqlite:///{tmp_path / database.name}"


@pytest.fixture
def by_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Graphs are captured as ever, and run as they are: Inductor takes minutes. What torch.compile was asked for."""
    import torch

    compile_by_torch = torch.compile
    asked: list[dict[str, Any]] = []

    def compile_by_eager(function: Any, **chosen: Any) -> Any:
        asked.append(dict(chosen))
        chosen.pop("options")
        return compile_by_torch(function, backend="eager", **chosen)

    monkeypatch.setattr(torch, "compile", compile_by_eager)  # which Module.compile calls, too
    torch._dynamo.utils.counters.clear()
    # Optimizations raise them for the whole process; they are put back here.
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield asked
    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()
