"""The spool, replayed into MLflow, and MLflow's runs as a DataFrame. The only module that imports mlflow.

Recording brings MLflow to what the spool says and sends only what is missing there: recording twice changes nothing,
and a recording that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_fast import report, rows, spool, view
from diffusion_fast.spec import Failure, Ladder, Outcome, Result

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

EXPERIMENT = "diffusion_fast"
UI = "http://127.0.0.1:5000"
DONE = "artifacts_recorded"  # the tag that is set last
# The UI gives runs colours at random, and may give two rungs the same one. Paul Tol's bright and muted schemes.
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#332288", "#999933", "#882255")


class TrackingError(Exception):
    """MLflow could not be reached, or refused."""


@dataclass(frozen=True)
class Recorded:
    """Where a ladder can be seen."""

    parent_run_id: str
    link: str
    served: bool  # False: a store on disk, which `diffusion-fast ui` serves at the link's address


def default_uri() -> str:
    """Where runs go unless told otherwise: MLFLOW_TRACKING_URI, or mlflow.db in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def connect(tracking_uri: str | None) -> MlflowClient:
    """A client for the given or the default store. The process's own MLflow settings stay as they are."""
    # MLflow's own default is four minutes of retries: the results are safe in the spool, so say soon what is wrong.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # one link is enough
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri or default_uri())


def record(
    folder: Path, *, experiment: str | None = None, tracking_uri: str | None = None, parent_run_id: str | None = None
) -> Recorded:
    """Bring MLflow to what a ladder's folder says. `parent_run_id`: the run that `mlflow run` has made for it.

    Raises TrackingError, and the spool keeps everything.
    """
    with _tracking_errors():
        return _record(connect(tracking_uri), folder, experiment, parent_run_id)


@contextmanager
def _tracking_errors() -> Iterator[None]:
    """Whatever a store, its driver or its network raises: no ladder may end by it."""
    try:
        yield
    except Exception as error:
        first_line, *_ = [*str(error).splitlines(), ""]
        raise TrackingError(f"{type(error).__name__}: {first_line[:300]}") from error


def _record(client: MlflowClient, folder: Path, experiment: str | None, parent_run_id: str | None) -> Recorded:
    ladder = spool.read_ladder(folder)
    parent = _parent(client, ladder, experiment, parent_run_id)
    experiment_id = parent.info.experiment_id
    search_filter = f"tags.kind = 'rung' and tags.ladder_id = '{ladder.id}'"
    known = {run.data.tags["measurement_id"]: run for run in _search(client, experiment_id, search_filter)}
    last = spool.last_outcomes(folder)
    for run_folder, outcome in spool.outcomes(folder):
        run = known.get(outcome.spec.measurement_id)
        _record_rung(client, parent, run, run_folder, outcome, rows.speedup_base(outcome, ladder, last))

    if view.TAG + ladder.id not in client.get_experiment(experiment_id).tags:
        saved = view.encode(view.view_state(search_filter), name=ladder.id, now_ms=int(time.time() * 1000))
        client.set_experiment_tag(experiment_id, view.TAG + ladder.id, saved)
    served = client.tracking_uri.startswith("http")
    link = view.link(client.tracking_uri if served else UI, experiment_id, ladder.id)
    return Recorded(parent.info.run_id, link, served)


def _parent(client: MlflowClient, ladder: Ladder, experiment: str | None, run_id: str | None) -> Run:
    """The ladder's run: the one it has, the one that `mlflow run` made, or a new one."""
    experiment_id = _experiment(client, experiment, run_id)
    found = _search(client, experiment_id, f"tags.kind = 'ladder' and tags.ladder_id = '{ladder.id}'")
    tags = {"kind": "ladder", "ladder_id": ladder.id, "ladder": ladder.name, "notes": "; ".join(ladder.notes)}
    if found:
        if run_id and run_id != found[0].info.run_id:
            client.set_tag(run_id, "resumes", found[0].info.run_id)
        return found[0]
    if run_id:
        for name, value in (tags | {"mlflow.runName": ladder.id}).items():
            client.set_tag(run_id, name, value)
        return client.get_run(run_id)
    return client.create_run(experiment_id, run_name=ladder.id, tags=tags)


def _experiment(client: MlflowClient, name: str | None, run_id: str | None) -> str:
    if run_id:
        return str(client.get_run(run_id).info.experiment_id)
    found = _find_experiment(client, name)
    return found.experiment_id if found else client.create_experiment(name or _experiment_name())


def _find_experiment(client: MlflowClient, name: str | None) -> Experiment | None:
    """By its name, by MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or "diffusion_fast"."""
    number = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if number and not name and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
        return client.get_experiment(number)
    found = client.get_experiment_by_name(name or _experiment_name())
    if found is not None and found.lifecycle_stage == "deleted":
        raise ValueError(f"the experiment {found.name!r} was deleted: restore it, or choose another by --experiment")
    return found


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _record_rung(
    client: MlflowClient, parent: Run, run: Run | None, folder: Path, outcome: Outcome, base: Result | None
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    finished_ms = _milliseconds(outcome.finished_at)
    if run is None:
        # The tag is what `nested=True` would set, which works in the process of the parent run only.
        color = COLORS[int(outcome.spec.rung.partition("-")[0]) % len(COLORS)]
        tags = {"mlflow.parentRunId": parent.info.run_id, "mlflow.runColor": color} | rows.labels(outcome, base)
        name = outcome.spec.rung + (f" r{outcome.spec.round:02}" if outcome.spec.round > 1 else "")
        run = client.create_run(parent.info.experiment_id, finished_ms, tags, name)
    has = run.data
    metrics = {key: value for key, value in rows.metrics(outcome, base).items() if key not in has.metrics}
    entries = [Metric(key, value, finished_ms, 0) for key, value in metrics.items()]
    entries += [
        Metric(name, value, finished_ms, step)
        for name, values in rows.series(outcome).items()
        if name not in has.metrics
        for step, value in values.items()
    ]
    params = {key: str(value) for key, value in rows.parameters(outcome).items() if key not in has.params}
    tags = {key: value for key, value in rows.labels(outcome, base).items() if has.tags.get(key) != value}
    if entries or params or tags:
        client.log_batch(
            run.info.run_id,
            metrics=entries,
            params=[Param(key, value[:6000]) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
    if DONE in has.tags:
        return
    _record_artifacts(client, run.info.run_id, folder, outcome)
    status = "FAILED" if isinstance(outcome, Failure) else "FINISHED"
    client.set_terminated(run.info.run_id, status, finished_ms)
    client.set_tag(run.info.run_id, DONE, "True")


def _record_artifacts(client: MlflowClient, run_id: str, folder: Path, outcome: Outcome) -> None:
    client.log_artifacts(run_id, str(folder))
    if isinstance(outcome, Failure):
        if outcome.traceback:
            client.log_text(run_id, outcome.traceback, "traceback.txt")
        return
    from PIL import Image

    image = next((folder / name for name in ("image.png", "image.jpg") if (folder / name).is_file()), None)
    # The chart page's grid takes images from here alone, not from artifacts.
    for key, path in (("output", image), ("prompts", folder / spool.PROMPTS_SHEET)):
        if path is not None and path.is_file():
            with Image.open(path) as opened:
                client.log_image(run_id, opened.convert("RGB"), key=key, step=0)


def fetch(run_id: str, name: str, folder: Path, *, tracking_uri: str | None = None) -> Path:
    """Download an artifact of a run into a folder. Raises TrackingError, and ValueError where there is none."""
    from mlflow.exceptions import MlflowException

    with _tracking_errors():
        client = connect(tracking_uri)
        try:
            found = {artifact.path for artifact in client.list_artifacts(run_id)}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = None
        if found and name in found:
            return Path(client.download_artifacts(run_id, name, str(folder)))
    if found is None:
        raise ValueError(f"There is no run {run_id} at {client.tracking_uri}.")
    raise ValueError(f"The run {run_id} has no {name}.")


def finish(
    folder: Path,
    *,
    experiment: str | None = None,
    tracking_uri: str | None = None,
    parent_run_id: str | None = None,
    interrupted: bool = False,
) -> Recorded:
    """Record a ladder whole: its rungs, the summary on its own run, and that run's end. Raises TrackingError."""
    recorded = record(folder, experiment=experiment, tracking_uri=tracking_uri, parent_run_id=parent_run_id)
    with _tracking_errors():
        client = connect(tracking_uri)
        _summarize(client, folder, recorded.parent_run_id)
        if recorded.parent_run_id != parent_run_id:  # `mlflow run` ends its own run, by the exit code
            failed = any(isinstance(outcome, Failure) for outcome in spool.last_outcomes(folder).values())
            status = "FAILED" if failed or spool.reference_failure(folder) else "FINISHED"
            _end(client, recorded.parent_run_id, "KILLED" if interrupted else status)
    return recorded


def _end(client: MlflowClient, run_id: str, status: str) -> None:
    if client.get_run(run_id).info.status != status:
        client.set_terminated(run_id, status)


def _summarize(client: MlflowClient, folder: Path, run_id: str) -> None:
    """Put the table, the plot, the images and what the rounds say together on the ladder's own run."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    frame = report.from_spool(folder)
    if not len(frame):
        return
    notes = list(spool.read_ladder(folder).notes)
    if floor := report.noise_floor(frame, report.floors_in(folder.parent)):
        notes.append(floor)
    if failure := spool.reference_failure(folder):
        notes.append(f"there is no reference to compare images with: {failure.reason}: {failure.message}")
    summary = report.markdown(frame, notes)
    # Its children's images, as MLflow serves them to its own page.
    children = _search(client, run.info.experiment_id, f"tags.kind = 'rung' and tags.`mlflow.parentRunId` = '{run_id}'")
    images = "".join(
        f"\n**{child.info.run_name}**\n\n![{child.info.run_name}](get-artifact?path=image.jpg&run_uuid={child.info.run_id})\n"
        for child in sorted(children, key=lambda child: str(child.info.run_name))
        if child.info.status == "FINISHED" and child.data.tags["round"] == "1"
    )
    figures = {key: value for key, value in report.figures(frame).items() if run.data.metrics.get(key) != value}
    if figures:
        now_ms = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, now_ms, 0) for key, value in figures.items()])
    note = f"{summary}{images}"
    if run.data.tags.get("mlflow.note.content") != note:
        with tempfile.TemporaryDirectory() as made:
            report.write(frame, Path(made), notes)
            client.log_artifacts(run_id, made)
        client.log_artifact(run_id, str(folder / spool.LADDER))
        client.set_tag(run_id, "mlflow.note.content", note)


def record_training(folder: Path, *, experiment: str | None = None, tracking_uri: str | None = None) -> None:
    """Record a finished training of the bundled model: its plan, curves and samples. Raises TrackingError."""
    with _tracking_errors():
        client = connect(tracking_uri)
        facts = spool.read_json(folder / spool.TRAINING)
        experiment_id = _experiment(client, experiment, None)
        found = _search(client, experiment_id, f"tags.kind = 'training' and tags.training_id = '{facts['id']}'")
        finished_ms = _milliseconds(facts["finished_at"])
        tags = {"kind": "training", "training_id": facts["id"]}
        run = found[0] if found else client.create_run(experiment_id, finished_ms, tags, facts["id"])
        if DONE not in run.data.tags:
            _record_training(client, run.info.run_id, folder, facts, finished_ms)


def _record_training(client: MlflowClient, run_id: str, folder: Path, facts: dict[str, Any], finished_ms: int) -> None:
    from mlflow.entities import Metric, Param
    from PIL import Image

    lines = [json.loads(line) for line in (folder / spool.TRAINING_METRICS).read_text().splitlines()]
    curves = {(line["name"], line["step"]): line["value"] for line in lines}  # after a restart a step counts once
    facts_as_params = facts["plan"] | facts["environment"] | {"seconds": facts["seconds"]}
    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in facts_as_params.items()])
    metrics = [Metric(name, value, finished_ms, step) for (name, step), value in curves.items()]
    for start in range(0, len(metrics), 1000):  # MLflow's limit
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".jpg"):
            client.log_artifact(run_id, str(path))
    for path in sorted((folder / spool.TRAINING_SAMPLES).glob("*.jpg")):
        client.log_artifact(run_id, str(path), spool.TRAINING_SAMPLES)
        with Image.open(path) as opened:
            client.log_image(run_id, opened.convert("RGB"), key="samples", step=int(path.stem.rpartition("-")[2]))
    client.set_terminated(run_id, "FINISHED", finished_ms)
    client.set_tag(run_id, DONE, "True")


def _search(client: MlflowClient, experiment_id: str, search_filter: str) -> list[Run]:
    found: list[Run] = []
    token: str | None = None
    while token != "":
        page = client.search_runs([experiment_id], search_filter, max_results=1000, page_token=token)
        found += page
        token = page.token or ""
    return found


def _milliseconds(iso: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(iso).timestamp() * 1000)


def load_runs(experiment: str | None = None, tracking_uri: str | None = None, query: str = "") -> pd.DataFrame:
    """One typed row a rung, oldest ladder first: numbers are numbers, latencies are seconds, absent is NaN or NA.

    The columns of `rows.COLUMNS` are always there. `experiment` is a name; by default MLFLOW_EXPERIMENT_NAME,
    MLFLOW_EXPERIMENT_ID or "diffusion_fast" decides. `query` is an MLflow search string, such as
    "params.recipe = 'sdpa' and tags.tag = 'nightly'"; what it doesn't match is left out. Raises ValueError where
    there is no such experiment or the query is wrong, and TrackingError where MLflow can't be read.
    """
    import pandas as pd
    from mlflow.exceptions import MlflowException

    wrong_query = ""
    with _tracking_errors():
        client = connect(tracking_uri)
        found = _find_experiment(client, experiment)
        others = [] if found else [each.name for each in client.search_experiments()]
        try:
            search_filter = f"tags.kind = 'rung' and {query}" if query else "tags.kind = 'rung'"
            runs = _search(client, found.experiment_id, search_filter) if found else []
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            wrong_query = f"{query!r} is not an MLflow search string: {error.message}"
    if wrong_query:
        raise ValueError(wrong_query)
    if found is None:
        wanted = experiment or _experiment_name()
        raise ValueError(f"There is no experiment {wanted!r} at {client.tracking_uri}; there are: {', '.join(others)}.")
    flat = [_flat(run) for run in runs]
    more = sorted({key for each in flat for key in each} - set(rows.COLUMNS) - {"run_id", DONE})
    frame = pd.DataFrame(flat).reindex(columns=["run_id", *rows.COLUMNS, *more])
    kinds = {"Int64": rows.INTEGERS, "float64": rows.METRICS + rows.FLOATS, "boolean": rows.FLAGS}
    frame = frame.astype({name: kind for kind, names in kinds.items() for name in names})
    return frame.sort_values(["ladder_id", "rung", "round", "attempt"], ignore_index=True)


def _flat(run: Run) -> dict[str, Any]:
    texts = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")} | run.data.params
    metrics = {key: value for key, value in run.data.metrics.items() if key not in rows.SERIES}  # the last of many
    return {"run_id": run.info.run_id, "status": run.info.status} | texts | metrics | rows.typed(texts)
