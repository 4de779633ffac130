"""What a call costs the host: a pipeline of full size whose networks compute nothing, on a CPU.

    python scripts/bench_host.py                          # SDXL, 30 steps; some 6 GB of memory
    python scripts/bench_host.py --with no_module_walks

What is left is Python's: tokenizing, the scheduler, and all that the pipeline asks its networks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from diffusion_fast import plan
from diffusion_fast.pipeline import build_pipeline, call
from diffusion_fast.spec import Recipe

CALLS = 21


def hollow(pipe: Any, height: int, width: int) -> None:
    """Have each network return at once what it would, all zeros or what it returned before."""
    batch, channels = 2, pipe.unet.config.in_channels
    scale, dtype = pipe.vae_scale_factor, pipe.unet.conv_in.weight.dtype
    step = torch.zeros(batch, channels, height // scale, width // scale, dtype=dtype)
    picture = torch.zeros(1, 3, height, width, dtype=dtype)
    pipe.unet.forward = lambda *_, **__: (step,)
    pipe.vae.decode = lambda *_, **__: (picture,)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        made = encoder(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
        encoder.forward = lambda *_, made=made, **__: made
    pipe.image_processor.postprocess = lambda *_, **__: []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--with", dest="names", default="", help="Optimizations, applied before the networks are empty."
    )
    chosen = parser.parse_args()
    for layer in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding):
        layer.reset_parameters = lambda _: None  # type: ignore[method-assign]  # nobody reads their numbers
    torch.set_grad_enabled(False)
    names = ("bf16", "sdpa", *filter(None, chosen.names.split(",")))
    settings = plan.Settings(weights="random", accuracy_prompts=0)
    model, device = plan.find_model("sdxl"), plan.find_device("cpu")
    spec = plan.plan_ladder("host", (Recipe("host", names),), model, device, settings).rungs[0]
    torch.set_default_dtype(torch.bfloat16)
    build, _ = build_pipeline(spec, lambda stage: None)
    torch.set_default_dtype(torch.float32)
    hollow(build.pipe, spec.height, spec.width)
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call(build)
        seconds.append(time.perf_counter() - start)
    modules = sum(len(list(network.modules())) for _, network in build.networks())
    low, high = min(seconds), max(seconds)
    print(f"{', '.join(spec.optimizations)}: {modules} modules")
    print(f"{1000 * statistics.median(seconds):.1f} ms a call, {1000 * low:.1f} to {1000 * high:.1f}")


if __name__ == "__main__":
    main()
