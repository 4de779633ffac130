"""Which layers lose most in eight bits: each one alone, and then all but those that are kept.

    python -m diffusion_fast.sensitivity FOLDER

reads FOLDER/spec.json, whose recipe names an optimization for eight bits, and writes FOLDER/sensitivity.json. Errors
are of single denoising steps from the same latents, relative to the same pipeline before it is quantized. All else is
in fp32: in bf16 any change at all, however small, comes out as large as bf16's own rounding.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_fast import spool
from diffusion_fast.modules import replace_modules
from diffusion_fast.optimizations import OPTIMIZATIONS, eight_bit_formats
from diffusion_fast.spec import DTYPES, RunSpec
from diffusion_fast.worker import end_with_parent

FILE = "sensitivity.json"


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution, and the largest relative L2 error of the steps where it alone is quantized."""

    name: str
    features: tuple[int, int]  # in, out
    rows: int  # pixels that a convolution makes, of all images
    taps: int  # that each of them is a product with; 1 for a linear layer
    error: float

    @property
    def cost(self) -> float:
        """What is lost by quantizing it for what is gained: squared error for each multiplication in eight bits."""
        return self.error**2 / (self.rows * math.prod(self.features) * self.taps)


def choose(layers: Sequence[Layer], target: float | None) -> list[str]:
    """The layers to keep so that the others' errors come to `target`, the costliest first; without a target none.

    Errors of different layers are taken to be independent, so that their squares add up. So what stays in eight bits is
    as much of the work as can be.
    """
    if target is None:
        return []
    left = math.fsum(layer.error**2 for layer in layers)
    kept: list[str] = []
    for layer in sorted(layers, key=lambda each: -each.cost):
        if left <= target**2:
            break
        kept.append(layer.name)
        left -= layer.error**2
    return kept


def measure(spec: RunSpec, target: float | None, tell: Any) -> dict[str, Any]:
    """The whole pass. `tell` is called with what is being done. Returns what sensitivity.json holds."""
    import torch

    from diffusion_fast import eight_bits, onestep
    from diffusion_fast.optimizations.quantization import eligible, eligible_convolutions
    from diffusion_fast.pipeline import build_pipeline, call

    of_linears, of_images = eight_bit_formats(spec.optimizations)
    # In eager mode: a layer more or less would be compiled anew each time.
    # Without what is for 16 bits alone, such as kernels of our own, the layers have the same names.
    known = [OPTIMIZATIONS[name] for name in spec.optimizations if name not in (*DTYPES, "tf32")]
    plain = tuple(each.name for each in known if each.stage not in LATER and not each.for_16_bits)
    torch.set_grad_enabled(False)
    build, _ = build_pipeline(replace(spec, optimizations=plain), tell)
    rows, linears = eligible(build, f"{of_linears}_rows") if of_linears else ({}, {})
    pixels, convolutions = eligible_convolutions(build, f"{of_images}_convolutions") if of_images else ({}, {})
    rows |= pixels
    candidates: dict[str, Any] = {**linears, **convolutions}
    tell("recording single steps")
    with onestep.record(build) as steps:
        call(build)
    steps = [steps[index] for index in sorted({0, len(steps) // 2, len(steps) - 1})]
    before = onestep.replay(build, steps)

    def quantized(layer: Any) -> Any:
        if isinstance(layer, torch.nn.Conv2d):
            return eight_bits.ImagewiseConvolution(layer, eight_bits.FORMATS[of_images])
        return eight_bits.RowwiseLinear(layer, eight_bits.FORMATS[of_linears])

    def error_of(names: Iterable[str]) -> float:
        """What a step loses when these layers, and no others, are quantized."""
        instead = {candidates[name]: quantized(candidates[name]) for name in names}
        replace_modules(build.denoiser, instead.get)  # under all of its names, where a layer has several
        after = onestep.replay(build, steps)
        replace_modules(build.denoiser, {made: layer for layer, made in instead.items()}.get)
        return max(onestep.distance(one, other) for one, other in zip(after, before, strict=True))

    layers = []
    for number, (name, layer) in enumerate(candidates.items()):
        tell(f"layer {number + 1} of {len(candidates)}: {name}")
        outputs, inputs, *window = layer.weight.shape
        layers.append(Layer(name, (inputs, outputs), rows[layer], math.prod(window), error_of([name])))
    layers.sort(key=lambda layer: -layer.error)
    kept = choose(layers, target)
    while True:
        others = [layer for layer in layers if layer.name not in kept]
        tell(f"all but {len(kept)}")
        together = error_of(layer.name for layer in others)
        if target is None or together <= target or not others:
            break
        kept.append(max(others, key=lambda layer: layer.cost).name)  # together they lose more than their squares say
    return {
        "model": spec.model,
        "format": " and ".join(
            [*([of_linears] if linears else []), *([f"{of_images} (convolutions)"] if convolutions else [])]
        ),
        "target": target,
        "kept": kept,
        "predicted": math.sqrt(math.fsum(layer.error**2 for layer in others)),
        "error": together,
        "layers": [vars(layer) for layer in layers],
    }


LATER = ("quantize", "hoist", "inductor", "compile", "approximate", "capture")


def read_kept(path: Path, model: str) -> tuple[str, ...]:
    """The layers that an earlier pass decided to keep. Raises ValueError where it was of another model, or none."""
    try:
        found = spool.read_json(path)
        if found["model"] != model:
            raise ValueError(f"it is about {found['model']}, and this is {model}")
        return tuple(found["kept"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} isn't what `diffusion-fast sensitivity` writes for it: {error}.") from error


def launch(spec: RunSpec, target: float | None, folder: Path) -> bool:
    """Run the pass in a process of its own; what libraries say goes to FOLDER/log.txt. Returns whether it succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)
    spool.write_json(folder / spool.SPEC, {"spec": spec.to_dict(), "target": target})
    with (folder / spool.LOG).open("w") as log:
        command = (sys.executable, "-X", "faulthandler", "-m", "diffusion_fast.sensitivity", str(folder))
        return subprocess.run(command, stdin=subprocess.DEVNULL, stderr=log, check=False).returncode == 0


def main(folder: Path) -> None:
    data = spool.read_json(folder / spool.SPEC)
    found = measure(RunSpec.from_dict(data["spec"]), data["target"], lambda stage: print(f"  {stage}", flush=True))
    spool.write_json(folder / FILE, found)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
