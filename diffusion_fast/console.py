"""A ladder as a person at a terminal sees it: what goes on, the table, the link, and how it ended."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from diffusion_fast import ladder as climbing
from diffusion_fast import spool
from diffusion_fast.spec import REFERENCE, Failure, Outcome, Result, RunSpec

if TYPE_CHECKING:
    import pandas as pd

    from diffusion_fast.tracking import Recorded


MOST_SENSITIVE = 20  # layers that are shown; the file has all of them


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong in one sentence, and leave."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def climb(
    folder: Path,
    only: tuple[str, ...],
    timeout: float,
    cache_dir: Path | None,
    recorder: Recorder | None,
    rounds: Rounds,
    save_cache: bool = False,
) -> None:
    """Measure what is missing of a ladder, or of `only`, and show what came of it. Exits with 1 or 130 on failures."""
    current = spool.read_ladder(folder)
    todo = climbing.missing(folder, only, rounds=rounds.planned, planned=rounds.planned)
    in_rounds = f" in {rounds.planned} rounds" if rounds.planned > 1 else ""
    click.echo(f"{folder}: {len(todo)} of {len(current.rungs) * rounds.planned} rungs to measure{in_rounds}")
    for note in current.notes:
        click.echo(f"  {note}")
    if save_cache and not any(climbing.leaves_cache(spec) for spec in todo):
        click.echo("  --save-cache saves nothing: nothing that is to be measured compiles anything new")

    def measure(specs: list[RunSpec]) -> list[Outcome]:
        return climbing.climb(
            folder,
            specs,
            timeout_s=timeout,
            shared_cache=cache_dir,
            save_cache=save_cache,
            on_start=_started,
            on_end=lambda spec, outcome: _ended(folder, spec, outcome, recorder),
        )

    # Schedulers and `timeout` end a process by SIGTERM, which must not leave a worker behind on the GPU.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = measure(todo)
        if rounds.until is not None:
            enough = rounds.planned
            while (more := _enough(folder, rounds, failed_rungs := _failed(outcomes))) > enough:
                enough = more
                added = climbing.missing(folder, only, rounds=enough, planned=rounds.planned)
                outcomes += measure([spec for spec in added if spec.rung not in failed_rungs])
    except KeyboardInterrupt:
        if recorder is not None:
            recorder.finish(interrupted=True)
        fail(f"Interrupted. What was measured is in {folder}; --resume goes on with the rest.", 130)

    from diffusion_fast import report

    frame = report.from_spool(folder)
    if len(frame):
        show(frame, report.noise_floor(frame, report.floors_in(folder.parent)))
    for outcome in outcomes:
        if isinstance(outcome, Result) and outcome.profile:
            tell_profile(spool.run_folder(folder, outcome.spec))
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    last = spool.last_outcomes(folder).values()
    lossy = sorted({each.spec.rung for each in last if isinstance(each, Result) and each.fidelity_ok is False})
    if recorder is not None:
        recorder.finish()
    if failed:
        logs = ", ".join(str(spool.run_folder(folder, failure.spec) / spool.LOG) for failure in failed)
        fail(f"{len(failed)} of {len(outcomes)} measurements failed; their logs: {logs}", 1)
    if lossy:
        fail(f"{', '.join(lossy)} lost more than rounding, though nothing in the recipe says so.", 1)


@dataclass(frozen=True)
class Rounds:
    """How often a ladder is measured: `planned` times, and more until intervals reach no further than `until`."""

    planned: int = 1
    until: float | None = None  # 0.02: 2%
    most: int = 1


def _failed(outcomes: list[Outcome]) -> set[str]:
    return {outcome.spec.rung for outcome in outcomes if isinstance(outcome, Failure)}


def _enough(folder: Path, rounds: Rounds, failed: set[str]) -> int:
    """The rounds that `until` takes, by what is known so far of the rungs that go on, but not more than `most`."""
    from diffusion_fast import report, stats

    assert rounds.until is not None
    if (first := spool.read_ladder(folder).rungs[0].rung) in failed:
        click.echo(f"No rounds are added: {first}, which speed-ups are against, has failed")
        return rounds.planned
    frame = report.measurements(folder)
    planned = report.planned_rounds(frame)
    needed = {
        rung: stats.rounds_needed(ratios, planned[rung], rounds.until) or rounds.planned
        for rung, ratios in report.log_ratios(frame).items()
        if rung not in failed
    }
    rung = max(needed, key=lambda name: needed[name], default="")
    if needed.get(rung, 0) > rounds.planned:
        stopped = f": --max-rounds stops it at {rounds.most}" if needed[rung] > rounds.most else ""
        click.echo(f"{needed[rung]} rounds bring the interval of {rung} within {100 * rounds.until:.3g}%{stopped}")
    return min(needed.get(rung, rounds.planned), rounds.most)


class Recorder:
    """Records as the ladder goes on. A server that fails once is left alone until the end: the spool has it all."""

    def __init__(self, folder: Path, experiment: str | None, tracking_uri: str | None) -> None:
        # Imported before the first worker starts: its seconds must not fall into anybody's measurement.
        from diffusion_fast import tracking

        self.tracking = tracking
        self.folder = folder
        self.arguments = {
            "experiment": experiment,
            "tracking_uri": tracking_uri,
            "parent_run_id": os.environ.get("MLFLOW_RUN_ID"),
        }
        self.broken = False
        self.rung_ended()

    def rung_ended(self) -> None:
        if self.broken:
            return
        try:
            self.tracking.record(self.folder, **self.arguments)
        except self.tracking.TrackingError as error:
            self.broken = True
            click.echo(f"  not recorded, and going on: {error}", err=True)

    def finish(self, interrupted: bool = False) -> None:
        try:
            recorded = self.tracking.finish(self.folder, interrupted=interrupted, **self.arguments)
        except self.tracking.TrackingError as error:
            chosen = {"--tracking-uri": self.arguments["tracking_uri"], "--experiment": self.arguments["experiment"]}
            flags = "".join(f" {flag} {value}" for flag, value in chosen.items() if value)
            fail(f"MLflow could not record it ({error}). Later: diffusion-fast sync {self.folder}{flags}", 1)
        tell_link(recorded)


def _started(spec: RunSpec) -> None:
    more = {"round": spec.round, "attempt": spec.attempt}
    click.echo(", ".join([spec.rung, *(f"{what} {number}" for what, number in more.items() if number > 1)]))


def _ended(folder: Path, spec: RunSpec, outcome: Outcome | None, recorder: Recorder | None) -> None:
    clear = "\r\x1b[2K" if sys.stdout.isatty() else ""
    if isinstance(outcome, Result):
        click.echo(f"{clear}  {outcome.latency_median_s:.4g} s a call, {outcome.peak_memory_gib:.2f} GiB")
        if (saved := spool.run_folder(folder, spec) / spool.COMPILE_CACHE).is_file():
            click.echo(f"  compile cache: {saved}, {saved.stat().st_size / 1e6:.1f} MB")
    elif isinstance(outcome, Failure):
        click.echo(f"{clear}  failed while {outcome.stage}: {outcome.reason}: {outcome.message.splitlines()[0][:200]}")
    else:
        click.echo(f"{clear}  done")
    if recorder is not None and spec.role != REFERENCE:
        recorder.rung_ended()


def show(frame: pd.DataFrame, floor: str = "") -> None:
    """The table, what must be known of single rungs, and the noise floor where it is known."""
    from rich.console import Console

    from diffusion_fast import control, report

    # Without a terminal to fit into, a table is as wide as it needs to be.
    console = Console(width=None if sys.stdout.isatty() else 160)
    speed, *costs = report.tables(frame)
    console.print(report.table(frame, speed, report.caption(frame)))
    for columns in costs:
        console.print(report.table(frame, columns))
    for warning in report.warnings(frame):
        click.echo(f"Warning: {warning}")
    for verdict in control.verdicts(report.records(frame)):
        click.echo(f"Control: {verdict.sentence}")
    if floor:
        click.echo(f"Note: {floor}")


def tell_profile(run_folder: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(Markdown((run_folder / spool.PROFILE).read_text()))
    click.echo(f"All kernels: {run_folder / spool.KERNELS}")
    click.echo(f"The trace, for chrome://tracing or ui.perfetto.dev: {run_folder / spool.TRACE}")


def tell_sensitivity(found: dict[str, Any]) -> None:
    """The layers that lose most, and what all of them lose together."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "in", "out", "rows", "error", "", caption_justify="left")
    for layer in found["layers"][:MOST_SENSITIVE]:
        kept = "kept" if layer["name"] in found["kept"] else ""
        numbers = (str(number) for number in (*layer["features"], layer["rows"]))
        table.add_row(layer["name"], *numbers, f"{layer['error']:.2e}", kept)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    click.echo(
        f"{len(found['layers']) - len(found['kept'])} of {len(found['layers'])} layers in {found['format']}: a step's "
        f"error is {found['error']:.2e} (their squares add up to {found['predicted']:.2e})"
    )


def tell_link(recorded: Recorded) -> None:
    click.echo(f"\nThe comparison: {recorded.link}")
    if not recorded.served:
        click.echo("(served by: diffusion-fast ui)")
