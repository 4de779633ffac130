"""Rows of measurements → one row a rung → table, CSV, plot and markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_fast import check, control, rows, spool, stats, sweep
from diffusion_fast.recipes import AA, LADDERS

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

# column, heading, how a value reads
COLUMNS = (
    ("rung", "rung", "{}"),
    ("latency_median_s", "median s", "{:.4g}"),
    ("latency_p10_s", "p10", "{:.4g}"),
    ("latency_p90_s", "p90", "{:.4g}"),
    ("speedup", "speed-up", "{:.2f}×"),
    ("denoising_step_s", "step ms", "{:.3g}"),
    ("vae_decode_s", "VAE ms", "{:.3g}"),
    ("peak_memory_gib", "peak GiB", "{:.2f}"),
    ("load_s", "load s", "{:.1f}"),
    ("first_call_s", "first call s", "{:.1f}"),
    ("cache_state", "cache", "{}"),
    ("first_call_warm_s", "warm s", "{:.1f}"),
    ("psnr_db", "PSNR dB", "{:.1f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("prompt_accuracy", "prompts right", "{:.1%}"),
    ("prompt_psnr_db", "their PSNR dB", "{:.1f}"),
    ("rounds", "rounds", "{:g}"),
)
OPTIONAL = ("prompt_accuracy", "prompt_psnr_db", "first_call_warm_s", "rounds")  # shown where a rung has it
# The second table: what it took, how close that is to what the device can do, and what it cost in fidelity.
COSTS = (
    ("rung", "rung", "{}"),
    ("weights_gib", "weights GiB", "{:.2g}"),
    ("peak_reserved_gib", "reserved GiB", "{:.2f}"),
    ("process_gib", "process GiB", "{:.2f}"),
    ("first_image_s", "first image s", "{:.1f}"),
    ("first_image_warm_s", "warm s", "{:.1f}"),
    ("energy_per_image_j", "J an image", "{:.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("floor_percent", "floor", "{:.0f}%"),
    ("one_step_error_max", "step error", "{:.1e}"),
    ("one_step_floor_max", "eager's", "{:.1e}"),
    ("one_step_to_eager_max", "to eager", "{:.1e}"),
    ("psnr_eager_db", "PSNR to eager", "{:.1f}"),
    ("clip_score", "CLIP", "{:.1f}"),
)
OF_EVERY_RUNG = ("rung", "first_image_s", "first_image_warm_s")  # these alone make no second table
NAMES = ("rung", "height", "batch_size")  # of a row, also of one that failed: the first columns of a table
MILLISECONDS = ("denoising_step_s", "vae_decode_s")
# Of the rounds the largest, not the median.
WORST = ("others_cpu_share", "recompilations", "cuda_graph_captures", "gpu_processes", "one_step_of_allowed_max")
NO_DIFFERENCE = "no difference seen"


def from_spool(folder: Path, across: bool = False) -> pd.DataFrame:
    """One row a rung of a ladder's folder: of its results, or its last failure where it never had one."""
    return summarize(measurements(folder), across)


def measurements(folder: Path) -> pd.DataFrame:
    """One row a rung and round of a ladder's folder: its last result, or its last failure where it never had one."""
    import pandas as pd

    ladder, last = spool.read_ladder(folder), spool.last_outcomes(folder)
    return pd.DataFrame([rows.row(each, rows.speedup_base(each, ladder, last)) for each in last.values()])


def summarize(frame: pd.DataFrame, across: bool = False) -> pd.DataFrame:
    """Rows of one ladder's measurements, one a rung and round, as one row a rung.

    Over several rounds a figure is the median of the rounds' figures, and a speed-up has an interval. The first call is
    that of the first round, whose compile cache was cold or saved; `first_call_warm_s` is of the later ones. With
    `across` measurements of different machines or versions make a ratio too.
    """
    import pandas as pd

    if across:
        frame = _across(frame)
    if not len(frame) or frame["rung"].is_unique:
        return frame
    ratios = log_ratios(frame)
    by_rung: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(records(frame), key=lambda row: (row["rung"], row["round"])):
        by_rung.setdefault(row["rung"], []).append(row)
    return pd.DataFrame([_one_row(each, ratios.get(rung, {}), across) for rung, each in by_rung.items()])


def _one_row(rounds: list[dict[str, Any]], ratios: dict[int, float], across: bool) -> dict[str, Any]:
    """A rung's rounds, in their order, as one row."""
    measured = [row for row in rounds if row["status"] == "FINISHED"]
    if len(rounds) == 1 or not measured:
        return rounds[-1]
    found = measured[0] | {"rounds": len(measured), "failed_rounds": len(rounds) - len(measured)}
    of_first_round = [f"first_{what}{state}_s" for what in ("call", "image") for state in ("", "_cold")]
    settings = (*rows.INTEGERS, *rows.FLOATS, *rows.FLAGS, *of_first_round)
    for name in {name for row in measured for name, value in row.items() if isinstance(value, (int, float))}:
        values = [row[name] for row in measured if name in row]
        if name not in settings:
            found[name] = max(values) if name in WORST else statistics.median(values)
    if reasons := {reason for row in measured for reason in row.get("held_back", "").split(", ") if reason}:
        found["held_back"] = ", ".join(sorted(reasons))
    for name in rows.FLAGS:
        if any(name in row for row in measured):
            found[name] = all(row[name] for row in measured if name in row)
    problems = [row["problem"] for row in measured if row.get("problem")]
    if len({row["environment_hash"] for row in measured if row.get("environment_hash")}) > 1:
        problems.append("its rounds are of different machines or versions" + ("" if across else ": no speed-up"))
        ratios = ratios if across else {}
    if ratios and len(ratios) < len(measured):
        problems.append(f"only {len(ratios)} of its {len(measured)} rounds have a first rung to compare with")
    found["problem"] = "; ".join(dict.fromkeys(problems))
    if ratios:
        judged = stats.mean_ratio(ratios, stats.planned_rounds(row["planned_rounds"] for row in rounds))
        found["speedup"] = judged.ratio
        found["speedup_base"] = next(row["speedup_base"] for row in measured if row.get("speedup_base"))
        if judged.low is not None:
            found |= {"speedup_low": judged.low, "speedup_high": judged.high}
    else:
        found.pop("speedup", None)
    return found | {"warnings": "; ".join(rows.warnings(found))}


def refused(frame: pd.DataFrame) -> list[str]:
    """A clause for each rung that has no speed-up because its machine or versions are not those of the first rung."""
    measured = [row for row in records(frame) if row["status"] == "FINISHED"]
    first = min(measured, key=lambda row: str(row["rung"]), default={})
    found = {}
    for row in measured:
        if "speedup" not in row and row.get("environment_hash", "") != first.get("environment_hash", ""):
            here, there = (
                {fact for name in check.FINGERPRINT for fact in str(each.get(name) or f"no {name}").split(", ")}
                for each in (row, first)
            )
            ours, theirs = ", ".join(sorted(here - there)), ", ".join(sorted(there - here))
            found[row["rung"]] = f"{row['rung']} was measured with {ours} and {first['rung']} with {theirs}"
    return list(found.values())


def _across(frame: pd.DataFrame) -> pd.DataFrame:
    """The measurements with the speed-ups that were refused."""
    import pandas as pd

    made = records(frame)
    first = min((str(row["rung"]) for row in made), default="")
    seconds = {row["round"]: row["latency_median_s"] for row in made if row["rung"] == first and "speedup" in row}
    for row in made:
        if row["status"] == "FINISHED" and "speedup" not in row and row["round"] in seconds:
            row |= {"speedup": round(seconds[row["round"]] / row["latency_median_s"], 3), "speedup_base": first}
    return pd.DataFrame(made)


def log_ratios(frame: pd.DataFrame) -> dict[str, dict[int, float]]:
    """By rung and round the logarithm of how many times faster it was than the first rung in the same round."""
    measured = [row for row in records(frame) if row["status"] == "FINISHED"]
    latencies = {(row["rung"], row["round"]): row["latency_median_s"] for row in measured}
    found: dict[str, dict[int, float]] = {}
    for row in measured:
        base = latencies.get((row.get("speedup_base"), row["round"]))
        if base is not None:
            found.setdefault(row["rung"], {})[row["round"]] = math.log(base / row["latency_median_s"])
    return found


def planned_rounds(frame: pd.DataFrame) -> dict[str, int]:
    """By rung the rounds that were decided on before any was measured, see stats.py."""
    told: dict[str, list[int]] = {}
    for row in records(frame):
        told.setdefault(row["rung"], []).append(row["planned_rounds"])
    return {rung: stats.planned_rounds(counts) for rung, counts in told.items()}


def noise_floor(frame: pd.DataFrame, others: Iterable[pd.DataFrame]) -> str:
    """What this machine's noise is, by the newest of `others` for each recipe: measurements of ladders `aa` of several
    rounds.

    Empty where none of them has the machine, versions and settings of the table, and for a sweep, which has many.
    """
    if _is_sweep(frame):
        return ""
    here = records(frame)[0]
    said: dict[str, str] = {}
    for other in others:
        rungs = records(summarize(other))
        if len(rungs) == 2 and "speedup_low" in rungs[1] and check.alike(rungs[1], here):
            low, ratio, high = (rungs[1][name] for name in ("speedup_low", "speedup", "speedup_high"))
            recipe = ", ".join(
                filter(None, (str(rungs[1].get(name, "")) for name in ("optimizations", "compile_mode")))
            )
            said[recipe] = (
                f"the same recipe ({recipe}) twice came to {ratio:.3f}× "
                f"({low:.3f}–{high:.3f}) in {rungs[1]['rounds']} rounds of {rungs[1]['ladder_id']}"
            )
    return f"noise floor: {'; '.join(said.values())}" if said else ""


def floors_in(root: Path) -> list[pd.DataFrame]:
    """The measurements of the ladders `aa` in a spool, oldest first."""
    found = []
    for folder in spool.find_ladders(root):
        with suppress(ValueError):  # what can't be read is told where it is asked for
            if spool.read_ladder(folder).name == AA:
                found.append(measurements(folder))
    return [frame for frame in found if len(frame)]


def floors_of(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Likewise, of rows as `load_runs()` has them."""
    again = frame[frame["recipe"].isin([recipe.name for recipe in LADDERS[AA]])]
    return [_last_of_each(rows) for _, rows in again.groupby("ladder_id")]


def one_ladder(frame: pd.DataFrame, ladder_id: str | None = None, across: bool = False) -> pd.DataFrame:
    """The rows of one ladder, the newest by default, one a rung. Raises ValueError where there is none."""
    known = sorted(frame["ladder_id"].unique()) if len(frame) else []
    if not known or (ladder_id and ladder_id not in known):
        raise ValueError(f"There is no ladder {ladder_id or ''} here; known are: {', '.join(known) or 'none'}.")
    return summarize(_last_of_each(frame[frame["ladder_id"] == (ladder_id or known[-1])]), across)


def _last_of_each(frame: pd.DataFrame) -> pd.DataFrame:
    """Of several attempts at a rung and round the last one that finished, or else that failed."""
    ended = frame[frame["status"].isin(["FAILED", "FINISHED"])]
    ordered = ended.sort_values(["rung", "round", "status", "attempt"])  # "FINISHED" sorts after "FAILED"
    return ordered.drop_duplicates(["rung", "round"], keep="last").reset_index(drop=True)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries, without what is absent."""
    import pandas as pd

    return [{str(key): value for key, value in row.items() if pd.notna(value)} for row in frame.to_dict("records")]


def _is_sweep(frame: pd.DataFrame) -> bool:
    return sweep.is_sweep(records(frame))


Columns = Sequence[tuple[str, str, str]]


def tables(frame: pd.DataFrame) -> list[Columns]:
    """The columns that the tables of these rungs have: of speed, and of costs where any are known. A sweep has one."""
    if _is_sweep(frame):
        return [sweep.columns(records(frame))]

    def known(name: str) -> bool:
        return name in frame and bool(frame[name].notna().any())

    speed = [each for each in COLUMNS if each[0] not in OPTIONAL or known(each[0])]
    costs = [each for each in COSTS if known(each[0])]
    return [speed, costs] if any(name not in OF_EVERY_RUNG for name, *_ in costs) else [speed]


def cells(row: dict[str, Any], columns: Columns) -> list[str]:
    """A row as the table shows it."""
    if row["status"] == "FAILED":
        names = [form.format(row[column]) for column, _, form in columns if column in NAMES]
        reason = f"{row['reason']}: {row['error'].splitlines()[0][:100]}"
        return [*names, reason, *[""] * (len(columns) - len(names) - 1)]
    texts = []
    for column, _, form in columns:
        value = row.get(column)
        if value is None:
            texts.append("∞" if column == "psnr_db" and row.get("identical_to_reference") is True else "")
        elif column == "speedup":
            texts.append(form.format(value) + _interval(row, ", "))
        else:
            texts.append(form.format(value * 1000 if column in MILLISECONDS else value))
    return texts


def _interval(row: dict[str, Any], separator: str) -> str:
    """What follows a speed-up: its interval, and whether that holds 1. Nothing for the first rung or a single round."""
    if "speedup_low" not in row or row["rung"] == row["speedup_base"]:
        return ""
    low, high = row["speedup_low"], row["speedup_high"]
    return f" ({low:.2f}–{high:.2f})" + (f"{separator}{NO_DIFFERENCE}" if low <= 1 <= high else "")


def table(frame: pd.DataFrame, columns: Columns, caption: str = "") -> Table:
    """The ladder for a terminal."""
    from rich.table import Table

    made = Table(caption=caption, caption_justify="left")
    for column, heading, _ in columns:
        left = column in ("rung", "cache")
        made.add_column(heading, justify="left" if left else "right", no_wrap=column == "rung")
    for row in records(frame):
        made.add_row(*cells(row, columns))
    return made


def figures(frame: pd.DataFrame) -> dict[str, float]:
    """What all rounds say of each rung: "speedup/03-compile" and so on."""
    names = ("latency_median_s", "images_per_s", "speedup", "speedup_low", "speedup_high")
    return {f"{name}/{row['rung']}": row[name] for name in names for row in records(frame) if name in row}


def caption(frame: pd.DataFrame) -> str:
    """What all rungs of the table share, in one line."""
    first = frame.iloc[0]
    if _is_sweep(frame):
        return sweep.caption(records(frame)[0])
    return (
        f"{first['model']} ({first['weights']} weights), {first['height']}×{first['width']}, {first['steps']} steps, "
        f"batch {first['batch_size']}, {first['device_name'] or first['device']}; "
        f"speed-ups against {_base(frame)}{_intervals(frame)}; PSNR and SSIM against fp32 in eager mode"
    )


def _base(frame: pd.DataFrame) -> str:
    named = [base for base in frame.get("speedup_base", ()) if base and base == base]
    return named[0] if named else "a first rung that isn't there yet"


def _intervals(frame: pd.DataFrame) -> str:
    if "speedup_low" in frame:
        return ", within rounds, with 95% intervals"
    return ", of one process a rung: without intervals" if "speedup" in frame else ""


def warnings(frame: pd.DataFrame) -> list[str]:
    """What a reader of the table must know of single rungs."""
    lacking = "not to be compared" if _is_sweep(frame) else "no speed-up"
    found = [f"{lacking}: {clause}" for clause in refused(frame)]
    for row in records(frame):
        if failed := row.get("failed_rounds"):
            found.append(f"{row['rung']} failed in {failed:g} of its {failed + row['rounds']:g} rounds")
        found += rows.warnings(row)
    return found


def markdown(frame: pd.DataFrame, notes: Iterable[str] = ()) -> str:
    """The table as markdown, the warnings about single rungs, and the ladder's notes."""
    speed, *costs = (_markdown_table(frame, columns) for columns in tables(frame))
    text = "\n".join([speed, f"{caption(frame)}\n", *costs])
    text += "".join(f"\nWarning: {warning}.\n" for warning in warnings(frame))
    text += "".join(f"\nControl: {each.sentence}.\n" for each in control.verdicts(records(frame)))
    return text + "".join(f"\nNote: {note}.\n" for note in notes)


def _markdown_table(frame: pd.DataFrame, columns: Columns) -> str:
    lines = [
        "| " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|" + "|".join("---" if column in ("rung", "cache") else "--:" for column, _, _ in columns) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(row, columns)) + " |" for row in records(frame)), ""])


def plot(frame: pd.DataFrame, path: Path) -> None:
    """One bar a rung with its seconds above it, as diffusion-fast draws them; a line spans p10 to p90.

    A rung that failed keeps its place, with its reason. A sweep has lines instead, see sweep.py.
    """
    if _is_sweep(frame):
        sweep.plot(records(frame), path)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.2 + 1.35 * len(frame)), 4.2), layout="constrained")
    for place, row in enumerate(records(frame)):
        if row["status"] == "FAILED":
            axes.annotate(row["reason"], (place, 0), (0, 4), textcoords="offset points", ha="center", color="#aa3377")
            continue
        median, low, high = (row[f"latency_{which}_s"] for which in ("median", "p10", "p90"))
        bar = axes.bar(place, median, yerr=[[median - low], [high - median]], color="#4477aa", capsize=4)
        axes.bar_label(bar, [f"{median:.3g} s{_speedup_label(row)}"], padding=3)
    axes.margins(y=0.18)
    axes.set_xlim(-0.6, len(frame) - 0.4)
    axes.set_xticks(range(len(frame)), frame["rung"], rotation=20)
    axes.set_ylabel("seconds a call, median (p10–p90)")
    axes.set_title(caption(frame).split(";")[0], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _speedup_label(row: dict[str, Any]) -> str:
    label = f"\n{row['speedup']:.2f}×" if row.get("speedup", 0) > 0 else ""
    return label + _interval(row, "\n") + ("\nloses more than rounding" if row.get("fidelity_ok") is False else "")


def write(frame: pd.DataFrame, folder: Path, notes: Iterable[str] = ()) -> list[Path]:
    """Write report.csv (the seed's columns first), report.md and report.png. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"report.{kind}" for kind in ("csv", "md", "png")]
    spool.write_text(paths[0], rows.seed_csv(records(frame)))
    spool.write_text(paths[1], markdown(frame, notes))
    plot(frame, paths[2])
    return paths
