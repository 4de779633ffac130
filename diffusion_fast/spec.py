"""The data that flows through the program: Model + Recipe → RunSpec → Result or Failure.

Frozen dataclasses that turn into JSON and back. Standard library only, so that every process can import it for free.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

REFERENCE = "reference"  # the role, and the folder, of the run that a ladder's images are compared with
SWEEP = "sweep"  # the ladder whose rungs are one recipe at many batch sizes and resolutions, see sweep.py


class _Json:
    """Dictionaries in and out, for flat dataclasses whose nested ones are `_Json` too."""

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        hints = typing.get_type_hints(cls)
        return cls(**{key: _restore(hints[key], value) for key, value in data.items() if key in hints})


def _restore(hint: Any, value: Any) -> Any:
    """What JSON made of a field's value, back in the field's type."""
    if value is None:
        return None
    if typing.get_origin(hint) is types.UnionType:  # a type | None
        hint = typing.get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, _Json):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_restore(item, each) for each in value)
    return value


@dataclass(frozen=True, kw_only=True)
class Model(_Json):
    """A text-to-image model as data: nothing elsewhere asks for a model by its name."""

    name: str
    summary: str
    pipeline: str  # class in diffusers
    denoiser: Literal["unet", "transformer"]  # the pipeline's attribute that runs once a step
    parameters: int  # of the denoiser; 0: nobody has counted them
    height: int  # pixels
    width: int
    steps: int
    guidance_scale: float
    steps_known: bool = True  # False: nobody says for how many it was made, and `steps` are its pipeline's default
    # By a second, unconditional row of each step, by an input of the denoiser, or not at all.
    guidance: Literal["classifier-free", "embedded", "none"] = "classifier-free"
    least_steps: int = 1  # that the pipeline can make
    chained_blocks: int = 0  # transformer blocks in a row, at most, that have plain layer norms; 0: never two
    multiple: int = 8  # of pixels, that height and width have to be
    written_out: bool = False  # diffusers has no vanilla attention for its denoiser, see scores.py
    lacks: tuple[str, ...] = ()  # what most models have and an optimization may need, by the words of `model_needs`
    prompt: str = "ghibli style, a fantasy landscape with castles"  # diffusion-fast's own
    small_world: bool = False  # paints the scenes of world.py, so that what it paints can be judged
    cacheable_blocks: bool = False  # its transformer's blocks are such as diffusers' first-block cache knows
    large: bool = False  # in fp32 it takes most of a GPU of 80 GB: its ladders begin in 16 bits
    outliers: bool = False  # a few channels are made much larger, as trained weights have them, see outliers.py
    scheduler: str = ""  # class in diffusers, in the place of the one that comes with the weights
    left_out: tuple[str, ...] = ()  # components of the pipeline that do without
    call_arguments: tuple[tuple[str, bool | int | float], ...] = ()  # of every call of the pipeline
    hub_id: str = ""  # weights="pretrained"
    embedded: str = ""  # weights="embedded": a folder of this package, in diffusers format
    folder: str = ""  # where the weights are that it was found with, see unlisted.py
    configs: str = ""  # weights="random": a folder of component configs under configs/
    fp16_vae_hub_id: str = ""  # a VAE fine-tuned to stay finite in float16
    tiny_vae_hub_id: str = ""  # a small VAE for the same latents, an AutoencoderTiny
    fp16_vae_config: str = ""  # its config in `configs`
    int8_excluded_shapes: tuple[tuple[int, int], ...] = ()  # (in, out) features; empty: chosen by rows and features

    @property
    def default_weights(self) -> str:
        return self.folder or ("embedded" if self.embedded else "pretrained")

    @property
    def unet(self) -> bool:
        return self.denoiser == "unet"

    @property
    def classifier_free_guidance(self) -> bool:
        return self.guidance == "classifier-free"

    @property
    def transformer(self) -> bool:
        return self.denoiser == "transformer"


@dataclass(frozen=True)
class Recipe(_Json):
    """A name for a set of optimizations. The order in which they are written has no meaning."""

    name: str
    optimizations: tuple[str, ...] = ()
    compile_mode: str = ""  # only where a recipe is about a mode; else the run decides
    usual_mode: str = ""  # where nobody asks for another: the device's own, unless a recipe does better by this one
    steps_share: float = 1.0  # of the run's steps: with fewer a recipe is the control of those that save work otherwise

    def plus(self, name: str, *more: str) -> Recipe:
        """This recipe and some more optimizations, under a new name."""
        return replace(self, name=name, optimizations=(*self.optimizations, *more))


@dataclass(frozen=True, kw_only=True)
class RunSpec(_Json):
    """Everything that decides a measurement, and the names that tell it from its twins and retries."""

    ladder_id: str
    ladder: str = ""  # its name; empty in spools of before it was recorded
    rung: str  # "03-compile"
    round: int = 1
    planned_rounds: int = 1  # that were decided on before any was measured; later ones are there because of these
    attempt: int = 1
    role: Literal["rung", "reference"] = "rung"

    model: str
    unlisted: Model | None = None  # the model itself, where models.py has no such entry
    weights: str  # "embedded", "pretrained", "random" or a folder
    recipe: str
    optimizations: tuple[str, ...]  # in the order of application
    device: Literal["cuda", "cpu"]
    compile_mode: str
    prompt: str
    steps: int
    batch_size: int
    height: int
    width: int
    guidance_scale: float
    seed: int
    kept: tuple[str, ...] = ()  # linear layers of the denoiser that optimizations for eight bits leave as they are
    accuracy_prompts: int = 0  # held-out prompts that it paints after the timed calls, for the judge
    tag: str = ""
    profile: bool = False  # after all else, a short call under torch.profiler
    saved_cache: str = ""  # the measurement whose compile cache its first attempt starts from

    @property
    def measurement_id(self) -> str:
        return f"{self.ladder_id}/{self.rung}/r{self.round}-a{self.attempt}"

    @property
    def conditions(self) -> str:
        """A hash that equal measurements share, whatever they are called."""
        labels = {"ladder_id", "ladder", "rung", "round", "planned_rounds", "attempt", "recipe", "tag", "profile"}
        labels |= {"saved_cache"}
        facts = {key: value for key, value in self.to_dict().items() if key not in labels}
        if self.unlisted is None:  # as in specs of before there were such models
            del facts["unlisted"]
        facts["optimizations"] = sorted(facts["optimizations"])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def dtype(self) -> str:
        return next((long for short, long in DTYPES.items() if short in self.optimizations), "float32")

    @property
    def numbers(self) -> str:
        """The format that it computes in: its dtype, or "tf32" for an fp32 whose products are rounded to that."""
        return "tf32" if self.dtype == "float32" and "tf32" in self.optimizations else self.dtype


DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Ladder(_Json):
    """Rungs measured together: the first is what the others' speed-ups are against."""

    id: str
    name: str
    model: str
    created_at: str
    rungs: tuple[RunSpec, ...]
    reference: RunSpec | None  # None: a sweep, whose images differ in shape, compares none
    notes: tuple[str, ...] = ()  # what was left out on this device, and why
    machine: dict[str, str] = field(default_factory=dict)  # device and versions: rungs of another one don't belong here


def calibration_s(applied: dict[str, dict[str, Any]]) -> float:
    """Seconds that optimizations took to run and time what they chose by, of their accounts."""
    return sum((account.get("calibration_s", 0.0) for account in applied.values()), 0.0)


@dataclass(frozen=True, kw_only=True)
class Result(_Json):
    """One finished measurement. Times are seconds of one call (a batch of images), memory is GiB."""

    spec: RunSpec
    finished_at: str
    pipeline_cls: str
    ckpt_id: str
    applied: dict[str, dict[str, Any]]  # each optimization's account of the state that it left
    import_s: float
    load_s: float  # the process's start to a loaded and changed pipeline, imports and calibration apart
    first_call_s: float  # compilation included
    cache_state: Literal["none", "cold", "warm", "shared", "saved"]  # before it; none: nothing compiles
    warmup_s: tuple[float, ...]
    warmed_up: bool  # False: the last two warm-up calls still differed by more than 5%
    samples_s: tuple[float, ...]
    latency_median_s: float
    latency_p10_s: float
    latency_p90_s: float
    phases: dict[str, float]
    memory: dict[str, float]
    surroundings: dict[str, Any] = field(default_factory=dict)  # of the timed calls, see watch.py
    image_repeats: bool = True  # every timed call, and the call that was split into phases, made the same image
    psnr_db: float | None = None  # None: identical to the reference (infinite), or there is no reference
    ssim: float | None = None
    identical_to_reference: bool = False
    psnr_eager_db: float | None = None  # of eager in the same number format; None: identical, or there is none
    ssim_eager: float | None = None
    clip_score: float | None = None  # None: CLIP's weights aren't at hand
    one_step: dict[str, Any] = field(default_factory=dict)  # errors of single denoising steps, see onestep.py
    limits: dict[str, float] = field(default_factory=dict)  # what the device could do, see roofline.py
    accuracy: dict[str, float] = field(
        default_factory=dict
    )  # of the held-out prompts: right, prompts, accuracy, low, high; psnr_db, see fidelity.median_psnr_db
    profile: dict[str, Any] = field(default_factory=dict)  # where the time goes, see profile.py
    problem: str = ""  # what could not be found out after the timed calls, which count nevertheless
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def fidelity_ok(self) -> bool | None:
        """Whether a recipe that claims to lose nothing doesn't. None: it claims no such thing, or it isn't known."""
        ok: bool | None = self.one_step.get("ok")
        return ok

    @property
    def calibration_s(self) -> float:
        return calibration_s(self.applied)

    @property
    def first_image_s(self) -> float:
        """From the process's start to its first image."""
        return self.import_s + self.load_s + self.calibration_s + self.first_call_s

    @property
    def peak_memory_gib(self) -> float:
        return self.memory.get("peak_allocated_gib", self.memory.get("peak_rss_gib", 0.0))


@dataclass(frozen=True, kw_only=True)
class Failure(_Json):
    """A measurement that did not come about: a result too, with its reason."""

    spec: RunSpec
    finished_at: str
    reason: Literal["exception", "out_of_memory", "broken_image", "killed", "timeout"]
    message: str
    stage: str  # what the worker was doing
    elapsed_s: float
    traceback: str = ""
    environment: dict[str, Any] = field(default_factory=dict)


Outcome = Result | Failure
