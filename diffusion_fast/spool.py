"""Where outcomes live on disk. The spool is the truth; MLflow is a view of it.

SPOOL/LADDER/ladder.json
             reference/              spec.json, reference.safetensors, steps.pt, flops.json, image.png, log.txt,
                                     prompts.npz (where prompts are judged)
             00-baseline/r1-a1/      spec.json, result.json | failure.json, image.png, image.jpg, result.csv,
                                     log.txt, progress.txt, environment.json, requirements.txt,
                                     prompts.json, prompts.jpg (where prompts were judged),
                                     profile.md, kernels.csv, trace.json.gz (where it was profiled),
                                     compile-cache.zip (where it was saved)
             .cache/00-baseline/     the rung's compile caches
             .cache/all/             those that the points of a sweep share

A folder with a training.json is a finished training of the bundled model (scripts/train_tiny.py): metrics.jsonl has a
line a value, and samples/, sheet.jpg and evaluation.json what the model painted.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from diffusion_fast.spec import REFERENCE, Failure, Ladder, Outcome, Result, RunSpec

LADDER, SPEC, RESULT, FAILURE = "ladder.json", "spec.json", "result.json", "failure.json"
TRAINING, TRAINING_METRICS, TRAINING_SAMPLES = "training.json", "metrics.jsonl", "samples"
REFERENCE_IMAGE, REFERENCE_STEPS, REFERENCE_FLOPS = "reference.safetensors", "steps.pt", "flops.json"
REFERENCE_PROMPTS = "prompts.npz"
LOG, PROGRESS = "log.txt", "progress.txt"
PROFILE, KERNELS, TRACE = "profile.md", "kernels.csv", "trace.json.gz"
COMPILE_CACHE = "compile-cache.zip"
PROMPTS, PROMPTS_SHEET = "prompts.json", "prompts.jpg"


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


T = TypeVar("T", Ladder, Result, Failure)


def _read(kind: type[T], path: Path) -> T:
    try:
        return kind.from_dict(read_json(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}. Move it away.") from error


@contextmanager
def alone(ladder_folder: Path) -> Iterator[None]:
    """Let one process at a time work on a ladder. Raises ValueError where another one does."""
    with (ladder_folder / LADDER).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{ladder_folder.name} is being measured or recorded by another process.") from error
        yield


def save_ladder(spool: Path, ladder: Ladder) -> Path:
    """Make the ladder's folder and return it."""
    folder = spool / ladder.id
    write_json(folder / LADDER, ladder.to_dict())
    return folder


def read_ladder(folder: Path) -> Ladder:
    return _read(Ladder, folder / LADDER)


def find_ladders(folder: Path) -> list[Path]:
    """The ladders in a folder, itself included, oldest first."""
    found = [path.parent for path in (folder / LADDER, *folder.glob(f"*/{LADDER}"), *folder.glob(f"*/*/{LADDER}"))]
    return sorted((path for path in found if (path / LADDER).is_file()), key=lambda path: path.name)


def find_trainings(folder: Path) -> list[Path]:
    """The finished trainings in a folder, itself included."""
    patterns = (TRAINING, f"*/{TRAINING}", f"*/*/{TRAINING}")
    return sorted(path.parent for pattern in patterns for path in folder.glob(pattern))


def run_folder(ladder_folder: Path, spec: RunSpec) -> Path:
    if spec.role == REFERENCE:
        return ladder_folder / REFERENCE
    return ladder_folder / spec.rung / f"r{spec.round}-a{spec.attempt}"


def reference_failure(ladder_folder: Path) -> Failure | None:
    """Why there is no reference to compare images with; None where there is one, or none was tried."""
    failed = ladder_folder / REFERENCE / FAILURE
    return _read(Failure, failed) if failed.is_file() else None


def reference_file(ladder_folder: Path) -> Path:
    return ladder_folder / REFERENCE / REFERENCE_IMAGE


def has_reference(ladder_folder: Path) -> bool:
    """Whether all of it is there: what is written last is."""
    return (ladder_folder / REFERENCE / REFERENCE_STEPS).is_file()


def cache_folder(ladder_folder: Path, spec: RunSpec) -> Path:
    return ladder_folder / ".cache" / spec.rung


def shared_cache_folder(ladder_folder: Path) -> Path:
    return ladder_folder / ".cache" / "all"


def read_outcome(folder: Path) -> Outcome | None:
    """What a run folder holds; None where the worker is still at it, or died with everything around it."""
    if (folder / RESULT).is_file():
        return _read(Result, folder / RESULT)
    if (folder / FAILURE).is_file():
        return _read(Failure, folder / FAILURE)
    return None


def outcomes(ladder_folder: Path) -> Iterator[tuple[Path, Outcome]]:
    """Every finished attempt with its folder: in the order of the rungs, then of rounds and attempts."""
    for spec in read_ladder(ladder_folder).rungs:
        for _, folder in sorted(_attempts(ladder_folder, spec.rung)):
            outcome = read_outcome(folder)
            if outcome is not None:
                yield folder, outcome


def _attempts(ladder_folder: Path, rung: str) -> Iterator[tuple[tuple[int, int], Path]]:
    """(round, attempt) and folder of every attempt at a rung, in no order."""
    for path in (ladder_folder / rung).glob("r*-a*"):
        if name := re.fullmatch(r"r(\d+)-a(\d+)", path.name):
            yield (int(name[1]), int(name[2])), path


def last_outcomes(ladder_folder: Path) -> dict[tuple[str, int], Outcome]:
    """One outcome a rung and round: its last result, or its last failure where it never had one."""
    last: dict[tuple[str, int], Outcome] = {}
    for _, outcome in outcomes(ladder_folder):
        key = outcome.spec.rung, outcome.spec.round
        if isinstance(outcome, Result) or not isinstance(last.get(key), Result):
            last[key] = outcome
    return last


def next_attempt(ladder_folder: Path, spec: RunSpec) -> int:
    """Attempts are never overwritten, not even those that left no outcome."""
    taken = [attempt for (number, attempt), _ in _attempts(ladder_folder, spec.rung) if number == spec.round]
    return max(taken, default=0) + 1
