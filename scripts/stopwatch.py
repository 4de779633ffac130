"""Does the harness time what a bare loop times?

    python scripts/stopwatch.py                              # the bundled model, calls of a second or so
    python scripts/stopwatch.py --model sdxl --weights random --steps 10 --with bf16,sdpa,cuda_graph  # on a GPU

One process has one pipeline, which is called in turns by the harness, as a worker does, and by a bare loop
with nothing but a clock: the wall clock on a CPU, CUDA events on a GPU. A machine's speed varies more from minute to
minute than any stopwatch; so what is compared are neighbouring calls.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_fast import measure, plan, spool, stats
from diffusion_fast.spec import Recipe, RunSpec
from diffusion_fast.watch import Watch


def turns(spec_file: Path, count: int) -> None:
    """Print seconds of calls by each, turn by turn: harness, bare, bare, harness, and so on."""
    import torch

    from diffusion_fast.pipeline import build_pipeline, call

    spec = RunSpec.from_dict(spool.read_json(spec_file))
    torch.set_grad_enabled(False)
    build = build_pipeline(spec, lambda _: None)[0]
    watch = Watch(spec.device)
    measure.warm_up(lambda: call(build), spec.device)
    bare(spec, build.pipe)
    found: dict[str, list[float]] = {"harness": [], "bare": []}
    with watch:
        for number in range(count):
            for who in ("harness", "bare") if number % 2 == 0 else ("bare", "harness"):
                timed = (
                    measure.timed(lambda: call(build), spec.device)[0] if who == "harness" else bare(spec, build.pipe)
                )
                found[who].append(timed)
    print(json.dumps(found))


def bare(spec: RunSpec, pipe: Any) -> float:
    """Seconds of a call."""
    import torch

    settings = {"num_inference_steps": spec.steps, "guidance_scale": spec.guidance_scale}
    settings |= {"height": spec.height, "width": spec.width}
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    if spec.device == "cpu":
        start = time.perf_counter()
        pipe(spec.prompt, generator=generator, **settings)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    pipe(spec.prompt, generator=generator, **settings)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--with", dest="names", default="bf16,sdpa", help="Optimizations. A GPU's calls vary less as a cuda_graph."
    )
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--turns", type=int, default=60, help="Calls by each, in each process.")
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.spec:
        turns(chosen.spec, chosen.turns)
        return
    settings = plan.Settings(weights=chosen.weights, steps=chosen.steps, accuracy_prompts=0)
    recipe = Recipe("stopwatch", tuple(chosen.names.split(",")))
    ladder = plan.plan_ladder("stopwatch", (recipe,), plan.find_model(chosen.model), plan.find_device(), settings)
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spec.json"
        for number in range(1, chosen.processes + 1):
            spool.write_json(file, replace(ladder.rungs[0], round=number).to_dict())
            command = (sys.executable, __file__, "--spec", str(file), "--turns", str(chosen.turns))
            said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            medians = {who: round(measure.quantiles(seconds)[0], 5) for who, seconds in found.items()}
            print(json.dumps({"process": number, "median_s": medians}), flush=True)
            ratios += [math.log(one / other) for one, other in zip(found["harness"], found["bare"], strict=True)]
    ratio = stats.mean_ratio(dict(enumerate(ratios, 1)), len(ratios))
    interval = f"95% interval {ratio.low:.4f} to {ratio.high:.4f}, {ratio.rounds} pairs of calls"
    print(f"harness / bare loop: {ratio.ratio:.4f} ({interval})")


if __name__ == "__main__":
    main()
