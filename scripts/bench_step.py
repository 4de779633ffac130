"""What a denoising step takes besides its network: guidance, the scheduler, and what a CUDA graph copies in and out.

    python scripts/bench_step.py --ladder fast --recipe convolutions --model sdxl --weights random

By CUDA events on the stream, in milliseconds: a step, from one network to the next; what lies between the two; and the
network with what is copied for its graph, beside that graph alone, replayed after each call on what it was last given.
What a graph of the whole step could gain at most is what lies between, and what is copied.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise
from typing import Any

import torch

from diffusion_fast import plan
from diffusion_fast.pipeline import build_pipeline, call

CALLS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", default="fast")
    parser.add_argument("--recipe", default="attention-kernel", help="One that has a CUDA graph of the whole network.")
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--weights")
    chosen = parser.parse_args()
    model, device = plan.find_model(chosen.model), plan.find_device("cuda")
    recipes, _ = plan.find_ladder(chosen.ladder, device, model)
    recipe = plan.lookup("recipe", chosen.recipe, {each.name: each for each in recipes})
    settings = plan.Settings(weights=chosen.weights, accuracy_prompts=0)
    spec = plan.plan_ladder(chosen.ladder, (recipe,), model, device, settings).rungs[0]
    torch.set_grad_enabled(False)
    build, _ = build_pipeline(spec, lambda stage: print(f"  {stage}", flush=True))
    for _ in range(3):
        call(build)
    (owner, attribute) = next((o, a) for name, o, a in build.launched() if name == f"{build.model.denoiser} step")
    print(f"{recipe.name} of {model.name}, {device.name}, medians of {CALLS} calls of {spec.steps} steps:")
    for name, milliseconds in measured(build, owner, attribute).items():
        print(f"{name:36}{milliseconds:8.3f} ms a step")


def measured(build: Any, owner: Any, attribute: str) -> dict[str, float]:
    graphed = getattr(owner, attribute)
    begins: list[Any] = []
    ends: list[Any] = []

    def event() -> Any:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    def watched(*args: Any, **kwargs: Any) -> Any:
        begins.append(event())
        made = graphed(*args, **kwargs)
        ends.append(event())
        return made

    found: dict[str, list[float]] = {"a step": [], "between two networks": [], "a network": [], "its graph alone": []}
    setattr(owner, attribute, watched)
    for _ in range(CALLS):
        begins.clear()
        ends.clear()
        call(build)
        (captured,) = graphed.captured.values()
        replayed = [event()]
        for _ in range(build.spec.steps):
            captured.replay()
            replayed.append(event())
        torch.cuda.synchronize()
        found["a step"] += [begin.elapsed_time(after) for begin, after in pairwise(begins)]
        found["between two networks"] += [end.elapsed_time(begin) for end, begin in zip(ends, begins[1:], strict=False)]
        found["a network"] += [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
        found["its graph alone"] += [begin.elapsed_time(end) for begin, end in pairwise(replayed)]
    setattr(owner, attribute, graphed)
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
