"""Model + recipe + device → the specs of a ladder, or a ValueError of one sentence before anything loads."""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from diffusion_fast import unlisted, world
from diffusion_fast.models import MODELS
from diffusion_fast.optimizations import (
    OPTIMIZATIONS,
    STAGES,
    WORDS,
    Optimization,
    compiles,
    eight_bit_formats,
    needs_guidance,
    same_work,
)
from diffusion_fast.recipes import ABLATION, ABOUT_ONE, BASELINE, BF16, LADDERS
from diffusion_fast.spec import DTYPES, REFERENCE, Ladder, Model, Recipe, RunSpec

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
T = TypeVar("T")
MOST_PROMPTS = 10_000  # different held-out prompts that the small world has, and some to spare


@dataclass(frozen=True)
class Device:
    """Where a ladder runs. `capability` is CUDA's (major, minor); a CPU has none."""

    kind: str
    name: str
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a person chose for a whole ladder. None: what the model or the device suggests."""

    prompt: str | None = None
    weights: str | None = None
    steps: int | None = None
    batch_size: int | None = None  # None: of no measurement (`optimize`), or of each point of a sweep
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    compile_mode: str | None = None
    kept: tuple[str, ...] = ()
    accuracy_prompts: int | None = None
    tag: str = ""
    profile: bool = False


def find_device(wanted: str = "auto") -> Device:
    """The device to measure on, found by NVML, without torch. Raises ValueError where CUDA is asked for in vain."""
    gpu = None if wanted == "cpu" else _first_gpu()
    if gpu:
        return gpu
    if wanted == "cuda":
        raise ValueError("--device cuda was asked for, and this machine has no CUDA device that answers.")
    return Device("cpu", f"CPU, {os.cpu_count()} cores")


def refuse_company(device: Device) -> None:
    """Raise ValueError where another process is on the GPU, or where there is no GPU to be alone on."""
    import pynvml

    if device.kind != "cuda":
        raise ValueError("--exclusive is about other processes on a GPU, and this ladder runs on a CPU.")
    found = _ask_gpu(pynvml.nvmlDeviceGetComputeRunningProcesses)
    if found is None:
        raise ValueError(f"--exclusive: {device.name} doesn't say which processes are on it.")
    if found:
        numbers = ", ".join(str(process.pid) for process in found)
        raise ValueError(f"--exclusive: {len(found)} other processes are on {device.name} (by number: {numbers}).")


def _first_gpu() -> Device | None:
    import pynvml

    def describe(handle: Any) -> Device:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Device("cuda", pynvml.nvmlDeviceGetName(handle), (major, minor))

    return _ask_gpu(describe)


def _ask_gpu(question: Callable[[Any], T]) -> T | None:
    """NVML's answer about the GPU that torch would use; None where there is no such GPU, or no answer."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if visible in ("", "-1"):
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if visible.startswith("GPU-"):
            return question(pynvml.nvmlDeviceGetHandleByUUID(visible))
        return question(pynvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def plan_recipe(model: Model, recipe: Recipe, device: Device) -> tuple[str, ...]:
    """The recipe's names in the order of their application. Raises ValueError where it is impossible."""
    names = set(recipe.optimizations)
    for name in recipe.optimizations:
        known = lookup("optimization", name, OPTIMIZATIONS)
        # What no further name would mend comes before what one would.
        if lacking := lacked(known, model):
            raise ValueError(f"{name} can't be applied to {model.name}: it has no {lacking}.")
        for other in known.excludes:
            if other in names:
                raise ValueError(f"{name} and {other} exclude each other: take one of them.")
        if device.kind not in known.devices:
            raise ValueError(f"{name} runs on {' or '.join(known.devices)} only, and this is a {device.kind}.")
        if device.capability is not None and device.capability < known.min_capability:
            need, have = (".".join(map(str, pair)) for pair in (known.min_capability, device.capability))
            raise ValueError(f"{name} needs compute capability {need}, and {device.name} has {have}.")
        if group := _lacking(known, names, model):
            where = "" if group in known.requires else f" on {model.name}"
            others = (each for each in recipe.optimizations if each in OPTIMIZATIONS)
            barring = next((each for each in others if set(group) <= set(OPTIMIZATIONS[each].excludes)), "")
            advice = f", which {barring} excludes" if barring else f": add {group[0]}"
            raise ValueError(f"{name} requires {' or '.join(group)}{where}{advice}.")
    order = list(OPTIMIZATIONS)
    return tuple(sorted(names, key=lambda name: (STAGES.index(OPTIMIZATIONS[name].stage), order.index(name))))


def _lacking(known: Optimization, names: set[str], model: Model) -> tuple[str, ...]:
    """Names of which an optimization requires one, and `names` has none. Empty where it lacks nothing."""
    field, needed = known.requires_where
    groups = [*known.requires, *([needed] if field and getattr(model, field) else [])]
    return next((group for group in groups if not names & set(group)), ())


def applies(optimization: Optimization, model: Model) -> bool:
    """Whether the model has what the optimization changes."""
    return not lacked(optimization, model)


def lacked(optimization: Optimization, model: Model) -> str:
    """What the optimization needs and the model has not, in words; "" where it has all."""
    needs = ["classifier_free_guidance" if optimization.needs_guidance else "", optimization.model_needs]
    return next((WORDS[need] for need in needs if need and (need in model.lacks or not getattr(model, need, True))), "")


def plan_ladder(
    name: str,
    recipes: Iterable[Recipe],
    model: Model,
    device: Device,
    settings: Settings,
    notes: tuple[str, ...] = (),
) -> Ladder:
    """Specs for every rung and for the reference that their images are compared with. Raises ValueError."""
    if settings.compile_mode is not None:
        lookup("compile mode", settings.compile_mode, dict.fromkeys(COMPILE_MODES))
    for what in ("steps", "batch_size", "height", "width"):
        value = getattr(settings, what)
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, not {value}.")
    if settings.guidance_scale is not None and not math.isfinite(settings.guidance_scale):
        raise ValueError(f"guidance must be a finite number, not {settings.guidance_scale}.")
    if settings.guidance_scale and model.guidance == "none":
        raise ValueError(f"{model.name} was distilled to do without guidance: leave --guidance out.")
    for what in ("height", "width"):
        if (getattr(settings, what) or 0) % model.multiple:
            raise ValueError(f"{what} must be a multiple of {model.multiple}, not {getattr(settings, what)}.")
    if settings.steps is not None and settings.steps < model.least_steps:
        raise ValueError(f"{model.name} can't be run with fewer than {model.least_steps} steps.")
    scale = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    prompt = model.prompt if settings.prompt is None else settings.prompt
    if model.small_world and world.parse(prompt) is None:
        notes += (f"{model.name} knows only its small world, of scenes like {model.prompt!r}: this prompt isn't one",)
    if settings.steps is None and not model.steps_known:
        notes += (
            f"no config says how many steps it was made for: {model.steps} are the default of {model.pipeline}'s call",
        )
    accuracy_prompts = _accuracy_prompts(model, settings)
    recipes, more = _worth_measuring(tuple(recipes), model, settings, scale)
    notes += more
    for each in dict.fromkeys(each for recipe in recipes for each in recipe.optimizations):
        known = lookup("optimization", each, OPTIMIZATIONS)
        if known.needs_guidance and scale <= 1:
            raise ValueError(f"{each} needs a guidance scale above 1, and there is no guidance at {scale:g}.")
        if settings.batch_size is not None and settings.batch_size < known.least_batch:
            raise ValueError(
                f"{each} has no effect on a batch of {settings.batch_size}: take {known.least_batch} or more."
            )
        if known.leaves_out:
            part = known.leaves_out.replace("_", " ")
            notes += (f"{each} leaves {part} out of what is timed: calls that repeat a prompt do without it",)
    approximate = any(not same_work(recipe.optimizations) for recipe in recipes)
    if approximate and (settings.weights or model.default_weights) == "random":
        notes += ("random weights paint no picture: what an approximation loses can't be told from it",)
    if settings.kept and not any(any(eight_bit_formats(recipe.optimizations)) for recipe in recipes):
        raise ValueError("--keep is about layers that a recipe for eight bits would quantize, and there is none.")
    now = datetime.now(UTC)
    named = re.sub(r"[^\w.-]+", "-", model.name)  # a hub id has a slash, a folder's name may have anything
    ladder_id = f"{now:%Y%m%d-%H%M%S}-{named}-{name}-{secrets.token_hex(2)}"

    def spec(rung: str, recipe: Recipe) -> RunSpec:
        return RunSpec(
            ladder_id=ladder_id,
            ladder=name,
            rung=rung,
            role="reference" if rung == REFERENCE else "rung",
            model=model.name,
            unlisted=None if MODELS.get(model.name) == model else model,
            weights=settings.weights or model.default_weights,
            recipe=recipe.name,
            optimizations=plan_recipe(model, recipe, device),
            device=device.kind,  # type: ignore[arg-type]
            compile_mode=_compile_mode(recipe, settings, device),
            prompt=prompt,
            steps=_steps(recipe, model, settings),
            batch_size=settings.batch_size or 1,
            height=settings.height or model.height,
            width=settings.width or model.width,
            guidance_scale=scale,
            seed=settings.seed,
            kept=settings.kept if any(eight_bit_formats(recipe.optimizations)) else (),
            accuracy_prompts=accuracy_prompts,
            tag=settings.tag,
            profile=settings.profile and rung != REFERENCE,
        )

    return Ladder(
        id=ladder_id,
        name=name,
        model=model.name,
        created_at=now.isoformat(timespec="seconds"),
        rungs=tuple(spec(f"{index:02}-{recipe.name}", recipe) for index, recipe in enumerate(recipes)),
        reference=spec(REFERENCE, Recipe(REFERENCE)),
        notes=notes,
        machine={"device": device.name} | {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
    )


def _steps(recipe: Recipe, model: Model, settings: Settings) -> int:
    return max(model.least_steps, round(recipe.steps_share * (settings.steps or model.steps)))


def _worth_measuring(
    recipes: tuple[Recipe, ...], model: Model, settings: Settings, scale: float
) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """Without those that these settings leave nothing of, and what is to be said of them and of modes.

    The first is what the others are compared with: where it is among them all are left, for others to refuse.
    """
    notes = []
    guided = [each for each in recipes if scale <= 1 and needs_guidance(each.optimizations)]
    if guided and recipes[0] not in guided:
        notes.append(f"{', '.join(each.name for each in guided)} left out: there is no guidance at {scale:g}")
        recipes = tuple(each for each in recipes if each not in guided)
    kept: list[Recipe] = []
    for each in recipes:
        same = next((old for old in kept if _same_steps(old, each, model, settings)), None)
        if same:
            notes.append(f"the rung {each.name} is left out: here it would be {same.name} again")
        else:
            kept.append(each)
    fixed = [each for each in kept if settings.compile_mode and each.compile_mode not in ("", settings.compile_mode)]
    notes += [f"{each.name} stays in compile mode {each.compile_mode}: it is about that" for each in fixed]
    return tuple(kept), tuple(notes)


def _same_steps(one: Recipe, other: Recipe, model: Model, settings: Settings) -> bool:
    """Whether they are one recipe with different shares of so few steps that these come to the same number."""
    return (
        one.steps_share != other.steps_share
        and replace(one, name="", steps_share=1.0) == replace(other, name="", steps_share=1.0)
        and _steps(one, model, settings) == _steps(other, model, settings)
    )


def _compile_mode(recipe: Recipe, settings: Settings, device: Device) -> str:
    """The recipe's own, or else the person's, or else what is usual for the recipe or, if it can be, the device."""
    usual = recipe.usual_mode or ("max-autotune" if device.kind == "cuda" else "default")
    known = [OPTIMIZATIONS[name] for name in recipe.optimizations]
    choosy = next((each for each in known if each.modes), None) if compiles(recipe.optimizations) else None
    if choosy is None:
        return recipe.compile_mode or settings.compile_mode or usual
    mode = recipe.compile_mode or settings.compile_mode or recipe.usual_mode or choosy.modes[0]
    if mode not in choosy.modes:
        raise ValueError(f"{choosy.name} excludes compile mode {mode}: take {' or '.join(choosy.modes)}.")
    return mode


def _accuracy_prompts(model: Model, settings: Settings) -> int:
    """How many held-out prompts a rung paints: 8 where the pictures can be judged, unless asked otherwise."""
    size = (settings.height or model.height, settings.width or model.width)
    readable = size == (world.CANVAS, world.CANVAS)
    if settings.accuracy_prompts is None:
        return 8 if model.small_world and readable else 0
    if not 0 <= settings.accuracy_prompts <= MOST_PROMPTS:
        raise ValueError(f"accuracy prompts must be 0 to {MOST_PROMPTS}, not {settings.accuracy_prompts}.")
    if settings.accuracy_prompts and not model.small_world:
        raise ValueError(f"{model.name}'s pictures can't be judged: --accuracy-prompts is for the bundled model, tiny.")
    if settings.accuracy_prompts and not readable:
        raise ValueError(
            f"The judge reads pictures of {world.CANVAS}×{world.CANVAS} alone: leave height and width out."
        )
    return settings.accuracy_prompts


def hub_parts(ladder: Ladder, model: Model) -> set[str]:
    """Hub ids of the single networks that a ladder's optimizations put in, such as another VAE."""
    needs = {OPTIMIZATIONS[name].model_needs for spec in ladder.rungs for name in spec.optimizations}
    return {getattr(model, field) for field in needs if field.endswith("hub_id")}


def find_model(name: str) -> Model:
    """A model by its name, or by a folder or hub id that need be no entry's.

    Raises ValueError where there is none, WeightsUnreachableError where the hub has it and doesn't give it.
    """
    listed = MODELS.get(name) or next((each for each in MODELS.values() if name and each.hub_id == name), None)
    try:
        return listed or unlisted.find(name) or lookup("model", name, MODELS)
    except unlisted.NowhereError as error:
        near = _nearest(name, [*MODELS, *(each.hub_id for each in MODELS.values())]) or MODELS
        raise ValueError(
            f"The model {name!r} can't be found (it is no folder, {error}): the nearest are {', '.join(near)}."
        ) from error


def find_ladder(name: str, device: Device, model: Model, about: str = "") -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """A ladder's recipes as they can be measured with this model on this device, and what was left out of them.

    Ladders are written once for all. A name that runs on another device, or changes what the model hasn't got, is left
    out of all rungs, and a rung that differed from an earlier one by such names alone is left out, because it would
    measure nothing new. Of a large model bf16 stands for what is in fp32. `ablation` is written as one recipe, and
    becomes that and one for each of its names. `about` is a recipe of any ladder, for one that is about a single one.

    Raises ValueError where there is no such ladder or recipe.
    """
    written = _written(name, about)
    recipes = _in_16_bits(written) if model.large else written
    absent = _absent(recipes, device, model)
    notes = [f"{each} is left out: {why}" for each, why in absent.items()]
    if recipes != written:
        notes.append(f"bf16 in the place of what is in fp32: {model.name} is too large for that")
    fitted: dict[Recipe, Recipe] = {}  # each as it was written, and as it can be measured
    for recipe in recipes:
        fits = replace(recipe, optimizations=tuple(each for each in recipe.optimizations if each not in absent))
        same = [
            old
            for old, new in fitted.items()
            if replace(new, name="") == replace(fits, name="") and replace(old, name="") != replace(recipe, name="")
        ]
        if same:
            notes.append(f"the rung {recipe.name} is left out: here it would be {same[-1].name} again")
        else:
            fitted[recipe] = fits
    if name == ABLATION:
        (full,) = fitted.values()
        less = [each for each in _without_each(full, model, device) if not (model.large and _in_fp32(each))]
        return (full, *less), tuple(notes)
    return tuple(fitted.values()), tuple(notes)


def _written(name: str, about: str) -> tuple[Recipe, ...]:
    """A ladder as it is written, of another recipe where it is about one."""
    recipes = lookup("ladder", name, LADDERS)
    if not about:
        return recipes
    if name not in ABOUT_ONE:
        raise ValueError(f"--recipe is for ladders about one recipe: {' and '.join(ABOUT_ONE)}; {name} has its own.")
    others = {each.name: each for ladder in LADDERS if ladder not in ABOUT_ONE for each in LADDERS[ladder]}
    chosen = lookup("recipe", about, others)
    return tuple(replace(chosen, name=each.name) for each in recipes)


def _in_16_bits(recipes: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """With bf16 in the place of a baseline in fp32, and once alone."""
    found = []
    for each in recipes:
        in_bf16 = replace(BF16, name=BF16.name if each.name == BASELINE.name else each.name)
        found.append(in_bf16 if _in_fp32(each) else each)
    return tuple(dict.fromkeys(found))


def _in_fp32(recipe: Recipe) -> bool:
    return not set(recipe.optimizations) & set(DTYPES)


def _absent(recipes: Iterable[Recipe], device: Device, model: Model) -> dict[str, str]:
    """The names that can't be applied, each with the reason."""
    found: dict[str, str] = {}
    for each in (name for recipe in recipes for name in recipe.optimizations):
        known = OPTIMIZATIONS[each]
        if device.kind not in known.devices:
            found[each] = f"it runs on another device than this {device.kind}"
        elif device.capability is not None and device.capability < known.min_capability:
            found[each] = f"{device.name} has too low a compute capability"
        elif not applies(known, model):
            found[each] = f"{model.name} has no {lacked(known, model)}"
    return found


def _without_each(full: Recipe, model: Model, device: Device) -> Iterator[Recipe]:
    """The recipe without each of its names in turn, and without those that require it, which its name then says."""
    for name in plan_recipe(model, full, device):
        left, out = set(full.optimizations) - {name}, [name]
        while lost := sorted(each for each in left if _lacking(OPTIMIZATIONS[each], left, model)):
            left -= set(lost)
            out += lost
        kept = tuple(each for each in full.optimizations if each in left)
        yield replace(full, name="-".join(["without", *out]), optimizations=kept)


def lookup(kind: str, name: str, known: Mapping[str, T]) -> T:
    """`known[name]`, or a ValueError that gives the nearest names."""
    if name in known:
        return known[name]
    near = _nearest(name, known) or known
    raise ValueError(f"There is no {kind} {name!r}: the nearest are {', '.join(near)}.")


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.4)
