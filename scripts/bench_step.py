"""What a denoising step takes besides its network: guidance, the scheduler, and what a CUDA graph copies in and out.

    python scripts/bench_step.py --ladder fast --recipe convolutions --model sdxl --weights random

By CUDA events on the stream, in milliseconds: from one step's network to the next one's, of which the network, and of
that its graph alone, replayed on what it was given. So what a graph of the whole step could gain at most is what is
outside of the network and what is copied.
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
    recipe = next(each for each in recipes if each.name == chosen.recipe)
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

    steps: list[float] = []
    networks: list[float] = []
    setattr(owner, attribute, watched)
    for _ in range(CALLS):
        begins.clear()
        ends.clear()
        call(build)
        torch.cuda.synchronize()
        steps += [begin.elapsed_time(after) for begin, after in pairwise(begins)]
        networks += [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)][:-1]
    setattr(owner, attribute, graphed)
    (replay,) = (each.replay for each in graphed.captured.values())
    graphs: list[float] = []
    for _ in range(CALLS):
        events = [event()]
        for _ in range(build.spec.steps):
            replay()
            events.append(event())
        torch.cuda.synchronize()
        graphs += [begin.elapsed_time(end) for begin, end in pairwise(events)]
    step, network, graph = (statistics.median(each) for each in (steps, networks, graphs))
    return {
        "a step": step,
        "its network": network,
        "the network's graph alone": graph,
        "guidance, scheduler and what waits": step - network,
        "copied in and out of the graph": network - graph,
    }


if __name__ == "__main__":
    main()
