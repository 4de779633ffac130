"""Where outcomes live on disk. The spool is the truth; MLflow is a view of it.

SPOOL/LADDER/ladder.json
             reference/              spec.json, reference.safetensors, image.png, log.txt
             00-baseline/r1-a1/      spec.json, result.json | failure.json, image.png, image.jpg, result.csv,
                                     log.txt, progress.txt, environment.json, requirements.txt
             .cache/00-baseline/     the rung's compile caches
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_fast.spec import REFERENCE, Failure, Ladder, Outcome, Result, RunSpec

LADDER, SPEC, RESULT, FAILURE = "ladder.json", "spec.json", "result.json", "failure.json"
REFERENCE_IMAGE = "reference.safetensors"
LOG, PROGRESS = "log.txt", "progress.txt"


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


def save_ladder(spool: Path, ladder: Ladder) -> Path:
    """Make the ladder's folder and return it."""
    folder = spool / ladder.id
    write_json(folder / LADDER, ladder.to_dict())
    return folder


def read_ladder(folder: Path) -> Ladder:
    return Ladder.from_dict(read_json(folder / LADDER))


def find_ladders(folder: Path) -> list[Path]:
    """The ladders in a folder, itself included, oldest first."""
    found = [path.parent for path in (folder / LADDER, *folder.glob(f"*/{LADDER}"), *folder.glob(f"*/*/{LADDER}"))]
    return sorted((path for path in found if (path / LADDER).is_file()), key=lambda path: path.name)


def run_folder(ladder_folder: Path, spec: RunSpec) -> Path:
    if spec.role == REFERENCE:
        return ladder_folder / REFERENCE
    return ladder_folder / spec.rung / f"r{spec.round}-a{spec.attempt}"


def reference_file(ladder_folder: Path) -> Path:
    return ladder_folder / REFERENCE / REFERENCE_IMAGE


def cache_folder(ladder_folder: Path, spec: RunSpec) -> Path:
    return ladder_folder / ".cache" / spec.rung


def read_outcome(folder: Path) -> Outcome | None:
    """What a run folder holds; None where the worker is still at it, or died with everything around it."""
    if (folder / RESULT).is_file():
        return Result.from_dict(read_json(folder / RESULT))
    if (folder / FAILURE).is_file():
        return Failure.from_dict(read_json(folder / FAILURE))
    return None


def outcomes(ladder_folder: Path) -> Iterator[tuple[Path, Outcome]]:
    """Every finished attempt with its folder: in the order of the rungs, then of rounds and attempts."""
    for spec in read_ladder(ladder_folder).rungs:
        attempts = (ladder_folder / spec.rung).glob("r*-a*")
        for folder in sorted(attempts, key=lambda path: [int(part[1:]) for part in path.name.split("-")]):
            outcome = read_outcome(folder)
            if outcome is not None:
                yield folder, outcome


def last_outcomes(ladder_folder: Path) -> dict[str, Outcome]:
    """One outcome a rung: its last result, or its last failure where it never had one."""
    last: dict[str, Outcome] = {}
    for _, outcome in outcomes(ladder_folder):
        if isinstance(outcome, Result) or not isinstance(last.get(outcome.spec.rung), Result):
            last[outcome.spec.rung] = outcome
    return last


def next_attempt(ladder_folder: Path, spec: RunSpec) -> int:
    """Attempts are never overwritten, not even those that left no outcome."""
    taken = [int(path.name.partition("-a")[2]) for path in (ladder_folder / spec.rung).glob(f"r{spec.round}-a*")]
    return max(taken, default=0) + 1
