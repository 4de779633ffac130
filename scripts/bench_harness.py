"""What the harness itself costs: the command line's start, the parent's work a rung, a worker's imports.

    python scripts/bench_harness.py

Prints a table; nothing here is a measurement of a model.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from diffusion_fast import spool, tracking
from diffusion_fast.spec import Result

REPEATS = 15
RECIPES = ("", "bf16,sdpa", "bf16,sdpa,compile,int8_dynamic")


def command(*arguments: str, cwd: Path) -> float:
    """Wall seconds of one call of the command line."""
    start = time.perf_counter()
    subprocess.run((sys.executable, "-m", "diffusion_fast", *arguments), cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def row(what: str, seconds: list[float]) -> None:
    print(f"{what:60} median {statistics.median(seconds):6.3f} s   max {max(seconds):6.3f} s   n={len(seconds)}")


def main() -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        row("diffusion-fast list", [command("list", cwd=folder) for _ in range(REPEATS)])

        for names in RECIPES:
            command("run", "--no-track", "--steps", "1", "--with", names, "--spool", f"spool-{names}", cwd=folder)
        results = []
        for names in RECIPES:
            (ladder_folder,) = spool.find_ladders(folder / f"spool-{names}")
            ((run_folder, outcome),) = spool.outcomes(ladder_folder)
            assert isinstance(outcome, Result)
            results.append((ladder_folder, run_folder, outcome))
            row(f"a worker's imports: {names or 'baseline'}", [outcome.import_s])

        # What the parent does between a worker's exit and the recorded run, on a real rung's files: the same rung is
        # put into the spool again as a later attempt.
        ladder_folder, run_folder, outcome = results[0]
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        start = time.perf_counter()
        tracking.record(ladder_folder, tracking_uri=uri)
        row("recording: importing mlflow, making the store, first rung", [time.perf_counter() - start])
        seconds = []
        for attempt in range(2, 2 + REPEATS):
            again = replace(outcome, spec=replace(outcome.spec, attempt=attempt))
            target = spool.run_folder(ladder_folder, again.spec)
            target.mkdir()
            for path in run_folder.iterdir():
                os.link(path, target / path.name)
            (target / spool.RESULT).unlink()
            spool.write_json(target / spool.RESULT, again.to_dict())
            start = time.perf_counter()
            spool.read_outcome(target)
            tracking.record(ladder_folder, tracking_uri=uri)
            seconds.append(time.perf_counter() - start)
        row("recording: every further rung", seconds)
        start = time.perf_counter()
        tracking.finish(ladder_folder, tracking_uri=uri)
        row("the ladder's summary and plot", [time.perf_counter() - start])


if __name__ == "__main__":
    main()
