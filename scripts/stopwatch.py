"""Does the harness time what a bare loop times?

    python scripts/stopwatch.py                                        # the bundled model, calls of a second or so
    python scripts/stopwatch.py --model sdxl --weights random --steps 30   # on a GPU

Both have the same pipeline and recipe (bf16, SDPA). One process is the harness's worker, the other a loop with nothing
but a clock: on a GPU CUDA events around each call. They take turns, and the ratio of their medians is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from diffusion_fast import launch, plan, spool, stats
from diffusion_fast.spec import Recipe, Result, RunSpec

CALLS = 12


def bare(spec_file: Path) -> None:
    """Print the median seconds of a call."""
    import torch

    from diffusion_fast.pipeline import build_pipeline

    spec = RunSpec.from_dict(spool.read_json(spec_file))
    torch.set_grad_enabled(False)
    pipe = build_pipeline(spec, lambda _: None)[0].pipe
    arguments = {"num_inference_steps": spec.steps, "guidance_scale": spec.guidance_scale}
    size = {"height": spec.height, "width": spec.width}
    seconds = []
    for _ in range(CALLS + 3):
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        if spec.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            pipe(spec.prompt, generator=generator, **arguments, **size)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            pipe(spec.prompt, generator=generator, **arguments, **size)
            seconds.append(time.perf_counter() - start)
    print(json.dumps(statistics.median(seconds[3:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.bare:
        bare(chosen.bare)
        return
    settings = plan.Settings(weights=chosen.weights, steps=chosen.steps, accuracy_prompts=0)
    recipe = Recipe("bf16-sdpa", ("bf16", "sdpa"))
    ladder = plan.plan_ladder("stopwatch", (recipe,), plan.find_model(chosen.model), plan.find_device(), settings)
    ratios = {}
    with tempfile.TemporaryDirectory() as root:
        folder = spool.save_ladder(Path(root), ladder)
        for number in range(1, chosen.rounds + 1):
            spec = replace(ladder.rungs[0], round=number)
            found: dict[str, float] = {}
            for who in ("harness", "bare") if number % 2 else ("bare", "harness"):
                if who == "harness":
                    outcome = launch.launch(spec, folder, 600)
                    assert isinstance(outcome, Result), outcome
                    found[who] = outcome.latency_median_s
                else:
                    file = Path(root) / "spec.json"
                    spool.write_json(file, spec.to_dict())
                    command = (sys.executable, __file__, "--bare", str(file))
                    found[who] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            ratios[number] = math.log(found["harness"] / found["bare"])
            print(json.dumps({"round": number} | found), flush=True)
    ratio = stats.mean_ratio(ratios, chosen.rounds)
    interval = f"95% interval {ratio.low:.4f} to {ratio.high:.4f}, {ratio.rounds} rounds"
    print(f"harness / bare loop: {ratio.ratio:.4f} ({interval})")


if __name__ == "__main__":
    main()
