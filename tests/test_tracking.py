"""What the spool says is what MLflow says."""

import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_fast import report, spool, tracking, view
from tests.conftest import failure, keep, planned, result


def client() -> Any:
    return tracking.connect(None)


def dump(tmp_path: Path) -> list[str]:
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        return sorted(connection.iterdump())


def test_a_ladder_is_a_parent_with_a_child_a_rung(store: str, climbed: Callable[..., Path]) -> None:
    folder = climbed()
    recorded = tracking.finish(folder, tracking_uri=store)
    parent = client().get_run(recorded.parent_run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["kind"] == "ladder"
    assert "| 05-int8-dynamic | 1 |" in parent.data.tags["mlflow.note.content"]
    assert {item.path for item in client().list_artifacts(recorded.parent_run_id)} == {
        "ladder.json",
        "report.csv",
        "report.md",
        "report.png",
    }
    frame = tracking.load_runs(tracking_uri=store)
    assert list(frame["rung"]) == [spec.rung for spec in planned().rungs]
    assert set(frame["status"]) == {"FINISHED"}
    child = client().get_run(frame["run_id"][3])
    assert child.info.run_name == "03-compile"
    assert child.data.tags["mlflow.parentRunId"] == recorded.parent_run_id
    samples = client().get_metric_history(child.info.run_id, "latency_sample_s")
    assert [(each.step, each.value) for each in samples] == [(0, pytest.approx(2.7)), (1, 3.0), (2, pytest.approx(3.3))]
    files = {item.path for item in client().list_artifacts(child.info.run_id)}
    assert {"image.png", "image.jpg", "spec.json", "result.json", "result.csv", "log.txt", "images"} <= files
    grid = {item.path for item in client().list_artifacts(child.info.run_id, "images")}
    assert any(path.startswith("images/output") and path.endswith(".png") for path in grid)


def test_rounds_are_runs_of_their_own_and_the_parent_says_what_they_say_together(store: str, tmp_path: Path) -> None:
    ladder = planned("cpu")
    folder = spool.save_ladder(tmp_path / "spool", ladder)
    for number, seconds in enumerate([(3.0, 2.0, 1.0), (3.1, 2.0, 1.0)], 1):
        for spec, each in zip(ladder.rungs, seconds, strict=True):
            keep(folder, result(replace(spec, round=number, planned_rounds=2), each))
    for _ in range(2):
        recorded = tracking.finish(folder, tracking_uri=store)
    frame = tracking.load_runs(tracking_uri=store)
    assert list(frame["round"]) == [1, 2] * 3
    assert list(frame["speedup"]) == [1.0, 1.0, 1.5, 1.55, 3.0, 3.1]  # each within its round
    names = [client().get_run(run_id).info.run_name for run_id in frame["run_id"]]
    assert names[2:4] == ["01-compile", "01-compile r02"]
    parent = client().get_run(recorded.parent_run_id).data
    assert parent.metrics["latency_median_s/00-sdpa"] == pytest.approx(3.05)
    assert parent.metrics["speedup/01-compile"] == pytest.approx((1.5 * 1.55) ** 0.5)
    assert parent.metrics["speedup_low/01-compile"] < 1.5 < 1.55 < parent.metrics["speedup_high/01-compile"]
    assert len(client().get_metric_history(recorded.parent_run_id, "speedup/01-compile")) == 1
    assert parent.tags["mlflow.note.content"].count("![") == 3  # a rung's rounds paint the same
    assert report.markdown(report.one_ladder(frame)) == report.markdown(report.from_spool(folder))


def test_numbers_come_back_as_numbers(store: str, climbed: Callable[..., Path]) -> None:
    tracking.finish(climbed(), tracking_uri=store)
    frame = tracking.load_runs(tracking_uri=store)
    assert list(frame["speedup"]) == [1.0, 1.2, 1.5, 2.0, 3.0, 6.0]
    for column in ("latency_median_s", "speedup", "guidance_scale", "peak_memory_gib", "psnr_db"):
        assert frame[column].dtype.kind == "f", column
    for column in ("steps", "batch_size", "height", "seed", "attempt"):
        assert frame[column].dtype.kind == "i", column
    assert frame["warmed_up"].dtype.kind == "b"
    assert set(frame["speedup_base"]) == {"00-baseline"}


def test_recording_twice_changes_nothing(store: str, climbed: Callable[..., Path], tmp_path: Path) -> None:
    folder = climbed()
    tracking.finish(folder, tracking_uri=store)
    before = dump(tmp_path)
    tracking.finish(folder, tracking_uri=store)
    assert dump(tmp_path) == before


def test_a_recording_that_was_cut_off_goes_on_where_it_stopped(
    store: str, climbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = climbed()
    with monkeypatch.context() as broken, pytest.raises(tracking.TrackingError, match="disk full"):
        broken.setattr(tracking, "_record_artifacts", lambda *_: (_ for _ in ()).throw(ValueError("disk full")))
        tracking.record(folder, tracking_uri=store)
    tracking.finish(folder, tracking_uri=store)
    frame = tracking.load_runs(tracking_uri=store)
    assert len(frame) == 6
    assert set(frame["status"]) == {"FINISHED"}
    assert len(client().get_metric_history(frame["run_id"][0], "latency_sample_s")) == 3


def test_a_run_that_was_not_ended_is_ended_by_the_next_recording(
    store: str, climbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    folder = climbed((1.0,))
    with monkeypatch.context() as broken, pytest.raises(tracking.TrackingError, match="gone"):
        broken.setattr(MlflowClient, "set_terminated", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        tracking.record(folder, tracking_uri=store)
    tracking.record(folder, tracking_uri=store)
    assert list(tracking.load_runs(tracking_uri=store)["status"]) == ["FINISHED"]


def test_a_rung_that_failed_is_a_failed_run_with_its_reason(store: str, climbed: Callable[..., Path]) -> None:
    recorded = tracking.finish(climbed((2.0, None, 1.0)), tracking_uri=store)
    assert client().get_run(recorded.parent_run_id).info.status == "FAILED"
    frame = tracking.load_runs(tracking_uri=store)
    failed = frame[frame["status"] == "FAILED"].iloc[0]
    assert (failed["rung"], failed["reason"], failed["error"]) == ("01-bf16", "timeout", "not done after 10 s")
    files = {item.path for item in client().list_artifacts(failed["run_id"])}
    assert {"failure.json", "log.txt", "traceback.txt"} <= files


def test_speed_ups_come_when_their_base_does(store: str, tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path / "spool", ladder)
    keep(folder, result(ladder.rungs[1], 2.0))
    tracking.record(folder, tracking_uri=store)
    assert tracking.load_runs(tracking_uri=store)["speedup"].isna().all()
    keep(folder, result(ladder.rungs[0], 4.0))
    tracking.record(folder, tracking_uri=store)
    assert list(tracking.load_runs(tracking_uri=store)["speedup"]) == [1.0, 2.0]


def test_a_retry_is_a_run_of_its_own(store: str, tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path / "spool", ladder)
    for attempt in (1, 2):
        keep(folder, result(replace(ladder.rungs[0], attempt=attempt)))
    tracking.record(folder, tracking_uri=store)
    assert list(tracking.load_runs(tracking_uri=store)["attempt"]) == [1, 2]


def test_the_run_that_mlflow_run_made_becomes_the_parent(store: str, climbed: Callable[..., Path]) -> None:
    experiment = client().create_experiment("elsewhere")
    made = client().create_run(experiment, run_name="vexed-crow-7")
    recorded = tracking.finish(climbed(), tracking_uri=store, parent_run_id=made.info.run_id)
    assert recorded.parent_run_id == made.info.run_id
    run = client().get_run(made.info.run_id)
    assert run.info.status == "RUNNING"  # `mlflow run` ends it itself
    assert run.data.tags["kind"] == "ladder"
    assert len(tracking.load_runs("elsewhere", tracking_uri=store)) == 6


def test_images_that_came_as_jpeg_alone_reach_the_grid(store: str, climbed: Callable[..., Path]) -> None:
    folder = climbed()
    for path in folder.glob("*/*/image.png"):
        path.unlink()
    tracking.finish(folder, tracking_uri=store)
    run_id = tracking.load_runs(tracking_uri=store)["run_id"][0]
    assert client().list_artifacts(run_id, "images")


def test_an_unreachable_server_is_said_soon(climbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    start = time.monotonic()
    with pytest.raises(tracking.TrackingError, match="127"):
        tracking.record(climbed(), tracking_uri="http://127.0.0.1:9")
    assert time.monotonic() - start < 60


def test_the_columns_are_there_before_any_run_is(store: str) -> None:
    client().create_experiment("empty")
    frame = tracking.load_runs("empty", tracking_uri=store)
    assert len(frame) == 0
    assert {"model", "latency_median_s", "speedup", "warmed_up"} <= set(frame.columns)
    assert frame["latency_median_s"].dtype.kind == "f"


def test_a_failed_rung_leaves_the_types_alone(store: str, climbed: Callable[..., Path]) -> None:
    tracking.finish(climbed((2.0, None)), tracking_uri=store)
    frame = tracking.load_runs(tracking_uri=store)
    assert [frame[column].dtype.kind for column in ("latency_median_s", "steps", "warmed_up")] == ["f", "i", "b"]


def test_a_deleted_experiment_is_said_to_be_deleted(store: str, climbed: Callable[..., Path]) -> None:
    client().delete_experiment(client().create_experiment(tracking.EXPERIMENT))
    with pytest.raises(tracking.TrackingError, match="was deleted"):
        tracking.record(climbed(), tracking_uri=store)


def test_without_any_outcome_a_ladder_is_a_parent_alone(store: str, climbed: Callable[..., Path]) -> None:
    recorded = tracking.finish(climbed(()), tracking_uri=store, interrupted=True)
    assert client().get_run(recorded.parent_run_id).info.status == "KILLED"


def test_a_missing_reference_is_a_failed_ladder_that_says_why(store: str, climbed: Callable[..., Path]) -> None:
    folder = climbed()
    keep(folder, failure(spool.read_ladder(folder).reference))
    parent = client().get_run(tracking.finish(folder, tracking_uri=store).parent_run_id)
    assert parent.info.status == "FAILED"
    assert "there is no reference" in parent.data.tags["mlflow.note.content"]


def test_an_unknown_experiment_is_named(store: str) -> None:
    with pytest.raises(ValueError, match="no experiment 'nowhere'"):
        tracking.load_runs("nowhere", tracking_uri=store)


def test_the_view_is_kept_with_the_experiment(store: str, climbed: Callable[..., Path]) -> None:
    folder = climbed()
    recorded = tracking.finish(folder, tracking_uri=store)
    experiment = client().get_experiment(client().get_run(recorded.parent_run_id).info.experiment_id)
    assert view.TAG + folder.name in experiment.tags
    assert f"viewStateShareKey={folder.name}" in recorded.link
