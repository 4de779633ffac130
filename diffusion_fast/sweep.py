"""A sweep, one recipe at many batch sizes and resolutions: its points are planned here, its table and plot described.

It is a ladder whose rungs are the points, so that a point is a process, a folder in the spool and a run like any rung.
What it is without: speed-ups, because points do different work; and a reference, because there is one a ladder, of one
shape. So a sweep says nothing of fidelity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import Any

from diffusion_fast.optimizations import OPTIMIZATIONS, compiles
from diffusion_fast.rows import optimization_names
from diffusion_fast.spec import SWEEP, Ladder, Model

SHARES = (1 / 2, 3 / 4, 1, 3 / 2)  # of the model's own height: of 1024 pixels 512, 768, 1024 and 1536

# column, heading, how a value reads
COLUMNS = (
    ("height", "size", "{0}×{0}"),
    ("batch_size", "batch", "{}"),
    ("latency_median_s", "median s", "{:.4g}"),
    ("s_per_image", "s an image", "{:.4g}"),
    ("images_per_s", "images/s", "{:.4g}"),
    ("peak_memory_gib", "peak GiB", "{:.2f}"),
    ("peak_reserved_gib", "reserved GiB", "{:.2f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("first_call_s", "first call s", "{:.1f}"),
    ("cache_state", "cache", "{}"),
    ("recompilations", "recompilations", "{:g}"),
    ("rounds", "rounds", "{:g}"),
)
IF_KNOWN = ("peak_reserved_gib", "mfu", "rounds")
# One panel each: by column, of which the first that is known is shown, what is written beside its axis. What a CUDA
# graph writes into was reserved at its capture, and isn't allocated while it is replayed.
PANELS = (
    {"images_per_s": "images a second"},
    {"peak_reserved_gib": "memory reserved at most, GiB", "peak_memory_gib": "peak memory, GiB"},
)

Row = dict[str, Any]


def plan_points(ladder: Ladder, model: Model, batch_sizes: str, sizes: str) -> Ladder:
    """A ladder of one rung as one rung a point: that recipe at every size with every batch size.

    Both are numbers with commas between them; sizes are pixels, or "auto". Raises ValueError of one sentence.
    """
    (recipe,) = ladder.rungs
    own = (int(share * model.height) // model.multiple * model.multiple for share in SHARES)
    squares = tuple(own) if sizes == "auto" else _numbers(sizes, "--sizes", multiple_of=model.multiple)
    batches = _numbers(batch_sizes, "--batch-sizes")
    idle = _idle(recipe.optimizations, batches)
    shapes = list(product(squares, batches))
    digits = max(2, len(str(len(shapes) - 1)))  # names sort as the points do
    points = tuple(
        replace(
            recipe,
            rung=f"{index:0{digits}}-{size}x{size}-b{batch}",
            batch_size=batch,
            height=size,
            width=size,
            accuracy_prompts=0,
        )
        for index, (size, batch) in enumerate(shapes)
    )
    shared = ("all points share one compile cache",) if compiles(recipe.optimizations) else ()
    return replace(ladder, rungs=points, reference=None, notes=(*ladder.notes, *shared, *idle))


def _idle(names: Iterable[str], batches: Sequence[int]) -> list[str]:
    """What to say of optimizations that have nothing to do in some of these batches. ValueError: in none of them."""
    notes = []
    for name, least in ((name, OPTIMIZATIONS[name].least_batch) for name in names):
        small = [batch for batch in batches if batch < least]
        said = f"{name} has no effect on batches of {' or '.join(map(str, small))}"
        if len(small) == len(batches):
            raise ValueError(f"{said}: --batch-sizes takes one of {least} or more with it.")
        notes += [said] if small else []
    return notes


def _numbers(text: str, option: str, multiple_of: int = 1) -> tuple[int, ...]:
    """ "4,1,2" → (1, 2, 4): ascending, so that a sweep is resumed in whatever order they are typed.

    Raises ValueError for what is no positive number, no multiple, or there twice.
    """
    found: list[int] = []
    for part in (each.strip() for each in text.split(",")):
        if not part.isdecimal() or int(part) == 0:
            raise ValueError(f"{option} takes whole numbers above 0 with commas between them, not {part!r}.")
        if int(part) % multiple_of:
            raise ValueError(f"{option} takes multiples of {multiple_of}, not {part}.")
        if int(part) in found:
            raise ValueError(f"{option} has {int(part)} twice.")
        found.append(int(part))
    return tuple(sorted(found))


def is_sweep(rows: Sequence[Row]) -> bool:
    """Whether rows of one ladder are a sweep's points."""
    return bool(rows) and rows[0].get("ladder") == SWEEP


def columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The columns of the growth table: of recompilations where there was one, others where they are known."""

    def shown(name: str) -> bool:
        if name == "recompilations":
            return any(row.get(name, 0) > 0 for row in rows)
        return name not in IF_KNOWN or any(name in row for row in rows)

    return [each for each in COLUMNS if shown(each[0])]


def caption(row: Row) -> str:
    """What all points share, in one line; `row` is any of them."""
    named = optimization_names(row)
    named += [f"mode {row['compile_mode']}"] if row.get("compile_mode") else []
    recipe = f"{row['recipe']} ({', '.join(named)})" if named else row["recipe"]
    return (
        f"growth of {recipe}: {row['model']} ({row['weights']} weights), {row['steps']} steps, "
        f"{row.get('device_name') or row['device']}"
    )


def lines(rows: Sequence[Row], column: str) -> dict[str, tuple[list[int], list[float]]]:
    """What is plotted: by a size's label the batch sizes and the values. A label names the batch sizes that failed."""
    found = {}
    for size in sorted({row["height"] for row in rows}):
        points = sorted((row for row in rows if row["height"] == size), key=lambda row: row["batch_size"])
        measured = [row for row in points if column in row]
        failed = ", ".join(str(row["batch_size"]) for row in points if row["status"] == "FAILED")
        label = f"{size}×{size}" + (f", failed: batch {failed}" if failed else "")
        found[label] = [row["batch_size"] for row in measured], [row[column] for row in measured]
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Images a second and memory over the batch size, a line a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({row["batch_size"] for row in rows})
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 4.2), layout="constrained")
    for axes, named in zip(panels, PANELS, strict=True):
        column = next((name for name in named if any(name in row for row in rows)), list(named)[-1])
        for label, (where, values) in lines(rows, column).items():
            axes.plot(where, values, marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, map(str, batches))
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # all begin at nought, and what lies on top is not cut
        axes.set_xlabel("batch size")
        axes.set_ylabel(named[column])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    figure.suptitle(fill(caption(rows[0]), 160), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
