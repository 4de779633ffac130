"""Which layers and operations of an eager denoiser give a batch something else than its images alone.

    python scripts/probe_batch.py --model sdxl --weights random --batch-size 8

The first of the model's steps in fp32, attention written out, as the reference would compute it if it took the batch
whole. Each layer, and each of attention's products and softmax, is computed once more image by image from the same
input; what differs by more than rounding is listed, and the whole network last. Each layer that differs is then held
against itself in float64, with other numbers, algorithms and contents of free memory. The VAE isn't looked at, and
compiled recipes have other kernels.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
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


def explained(layer: Any, given: torch.Tensor, found: torch.Tensor, count: int) -> Iterator[str]:
    """How far a layer's batch is from float64, one line a way to compute it."""
    exact, other = copy.deepcopy(layer).double(), torch.randn_like(given)
    right = exact(given.double())

    def cudnn(**flags: bool) -> Any:
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False, **flags)

    yield f"as it was: {onestep.distance(found, right):.1e}"
    yield f"again: {onestep.distance(layer(given), right):.1e}"
    yield f"image by image: {onestep.distance(in_parts(layer, 'forward', count)(given), right):.1e}"
    yield f"of random numbers: {onestep.distance(layer(other), exact(other.double())):.1e}"
    with cudnn(benchmark=True):
        yield f"by cuDNN's fastest algorithm: {onestep.distance(layer(given), right):.1e}"
    with cudnn(deterministic=True):
        yield f"by a deterministic one: {onestep.distance(layer(given), right):.1e}"
    with torch.backends.cudnn.flags(enabled=False):
        yield f"without cuDNN: {onestep.distance(layer(given), right):.1e}"
    if given.is_cuda:
        torch.cuda.empty_cache()
        torch.full((torch.cuda.mem_get_info()[0] // 8,), float("nan"), device=given.device)  # half of what is free
        yield f"with NaN in free memory: {onestep.distance(layer(given), right):.1e}"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer(given)
        yield "kernels: " + ", ".join(event.key for event in profile.key_averages())


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
            if not layers[name] <= ROUNDING:  # NaN, too
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
    for name, (layer, one, found) in differing.items():
        print(f"{name}, of {tuple(one.shape)}: {layers[name]:.1e}")
        for line in explained(layer, one.to(chosen.device), found.to(chosen.device), count):
            print(f"  {line}", flush=True)
    for name, errors in products.errors.items():
        differ = sum(not each <= ROUNDING for each in errors)
        print(f"{name}: {differ} of {len(errors)} parts differ, at most {max(errors):.1e}")
    alone = in_parts(build.denoiser, "forward", count)(*args, **kwargs)[0]
    print(f"{len(layers)} layers compared; the whole network: {onestep.distance(whole, alone):.1e}")


if __name__ == "__main__":
    main()
