"""Click commands. What they do is elsewhere; exit codes are decided here.

0: done. 1: a rung failed, or something could not be reached; what was measured is kept. 2: the input is wrong.
3: `check` can't tell.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from diffusion_fast import console, plan, saved_cache, script, spool, sweep
from diffusion_fast import ladder as climbing
from diffusion_fast.console import fail
from diffusion_fast.models import MODELS, WeightsUnreachableError, check_weights
from diffusion_fast.optimizations import OPTIMIZATIONS, eight_bit_formats
from diffusion_fast.recipes import ABLATION, LADDERS
from diffusion_fast.sensitivity import read_kept
from diffusion_fast.spec import SWEEP, Model, Recipe

RUN_ID = re.compile("[0-9a-f]{32}")  # MLflow's
DEFAULT_LADDER = "progressive"
UNTIL_ROUNDS = 5  # planned by --until at least: of fewer, the spread is so ill known that many would be added


class Auto(click.ParamType[Any]):
    """A number, or "auto" for what the model suggests: MLproject parameters can't be left out."""

    name = "auto|number"

    def __init__(self, number: click.ParamType[Any]) -> None:
        self.number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value in ("auto", None) else self.number.convert(value, param, ctx)


class Percentage(click.ParamType[Any]):
    """ "2%" → 0.02; nothing → None, for MLproject."""

    name = "percentage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("", None) or isinstance(value, float):
            return value or None
        try:
            number = float(value.removesuffix("%")) / 100
        except ValueError:
            number = 0.0
        if not (value.endswith("%") and 0 < number < 1):
            self.fail(f"{value!r} is not a percentage such as 2%.", param, ctx)
        return number


@contextmanager
def errors_exit() -> Iterator[None]:
    """With 2 where the input is wrong, with 1 where weights can't be had."""
    try:
        yield
    except ValueError as error:
        fail(str(error), 2)
    except WeightsUnreachableError as error:
        fail(str(error), 1)


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several decorators as one, applied so that the help lists them in order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


MODEL_HELP = "See `diffusion-fast list`; or a folder in diffusers' format, or a hub id."
conditions = options(
    click.option("--model", default="tiny", show_default=True, help=MODEL_HELP),
    click.option("--weights", default="auto", help="embedded, pretrained (from the hub), random, or a folder."),
    click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True),
    click.option("--compile-mode", default="auto", help="auto: max-autotune on a GPU, default on a CPU."),
    click.option("--prompt", default="auto", help="auto: the model's own, see `diffusion-fast list --json`."),
    click.option("--steps", type=Auto(click.INT), default="auto", help="Denoising steps."),
    click.option("--guidance", type=Auto(click.FLOAT), default="auto", help="Guidance scale."),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the latents' noise."
    ),
)
measuring = options(
    conditions,
    click.option(
        "--rounds",
        type=click.IntRange(1, 1000),
        default=1,
        show_default=True,
        help="How often everything is measured, each time in a new process.",
    ),
    click.option(
        "--keep",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="What `sensitivity` wrote: the layers that stay out of eight bits.",
    ),
    click.option("--tag", default="", help="A word of your own on every run."),
    click.option(
        "--exclusive",
        type=bool,
        is_flag=False,
        flag_value=True,
        default=False,
        help="Refuse to start beside another process on the GPU.",
    ),
    click.option("--timeout", type=click.IntRange(1), default=3600, show_default=True, help="Seconds a rung may take."),
    click.option(
        "--spool",
        "root",
        type=click.Path(file_okay=False, path_type=Path),
        default="spool",
        show_default=True,
        envvar="DIFFUSION_FAST_SPOOL",
        help="Where results are kept.",
    ),
    click.option(
        "--cache-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="One compile cache for all rungs, instead of one each.",
    ),
    click.option(
        "--resume",
        type=bool,
        is_flag=False,
        flag_value=True,
        default=False,
        help="Go on with the newest such ladder: only what is missing.",
    ),
    click.option("--no-track", is_flag=True, help="Measure into the spool alone; `sync` records it later."),
)
shape = options(
    click.option("--batch-size", type=int, default=1, show_default=True, help="Images a call."),
    click.option("--height", type=Auto(click.INT), default="auto", help="Pixels."),
    click.option("--width", type=Auto(click.INT), default="auto", help="Pixels."),
)
one_shape = options(
    shape,
    click.option(
        "--accuracy-prompts",
        type=Auto(click.INT),
        default="auto",
        help="Held-out prompts that tiny paints for the judge. [default: 8]",
    ),
    click.option(
        "--save-cache",
        type=bool,
        is_flag=False,
        flag_value=True,
        default=False,
        help="Keep what a rung compiled with its results, for --load-cache.",
    ),
)
with_names = click.option(
    "--with", "names", default="", metavar="NAME,NAME", help="Optimizations; their order has no meaning."
)
one_recipe = options(
    with_names,
    click.option("--recipe", "recipe_name", default="", help="A rung of --ladder, as a start for --with."),
    click.option(
        "--ladder", "ladder_name", default=DEFAULT_LADDER, show_default=True, help="Where --recipe comes from."
    ),
)
saved_cache_option = click.option(
    "--load-cache",
    default="",
    metavar="RUN",
    help="Start from what a run has saved by --save-cache: its MLflow id, or its folder in a spool.",
)
tracked = options(
    click.option("--experiment", envvar="MLFLOW_EXPERIMENT_NAME", help="MLflow experiment [default: diffusion_fast]"),
    click.option("--tracking-uri", help="[default: MLFLOW_TRACKING_URI, or mlflow.db in this folder]"),
)


@click.group(context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffusion-fast")
def main() -> None:
    """Which inference optimizations pay on your GPU, for your text-to-image model, by how much, and at what cost."""


@main.command("list")
@click.argument("what", type=click.Choice(["all", "models"]), default="all")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_(what: str, as_json: bool) -> None:
    """Models, optimizations and ladders; or models alone, and which optimizations apply to each."""
    models = {model.name: model.to_dict() for model in MODELS.values()}
    names = {
        each.name: {
            "summary": each.summary,
            "stage": each.stage,
            "requires": [list(group) for group in each.requires],
            "excludes": list(each.excludes),
            "devices": list(each.devices),
            "lossless": each.lossless,
        }
        for each in OPTIMIZATIONS.values()
    }
    ladders = {name: [recipe.to_dict() for recipe in recipes] for name, recipes in LADDERS.items()}
    if as_json:
        click.echo(json.dumps({"models": models, "optimizations": names, "ladders": ladders}, indent=1))
        return
    if what == "models":
        _list_models()
        return
    click.echo("Models")
    width = max(map(len, (*MODELS, *OPTIMIZATIONS)))
    for model in MODELS.values():
        click.echo(f"  {model.name:{width}} {model.summary}, {model.height}×{model.width}, {model.steps} steps")
    click.echo("\nOptimizations (~: not lossless, changes the picture by more than rounding)")
    for each in OPTIMIZATIONS.values():
        click.echo(f"{' ' if each.lossless else '~'} {each.name:{width}} {each.summary}")
    click.echo("\nLadders")
    for name, recipes in LADDERS.items():
        click.echo(f"  {name}")
        before: set[str] = set()
        for index, recipe in enumerate(recipes):
            added = [each for each in recipe.optimizations if each not in before]
            share = f"{recipe.steps_share:.0%} of the steps" if recipe.steps_share < 1 else ""
            mode = share or (f"compile mode {recipe.compile_mode}" if recipe.compile_mode else "")
            click.echo(f"    {index:02}-{recipe.name:20} {'+ ' + ', '.join(added) if added else mode}".rstrip())
            before |= set(recipe.optimizations)
        if name == ABLATION:
            click.echo("    01-without-NAME         each of its names in turn, with those that require it")


def _list_models() -> None:
    """A Markdown table: a column a model, a line an optimization."""
    click.echo(f"| | lossless | {' | '.join(MODELS)} |")
    click.echo(f"|---|--:|{'--:|' * len(MODELS)}")
    click.echo(f"| parameters of the denoiser | | {' | '.join(f'{each.parameters:,}' for each in MODELS.values())} |")
    click.echo(f"| pixels | | {' | '.join(f'{each.height}×{each.width}' for each in MODELS.values())} |")
    for known in OPTIMIZATIONS.values():
        marks = ("yes" if plan.applies(known, model) else "" for model in MODELS.values())
        click.echo(f"| {known.name} | {'yes' if known.lossless else 'no'} | {' | '.join(marks)} |")


@main.command()
@click.option("--ladder", "name", default=DEFAULT_LADDER, show_default=True, help="See `diffusion-fast list`.")
@click.option("--recipe", "about", default="", help="Of any ladder: what aa or ablation are to be about.")
@click.option("--only", default="", metavar="RUNG,RUNG", help="Measure these rungs alone.")
@click.option(
    "--until",
    type=Percentage(),
    metavar="2%",
    help="Add rounds till the 95% intervals of speed-ups reach no further; at least 5.",
)
@click.option("--max-rounds", type=click.IntRange(1, 1000), default=20, show_default=True, help="The most for --until.")
@one_shape
@measuring
@tracked
def ladder(name: str, about: str, only: str, device: str, model: str, **chosen: Any) -> None:
    """Measure a ladder of recipes, a fresh process each, and record every rung as an MLflow run."""
    with errors_exit():
        where, found = plan.find_device(device), plan.find_model(model)
        recipes, notes = plan.find_ladder(name, where, found, about)
    _measure(name, recipes, notes, where, found, only=_names(only), **chosen)


@main.command()
@one_recipe
@saved_cache_option
@one_shape
@measuring
@tracked
def run(**chosen: Any) -> None:
    """Measure one recipe of your choice. Without any, the baseline: fp32, vanilla attention, eager."""
    _measure_one("run", **chosen)


@main.command()
@one_recipe
@saved_cache_option
@one_shape
@measuring
@tracked
def profile(**chosen: Any) -> None:
    """Measure one recipe and show where its time goes: kernels by class, and a trace for chrome://tracing."""
    _measure_one("profile", profile=True, **chosen)


@main.command()
@one_recipe
@click.option("--model", default="tiny", show_default=True, help=MODEL_HELP)
@click.option("--weights", default="auto", help="embedded, pretrained (from the hub), random, or a folder.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--target", type=Percentage(), metavar="2%", help="The relative error of a step that may remain.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="sensitivity", show_default=True)
def sensitivity(
    names: str,
    recipe_name: str,
    ladder_name: str,
    model: str,
    weights: str,
    device: str,
    target: float | None,
    output: Path,
) -> None:
    """Quantize a recipe's layers one by one, and say which lose most in eight bits.

    With --target, also which have to stay out of them: `run --keep OUTPUT/sensitivity.json` sees to it.
    """
    from diffusion_fast import sensitivity as pass_

    with errors_exit():
        found = plan.find_device(device)
        chosen = plan.find_model(model)
        recipe, _ = _chosen_recipe(names, recipe_name, ladder_name, found, chosen)
        settings = plan.Settings(weights=None if weights == "auto" else weights)
        planned = plan.plan_ladder("sensitivity", (recipe,), chosen, found, settings)
        if not any(eight_bit_formats(recipe.optimizations)):
            raise ValueError(
                "sensitivity is about a recipe for eight bits: add fp8_rows, int8_rows or int8_convolutions by --with."
            )
        check_weights(chosen, planned.rungs[0].weights, plan.hub_parts(planned, chosen))
    try:
        done = pass_.launch(planned.rungs[0], target, output)
    except OSError as error:
        fail(f"--output {output} can't be written to: {error}.", 2)
    if not done:
        fail(f"the pass has failed; {output / spool.LOG} says why.", 1)
    console.tell_sensitivity(spool.read_json(output / pass_.FILE))
    click.echo(output / pass_.FILE)


@main.command()
@click.argument("recipe_name", metavar="RECIPE", default="")
@with_names
@click.option("--ladder", "ladder_name", default=DEFAULT_LADDER, show_default=True, help="Where RECIPE comes from.")
@shape
@conditions
def code(recipe_name: str, names: str, ladder_name: str, model: str, device: str, **chosen: Any) -> None:
    """Print the plain diffusers script that a recipe amounts to. It runs without this package.

    RECIPE is a rung of --ladder. With --device cuda it is printed for a GPU, which needn't be there.
    """
    with errors_exit():
        found = plan.find_model(model)
        where = plan.Device("cuda", "CUDA") if device == "cuda" else plan.find_device(device)
        recipe, notes = _chosen_recipe(names, recipe_name, ladder_name, where, found)
        (spec,) = plan.plan_ladder("code", (recipe,), found, where, _settings(**chosen)).rungs
        text = script.write(found, spec)
        if spec.weights != "pretrained":  # those it will fetch when it is run
            check_weights(found, spec.weights)
    for note in notes:
        click.echo(f"Note: {note}.", err=True)
    click.echo(text, nl=False)


@main.command("sweep")
@one_recipe
@click.option("--batch-sizes", default="1,2,4,8,16", show_default=True, metavar="N,N", help="Images a call.")
@click.option(
    "--sizes",
    default="auto",
    metavar="PIXELS,PIXELS",
    help="Of square images. [default: 1/2, 3/4, 1 and 3/2 of the model's own]",
)
@measuring
@tracked
def sweep_(**chosen: Any) -> None:
    """Measure how one recipe grows: every batch size at every resolution, a fresh process each.

    Nothing is said of fidelity or of speed-ups: no two shapes do the same work. All share one compile cache. What is
    about batches, as vae_slicing is, takes one batch size at least on which it has an effect.
    """
    _measure_one(SWEEP, **chosen)


def _measure_one(
    what: str, *, names: str, recipe_name: str, ladder_name: str, device: str, model: str, **chosen: Any
) -> None:
    with errors_exit():
        where, found = plan.find_device(device), plan.find_model(model)
        recipe, notes = _chosen_recipe(names, recipe_name, ladder_name, where, found)
    _measure(what, (recipe,), notes, where, found, only=(), **chosen)


def _chosen_recipe(
    names: str, recipe_name: str, ladder_name: str, device: plan.Device, model: Model
) -> tuple[Recipe, tuple[str, ...]]:
    """A rung's recipe with some more names, and what was left out of it."""
    start = Recipe("baseline")
    notes: tuple[str, ...] = ()
    written = plan.lookup("ladder", ladder_name, LADDERS)
    if recipe_name:
        recipes, notes = plan.find_ladder(ladder_name, device, model)
        known = {recipe.name: recipe for recipe in recipes}
        if recipe_name not in known and recipe_name in {recipe.name for recipe in written}:
            raise ValueError(f"{recipe_name} of {ladder_name} isn't to be had here: {'; '.join(notes)}.")
        start = plan.lookup("recipe", recipe_name, known)
    elif ladder_name != DEFAULT_LADDER:
        raise ValueError(f"--ladder {ladder_name} says where a recipe comes from, and none of its recipes is named.")
    more = [name for name in _names(names) if name not in start.optimizations]
    label = "-".join([*([start.name] if recipe_name or not more else []), *more])
    return start.plus(label, *more), notes


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _measure(
    name: str,
    recipes: tuple[Recipe, ...],
    notes: tuple[str, ...],
    device: plan.Device,
    model: Model,
    *,
    only: tuple[str, ...],
    weights: str,
    compile_mode: str,
    prompt: str,
    guidance: float | None,
    keep: Path | None,
    timeout: float,
    root: Path,
    cache_dir: Path | None,
    resume: bool,
    no_track: bool,
    exclusive: bool,
    rounds: int,
    experiment: str | None,
    tracking_uri: str | None,
    until: float | None = None,
    max_rounds: int = 1,
    batch_sizes: str = "",
    sizes: str = "",
    save_cache: bool = False,
    load_cache: str = "",
    **settings: Any,
) -> None:
    with ExitStack() as held:
        with errors_exit():
            kept = read_kept(keep, model.name) if keep else ()
            chosen = _settings(weights, compile_mode, prompt, guidance, kept=kept, **settings)
            first = rounds if until is None else max(rounds, UNTIL_ROUNDS)
            if until is not None and max_rounds < first:
                raise ValueError(f"--until plans {first} rounds, and --max-rounds {max_rounds} is less.")
            planned = plan.plan_ladder(name, recipes, model, device, chosen, notes)
            if name == SWEEP:
                planned = sweep.plan_points(planned, model, batch_sizes, sizes)
            named = {climbing.resolve(planned, each) for each in only}
            if until is not None and named and planned.rungs[0].rung not in named:
                raise ValueError(
                    f"--until is about speed-ups: add {planned.rungs[0].recipe}, the first rung, to --only."
                )
            if cache_dir and (save_cache or load_cache):
                raise ValueError(
                    "--cache-dir is one compile cache for all: --save-cache and --load-cache go without it."
                )
            loaded = None
            if load_cache:
                loaded = _find_cache(load_cache, tracking_uri, held)
                planned = saved_cache.start_from(loaded, planned)
            if exclusive:
                plan.refuse_company(device)
            check_weights(model, planned.rungs[0].weights, plan.hub_parts(planned, model))
            if not no_track and importlib.util.find_spec("mlflow") is None:
                raise ValueError("mlflow isn't installed: --no-track measures without it, and `sync` records later.")
            resumed = climbing.find_resumable(root, planned) if resume else None
            try:
                folder = resumed or spool.save_ladder(root, planned)
                if loaded:
                    saved_cache.unpack(loaded, spool.cache_folder(folder, planned.rungs[0]))
            except OSError as error:
                raise ValueError(f"--spool {root} can't be written to: {error}.") from error
            held.enter_context(spool.alone(folder))
        if name == SWEEP:  # shapes have kernels in common; no first call is compared with another here
            cache_dir = cache_dir or spool.shared_cache_folder(folder)
        recorder = None if no_track else console.Recorder(folder, experiment, tracking_uri)
        asked = console.Rounds(first, until, max_rounds)
        console.climb(folder, only, timeout, cache_dir, recorder, asked, save_cache)


def _settings(weights: str, compile_mode: str, prompt: str, guidance: float | None, **others: Any) -> plan.Settings:
    return plan.Settings(
        weights=None if weights == "auto" else weights,
        compile_mode=None if compile_mode == "auto" else compile_mode,
        prompt=None if prompt == "auto" else prompt,
        guidance_scale=guidance,
        **others,
    )


def _find_cache(wanted: str, tracking_uri: str | None, held: ExitStack) -> Path:
    """What --load-cache names: a file in a run's folder, or fetched from MLflow. Raises ValueError."""
    file = Path(wanted) / spool.COMPILE_CACHE
    if file.is_file():
        return file
    if Path(wanted).exists() or not RUN_ID.fullmatch(wanted):
        raise ValueError(f"--load-cache: {wanted} is no MLflow run id, and no folder with a {spool.COMPILE_CACHE}.")
    if importlib.util.find_spec("mlflow") is None:
        raise ValueError("mlflow isn't installed: give --load-cache the folder of a run in a spool.")
    from diffusion_fast import tracking

    folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
    try:
        return tracking.fetch(wanted, spool.COMPILE_CACHE, folder, tracking_uri=tracking_uri)
    except tracking.TrackingError as error:
        fail(f"MLflow could not be read: {error}", 1)


@main.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--ladder-id", help="[default: the newest ladder]")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="report", show_default=True)
@click.option("--across", is_flag=True, help="Make ratios of different machines or versions, too.")
@tracked
def report(
    folder: Path | None,
    ladder_id: str | None,
    output: Path,
    across: bool,
    experiment: str | None,
    tracking_uri: str | None,
) -> None:
    """Print a ladder's table; write report.csv, report.md and report.png.

    From MLflow, or from FOLDER: a spool, or a ladder's folder in it.
    """
    from diffusion_fast import report as reporting

    with errors_exit():
        if folder is not None:
            found = [path for path in spool.find_ladders(folder) if ladder_id in (None, "", path.name)]
            if not found:
                raise ValueError(f"There is no ladder {ladder_id or ''} in {folder}.")
            frame, notes = reporting.from_spool(found[-1], across), spool.read_ladder(found[-1]).notes
            if not len(frame):
                raise ValueError(f"No rung of {found[-1].name} has an outcome yet.")
            floors = reporting.floors_in(found[-1].parent)
        else:
            from diffusion_fast.tracking import TrackingError, load_runs

            try:
                runs = load_runs(experiment, tracking_uri)
            except TrackingError as error:
                fail(f"MLflow could not be read: {error}", 1)
            frame, notes = reporting.one_ladder(runs, ladder_id, across), ()
            floors = reporting.floors_of(runs)
        if not across and (clauses := reporting.refused(frame)):
            raise ValueError(f"{'; '.join(clauses)}: --across compares them nevertheless.")
    floor = reporting.noise_floor(frame, floors)
    console.show(frame, floor)
    for path in reporting.write(frame, output, (*notes, *filter(None, [floor]))):
        click.echo(path)


@main.command()
@click.option("--baseline", required=True, metavar="QUERY", help="An MLflow search string of one recipe's runs.")
@click.option("--candidate", required=True, metavar="QUERY", help="Likewise: \"params.recipe = 'sdpa'\".")
@click.option("--max-slowdown", type=Percentage(), default="3%", show_default=True, help="What the candidate may lose.")
@click.option("--across", is_flag=True, help="Compare different machines or versions, too.")
@tracked
def check(
    baseline: str,
    candidate: str,
    max_slowdown: float | None,
    across: bool,
    experiment: str | None,
    tracking_uri: str | None,
) -> None:
    """Exit with 0 where the candidate isn't slower than is allowed, 1 where it is, 3 where that can't be told."""
    from diffusion_fast import check as checking
    from diffusion_fast import report as reporting
    from diffusion_fast.tracking import TrackingError, load_runs

    with errors_exit():
        try:
            ours, theirs, known = (
                reporting.records(load_runs(experiment, tracking_uri, query)) for query in (candidate, baseline, "")
            )
        except TrackingError as error:
            fail(f"MLflow could not be read: {error}", 2)  # 1 would say that it is slower
        if max_slowdown is None:
            raise ValueError("--max-slowdown is a percentage such as 3%.")
        verdict = checking.check(theirs, ours, known, max_slowdown, across)
    click.echo(verdict.sentence)
    sys.exit({"ok": 0, "slower": 1, "unknown": 3}[verdict.outcome])


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@tracked
def sync(folder: Path, experiment: str | None, tracking_uri: str | None) -> None:
    """Record ladders and trainings made elsewhere, or earlier. Doing it twice changes nothing."""
    found, trainings = spool.find_ladders(folder), spool.find_trainings(folder)
    if not (found or trainings):
        fail(f"There is no ladder and no training in {folder}.", 2)
    from diffusion_fast import tracking

    failed, recorded = False, None
    for path in trainings:
        try:
            tracking.record_training(path, experiment=experiment, tracking_uri=tracking_uri)
            click.echo(path.name)
        except tracking.TrackingError as error:
            failed = True
            click.echo(f"Error: {path.name} is not recorded: {error}", err=True)
    for path in found:
        try:
            with spool.alone(path):
                recorded = tracking.finish(path, experiment=experiment, tracking_uri=tracking_uri)
            click.echo(path.name)
        except (tracking.TrackingError, ValueError) as error:
            failed = True
            click.echo(f"Error: {path.name} is not recorded: {error}", err=True)
    if recorded is not None:
        console.tell_link(recorded)
    sys.exit(int(failed))


@main.command()
@click.option("--port", type=int, default=5000, show_default=True)
@click.option("--tracking-uri", help="[default: MLFLOW_TRACKING_URI, or mlflow.db in this folder]")
def ui(port: int, tracking_uri: str | None) -> None:
    """Start MLflow's UI on the recorded runs."""
    from diffusion_fast.tracking import default_uri

    uri = tracking_uri or default_uri()
    if uri.startswith("http"):
        fail(f"{uri} is a server already: open it in a browser.", 2)
    # For one person. MLflow would start four workers, and eight processes more for jobs that nobody here gives it.
    os.environ.setdefault("MLFLOW_WORKERS", "1")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(
        sys.executable,
        (sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)),
    )


if __name__ == "__main__":
    main()
