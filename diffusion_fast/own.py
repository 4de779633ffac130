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

# diffusers' processors that compute attention and nothing else: not an IP-Adapter's, for instance.
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")
LATE = {"guidance_cutoff": "it works by an argument of each call"}
# Components of a pipeline, by what they are, that add to the features of a UNet's blocks.
ADDING = {"controlnet": "ControlNet", "adapter": "T2I-Adapter"}
WHOLE = "This pipeline has been optimized already: give all names at once."


def optimize(pipe: Any, *names: str, compile_mode: str = "default", example: Mapping[str, Any] | None = None) -> Any:
    """Apply optimizations to a diffusers pipeline, in place. Returns it.

    `names` are those of `diffusion-fast list`; their order has no meaning. A pipeline that is in bfloat16 or float16
    already needs no `bf16` or `fp16`. Some optimizations call the pipeline, with few steps, to see the shapes
    that it works on: by its defaults, or with the arguments in `example`, which may also be what such a call needs, a
    ControlNet's `image` for instance. With one of these among the names the pipeline is called once before all else, as
    it is, to see whether it can be.

    Some names set switches of PyTorch that are the whole process's, so that other pipelines in it are concerned, too:
    `tf32`, `cudnn_benchmark`, `attention_backend`, `persistent_reductions`, `regional_compile` (how often dynamo may
    compile a function anew), and on a GPU whatever searches for tile sizes while it compiles, `inductor_tuning` or a
    max-autotune mode (how the search goes, not what it may choose).

    Raises ValueError where these names don't go together, or not with this pipeline or device, or where a call of it
    fails that they need, before anything is changed; RuntimeError where one finds nothing to change. Then what was
    applied before it stays applied, and perhaps a part of its own: a note of the error says what, and a second attempt
    is refused. What shows in a call alone, that a graph was compiled or captured, is not checked, as it is in a
    measurement.
    """
    import torch

    _refuse_other_things(pipe, names)
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
    build = Build(model, spec, dtype=dtype, example=arguments, pipe=pipe)
    begun: list[str] = []
    with torch.no_grad():
        _try_a_call(build)
        try:
            apply(build, lambda stage: None, before_loading=True)
            if converted:  # else a part that was left in another dtype stays in it
                pipe.to(getattr(torch, build.dtype))
            apply(build, lambda stage: begun.append(stage.removeprefix("applying ")), before_loading=False)
        except BaseException as error:
            # The last of them may have changed something before it failed, and nobody knows what.
            half = " and ".join(begun) or "a conversion"
            pipe._optimized_by_diffusion_fast = f"This pipeline stays half optimized, by {half}: load it anew."
            error.add_note(pipe._optimized_by_diffusion_fast)
            raise
    pipe._optimized_by_diffusion_fast = WHOLE
    return pipe


def _refuse_other_things(pipe: Any, names: tuple[Any, ...]) -> None:
    """Raise ValueError where it isn't a pipeline and names that are given."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"optimize takes a diffusers pipeline, not an object of type {type(pipe).__name__}.")
    if not names:
        raise ValueError("optimize takes names of optimizations, and none is given: `diffusion-fast list` has them.")
    if strange := [each for each in names if not isinstance(each, str)]:
        raise ValueError(
            f"optimize takes names one by one, as in optimize(pipe, 'sdpa', 'fused_qkv'), not a "
            f"{type(strange[0]).__name__}."
        )


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
    if before := getattr(pipe, "_optimized_by_diffusion_fast", ""):
        raise ValueError(before)
    # Whatever replaces processors requires one of this stage.
    replacing = " and ".join(name for name in names if OPTIMIZATIONS[name].stage == "attention")
    if replacing and (lost := set().union(*map(_more_than_plain, pipe.components.values()))):
        raise ValueError(
            f"{min(lost)} computes attention in this pipeline, and would be lost: take it out first, or leave "
            f"{replacing} out."
        )
    for name in names:
        if name in LATE:
            raise ValueError(f"{name} can't be applied to a pipeline of your own: {LATE[name]}.")
        for part, what in ADDING.items():
            if OPTIMIZATIONS[name].reuses_features and pipe.components.get(part) is not None:
                raise ValueError(f"{name} can't be applied to a pipeline with a {what}, which adds to what it reuses.")
    stubborn = [name for name in names if not OPTIMIZATIONS[name].takes_adapters]
    if stubborn and getattr(getattr(pipe, model.denoiser), "peft_config", None):
        raise ValueError(
            f"{' and '.join(stubborn)} would leave the adapter out: fuse it into the weights first, by "
            "pipe.fuse_lora() and pipe.unload_lora_weights()."
        )


def _more_than_plain(component: Any) -> set[str]:
    """Classes of attention processors that do something which is lost when they are replaced; none: nothing is.

    sdpa puts plain attention in the place of all processors of a network that has a default to set. Others it leaves
    with their own, and what fuses their projections puts in a processor for those: there nothing is lost of what the
    network makes for itself.
    """
    from diffusers.models import attention_processor

    found = {type(each) for each in getattr(component, "attn_processors", {}).values()}
    more = found - {getattr(attention_processor, name) for name in PLAIN}
    if more and not hasattr(component, "set_default_attn_processor"):
        more -= _made_for_itself(component)
    return {each.__name__ for each in more}


def _made_for_itself(network: Any) -> set[type]:
    """Classes of the attention processors that a network of diffusers has when it is built anew."""
    import torch

    try:
        with torch.device("meta"):  # modules without numbers: a tenth of a second
            new = type(network).from_config(network.config)
    except Exception:  # of a network of somebody's own, whatever it is: then nothing is known of it
        return set()
    return {type(each) for each in new.attn_processors.values()}


def _try_a_call(build: Build) -> None:
    """Call the pipeline as it is, where one of the optimizations will. Raises ValueError where that fails."""
    import torch

    calling = [name for name in build.spec.optimizations if OPTIMIZATIONS[name].calls_pipeline]
    if not calling:
        return
    try:
        build.short_call()
    except torch.OutOfMemoryError:
        raise  # which says nothing of the arguments
    except Exception as error:  # whatever diffusers or its user's own code says of a call that lacks something
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{' and '.join(calling)} would call the pipeline, and such a call fails ({type(error).__name__}: {said}): "
            "give what it needs in example=."
        ) from error
