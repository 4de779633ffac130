"""A recipe for a pipeline that somebody else built: other weights, an adapter, another scheduler, a ControlNet."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusion_fast import unlisted
from diffusion_fast.optimizations import OPTIMIZATIONS, Build
from diffusion_fast.pipeline import apply
from diffusion_fast.plan import Device, Settings, plan_ladder
from diffusion_fast.spec import DTYPES, Model, Recipe

# diffusers' own processors, that compute attention and nothing else: not an IP-Adapter's, for instance.
PLAIN = {
    *("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0"),
    *("FluxAttnProcessor", "JointAttnProcessor2_0", "SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0"),
}
LATE = {"guidance_cutoff": "it works by an argument of each call"}


def optimize(pipe: Any, *names: str, compile_mode: str = "default", example: Mapping[str, Any] | None = None) -> Any:
    """Apply optimizations to a diffusers pipeline, in place. Returns it.

    `names` are those of `diffusion-fast list`; their order has no meaning. A pipeline that is in bfloat16 or float16
    already needs no `bf16` or `fp16`. Some optimizations call the pipeline once, with few steps, to see the shapes that
    it works on: by its defaults, or with the arguments in `example`, which may also be what such a call needs, a
    ControlNet's `image` for instance.

    Raises ValueError where these names don't go together, or not with this pipeline or device, before anything is
    changed; RuntimeError where one finds nothing to change. Then what was applied before it stays applied. What shows
    in a call alone, that a graph was compiled or captured, is not checked, as it is in a measurement.
    """
    import torch

    model = _model_of(pipe)
    arguments = dict(example or {})
    dtype = str(getattr(pipe, model.denoiser).dtype).removeprefix("torch.")
    converted = bool(set(names) & set(DTYPES))
    wanted = dict.fromkeys(names)
    if not converted:
        wanted |= {short: None for short, long in DTYPES.items() if long == dtype}
    settings = Settings(
        weights="",
        prompt=arguments.get("prompt", model.prompt),
        height=arguments.get("height"),
        width=arguments.get("width"),
        guidance_scale=arguments.get("guidance_scale"),
        compile_mode=compile_mode,
    )
    recipe = Recipe("own", tuple(wanted))
    spec = plan_ladder("own", (recipe,), model, _device_of(pipe), settings).rungs[0]
    _refuse(pipe, model, spec.optimizations)
    pipe._optimized_by_diffusion_fast = True

    build = Build(model, spec, dtype=dtype, example=arguments, pipe=pipe)
    with torch.no_grad():
        apply(build, lambda stage: None, before_loading=True)
        if converted:  # else a part that was left in another dtype stays in it
            pipe.to(getattr(torch, build.dtype))
        apply(build, lambda stage: None, before_loading=False)
    return pipe


def _model_of(pipe: Any) -> Model:
    """What optimizations ask of a model, of this pipeline: what is known of its class, and its own numbers."""
    from diffusion_fast import chained

    kind = type(pipe).__name__
    denoiser = unlisted.denoiser_of(kind, (name for name, part in pipe.components.items() if part is not None))
    network = getattr(pipe, denoiser)
    arguments = inspect.signature(type(pipe).__call__).parameters.values()
    config = dict(network.config)
    config["sample_size"] = config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    model = unlisted.describe(
        kind,
        kind,
        denoiser,
        config,
        pipe.scheduler.config,
        getattr(pipe, "vae_scale_factor", None),
        {each.name: None if each.default is each.empty else each.default for each in arguments},
        summary="your own",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    # Its attention is as diffusers made it: a measurement's baseline alone writes scores out.
    return replace(model, written_out=False, chained_blocks=chained.longest(network))


def _device_of(pipe: Any) -> Device:
    import torch

    if pipe.device.type != "cuda":
        return Device(pipe.device.type, pipe.device.type)
    return Device("cuda", torch.cuda.get_device_name(pipe.device), torch.cuda.get_device_capability(pipe.device))


def _refuse(pipe: Any, model: Model, names: tuple[str, ...]) -> None:
    """Raise ValueError for what can't be done to a pipeline that is there already."""
    if getattr(pipe, "_optimized_by_diffusion_fast", False):
        raise ValueError("This pipeline has been optimized already: give all names at once.")
    own = {
        type(processor).__name__
        for network in (getattr(pipe, model.denoiser), pipe.vae)
        for processor in getattr(network, "attn_processors", {}).values()
    }
    if strange := own - PLAIN:
        raise ValueError(f"{min(strange)} computes attention in this pipeline, and would be lost: take it out first.")
    for name in names:
        if name in LATE:
            raise ValueError(f"{name} can't be applied to a pipeline of your own: {LATE[name]}.")
    stubborn = [name for name in names if not OPTIMIZATIONS[name].takes_adapters]
    if stubborn and getattr(getattr(pipe, model.denoiser), "peft_config", None):
        raise ValueError(
            f"{' and '.join(stubborn)} would leave the adapter out: fuse it into the weights first, by "
            "pipe.fuse_lora() and pipe.unload_lora_weights()."
        )
