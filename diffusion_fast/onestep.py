"""How far one denoising step is from the reference's, when both start from the same latents.

Over a whole trajectory rounding is amplified, and two good images may drift apart. A single step from given latents
(teacher-forced) has the recipe's own error and nothing else; eager in the same number format is its floor.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_fast import ahead
from diffusion_fast.optimizations import OPTIMIZATIONS, Build
from diffusion_fast.spec import RunSpec

POINTS = 5  # steps of a trajectory that are looked at, the first and the last among them
ALLOWED = 1.2  # times the floor, for a recipe that claims to lose nothing
ROUNDING = 1e-5  # relative: fp32's own floor is nought, and sums in another order differ by about a tenth of this

# "index", "args" and "kwargs" of the denoiser, "output"; by number format "eager"; by the denoiser's dtype "own".
Step = dict[str, Any]


@contextmanager
def record(build: Build) -> Iterator[list[Step]]:
    """Within, of one call: what the denoiser is given and what it gives, at POINTS steps. Tensors on the CPU."""
    import torch

    count = build.spec.steps
    wanted = sorted({round(point * (count - 1) / max(POINTS - 1, 1)) for point in range(POINTS)})
    found: list[Step] = []
    index = -1

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal index
        index += 1
        if index in wanted:
            kept = torch.utils._pytree.tree_map(lambda value: _moved(value, "cpu"), (args, kwargs, output[0]))
            args, kwargs, given = kept
            found.append({"index": index, "args": args, "kwargs": kwargs, "output": given, "eager": {}, "own": {}})

    hook = build.denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def replay(build: Build, steps: list[Step]) -> list[Any]:
    """The denoiser's outputs for recorded inputs, fp32 on the CPU. Raises RuntimeError rather than compile anew.

    In another number format these are cast, but for what a pipeline itself has rounded there: it is given that.
    """
    import torch
    from torch.utils import _pytree as pytree

    device, dtype = build.pipe.device, build.denoiser.dtype
    outputs = []
    with torch.compiler.set_stance("fail_on_recompile"), ahead.nothing_new():
        for step in steps:
            leaves, tree = pytree.tree_flatten((step["args"], step["kwargs"]))
            own = step["own"].get(str(dtype)) or [_usual(leaf, dtype) for leaf in leaves]
            moved = [
                _moved(each, device) if isinstance(each, torch.Tensor) else _moved(leaf, device, each)
                for leaf, each in zip(leaves, own, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(moved, tree)
            outputs.append(build.denoiser(*args, **kwargs)[0].to("cpu", torch.float32, copy=True))
    return outputs


def floors(build: Build, steps: list[Step], formats: set[str]) -> Iterator[str]:
    """Bring the reference's pipeline into one number format after another, and add to the steps what it gives there.

    Whoever iterates makes one call in each format: what the pipeline gives its denoiser is seen there. Leaves it in the
    last of them.
    """
    from torch.utils import _pytree as pytree

    for numbers in _eager_in(build, formats):
        with record(build) as found:
            yield numbers
        for step, there in zip(steps, found, strict=True):
            leaves = pytree.tree_leaves((there["args"], there["kwargs"]))
            step["own"][str(build.denoiser.dtype)] = [_own(leaf) for leaf in leaves]
        for step, output in zip(steps, replay(build, steps), strict=True):
            step["eager"][numbers] = output


def _own(value: Any) -> Any:
    """Of what a pipeline gives its denoiser: numbers as they are, of latents and embeddings the dtype.

    It may have rounded a time step before dividing it (FLUX's: 750 is 752 and 0.7539 in bf16, and not 0.75).
    """
    import torch

    if not isinstance(value, torch.Tensor):
        return None
    return value if value.ndim < 2 else value.dtype


def _eager_in(build: Build, formats: set[str]) -> Iterator[str]:
    import copy

    import torch

    from diffusion_fast.pipeline import no_tf32

    if "tf32" in formats:
        OPTIMIZATIONS["tf32"].apply(build)
        yield "tf32"
        no_tf32()
    halves = sorted(formats - {"tf32", "float32"})
    networks = list(build.networks())
    for name in halves:
        for part, network in networks:
            # For the last one they are converted where they are: a large model has no room beside itself.
            own = network if name == halves[-1] else copy.deepcopy(network)
            setattr(build.pipe, part, own.to(getattr(torch, name)))
        gc.collect()  # one that computes in parts holds itself, and the one before would stay on the device
        build.dtype = name
        yield name


def compare(spec: RunSpec, outputs: list[Any], steps: list[Step]) -> dict[str, Any]:
    """Relative L2 errors at each step: of the outputs, of the floor, and of the outputs against the floor.

    `of_allowed`: the largest, as a multiple of what a lossless recipe may have at that step, ALLOWED times the floor.
    `ok`: that is at most 1. A recipe that says it is lossy isn't judged (None).
    """
    error, floor, to_eager = [], [], []
    for output, step in zip(outputs, steps, strict=True):
        reference = step["output"]
        eager = reference if spec.numbers == "float32" else step["eager"][spec.numbers]
        for who, values in (("the denoiser", output), (f"eager {spec.numbers}", eager)):
            if not values.isfinite().all():
                raise ValueError(f"{who} gave values that are not finite at step {step['index']}")
        error.append(distance(output, reference))
        floor.append(distance(eager, reference))
        to_eager.append(distance(output, eager))
    lossless = all(OPTIMIZATIONS[name].lossless for name in spec.optimizations)
    of_allowed = max(each / max(ALLOWED * least, ROUNDING) for each, least in zip(error, floor, strict=True))
    return {
        "steps": [step["index"] for step in steps],
        "error": error,
        "floor": floor,
        "to_eager": to_eager,
        "of_allowed": of_allowed,
        "ok": of_allowed <= 1 if lossless else None,
    }


def distance(one: Any, other: Any) -> float:
    """The relative L2 error of `one` as `other`."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def _moved(value: Any, device: Any, dtype: Any = None) -> Any:
    """A tensor elsewhere, with its repeats still one number: a time step for all rows is compiled as such."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    one = value
    for dim, stride in enumerate(value.stride()):
        one = one.narrow(dim, 0, 1) if stride == 0 else one
    return one.to(device, dtype, copy=True).expand(value.shape)


def _usual(value: Any, dtype: Any) -> Any:
    """The dtype in which a pipeline gives a tensor, where it hasn't been seen to: numbers alone are a scheduler's."""
    import torch

    return dtype if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point() else None
