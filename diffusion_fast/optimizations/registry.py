"""What an optimization is: a decorated function, with what it requires, excludes and needs declared beside it.

A function changes the pipeline in the making (`Build`) and returns an account of the state that it left, which it has
checked itself: it raises where the effect isn't there. The stage, not the order of typing, decides what comes first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusion_fast.spec import DTYPES, Model, RunSpec

STAGES = (
    *("load", "attention", "layout", "fuse", "swap", "quantize", "hoist"),
    *("inductor", "compile", "approximate", "capture"),
)


@dataclass
class Build:
    """A pipeline in the making. Up to the stage `load` there is no `pipe`; from then on there is."""

    model: Model
    spec: RunSpec
    dtype: str = "float32"
    fp16_vae: bool = False
    tiny_vae: bool = False
    own_dtypes: set[str] = field(default_factory=set)  # networks whose dtypes another optimization decides, and proves
    compile_options: dict[str, Any] = field(default_factory=dict)
    call_arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline, beside what the spec says
    step_calls: list[tuple[str, Any, str]] = field(default_factory=list)  # see `launched`
    prompt_calls: list[tuple[str, Any, str]] = field(default_factory=list)  # likewise: once for each prompt
    example: dict[str, Any] = field(default_factory=dict)  # of a call of a pipeline that somebody else built
    pipe: Any = None
    proofs: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)  # called after the warm-up

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.model.denoiser)

    def short_call(self, *hooks: Any) -> None:
        """Have the pipeline make as few steps as it can, for those who look on by `hooks`, which are removed after.

        Of what a measurement gives every call a pipeline of somebody's own may take less, without a size for instance.
        """
        spec = self.spec
        taken = inspect.signature(type(self.pipe).__call__).parameters
        all_are = any(each.kind is each.VAR_KEYWORD for each in taken.values())
        arguments = {
            "prompt": spec.prompt,
            "guidance_scale": spec.guidance_scale,
            "height": spec.height,
            "width": spec.width,
            "num_images_per_prompt": spec.batch_size,
        }
        arguments |= {"num_inference_steps": self.model.least_steps, **dict(self.model.call_arguments)}
        arguments = {name: value for name, value in arguments.items() if all_are or name in taken} | self.example
        try:
            self.pipe(**arguments)
        finally:
            for hook in hooks:
                hook.remove()

    def launched(self) -> list[tuple[str, Any, str]]:
        """What computes on the device with nothing for the host to decide meanwhile: name, owner, attribute.

        A step of the denoiser is one of them, unless an optimization has made `step_calls` of it, and what it does
        once for each prompt (`prompt_calls`) is apart from it.
        """
        step = self.step_calls or [("step", self.denoiser, _entry(self.denoiser))]
        calls = [
            (f"{self.model.denoiser} {name}", owner, attribute)
            for name, owner, attribute in [*self.prompt_calls, *step]
        ]
        decoder = self.pipe.vae.decoder
        encoders = [(name, each) for name, each in self.networks() if name.startswith("text_encoder")]
        if "text_encoding" in left_out(self.spec.optimizations):
            encoders = []  # they run for a new prompt alone
        return [*calls, *((name, each, _entry(each)) for name, each in [*encoders, ("vae.decoder", decoder)])]

    def networks(self) -> Iterator[tuple[str, Any]]:
        """The pipeline's neural networks by their names in it."""
        import torch

        for name, component in self.pipe.components.items():
            if isinstance(component, torch.nn.Module):
                yield name, component


def _entry(network: Any) -> str:
    """The attribute that a call of the network runs: a compiled one has its graph in another place than its code."""
    return "_compiled_call_impl" if network._compiled_call_impl is not None else "forward"


@dataclass(frozen=True)
class Optimization:
    """A registered optimization. `requires` holds groups of alternatives: one of each group must be in the recipe."""

    name: str
    apply: Callable[[Build], dict[str, Any]]
    stage: str
    requires: tuple[tuple[str, ...], ...] = ()
    excludes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda", "cpu")
    min_capability: tuple[int, int] = (0, 0)
    model_needs: str = ""  # a field of Model that must not be empty, or what it must not lack (Model.lacks)
    # A field of Model and names: where the one is set, one of the others is required.
    requires_where: tuple[str, tuple[str, ...]] = ("", ())
    imports: tuple[str, ...] = ()  # slow modules it needs, imported (and timed) before the pipeline loads
    modes: tuple[str, ...] = ()  # the only compile modes that it goes with, where anything compiles; none: all
    lossless: bool = True  # False: changes the image by more than rounding
    takes_adapters: bool = True  # False: layers are gone that a LoRA attached afterwards would have to change
    # Of eight_bits.py: to which it quantizes the linear layers, or convolutions, that are worth it and aren't kept.
    number_format: str = ""
    image_format: str = ""
    needs_guidance: bool = False  # a guidance scale above 1
    calls_pipeline: bool = False  # while it is applied (Build.short_call), to see what layers are given
    reuses_features: bool = False  # computes some of a UNet's blocks alone, where nothing may be added to the others
    least_batch: int = 1  # pictures of a call, below which there is nothing to do
    leaves_out: str = ""  # the part of a call that one with the prompt of the one before, as all timed ones, is without
    # What it amounts to in plain Python, see script.py: lines on `pipe`, `denoiser` and the call's `arguments`, in the
    # stage `load` on `dtype` and `parts`; fields of model and spec behind a $. Empty: it takes code of this package.
    code: str | Callable[[RunSpec], str] = ""
    same_work: bool = True  # False: leaves out some of the model's operations, so that single steps can't be compared

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.apply) or "").partition("\n")[0]

    @property
    def for_16_bits(self) -> bool:
        """Whether it has no meaning in fp32."""
        return any(set(group) <= set(DTYPES) for group in self.requires)


OPTIMIZATIONS: dict[str, Optimization] = {}

# What a model hasn't got that lacks what `model_needs` says, or has no guidance of the kind: "it has no …".
WORDS = {
    "unet": "UNet",
    "transformer": "transformer for a denoiser",
    "plain_attention": "attention as plain as a UNet's",
    "fusable_projections": "projections that diffusers can fuse",
    "wide_vae_heads": "VAE with a head too wide for fused attention",
    "small_1x1_convolutions": "1×1 convolutions of 128 channels",
    "chained_blocks": "transformer blocks in a row",
    "group_norms": "group norms",
    "cacheable_blocks": "blocks that diffusers' first-block cache knows",
    "tiny_vae_hub_id": "tiny VAE that is known here",
    "fp16_vae_hub_id": "VAE known here that stays finite in fp16",
    "classifier_free_guidance": "guidance by a second row of each step",
    "guidance_that_ends": "guidance that a callback can end",
}


def optimization(
    *, stage: str, requires: tuple[str | tuple[str, ...], ...] = (), **declared: Any
) -> Callable[[Callable[[Build], dict[str, Any]]], Callable[[Build], dict[str, Any]]]:
    """Register a function under its own name. `requires` takes names, and tuples of names that will do as well."""
    groups = tuple((item,) if isinstance(item, str) else item for item in requires)

    def register(function: Callable[[Build], dict[str, Any]]) -> Callable[[Build], dict[str, Any]]:
        if stage not in STAGES:
            raise ValueError(f"there is no stage {stage!r}")
        name = function.__name__
        OPTIMIZATIONS[name] = Optimization(name, function, stage, groups, **declared)
        return function

    return register


def _known(names: Iterable[str]) -> list[Optimization]:
    """A result may be of another version of this package, whose names this one hasn't."""
    return [OPTIMIZATIONS[name] for name in names if name in OPTIMIZATIONS]


def compiles(names: Iterable[str]) -> bool:
    """Whether a recipe of these names compiles anything."""
    return any(each.stage == "compile" for each in _known(names))


def needs_guidance(names: Iterable[str]) -> bool:
    """Whether a recipe of these names has no meaning without guidance."""
    return any(each.needs_guidance for each in _known(names))


def eight_bit_formats(names: Iterable[str]) -> tuple[str, str]:
    """The eight-bit formats of linear layers and of convolutions in a recipe of these names, "" where it has none."""
    known = _known(names)
    of_linears = next((each.number_format for each in known if each.number_format), "")
    return of_linears, next((each.image_format for each in known if each.image_format), "")


def left_out(names: Iterable[str]) -> set[str]:
    """The parts of a call that timed calls of a recipe of these names don't do: they repeat one prompt."""
    return {each.leaves_out for each in _known(names)} - {""}


def same_work(names: Iterable[str]) -> bool:
    """Whether a recipe of these names does all of the model's work, in whatever way. Of unknown names nobody knows."""
    return all(name in OPTIMIZATIONS and OPTIMIZATIONS[name].same_work for name in names)
