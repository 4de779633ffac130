"""A recipe as the plain diffusers script that it amounts to, which runs without this package.

What an optimization amounts to is said beside it (`code=` of its decorator). Here these lines are put in the order of
the stages, between those of the baseline: how a pipeline is loaded, which noise it starts from, how it is called.
"""

from __future__ import annotations

import string

from diffusion_fast.models import PACKAGE
from diffusion_fast.optimizations import OPTIMIZATIONS, Optimization
from diffusion_fast.spec import Model, RunSpec

BASELINE = """
# The baseline: fp32 without TF32.
torch.set_grad_enabled(False)
torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False
dtype = torch.float32
"""
LOADING = """
pipe = $pipeline.from_pretrained(
    $source,
    dtype=dtype,
    use_safetensors=True,
$parts)
pipe.to($device)$scheduler
pipe.set_progress_bar_config(disable=True)
denoiser = pipe.$denoiser
arguments = $arguments

# The baseline's attention: scores as one explicit matrix.
for network in pipe.components.values():
    if hasattr(network, "set_default_attn_processor"):
        network.set_default_attn_processor()
    elif hasattr(network, "set_attn_implementation"):
        network.set_attn_implementation("eager")
"""
CALL = """
# The noise is drawn on the CPU and in fp32, so that every device and number format starts from the same.
generator = torch.Generator("cpu").manual_seed($seed)
height, width = $height // pipe.vae_scale_factor, $width // pipe.vae_scale_factor
noise = torch.randn(($batch_size, pipe.vae.config.latent_channels, height, width), generator=generator)
if hasattr(pipe, "_pack_latents"):  # its denoiser takes rows of 2×2 latents
    noise = pipe._pack_latents(noise, *noise.shape)
images = pipe(**arguments, generator=generator, latents=noise.to(pipe.device, denoiser.dtype)).images
for number, image in enumerate(images):
    image.save(f"image-{number}.png")
"""
# Variables that the lines of several optimizations add to, and their beginnings.
COLLECTED = {"parts": "parts = {}", "compile_options": "compile_options = {}"}


def write(model: Model, spec: RunSpec) -> str:
    """The script. It makes the images of the spec's rung, from the same weights and noise, as image-0.png and so on.

    Raises ValueError where it would have to import this package.
    """
    _refuse(model, spec)
    chosen = [OPTIMIZATIONS[name] for name in spec.optimizations]
    before, after = (
        [(each, _lines(each, model, spec)) for each in chosen if (each.stage == "load") == loads]
        for loads in (True, False)
    )
    lines = [line for _, body in (*before, *after) for line in body]
    begun = [first for name, first in COLLECTED.items() if any(name in line for line in lines)]
    classes = filter(None, (model.pipeline, model.scheduler))
    imports = ["import torch", *(f"from diffusers import {name}" for name in classes), *filter(_imports, lines)]
    names = ", ".join(spec.optimizations) or "no optimizations"
    text = [
        f"# {' '.join(model.name.split())} by the recipe {spec.recipe}: {names}.\n",
        *_merged(imports),
        BASELINE.rstrip(),
        *begun,
        *(_section(each, body) for each, body in before),
        _loading(model, spec, with_parts="parts = {}" in begun).rstrip(),
        *(_section(each, body) for each, body in after),
        _filled(CALL, model, spec).rstrip(),
    ]
    return "\n".join(text) + "\n"


def _refuse(model: Model, spec: RunSpec) -> None:
    ours = [name for name in spec.optimizations if not OPTIMIZATIONS[name].code]
    if ours:
        raise ValueError(
            f"{', '.join(ours)} can't be printed: that takes code of this package. "
            "`diffusion_fast.optimize` applies what it is to a pipeline of your own."
        )
    if model.written_out and "sdpa" not in spec.optimizations:
        raise ValueError(
            f"{model.name} can't be printed without sdpa: attention that is written out is code of this package there."
        )
    if spec.weights == "random":
        raise ValueError("Random weights can't be printed: they are made by code of this package.")
    if model.outliers:
        raise ValueError(f"{model.name} can't be printed: its outliers are made by code of this package.")


def _imports(line: str) -> bool:
    return line.startswith(("import ", "from "))


def _merged(imports: list[str]) -> list[str]:
    """Lines of imports in order, each module in one."""
    whole = sorted({line for line in imports if line.startswith("import ")})
    taken: dict[str, set[str]] = {}
    for line in set(imports) - set(whole):
        _, module, _, names = line.split(" ", 3)
        taken.setdefault(module, set()).update(names.split(", "))
    return [*whole, *(f"from {module} import {', '.join(sorted(taken[module]))}" for module in sorted(taken))]


def _lines(optimization: Optimization, model: Model, spec: RunSpec) -> list[str]:
    code = optimization.code if isinstance(optimization.code, str) else optimization.code(spec)
    return _filled(code.strip("\n"), model, spec).splitlines()


def _section(optimization: Optimization, lines: list[str]) -> str:
    body = "\n".join(line for line in lines if not _imports(line)).strip("\n")
    return f"\n# {optimization.name}: {optimization.summary}\n{body}"


def _filled(text: str, model: Model, spec: RunSpec) -> str:
    """`text` with the fields of model and spec in the place of their names behind a $."""
    return string.Template(text).substitute(model.to_dict() | spec.to_dict() | {"dtype": spec.dtype})


def _loading(model: Model, spec: RunSpec, with_parts: bool) -> str:
    source = {"embedded": str(PACKAGE / model.embedded), "pretrained": model.hub_id}.get(spec.weights, spec.weights)
    parts = [*(f"{name}=None" for name in model.left_out), *(["**parts"] if with_parts else [])]
    arguments = {
        "prompt": spec.prompt,
        "num_inference_steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "height": spec.height,
        "width": spec.width,
        "num_images_per_prompt": spec.batch_size,
        **dict(model.call_arguments),
    }
    return string.Template(LOADING).substitute(
        pipeline=model.pipeline,
        source=repr(source),
        parts="".join(f"    {part},\n" for part in parts),
        device=repr(spec.device),
        scheduler=f"\npipe.scheduler = {model.scheduler}.from_config(pipe.scheduler.config)" if model.scheduler else "",
        denoiser=model.denoiser,
        arguments="{\n" + "".join(f"    {name!r}: {value!r},\n" for name, value in arguments.items()) + "}",
    )
