"""The product, from `mlflow run` to the DataFrame, with real workers: fp32, bf16, and int8 compiled by Inductor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import diffusion_fast

ROOT = Path(diffusion_fast.__file__).parent.parent
EAGER = ["00-baseline", "01-bf16"]
COMPILED = pytest.param([*EAGER, "05-int8-dynamic"], id="compiled", marks=pytest.mark.full)
compiled = pytest.mark.parametrize("rungs", [COMPILED], indirect=True)


@pytest.fixture(scope="module", params=[pytest.param(EAGER, id="eager"), COMPILED])
def rungs(request: pytest.FixtureRequest) -> list[str]:
    found: list[str] = request.param
    return found


@pytest.fixture(scope="module")
def store(rungs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("mlflow-run")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        # The interpreter that runs the tests is the one that `--env-manager local` is to find.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        environment.pop(name, None)
    parameters = [f"only={','.join(rungs)}", "steps=2", "seed=3", f"spool={folder / 'spool'}", "save_cache=true"]
    done = subprocess.run(
        (
            *(sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "ladder", "--env-manager", "local"),
            *("--experiment-name", "end-to-end"),
            *(word for parameter in parameters for word in ("-P", parameter)),
        ),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "viewStateShareKey=" in done.stdout + done.stderr
    return folder, uri


@pytest.fixture(scope="module")
def frame(store: tuple[Path, str]) -> pd.DataFrame:
    return diffusion_fast.load_runs("end-to-end", tracking_uri=store[1])


def test_the_project_run_is_the_parent_and_has_finished(store: tuple[Path, str], frame: pd.DataFrame) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(store[1])
    experiment = client.get_experiment_by_name("end-to-end")
    parents = client.search_runs([experiment.experiment_id], "tags.kind = 'ladder'")
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert parents[0].data.params["steps"] == "2"  # what `mlflow run` logged of its own
    for run_id in frame["run_id"]:
        assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == parents[0].info.run_id


def test_every_rung_was_measured(frame: pd.DataFrame, rungs: list[str]) -> None:
    assert list(frame["rung"]) == rungs
    assert set(frame["status"]) == {"FINISHED"}
    assert (frame["timed_calls"] >= 10).all()
    assert (frame["latency_p10_s"] <= frame["latency_median_s"]).all()
    assert (frame["latency_median_s"] <= frame["latency_p90_s"]).all()
    assert (frame["peak_memory_gib"] > 0.1).all()
    assert (frame["import_s"] > 0).all()
    assert (frame["load_s"] > 0).all()
    assert frame["image_repeats"].all()
    assert (frame["prompt_count"] == 8).all()
    assert (frame["prompt_accuracy_low"] <= frame["prompt_accuracy"]).all()


def test_the_phases_add_up_to_about_a_call(frame: pd.DataFrame) -> None:
    parts = frame[["text_encoding_s", "denoising_s", "vae_decode_s", "postprocessing_s"]]
    assert (parts > 0).all(axis=None)
    assert (parts.sum(axis=1) < 3 * frame["latency_median_s"]).all()


@compiled
def test_single_steps_are_judged_of_the_compiled_rung_too(frame: pd.DataFrame) -> None:
    assert frame["problem"].tolist() == [""] * 3
    assert frame["one_step_error_max"].between(0, 0.05).all()
    assert frame["one_step_to_eager_max"].iloc[:2].tolist() == [0.0, 0.0]  # eager is eager
    assert frame["fidelity_ok"].iloc[:2].tolist() == [True, True]
    assert frame["psnr_eager_db"].notna().tolist() == [False, False, True]  # identical, identical, int8
    assert frame["graph_breaks"].tolist() == [0, 0, 0]


def test_fidelity_is_against_the_fp32_reference(frame: pd.DataFrame) -> None:
    baseline, bf16, *int8 = frame.to_dict("records")
    assert baseline["identical_to_reference"]
    assert pd.isna(baseline["psnr_db"])
    assert bf16["psnr_db"] > 30
    assert all(each["psnr_db"] > 25 for each in int8)
    assert not bf16["identical_to_reference"]


@compiled
def test_compiling_left_its_proof_and_a_cold_cache(store: tuple[Path, str], frame: pd.DataFrame) -> None:
    from diffusion_fast import spool
    from diffusion_fast.spec import Result

    (folder,) = spool.find_ladders(store[0] / "spool")
    outcome = spool.last_outcomes(folder)["05-int8-dynamic", 1]
    assert isinstance(outcome, Result)
    assert outcome.cache_state == "cold"
    assert outcome.applied["compile"]["graphs"] >= 2
    assert outcome.applied["compile"]["from_cache"] == 0
    assert outcome.applied["compile"]["graph_breaks"] == 0
    assert outcome.applied["int8_dynamic"]["quantized_linears"] > 0
    assert set(outcome.applied) == set(outcome.spec.optimizations)
    compiled = frame[frame["rung"] == "05-int8-dynamic"].iloc[0]
    assert compiled["first_call_cold_s"] > 3 * compiled["latency_median_s"]


@compiled
def test_its_compile_cache_comes_back_from_mlflow_and_spares_every_graph(
    store: tuple[Path, str], frame: pd.DataFrame
) -> None:
    from diffusion_fast import spool
    from diffusion_fast.spec import Result

    run_id, measurement_id = frame[["run_id", "measurement_id"]].iloc[2]
    recipe = ("--recipe", "int8-dynamic", "--steps", "2", "--accuracy-prompts", "0", "--no-track")
    cache = ("--load-cache", run_id, "--tracking-uri", store[1], "--spool", str(store[0] / "another spool"))
    done = subprocess.run(
        (sys.executable, "-m", "diffusion_fast", "run", *recipe, *cache), cwd=store[0], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = spool.find_ladders(store[0] / "another spool")
    ((_, outcome),) = spool.outcomes(folder)
    assert isinstance(outcome, Result)
    assert (outcome.cache_state, outcome.spec.saved_cache, outcome.problem) == ("saved", measurement_id, "")
    assert outcome.applied["compile"]["from_cache"] == outcome.applied["compile"]["graphs"] >= 2
    (before,) = (store[0] / "spool").glob("*/.cache/05-int8-dynamic")
    (after,) = (store[0] / "another spool").glob("*/.cache/00-int8-dynamic")
    libraries = [{path.relative_to(each) for path in each.rglob("*.so")} for each in (before, after)]
    assert libraries[0] == libraries[1] != set()  # no C++ was compiled either


def test_the_spool_has_the_seeds_files(store: tuple[Path, str], rungs: list[str]) -> None:
    for rung in rungs:
        (folder,) = (store[0] / "spool").glob(f"*/{rung}/r1-a1")
        header = (folder / "result.csv").read_text().splitlines()[0]
        assert header.startswith("pipeline_cls,ckpt_id,bf16,sdpa,")
        assert (folder / "image.jpg").stat().st_size <= 200_000
        assert len(json.loads((folder / "prompts.json").read_text())["painted"]) == 8
        assert (folder / "prompts.jpg").is_file()
        assert (folder / "requirements.txt").read_text().count("==") > 50
