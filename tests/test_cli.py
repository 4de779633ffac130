"""Commands, their exit codes and what they say. Measurements are pretended here."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from diffusion_fast import ladder as climbing
from diffusion_fast import load_runs, spool
from diffusion_fast.cli import main
from diffusion_fast.spec import Outcome, RunSpec
from tests.conftest import failure, keep, result

DOCS = Path(__file__).resolve().parent.parent / "docs"


pytestmark = pytest.mark.usefixtures("nowhere_else")


@pytest.fixture
def pretended(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Workers that finish at once; those rungs fail whose recipe is in the list `failing`."""
    failing: list[str] = []

    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        if spec.recipe in failing:
            keep(folder, failure(spec))
            return failure(spec)
        if spec.role == "reference":
            spool.reference_file(folder).parent.mkdir(exist_ok=True)
            (spool.reference_file(folder).parent / spool.REFERENCE_STEPS).touch()
            return None
        outcome = result(spec, 1.0 + len(spec.optimizations))
        keep(folder, outcome)
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    yield failing


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_list_names_everything() -> None:
    text = invoke("list").output
    assert all(word in text for word in ("tiny", "sdxl", "int8_dynamic", "progressive", "+ bf16"))
    data = json.loads(invoke("list", "--json").output)
    assert data["models"]["sdxl"]["hub_id"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert data["optimizations"]["int8_dynamic"]["requires"] == [["bf16", "fp16"], ["compile", "regional_compile"]]


def test_list_models_is_what_the_docs_say() -> None:
    text = invoke("list", "models").output
    assert text in (DOCS / "models.md").read_text()
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines()}
    assert [each.strip() for each in lines["feature_reuse"]][-1] == ""
    assert {each.strip() for each in lines["sdpa"]} == {"yes"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ladder", "--model", "tinny"), "nearest are tiny"),
        (("ladder", "--ladder", "progresive"), "nearest are progressive"),
        (("run", "--with", "bf61"), "nearest are bf16"),
        (("run", "--recipe", "fused"), "nearest are fused-qkv"),
        (("run", "--with", "int8_dynamic"), "int8_dynamic requires"),
        (("run", "--with", "fused_qkv"), "fused_qkv requires sdpa"),
        (("run", "--with", "fp8_dynamics", "--device", "cpu"), "There is no optimization 'fp8_dynamics'"),
        (("ladder", "--only", "compil"), "nearest are"),
        (("ladder", "--weights", "random"), "can't be built from random weights"),
        (("ladder", "--weights", "/nowhere"), "model_index.json"),
        (("ladder", "--steps", "many"), "many"),
        (("ladder", "--steps", "0"), "steps must be at least 1"),
        (("ladder", "--guidance", "nan"), "guidance must be a finite number"),
        (("ladder", "--accuracy-prompts", "-1"), "accuracy prompts must be 0 to 10000"),
        (("ladder", "--model", "sdxl", "--weights", "random", "--accuracy-prompts", "8"), "pictures can't be judged"),
        (("ladder", "--timeout", "0"), "Invalid value for '--timeout'"),
        (("ladder", "--seed", "-1"), "Invalid value for '--seed'"),
        (("ladder", "--spool", "/proc/nowhere"), "can't be written to"),
        (("report", "."), "There is no ladder"),
        (("sync", "."), "There is no ladder"),
        (("report",), "no experiment 'diffusion_fast'"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "spool").exists()


def test_cuda_where_there_is_none_is_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = invoke("ladder", "--device", "cuda")
    assert (done.exit_code, "no CUDA device" in done.output) == (2, True)


def test_weights_out_of_reach_are_exit_code_1_and_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = invoke("run", "--model", "sdxl")
    assert done.exit_code == 1
    assert "--weights random" in done.output
    assert "--weights FOLDER" in done.output


def test_another_vae_must_be_reachable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (tmp_path / "unet" / "model.safetensors").touch()
    done = invoke("run", "--model", "sdxl", "--weights", str(tmp_path), "--with", "vae_fp16_fix")
    assert (done.exit_code, "madebyollin/sdxl-vae-fp16-fix can't be reached" in done.output) == (1, True)


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    index = folder / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    done = invoke("run", "--model", "sdxl", "--weights", str(folder))
    assert (done.exit_code, "holds a FluxPipeline" in done.output) == (2, True)
    index.write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (folder / "unet" / "model.bin").touch()
    done = invoke("run", "--model", "sdxl", "--weights", str(folder))
    assert (done.exit_code, "holds no .safetensors" in done.output) == (2, True)


def test_a_ladder_ends_with_a_table_and_a_link(pretended: list[str]) -> None:
    done = invoke("ladder")
    assert done.exit_code == 0, done.output
    assert "tf32 is left out" in done.output
    assert "speed-up" in done.output
    assert "viewStateShareKey=" in done.output


def test_a_failed_rung_stops_nothing_and_is_exit_code_1(pretended: list[str]) -> None:
    pretended.append("sdpa")
    done = invoke("ladder", "--no-track")
    assert done.exit_code == 1
    assert "05-int8-dynamic" in done.output
    assert "1 of 6 measurements failed" in done.output
    assert "02-sdpa/r1-a1/log.txt" in done.output


def test_without_its_reference_a_ladder_goes_on_and_is_exit_code_1(pretended: list[str]) -> None:
    pretended.append("reference")
    done = invoke("ladder")
    assert done.exit_code == 1
    assert "05-int8-dynamic" in done.output
    assert "1 of 7 measurements failed" in done.output


def test_resume_measures_what_is_missing(pretended: list[str], tmp_path: Path) -> None:
    pretended.append("sdpa")
    invoke("ladder", "--no-track")
    pretended.clear()
    done = invoke("ladder", "--no-track", "--resume")
    assert (done.exit_code, "1 of 6 rungs to measure" in done.output) == (0, True)
    assert "02-sdpa, attempt 2" in done.output
    again = invoke("ladder", "--no-track", "--resume", "true")
    assert "0 of 6 rungs to measure" in again.output
    assert len(spool.find_ladders(tmp_path / "spool")) == 1
    invoke("ladder", "--no-track", "--resume", "false", "--only", "bf16")
    assert len(spool.find_ladders(tmp_path / "spool")) == 2


def test_only_measures_the_named_rungs_and_later_the_others(pretended: list[str]) -> None:
    done = invoke("ladder", "--no-track", "--only", "bf16, 00-baseline")
    assert "2 of 6 rungs to measure" in done.output
    rest = invoke("ladder", "--no-track", "--resume")
    assert "4 of 6 rungs to measure" in rest.output


def test_rounds_are_measured_and_go_on(pretended: list[str], tmp_path: Path) -> None:
    pretended.append("sdpa")
    done = invoke("ladder", "--no-track", "--ladder", "cpu", "--rounds", "2")
    assert (done.exit_code, "6 of 6 rungs to measure in 2 rounds" in done.output) == (1, True)
    said = [line for line in done.output.splitlines() if line.startswith("0")]
    assert said == ["00-sdpa", "01-compile", "02-fused-qkv", "02-fused-qkv, round 2", "01-compile, round 2"]
    assert "1 of 5 measurements failed" in done.output  # not tried again in the second round
    pretended.clear()
    done = invoke("ladder", "--no-track", "--ladder", "cpu", "--rounds", "3", "--resume")
    assert (done.exit_code, "5 of 9 rungs to measure in 3 rounds" in done.output) == (0, True)


@pytest.mark.parametrize(("spread", "most", "rounds"), [(0.0, 20, 5), (0.03, 20, 12), (0.03, 7, 7), (0.05, 20, 20)])
def test_until_adds_the_rounds_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pretended: list[str], spread: float, most: int, rounds: int
) -> None:
    noise = dict(zip(range(1, 6), (-1.0, 0.2, 1.1, -0.6, 0.3), strict=True))

    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        if spec.role == "reference":
            return None
        off = noise.get(spec.round, 0.0) * spread if spec.recipe == "b" else 0.0
        outcome = result(spec, math.exp(off))
        keep(folder, outcome)
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    done = invoke("ladder", "--no-track", "--ladder", "aa", "--until", "2%", "--max-rounds", str(most))
    assert done.exit_code == 0
    (folder,) = spool.find_ladders(tmp_path / "spool")
    measured = {(outcome.spec.round, outcome.spec.planned_rounds) for _, outcome in spool.outcomes(folder)}
    assert measured == {(number, 5) for number in range(1, rounds + 1)}
    assert (f"--max-rounds stops it at {most}" in done.output) == (rounds == most)
    if 5 < rounds < most:
        assert f"{rounds} rounds bring the interval of 01-b within 2%\n" in done.output
        assert done.output.count("no difference seen") == 1
    again = invoke("ladder", "--no-track", "--ladder", "aa", "--until", "2%", "--max-rounds", str(most), "--resume")
    assert "0 of 10 rungs to measure in 5 rounds" in again.output
    assert len(list(spool.outcomes(folder))) == 2 * rounds


def test_until_adds_nothing_for_what_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pretended: list[str]
) -> None:
    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        if spec.role == "reference":
            return None
        lost = (spec.recipe == "compile" and spec.round == 3) or (spec.recipe == dead and spec.round == 4)
        off = spec.round * 0.3 if spec.recipe == "compile" else 0.0
        outcome = failure(spec) if lost else result(spec, math.exp(off))
        keep(folder, outcome)
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    dead = "nothing"
    invoke("ladder", "--no-track", "--ladder", "cpu", "--until", "2%")
    (folder,) = spool.find_ladders(tmp_path / "spool")
    assert max(outcome.spec.round for _, outcome in spool.outcomes(folder)) == 5
    dead = "sdpa"
    done = invoke("ladder", "--no-track", "--ladder", "cpu", "--until", "2%", "--tag", "again")
    assert "No rounds are added: 00-sdpa, which speed-ups are against, has failed" in done.output


def test_a_rung_that_lost_more_than_rounding_is_kept_marked_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, pretended: list[str], tmp_path: Path
) -> None:
    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        if spec.role == "reference":
            return None
        wrong = spec.recipe == "compile"
        one_step = {
            "steps": [0, 3],
            "error": [0.01, 0.09 if wrong else 0.01],
            "floor": [0.01, 0.01],
            "to_eager": [0.0, 0.0],
            "of_allowed": 7.5 if wrong else 0.83,
            "ok": not wrong,
        }
        outcome = result(spec, one_step=one_step)
        keep(folder, outcome)
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    done = invoke("ladder", "--ladder", "cpu")
    assert done.exit_code == 1
    assert "Warning: 01-compile loses more than rounding: at a step 7.50 times what is allowed" in done.output
    assert "Error: 01-compile lost more than rounding" in done.output
    frame = load_runs()
    assert frame["fidelity_ok"].tolist() == [True, False, True]
    assert frame["one_step_error_max"].tolist() == [0.01, 0.09, 0.01]
    assert ["loses more than rounding" in text for text in frame["warnings"]] == [False, True, False]
    assert set(frame["status"]) == {"FINISHED"}


@pytest.mark.parametrize("wrong", ["2", "0%", "two%", "200%"])
def test_until_is_a_percentage(wrong: str) -> None:
    done = invoke("ladder", "--until", wrong)
    assert (done.exit_code, "is not a percentage such as 2%" in done.output) == (2, True)


def test_run_measures_a_recipe_of_ones_own(pretended: list[str], tmp_path: Path) -> None:
    invoke("run", "--no-track", "--with", "sdpa,bf16")
    invoke("run", "--no-track", "--recipe", "bf16", "--with", "channels_last", "--device", "cpu")
    invoke("run", "--no-track")
    ladders = [spool.read_ladder(folder) for folder in spool.find_ladders(tmp_path / "spool")]
    assert {(each.rungs[0].rung, each.rungs[0].optimizations) for each in ladders} == {
        ("00-sdpa-bf16", ("bf16", "sdpa")),
        ("00-baseline", ()),
        ("00-bf16-channels_last", ("bf16", "channels_last")),
    }


def test_a_dead_tracking_server_costs_no_result(pretended: list[str], tmp_path: Path) -> None:
    done = invoke("ladder", "--tracking-uri", "http://127.0.0.1:9", "--only", "baseline")
    assert done.exit_code == 1
    folder = spool.find_ladders(tmp_path / "spool")[0]
    assert f"diffusion-fast sync spool/{folder.name}" in done.output
    assert len(list(spool.outcomes(folder))) == 1
    done = invoke("sync", "spool")
    assert (done.exit_code, "viewStateShareKey=" in done.output) == (0, True)


def test_an_unreachable_server_is_said_in_a_sentence() -> None:
    done = invoke("report", "--tracking-uri", "http://127.0.0.1:9")
    assert (done.exit_code, "MLflow could not be read" in done.output) == (1, True)


@pytest.mark.usefixtures("store")
def test_sync_goes_past_a_ladder_that_can_not_be_read(climbed: Callable[..., Path]) -> None:
    broken, whole = climbed(), climbed()
    next(broken.glob("00-baseline/*/result.json")).write_text("{")
    done = invoke("sync", str(whole.parent))
    assert done.exit_code == 1
    assert f"{broken.name} is not recorded" in done.output
    assert f"{whole.name}\n" in done.output


def test_without_mlflow_one_is_told_how_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = invoke("ladder")
    assert (done.exit_code, "--no-track" in done.output) == (2, True)


def test_report_reads_the_spool_and_mlflow_alike(pretended: list[str], tmp_path: Path) -> None:
    invoke("ladder")
    from_spool = invoke("report", "spool", "--output", "one")
    from_mlflow = invoke("report", "--output", "two")
    assert from_spool.exit_code == from_mlflow.exit_code == 0
    one, two = ((tmp_path / name / "report.md").read_text() for name in ("one", "two"))
    assert one.startswith(two)  # the spool also knows the ladder's notes


@pytest.mark.usefixtures("store")
def test_interrupting_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(climbing, "launch", interrupt)
    for arguments in (("ladder", "--no-track"), ("ladder",)):
        done = invoke(*arguments)
        assert (done.exit_code, "--resume" in done.output) == (130, True)


def test_sync_takes_folders_made_elsewhere(climbed: Callable[..., Path]) -> None:
    first, second = climbed(), climbed((1.0,), "elsewhere")
    done = invoke("sync", str(first.parent))
    assert first.name in done.output
    assert invoke("sync", str(second)).exit_code == 0


def test_until_wants_the_first_rung_too(pretended: list[str], tmp_path: Path) -> None:
    done = invoke("ladder", "--no-track", "--until", "2%", "--only", "sdpa")
    assert (done.exit_code, "add baseline, the first rung, to --only" in done.output) == (2, True)
    assert not (tmp_path / "spool").exists()


def test_check_says_what_there_is_where_nothing_matches(pretended: list[str]) -> None:
    invoke("ladder", "--ladder", "cpu")
    done = invoke("check", "--baseline", "params.recipe = 'sdpa'", "--candidate", "params.recipe = 'compiled'")
    assert done.exit_code == 2
    assert "The candidate matches no finished measurement; finished ones are of the recipes: " in done.output
    assert "compile, " in done.output


@pytest.mark.usefixtures("store")
def test_profile_measures_profiles_and_shows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = {"ms": 2.0, "ranges": 3, "top": [], "classes": {"linear": {"ms": 1.5, "kernels": 4.0, "tflops": 3.0}}}

    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        profiled.append((spec.role, spec.profile))
        if spec.role == "reference":
            return None
        outcome = result(spec, profile={"denoising_step": step} if spec.profile else {})
        spool.write_text(keep(folder, outcome) / spool.PROFILE, "## denoising_step: 2 ms\n")
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    profiled: list[tuple[str, bool]] = []
    done = invoke("profile", "--recipe", "sdpa")
    assert profiled == [("reference", False), ("rung", True)]
    assert done.exit_code == 0
    assert "denoising_step: 2 ms" in done.output
    assert "00-sdpa/r1-a1/trace.json.gz" in done.output
    assert "00-sdpa/r1-a1/kernels.csv" in done.output
    (row,) = load_runs().to_dict("records")
    assert row["profile/denoising_step/ms"] == 2.0
    assert row["profile/denoising_step/linear_tflops"] == 3.0
    again = invoke("run", "--recipe", "sdpa", "--resume", "--no-track")
    assert "1 of 1 rungs to measure" in again.output  # what isn't profiled is another measurement
