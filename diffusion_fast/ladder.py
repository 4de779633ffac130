"""Climb a ladder: the reference, then rung after rung, each in a process of its own, whatever befalls one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_fast import saved_cache, spool
from diffusion_fast.launch import launch
from diffusion_fast.optimizations import compiles
from diffusion_fast.plan import lookup
from diffusion_fast.spec import Failure, Ladder, Outcome, Result, RunSpec


def climb(
    folder: Path,
    todo: Iterable[RunSpec],
    *,
    timeout_s: float,
    shared_cache: Path | None,
    save_cache: bool,
    on_start: Callable[[RunSpec], None],
    on_end: Callable[[RunSpec, Outcome | None], None],
) -> list[Outcome]:
    """Measure `todo` and return the outcomes, the reference's failure among them if it has one.

    A rung that fails is left alone in the rounds that follow: it would most likely fail again, and take its time.
    """
    found: list[Outcome] = []
    failed: set[str] = set()
    specs = list(todo)
    reference = spool.read_ladder(folder).reference
    if specs and reference is not None and not spool.has_reference(folder):
        specs.insert(0, reference)
    for spec in specs:
        if spec.rung in failed:
            continue
        on_start(spec)
        outcome = launch(spec, folder, timeout_s, shared_cache)
        if outcome is not None:
            if save_cache and isinstance(outcome, Result) and leaves_cache(spec):
                outcome = _save_cache(folder, outcome)
            found.append(outcome)
        if isinstance(outcome, Failure):
            failed.add(spec.rung)
        on_end(spec, outcome)
    return found


def leaves_cache(spec: RunSpec) -> bool:
    """Whether a cache of its own can be saved: later rounds start from the first one's, and compile nothing new."""
    return compiles(spec.optimizations) and spec.round == 1


def _save_cache(folder: Path, result: Result) -> Result:
    """Pack what the rung has compiled. A failure costs that alone, and is the result's problem."""
    run_folder = spool.run_folder(folder, result.spec)
    try:
        saved_cache.save(result.spec, spool.cache_folder(folder, result.spec), run_folder / spool.COMPILE_CACHE)
    except (OSError, ValueError) as error:  # a full disk, a GPU that no longer answers
        problem = f"its compile cache is not saved: {error}"
        result = replace(result, problem="; ".join(filter(None, (result.problem, problem))))
        spool.write_json(run_folder / spool.RESULT, result.to_dict())
    return result


def missing(folder: Path, only: tuple[str, ...] = (), *, rounds: int = 1, planned: int = 1) -> list[RunSpec]:
    """What of `rounds` has no result, or the rungs of it that are named, each as its next attempt.

    Every other round goes through the rungs backwards, so that a machine that gets slower or faster favours none.
    ValueError for a wrong name.
    """
    ladder = spool.read_ladder(folder)
    last = spool.last_outcomes(folder)
    wanted = {resolve(ladder, name) for name in only}
    todo = [
        replace(spec, round=number, planned_rounds=planned)
        for number in range(1, rounds + 1)
        for spec in (ladder.rungs if number % 2 else reversed(ladder.rungs))
        if (not wanted or spec.rung in wanted) and not isinstance(last.get((spec.rung, number)), Result)
    ]
    return [replace(spec, attempt=spool.next_attempt(folder, spec)) for spec in todo]


def resolve(ladder: Ladder, name: str) -> str:
    """A rung by its whole name or by its recipe's. Raises ValueError with the nearest names."""
    rungs = {spec.rung: spec.rung for spec in ladder.rungs}
    return lookup("rung", name, rungs | {spec.recipe: spec.rung for spec in ladder.rungs})


def find_resumable(root: Path, planned: Ladder) -> Path | None:
    """The newest ladder in a spool that measures just what is planned, on this machine; None where there is none."""

    def key(ladder: Ladder) -> tuple[Any, ...]:
        names = ("rung", "conditions", "tag", "profile", "saved_cache")
        return ladder.machine, [tuple(getattr(spec, name) for name in names) for spec in ladder.rungs]

    for folder in reversed(spool.find_ladders(root)):
        if key(spool.read_ladder(folder)) == key(planned):
            return folder
    return None
