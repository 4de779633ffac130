"""Which layers and operations of an eager denoiser give a batch something else than its images alone.

    python scripts/probe_batch.py --model sdxl --weights random --batch-size 8

The first of the model's steps in fp32, attention written out, as the reference would compute it if it took the batch
whole. Each layer, and each of attention's products and softmax, is computed once more image by image from the same
input; what differs by more than rounding is listed, then the whole network. Convolutions and linear layers that differ
are then held against themselves in float64, with other numbers, algorithms and contents of free memory. The VAE isn't
looked at, and compiled recipes have other kernels.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_fast import onestep, plan
from diffusion_fast.pipeline import build_pipeline, call, in_parts

ROUNDING = 1e-4  # relative: sums in another order differ by a tenth of this
PRODUCTS = ("baddbmm", "bmm", "_softmax")


class Apart(TorchDispatchMode):
    """Attention's operations, each part of the batch alone beside the whole."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.errors: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS and len(output) % self.count == 0:
            whole = [each for each in args if isinstance(each, torch.Tensor)]
            others = args[len(whole) :]
            errors = self.errors.setdefault(f"{name} -> {tuple(output.shape)}", [])
            for *part, found in zip(*(each.chunk(self.count) for each in (*whole, output)), strict=True):
                alone = func(*part, *others, **(kwargs or {}))
                # Of no prompt some models make zeros, which have no relative error.
                errors.append(0.0 if torch.equal(found, alone) else onestep.distance(found, alone))
        return output


def explain(layer: Any, given: torch.Tensor, found: torch.Tensor, count: int) -> torch.Tensor:
    """Print how far a layer's batch is from float64, a line for each way to compute it. Returns the one in float64."""
    cudnn = functools.partial(torch.backends.cudnn.flags, allow_tf32=False)
    other = torch.randn_like(given)
    exact = in_parts(copy.deepcopy(layer).double(), "forward", count)
    with cudnn(enabled=False):  # nothing of what is looked into
        right, right_of_other = exact(given.double()), exact(other.double())

    def run(numbers: torch.Tensor, **flags: bool) -> torch.Tensor:
        with cudnn(**{"enabled": True, **flags}):
            value: torch.Tensor = layer(numbers)
        return value

    def chosen_anew() -> torch.Tensor:
        with ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(False,)) as another:
            return another.submit(run, given, benchmark=True).result()  # each thread keeps its own choice of algorithms

    ways: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "as it was": (lambda: found, right),
        "again": (lambda: run(given), right),
        "image by image": (lambda: in_parts(layer, "forward", count)(given), right),
        "of random numbers": (lambda: run(other), right_of_other),
        "by the fastest algorithm": (chosen_anew, right),
        "by a deterministic one": (lambda: run(given, deterministic=True), right),
        "without cuDNN": (lambda: run(given, enabled=False), right),
    }
    for way, (value, expected) in ways.items():
        try:
            print(f"  {way}: {onestep.distance(value(), expected):.1e}", flush=True)
        except RuntimeError as error:  # the other ways are worth knowing, too
            print(f"  {way}: {error}", flush=True)
    if given.is_cuda:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(given)
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                print(f"  kernel: {event.name}", flush=True)
    return right


def leave_nan() -> None:
    """Fill the GPU's free memory with NaN, and give it back to PyTorch's allocator, which clears nothing."""
    blocks = []
    torch.cuda.set_per_process_memory_fraction(0.95)
    for size in (2**30, 2**25, 2**20):
        with suppress(torch.OutOfMemoryError):
            while True:
                blocks.append(torch.full((size // 4,), math.nan, device="cuda"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--weights")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    model, device = plan.find_model(chosen.model), plan.find_device(chosen.device)
    recipes, _ = plan.find_ladder("progressive", device, model)
    settings = plan.Settings(weights=chosen.weights, accuracy_prompts=0, batch_size=chosen.batch_size)
    spec = plan.plan_ladder("progressive", recipes, model, device, settings).reference
    torch.set_grad_enabled(False)
    build, _ = build_pipeline(spec, lambda stage: print(f"  {stage}", flush=True))
    given: list[Any] = []

    def stop(_: Any, args: Any, kwargs: Any) -> None:
        given.extend((args, kwargs))
        raise StopIteration

    hook = build.denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    with suppress(StopIteration):
        call(build)
    hook.remove()
    args, kwargs = given
    count = chosen.batch_size
    layers: dict[str, float] = {}
    differing: dict[str, tuple[Any, ...]] = {}

    def compare(name: str) -> Any:
        def again(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            layers[name] = onestep.distance(output, in_parts(layer, "forward", count)(*args, **kwargs))
            if not layers[name] <= ROUNDING and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                differing[name] = (layer, args[0].cpu(), output.cpu())

        return again

    hooks = [
        layer.register_forward_hook(compare(name), with_kwargs=True)
        for name, layer in build.denoiser.named_modules()
        if not list(layer.children()) and list(layer.parameters())
    ]
    with Apart(count) as products:
        whole = build.denoiser(*args, **kwargs)[0]
    for hook in hooks:
        hook.remove()
    for name, error in layers.items():
        if not error <= ROUNDING:  # NaN, too
            print(f"{name}: {error:.1e}")
    for name, errors in products.errors.items():
        differ = sum(not each <= ROUNDING for each in errors)
        print(f"{name}: {differ} of {len(errors)} parts differ, at most {max(errors):.1e}")
    alone = in_parts(build.denoiser, "forward", count)(*args, **kwargs)[0]
    print(f"{len(layers)} layers compared; the whole network: {onestep.distance(whole, alone):.1e}", flush=True)
    rights = {}
    for name, (layer, one, found) in differing.items():
        print(f"{name}, given {tuple(one.shape)}, against float64:")
        rights[name] = explain(layer, one.to(chosen.device), found.to(chosen.device), count)
    if whole.is_cuda:  # last, for what is left behind would be under all that comes after
        leave_nan()
        for name, (layer, one, _) in differing.items():
            print(
                f"{name}, with NaN in free memory: {onestep.distance(layer(one.cuda()), rights[name]):.1e}", flush=True
            )


if __name__ == "__main__":
    main()
