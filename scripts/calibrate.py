"""How often is a difference seen where there is none, and how often where there is one of 5%?

    python scripts/calibrate.py cheap --comparisons 200 --output calibration --cores 2   # matrix products as pipeline
    python scripts/calibrate.py tiny --comparisons 10 --output calibration               # the bundled model

A comparison is a whole ladder `aa`, measured, aggregated and judged by the code that users run, with its rounds, its
spool and a new process for every measurement. Only what the processes measure is exchanged, or slowed down. Every
comparison is a line of a .jsonl file in the output folder; started again, it makes those that are missing, and judges
all of them anew by their rounds: `--comparisons 0` does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffusion_fast import console, plan, report, spool, stats
from diffusion_fast import ladder as climbing
from diffusion_fast.spec import Outcome, Result, RunSpec

SLOWDOWN = 0.05
# What is compared: the name, how much slower the second rung is, and the rounds.
CASES = {
    "cheap": (
        ("aa-5-rounds", 0.0, console.Rounds(5)),
        ("aa-until-1-percent", 0.0, console.Rounds(5, 0.01, 30)),
        ("slower-until-2-percent", SLOWDOWN, console.Rounds(5, 0.02, 30)),
    ),
    "tiny": (("aa-5-rounds", 0.0, console.Rounds(5)), ("slower-5-rounds", SLOWDOWN, console.Rounds(5))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*CASES, "worker"])
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cores", type=int, default=1, help="Comparisons at a time, each on a core of its own.")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.what == "worker":
        worker(*chosen.arguments)
        return
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, slower, rounds in CASES[chosen.what]:
        file = chosen.output / f"{chosen.what}-{name}.jsonl"
        done = len(file.read_text().splitlines()) if file.is_file() else 0
        jobs = [
            (sys.executable, __file__, "worker", "compare", chosen.what, str(slower), json.dumps(vars(rounds)))
            for _ in range(done, chosen.comparisons)
        ]
        with file.open("a") as lines, ThreadPoolExecutor(chosen.cores) as pool:
            cores: dict[int, int] = {}  # by thread
            take = functools.partial(pinned, cores) if chosen.cores > 1 else alone
            for line in pool.map(take, jobs):
                lines.write(line)
                lines.flush()
        print(summary(file, rounds.planned), flush=True)


def alone(command: tuple[str, ...]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def pinned(cores: dict[int, int], command: tuple[str, ...]) -> str:
    """The command's output, run on a core that no other thread of this process uses."""
    core = cores.setdefault(threading.get_ident(), len(cores))
    return alone(("taskset", "-c", str(core), *command))


def judged(file: Path, planned: int) -> list[stats.Ratio]:
    """What today's statistics say of a file's comparisons, each of so many planned rounds or more."""
    found = []
    for line in file.read_text().splitlines():
        pairs = zip(*json.loads(line)["medians_s"].values(), strict=True)
        logs = {number: math.log(first / second) for number, (first, second) in enumerate(pairs, 1)}
        found.append(stats.mean_ratio(logs, planned))
    return found


def summary(file: Path, planned: int) -> str:
    """How many of a file's comparisons saw a difference, and what share of all that would be."""
    from scipy.stats import binomtest

    found = judged(file, planned)
    if not found:
        return f"{file.stem}: no comparison yet"
    seen = sum(each.seen is True for each in found)
    low, high = binomtest(seen, len(found)).proportion_ci()
    rounds = sorted(each.rounds for each in found)
    width = sorted(each.high / each.ratio - 1 for each in found if each.high is not None)
    return (
        f"{file.stem}: a difference was seen in {seen} of {len(found)} ({low:.1%} to {high:.1%}); "
        f"rounds {rounds[0]} to {rounds[-1]}, median {rounds[len(rounds) // 2]}; "
        f"the interval reaches ±{width[len(width) // 2]:.1%} (median)"
    )


def worker(task: str, *arguments: str) -> None:
    {"compare": compare, "cheap": cheap, "tiny": tiny}[task](*arguments)


def compare(what: str, slower: str, rounds: str) -> None:
    """Print one comparison as JSON."""
    device = plan.Device("cpu", "CPU")
    recipes, _ = plan.find_ladder("aa", device, plan.find_model("tiny"))
    planned = plan.plan_ladder("aa", recipes, plan.find_model("tiny"), device, plan.Settings(accuracy_prompts=0))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        folder = spool.save_ladder(Path(root), planned)
        climbing.launch = functools.partial(measure, what, slower)  # type: ignore[assignment]
        with contextlib.redirect_stdout(io.StringIO()):
            console.climb(folder, (), 600, None, None, console.Rounds(**json.loads(rounds)))
        row = report.from_spool(folder).iloc[1].to_dict()
        medians = report.measurements(folder).groupby("rung")["latency_median_s"]
        medians_s = {str(rung): each.round(7).tolist() for rung, each in medians}
    facts = {"ratio": row["speedup"], "low": row["speedup_low"], "high": row["speedup_high"]}
    numbers = {key: round(value, 5) for key, value in facts.items()} | {"rounds": int(row["rounds"])}
    print(json.dumps(numbers | {"seconds": round(time.monotonic() - start, 1), "medians_s": medians_s}))


def measure(what: str, slower: str, spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Any) -> Outcome | None:
    """In place of launch.launch: a new process, but another worker in it."""
    run = spool.run_folder(folder, spec)
    spool.write_json(run / spool.SPEC, spec.to_dict())
    percent = slower if spec.recipe == "b" else "0"
    if spec.role == "reference":
        return None
    with (run / spool.LOG).open("w") as log:
        command = (sys.executable, __file__, "worker", what, str(run), percent)
        subprocess.run(command, check=True, stdout=log, stderr=log, timeout=timeout_s)
    return spool.read_outcome(run)


def cheap(folder: str, slower: str) -> None:
    """Measure a matrix product of a few milliseconds as a pipeline is measured, with fewer and shorter calls."""
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy as np

    from diffusion_fast import measure as measuring

    matrix = np.random.default_rng(0).random((400, 400), np.float32)

    def call() -> None:
        begin = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        waste(float(slower) * (time.perf_counter() - begin))

    spec = RunSpec.from_dict(spool.read_json(Path(folder) / spool.SPEC))
    measuring.MIN_SECONDS = 0.2
    warmup_s, warmed_up = measuring.warm_up(call, "cpu")
    samples_s, _ = measuring.samples(call, "cpu", spec.planned_rounds)
    median, low, high = measuring.quantiles(samples_s)
    result = Result(
        spec=spec,
        finished_at="",
        pipeline_cls="",
        ckpt_id="",
        applied={},
        import_s=0.0,
        load_s=0.0,
        first_call_s=warmup_s[0],
        cache_state="none",
        warmup_s=tuple(warmup_s),
        warmed_up=warmed_up,
        samples_s=tuple(samples_s),
        latency_median_s=median,
        latency_p10_s=low,
        latency_p90_s=high,
        phases={},
        memory={},
        image_repeats=True,
    )
    spool.write_json(Path(folder) / spool.RESULT, result.to_dict())


def tiny(folder: str, slower: str) -> None:
    """The real worker, with a denoiser that takes so much longer."""
    from diffusion_fast import pipeline
    from diffusion_fast import worker as real

    build_pipeline = pipeline.build_pipeline

    def slowed(*arguments: Any) -> Any:
        build, applied = build_pipeline(*arguments)
        forward = build.pipe.unet.forward

        def slow_forward(*inputs: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            found = forward(*inputs, **more)
            waste(float(slower) * (time.perf_counter() - begin))
            return found

        build.pipe.unet.forward = slow_forward
        return build, applied

    pipeline.build_pipeline = slowed  # type: ignore[assignment]
    raise SystemExit(real.main(Path(folder)))


def waste(seconds: float) -> None:
    """Wait, to the microsecond: a sleep of half a millisecond takes a tenth of a millisecond more."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


if __name__ == "__main__":
    main()
