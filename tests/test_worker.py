"""What a worker does with a measurement once it has it. The pipeline is a stand-in; time and memory are real."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusion_fast import environment, measure, models, pipeline, spool, worker, world
from diffusion_fast.draw import arrange, draw
from diffusion_fast.optimizations import Build
from diffusion_fast.spec import Failure, Result, RunSpec
from tests.conftest import planned
from tests.test_optimizations import build


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))


NOISE = noise(256)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunSpec, Path]:
    """A rung whose calls are short, and as many as they have to be: test_measure.py has for how long they are timed."""
    ladder = planned()
    folder = spool.run_folder(spool.save_ladder(tmp_path, ladder), ladder.rungs[0])
    folder.mkdir(parents=True)
    build = Build(models.MODELS["tiny"], ladder.rungs[0], pipe=SimpleNamespace(components={}))
    monkeypatch.setattr(worker, "_load", lambda spec, progress: (build, {"int8": {"calibration_s": 1.0}}, 0.25))

    def call_for(build: Build, prompts: list[str], seeds: list[int]) -> list[Any]:
        scenes = [scene for scene in map(world.parse, prompts) if scene is not None]
        assert len(prompts) == len(seeds) == len(scenes) == 1
        pixels = draw(arrange(scenes, torch.Generator().manual_seed(seeds[0])))[0].permute(1, 2, 0)
        return [Image.fromarray((pixels * 255).byte().numpy())]

    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)
    painting(monkeypatch, NOISE, seconds=0.01)
    monkeypatch.setattr(pipeline, "call_for", call_for)
    monkeypatch.setattr(worker, "_limits", lambda *_: {})  # a stand-in has no operations to count
    return ladder.rungs[0], folder


def painting(monkeypatch: pytest.MonkeyPatch, image: Image.Image, seconds: float) -> None:
    """Have each call take so long and paint this."""

    def call(build: Build) -> list[Any]:
        time.sleep(seconds)
        return [image]

    monkeypatch.setattr(pipeline, "call", call)
    monkeypatch.setattr(worker, "_phases", lambda build: ({"denoising_s": 0.2}, to_floats(image)))


def to_floats(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


class Silent:
    stage = ""

    def __call__(self, stage: str) -> None:
        self.stage = stage


def test_a_measurement_has_its_samples_its_image_and_its_fidelity(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    painting(monkeypatch, noise(1024), seconds=0.2)
    spec, folder = prepared
    reference = spool.reference_file(folder.parents[1])
    reference.parent.mkdir()
    save_file({"float32": torch.rand(1, 3, 1024, 1024)}, reference)
    result = worker.measure_rung(spec, folder, Silent())  # type: ignore[arg-type]
    assert len(result.samples_s) >= 10
    assert result.latency_median_s == pytest.approx(0.2, abs=0.05)
    assert result.psnr_db is not None
    assert result.psnr_db < 15
    assert (result.problem, result.image_repeats, result.warmed_up) == ("", True, True)
    assert (folder / "image.png").is_file()
    assert 50_000 < (folder / "image.jpg").stat().st_size <= 200_000  # noise hardly compresses


@pytest.mark.parametrize(("value", "said"), [(0.0, "black all over"), (float("nan"), "not finite")])
def test_what_is_no_image_is_a_failure(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch, value: float, said: str
) -> None:
    broken = torch.rand(2, 3, 64, 64)
    broken[1] = value if value == 0 else broken[1].index_fill(1, torch.tensor([7]), value)
    monkeypatch.setattr(worker, "_phases", lambda build: ({"denoising_s": 0.2}, broken))
    spec, folder = prepared
    spool.write_json(folder / spool.SPEC, spec.to_dict())
    monkeypatch.setattr(worker, "Progress", lambda folder: Silent())
    assert worker.main(folder) == 1
    outcome = spool.read_outcome(folder)
    assert isinstance(outcome, Failure)
    assert said in outcome.message


def test_a_call_that_painted_black_is_a_failure(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    painting(monkeypatch, Image.new("RGB", (64, 64)), seconds=0.01)
    monkeypatch.setattr(worker, "_phases", lambda build: ({}, torch.rand(1, 3, 64, 64)))  # it was that call alone
    with pytest.raises(worker.BrokenImageError, match="an image is black all over"):
        worker.measure_rung(*prepared, Silent())  # type: ignore[arg-type]


def test_a_black_picture_that_was_nan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = build()
    next(made.pipe.vae.decoder.parameters()).data.fill_(float("nan"))
    monkeypatch.setattr(worker, "_load", lambda spec, progress: (made, {}, 0.0))
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)
    with pytest.raises(worker.BrokenImageError, match="not finite: NaN or infinity"):
        worker.measure_rung(made.spec, tmp_path, Silent())  # type: ignore[arg-type]


def test_what_can_not_be_written_down_costs_itself_alone(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_fidelity", lambda *_: {"psnr_db": 30.0})
    monkeypatch.setattr(worker, "_limits", lambda *_: {"limits": {"mfu": float("nan")}})
    spec, folder = prepared
    result = worker.measure_rung(spec, folder, Silent())  # type: ignore[arg-type]
    assert (result.psnr_db, result.limits, result.accuracy["right"]) == (30.0, {}, 8)
    assert result.problem.startswith("measuring what the device can do: ValueError: Out of range float values")


def test_held_out_prompts_are_painted_and_judged(prepared: tuple[RunSpec, Path]) -> None:
    spec, folder = prepared
    result = worker.measure_rung(spec, folder, Silent())  # type: ignore[arg-type]
    assert result.problem == ""
    assert (result.accuracy["right"], result.accuracy["prompts"], result.accuracy["high"]) == (8, 8, 1.0)
    painted = spool.read_json(folder / spool.PROMPTS)["painted"]
    assert [each["prompt"] for each in painted] == list(world.held_out_prompts(8))
    assert (folder / spool.PROMPTS_SHEET).is_file()


def test_what_fails_at_the_prompts_costs_neither_measurement_nor_fidelity(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call_for(*_: Any) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(pipeline, "call_for", call_for)
    spec, folder = prepared
    result = worker.measure_rung(spec, folder, Silent())  # type: ignore[arg-type]
    assert result.latency_median_s > 0
    assert result.accuracy == {}
    assert result.problem == "painting 8 held-out prompts: RuntimeError: no more memory"


def kept_when_killed(spec: RunSpec, folder: Path) -> Result:
    """What a worker leaves that something in it kills."""
    with pytest.raises(KeyboardInterrupt):
        worker.measure_rung(spec, folder, Silent())  # type: ignore[arg-type]
    kept = spool.read_outcome(folder)
    assert isinstance(kept, Result)
    return kept


def killed(*_: Any) -> None:
    raise KeyboardInterrupt  # like a kill, nothing in the worker catches it


def test_what_is_killed_at_the_prompts_leaves_everything_else(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "call_for", killed)
    kept = kept_when_killed(*prepared)
    assert kept.phases == {"denoising_s": 0.2}
    assert kept.environment
    assert kept.problem == "the worker ended while painting 8 held-out prompts"


def test_what_fails_after_the_timed_calls_costs_no_measurement(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = prepared
    reference = spool.reference_file(folder.parents[1])
    reference.parent.mkdir()
    save_file({"float32": torch.rand(1, 3, 256, 256)}, reference)
    smaller = torch.rand(1, 3, 128, 128)
    monkeypatch.setattr(worker, "_phases", lambda build: ({"denoising_s": 0.2}, smaller))
    result = worker.measure_rung(spec, folder, Silent())  # type: ignore[arg-type]
    assert result.latency_median_s > 0
    assert result.phases == {"denoising_s": 0.2}
    assert (result.psnr_db, result.image_repeats) == (None, False)
    assert "its reference (1, 3, 256, 256)" in result.problem
    assert result.accuracy["right"] == 8  # and what comes after it is found out nevertheless


def test_what_is_killed_after_the_timed_calls_leaves_its_measurement(
    prepared: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_phases", killed)
    kept = kept_when_killed(*prepared)
    assert len(kept.samples_s) >= 10
    assert kept.problem == "the worker ended while splitting into phases"


@pytest.mark.parametrize(("shared", "filled"), [("", "warm"), ("1", "shared")])
def test_the_state_of_the_compile_cache_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, filled: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("DIFFUSION_FAST_SHARED_CACHE", shared)
    eager, compiled = planned().rungs[0], planned().rungs[3]
    assert worker._cache_state(eager) == "none"
    assert worker._cache_state(compiled) == "cold"
    (tmp_path / "inductor" / "ab").mkdir(parents=True)
    assert worker._cache_state(compiled) == filled


def test_a_saved_cache_is_the_first_attempts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("DIFFUSION_FAST_SHARED_CACHE", raising=False)
    spec = replace(planned().rungs[3], saved_cache="another/03-compile/r1-a1")
    assert worker._cache_state(spec) == "cold"  # it was to be there, and isn't
    (tmp_path / "inductor" / "ab").mkdir(parents=True)
    assert worker._cache_state(spec) == "saved"
    assert worker._cache_state(replace(spec, attempt=2)) == "warm"
    assert worker._cache_state(replace(spec, round=2)) == "warm"


@pytest.mark.parametrize(
    ("state", "cached", "said"),
    [("saved", 3, []), ("saved", 2, ["of 3 graphs the saved compile cache had only 2"]), ("warm", 2, [])],
)
def test_graphs_that_a_saved_cache_had_not_are_a_problem(state: str, cached: int, said: list[str]) -> None:
    applied = {"bf16": {"parameters": 1}, "compile": {"graphs": 3, "from_cache": cached}}
    assert worker._not_saved(state, applied) == said


def test_the_age_of_the_process_is_its_age() -> None:
    before = worker.process_age_s()
    time.sleep(0.2)
    assert worker.process_age_s() - before == pytest.approx(0.2, abs=0.05)
    assert 0 < before < 36_000


def test_of_two_installed_versions_the_imported_one_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name, version in (("first", "Two_of.It", "2.0"), ("vendored", "two-of-it", "1.0")):
        metadata = tmp_path / folder / f"two_of_it-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), *sys.path, str(tmp_path / "vendored")])
    lines = environment.installed().splitlines()
    assert [line for line in lines if line.lower().startswith("two")] == ["Two_of.It==2.0"]
    assert len(lines) == len({line.split("==")[0].lower() for line in lines}) > 50
