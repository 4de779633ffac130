"""Climb a ladder: the reference, then rung after rung, each in a process of its own, whatever befalls one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from diffusion_fast import spool
from diffusion_fast.launch import launch
from diffusion_fast.plan import lookup
from diffusion_fast.spec import Ladder, Outcome, Result, RunSpec


def climb(
    folder: Path,
    todo: Iterable[RunSpec],
    *,
    timeout_s: float,
    shared_cache: Path | None,
    on_start: Callable[[RunSpec], None],
    on_end: Callable[[RunSpec, Outcome | None], None],
) -> list[Outcome]:
    """Measure `todo` and return the outcomes, the reference's failure among them if it has one."""
    found: list[Outcome] = []
    specs = list(todo)
    if specs and not spool.reference_file(folder).is_file():
        specs.insert(0, spool.read_ladder(folder).reference)
    for spec in specs:
        on_start(spec)
        outcome = launch(spec, folder, timeout_s, shared_cache)
        if outcome is not None:
            found.append(outcome)
        on_end(spec, outcome)
    return found


def missing(folder: Path, only: tuple[str, ...] = ()) -> list[RunSpec]:
    """The rungs without a result, or those of them named, each as its next attempt. ValueError for a wrong name."""
    ladder = spool.read_ladder(folder)
    last = spool.last_outcomes(folder)
    wanted = {resolve(ladder, name) for name in only}
    return [
        replace(spec, attempt=spool.next_attempt(folder, spec))
        for spec in ladder.rungs
        if (not wanted or spec.rung in wanted) and not isinstance(last.get(spec.rung), Result)
    ]


def resolve(ladder: Ladder, name: str) -> str:
    """A rung by its whole name or by its recipe's. Raises ValueError with the nearest names."""
    rungs = {spec.rung: spec.rung for spec in ladder.rungs}
    return lookup("rung", name, rungs | {spec.recipe: spec.rung for spec in ladder.rungs})


def find_resumable(root: Path, planned: Ladder) -> Path | None:
    """The newest ladder in a spool that measures just what is planned, on this machine; None where there is none."""

    def key(ladder: Ladder) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
        return ladder.machine, [(spec.rung, spec.conditions, spec.tag) for spec in ladder.rungs]

    for folder in reversed(spool.find_ladders(root)):
        if key(spool.read_ladder(folder)) == key(planned):
            return folder
    return None
