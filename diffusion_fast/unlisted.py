"""Models that have no entry in models.py: what its own files tell of one, or a pipeline that is loaded already.

Pipelines are diffusers' own, in its format: a model_index.json, and a folder with a config.json for each component.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_fast.models import MODELS, PACKAGE, WeightsUnreachableError, check_hub
from diffusion_fast.spec import Model

DENOISERS = ("unet", "transformer")
INDEX = "model_index.json"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# What a measurement gives every call. A pipeline that takes less does something else than text to image.
GIVEN = (
    *("prompt", "num_inference_steps", "guidance_scale", "height", "width", "num_images_per_prompt"),
    *("generator", "latents"),
)
CROSS_ATTENDING = "UNetMidBlock2DCrossAttn"  # a UNet2DConditionModel's middle, where its config doesn't say otherwise
# What the configs of a model that was distilled to few steps say, and of its pipeline's others don't: fields of the
# denoiser and of the scheduler. Of FLUX.1 schnell alone the time steps aren't shifted in its authors' own code,
# https://github.com/black-forest-labs/flux. That it has no input for guidance isn't enough: a model that was trained to
# be guided by two rows again has none, either.
FEW_STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flux-schnell": ({"guidance_embeds": False}, {"shift": 1.0, "use_dynamic_shifting": False})
}
# Of a transformer that no entry is like nobody has seen that it has any of these.
UNKNOWN_LACK = ("fusable_projections", "plain_attention", "guidance_that_ends")
# Fields of a UNet's config that decide how large its linear layers are.
SIZES = ("_class_name", "block_out_channels", "transformer_layers_per_block", "cross_attention_dim")
# How sources say how many pixels a latent is, where it is as the VAE's levels make it: doubled by each but the first.
PIXELS = ("2 ** (len(self.vae.config.block_out_channels) - 1)", "8")
# What FLUX is given to make rows of latents. FLUX.2 takes them for 2×2 already.
PACKING = ("latents", "batch_size", "num_channels_latents", "height", "width")
BINNING = "use_resolution_binning"  # an argument by which a call paints another size than was asked for


class NowhereError(LookupError):
    """A hub id that is in nobody's reach from here: most likely mistyped. Its text says where it was looked for."""


def find(name: str) -> Model | None:
    """The model in the folder `name`, or with the hub id OWNER/NAME. None: it can be neither.

    Raises ValueError where it isn't such a model as can be measured, NowhereError where neither the hub nor its local
    cache knows the name, WeightsUnreachableError where they know it and what it takes can't be read.
    """
    if Path(name).is_dir():
        folder = Path(name).resolve()
        return _read(folder.name, folder, lambda file: _in_folder(folder, file))
    if HUB_ID.fullmatch(name):
        return _read(name, None, lambda file: _on_hub(name, file))
    return None


def denoiser_of(kind: str, components: Iterable[str]) -> str:
    """The component that runs once a step. Raises ValueError where none is known to."""
    found = sorted(components)
    denoiser = next((each for each in DENOISERS if each in found), None)
    if denoiser is None:
        raise ValueError(f"{kind} has neither a unet nor a transformer: its parts are {', '.join(found) or 'none'}.")
    return denoiser


def describe(
    name: str,
    kind: str,
    denoiser: str,
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    vae_scale: int | None,
    defaults: Mapping[str, Any],
    **more: Any,
) -> Model:
    """A model by its pipeline's class `kind`, its denoiser's and scheduler's config, and its call's arguments.

    `vae_scale` is pixels for each latent, `defaults` those of the call. What no file says is taken from an entry with
    the same class, if there is one: the fewest steps, arguments of each call, what it lacks. Of other transformers
    nothing of the kind is known. Raises ValueError where the size of pictures can't be told.
    """
    few_steps = _distilled(kind, config, scheduler)
    known = few_steps or next((each for each in MODELS.values() if each.pipeline == kind and each.hub_id), None)
    guidance, steps = defaults.get("guidance_scale"), defaults.get("num_inference_steps")
    if not isinstance(guidance, (int, float)) or not isinstance(steps, int):
        raise ValueError(f"{kind} isn't known here: its call has no default for its guidance scale or number of steps.")
    if few_steps:
        guidance, steps = few_steps.guidance_scale, few_steps.steps
    latents = config.get("sample_size")
    if isinstance(latents, int) and vae_scale:
        height = width = latents * vae_scale
    elif known:
        height, width = known.height, known.width
    else:
        raise ValueError(
            f"{kind} isn't known here: its own size of pictures can't be told from its configs or its source."
        )
    usual = ((BINNING, False),) if BINNING in defaults else ()
    return Model(
        name=name,
        pipeline=kind,
        denoiser=denoiser,  # type: ignore[arg-type]
        height=height,
        width=width,
        steps=max(steps, known.least_steps) if known else steps,
        guidance_scale=guidance,
        steps_known=few_steps is not None,
        # FLUX says there whether its guidance was distilled into an input, or it does without.
        guidance="none" if config.get("guidance_embeds") is False else known.guidance if known else "classifier-free",
        least_steps=known.least_steps if known else 1,
        chained_blocks=_chained_blocks(config),
        multiple=known.multiple if known else 8,
        written_out=known.written_out if known else denoiser == "transformer",
        lacks=known.lacks if known else UNKNOWN_LACK if denoiser == "transformer" else (),
        cacheable_blocks=known.cacheable_blocks if known else False,
        large=known.large if known else False,
        call_arguments=known.call_arguments if known else usual,
        left_out=known.left_out if known else (),
        int8_excluded_shapes=_excluded_shapes(denoiser, config),
        **more,
    )


def _excluded_shapes(denoiser: str, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The published list of an entry whose denoiser has layers of the same sizes: then a name means the same layers."""
    for entry in MODELS.values():
        if entry.denoiser == denoiser and entry.int8_excluded_shapes and entry.configs:
            listed = json.loads((PACKAGE / "configs" / entry.configs / f"{denoiser}.json").read_text())
            if all(json.dumps(listed.get(each)) == json.dumps(config.get(each)) for each in SIZES):
                return entry.int8_excluded_shapes
    return ()


def _distilled(kind: str, config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Model | None:
    """The entry that was distilled to few steps and whose configs these are like; None: they don't say so."""
    for name, (of_the_denoiser, of_the_scheduler) in FEW_STEPS.items():
        alike = of_the_denoiser.items() <= config.items() and of_the_scheduler.items() <= scheduler.items()
        if MODELS[name].pipeline == kind and alike:
            return MODELS[name]
    return None


def _chained_blocks(config: Mapping[str, Any]) -> int:
    """Blocks of the longest row of plain transformer blocks, as chained.longest finds them in the network; 0 for none.

    It is the config that says so of a UNet2DConditionModel alone: other networks have blocks of their own.
    """
    if config.get("_class_name") != "UNet2DConditionModel" or config.get("dual_cross_attention"):
        return 0
    if config.get("attention_type", "default") != "default":
        return 0
    down, up = config.get("down_block_types", ()), config.get("up_block_types", ())
    layers = config.get("transformer_layers_per_block", 1)  # of each level, or of each of a level's transformers
    layers = [layers] * len(down) if isinstance(layers, int) else layers
    upwards = config.get("reverse_transformer_layers_per_block") or layers[::-1]
    levels = *zip(down, layers, strict=False), *zip(up, upwards, strict=False)
    rows = [each for kind, each in levels if kind.startswith("CrossAttn")]
    if config.get("mid_block_type", CROSS_ATTENDING) == CROSS_ATTENDING:
        rows.append(layers[-1])
    longest = max((max([each] if isinstance(each, int) else each) for each in rows), default=0)
    return longest if longest > 1 else 0


def _read(name: str, folder: Path | None, read: Callable[[str], dict[str, Any]]) -> Model:
    """`read` gives a JSON file of the model; `folder` is None for one of the hub."""
    index = read(INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ValueError(f"{name} has no class of diffusers in its {INDEX}, but {kind!r}.")
    parts = {part for part, source in index.items() if isinstance(source, list) and source[0]}
    denoiser = denoiser_of(kind, parts)
    defaults = call_defaults(kind)
    if absent := [each for each in GIVEN if each not in defaults]:
        raise ValueError(f"{kind} doesn't go from text to image as is measured here: its call takes no {absent[0]}.")
    packing = next((each.args.args for each in _methods(kind) if each.name == "_pack_latents"), [])
    if packing and tuple(each.arg for each in packing if each.arg != "self") != PACKING:
        raise ValueError(f"{kind} isn't known here: it makes rows of latents otherwise than FLUX does.")
    vae = read("vae/config.json") if "vae" in parts else {}
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    config = read(f"{denoiser}/config.json")
    return describe(
        name,
        kind,
        denoiser,
        config | {"sample_size": config.get("sample_size") or default_sample_size(kind)},
        read("scheduler/scheduler_config.json") if "scheduler" in parts else {},
        2 ** (len(levels) - 1) if levels else None,
        defaults,
        summary=f"a {kind} of your own",
        parameters=0,
        folder=str(folder or ""),
        hub_id="" if folder else name,
    )


def call_defaults(kind: str) -> dict[str, Any]:
    """The arguments of a diffusers pipeline's call with their defaults, None for what isn't a plain value.

    They are read from the source: importing a pipeline would import torch. Raises ValueError where there is none.
    """
    for method in _methods(kind):
        if method.name == "__call__":
            return _defaults(method.args)
    raise ValueError(f"diffusers has no pipeline {kind} whose call could be read.")


def default_sample_size(kind: str) -> int | None:
    """The latents a side of a pipeline's pictures, where it says so itself and its denoiser's config doesn't.

    None also where a latent isn't as many pixels to it as its VAE's levels make of it: Bria's are of 2×2 latents.
    """
    nodes = [each for method in _methods(kind) if method.name == "__init__" for each in ast.walk(method)]
    given = {ast.unparse(each.targets[0]): each.value for each in nodes if isinstance(each, ast.Assign)}
    pixels, size = given.get("self.vae_scale_factor"), given.get("self.default_sample_size")
    # Of the VAE, or a number for where it has none; a number, or a choice between the denoiser's and one likewise.
    pixels = pixels.body if isinstance(pixels, ast.IfExp) else pixels
    size = size.orelse if isinstance(size, ast.IfExp) else size
    if pixels is None or ast.unparse(pixels) not in PIXELS:
        return None
    return size.value if isinstance(size, ast.Constant) and isinstance(size.value, int) else None


@functools.cache
def _methods(kind: str) -> tuple[ast.FunctionDef, ...]:
    """Those of a diffusers pipeline, from its source. Empty where there is none of the name."""
    package = importlib.util.find_spec("diffusers")
    folder = Path(package.origin or "").parent / "pipelines" if package else Path()
    for file in sorted(folder.rglob("pipeline_*.py")):
        text = file.read_text()
        if re.search(rf"^class {re.escape(kind)}\b", text, re.MULTILINE):
            classes = (each for each in ast.parse(text).body if isinstance(each, ast.ClassDef) and each.name == kind)
            return tuple(each for found in classes for each in found.body if isinstance(each, ast.FunctionDef))
    return ()


def _defaults(arguments: ast.arguments) -> dict[str, Any]:
    places = arguments.args[1:]  # after self
    given: list[ast.expr | None] = [*[None] * (len(places) - len(arguments.defaults)), *arguments.defaults]
    pairs = [*zip(places, given, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return {argument.arg: value.value if isinstance(value, ast.Constant) else None for argument, value in pairs}


def _in_folder(folder: Path, file: str) -> dict[str, Any]:
    if not (folder / file).is_file():
        raise ValueError(f"{folder} is no model in diffusers' format: it has no {file}.")
    return _json(folder / file)


def _on_hub(hub_id: str, file: str) -> dict[str, Any]:
    """A file of the hub's local cache, or else of the hub, as HF_HUB_OFFLINE and HF_TOKEN say."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(hub_id, file)
        if isinstance(cached, str):
            return _json(Path(cached))
        check_hub(hub_id, file, listed=False)  # a download would ask again and again
    except HFValidationError as error:
        raise NowhereError("nor a name that the hub allows") from error
    except WeightsUnreachableError as error:
        answer = error.__cause__  # whose text may have what it was asked with
        if file != INDEX or isinstance(answer, GatedRepoError):  # the model is there
            raise
        if isinstance(answer, RepositoryNotFoundError):
            raise NowhereError("nor is it on the hub, where HF_TOKEN opens what is private") from error
        raise NowhereError(
            f"nor in the hub's local cache, and the hub doesn't answer: {type(answer).__name__}"
        ) from error
    try:
        path = Path(hf_hub_download(hub_id, file, etag_timeout=5))
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"{hub_id} is no model in diffusers' format: it has no {file}.") from error
    except Exception as error:  # the hub client's own, its HTTP library's, the operating system's
        raise WeightsUnreachableError(hub_id, error, listed=False) from error
    return _json(path)


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} isn't JSON: {error}.") from error
    return found
