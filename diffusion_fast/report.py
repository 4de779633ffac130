"""Rows of rungs → table, CSV, plot and markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_fast import rows, spool
from diffusion_fast.spec import Ladder, Result

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
    ("psnr_db", "PSNR dB", "{:.1f}"),
    ("ssim", "SSIM", "{:.4f}"),
)
MILLISECONDS = ("denoising_step_s", "vae_decode_s")


def from_spool(folder: Path) -> pd.DataFrame:
    """One row a rung of a ladder's folder: its last result, or its last failure where it never had one."""
    import pandas as pd

    last = spool.last_outcomes(folder)
    first = last.get(spool.read_ladder(folder).rungs[0].rung)
    base = first if isinstance(first, Result) else None
    return pd.DataFrame([rows.row(outcome, base) for outcome in last.values()])


def one_ladder(frame: pd.DataFrame, ladder_id: str | None = None) -> pd.DataFrame:
    """The rows of one ladder, the newest by default, one a rung. Raises ValueError where there is none."""
    known = sorted(frame["ladder_id"].unique()) if len(frame) else []
    if not known or (ladder_id and ladder_id not in known):
        raise ValueError(f"There is no ladder {ladder_id or ''} here; known are: {', '.join(known) or 'none'}.")
    rungs = frame[frame["ladder_id"] == (ladder_id or known[-1])]
    # Of several attempts the last one that finished counts: "FINISHED" sorts after "FAILED".
    ordered = rungs.sort_values(["rung", "status", "round", "attempt"])
    return ordered.drop_duplicates("rung", keep="last").reset_index(drop=True)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as the table shows it."""
    if row["status"] == "FAILED":
        return [row["rung"], f"{row['reason']}: {row['error'].splitlines()[0][:100]}", *[""] * (len(COLUMNS) - 2)]
    texts = []
    for column, _, form in COLUMNS:
        value = row.get(column)
        if value is None or value != value:
            texts.append("∞" if column == "psnr_db" and row.get("identical_to_reference") is True else "")
        else:
            texts.append(form.format(value * 1000 if column in MILLISECONDS else value))
    return texts


def table(frame: pd.DataFrame) -> Table:
    """The ladder for a terminal."""
    from rich.table import Table

    made = Table(caption=caption(frame), caption_justify="left")
    for column, heading, _ in COLUMNS:
        left = column in ("rung", "cache")
        made.add_column(heading, justify="left" if left else "right", no_wrap=column == "rung")
    for row in _records(frame):
        made.add_row(*cells(row))
    return made


def caption(frame: pd.DataFrame) -> str:
    """What all rungs of the table share, in one line."""
    first = frame.iloc[0]
    return (
        f"{first['model']} ({first['weights']} weights), {first['height']}×{first['width']}, {first['steps']} steps, "
        f"batch {first['batch_size']}, {first['device_name'] or first['device']}; "
        f"speed-ups against {_base(frame)}; PSNR and SSIM against fp32 in eager mode"
    )


def _base(frame: pd.DataFrame) -> str:
    named = [base for base in frame.get("speedup_base", ()) if base and base == base]
    return named[0] if named else "a first rung that isn't there yet"


def markdown(frame: pd.DataFrame, ladder: Ladder | None = None) -> str:
    """The table as markdown, with what each rung adds when the ladder is given."""
    lines = [
        "| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |",
        "|" + "|".join("---" if column in ("rung", "cache") else "--:" for column, _, _ in COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in _records(frame)]
    text = "\n".join(lines) + f"\n\n{caption(frame)}\n"
    if ladder is not None:
        text += "".join(f"\nNote: {note}.\n" for note in ladder.notes)
    return text


def plot(frame: pd.DataFrame, path: Path) -> None:
    """One bar a rung with its seconds above it, as diffusion-fast draws them; a line spans p10 to p90."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    finished = frame[frame["status"] == "FINISHED"]
    figure, axes = pyplot.subplots(figsize=(1.2 + 1.35 * len(finished), 4.2), layout="constrained")
    if len(finished):
        latency = finished["latency_median_s"]
        spread = [latency - finished["latency_p10_s"], finished["latency_p90_s"] - latency]
        bars = axes.bar(finished["rung"], latency, yerr=spread, color="#4477aa", ecolor="#222222", capsize=4)
        texts = [
            f"{row['latency_median_s']:.3g} s" + (f"\n{row['speedup']:.2f}×" if row.get("speedup", 0) > 0 else "")
            for row in finished.to_dict("records")
        ]
        axes.bar_label(bars, texts, padding=3)
        axes.margins(y=0.18)
        axes.tick_params(axis="x", rotation=20)
    axes.set_ylabel("seconds a call, median (p10–p90)")
    axes.set_title(caption(frame).split(";")[0], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(frame: pd.DataFrame, ladder: Ladder | None, folder: Path) -> list[Path]:
    """Write report.csv (the seed's columns first), report.md and report.png. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"report.{kind}" for kind in ("csv", "md", "png")]
    known = [{key: value for key, value in row.items() if value == value} for row in _records(frame)]
    spool.write_text(paths[0], rows.seed_csv(known))
    spool.write_text(paths[1], markdown(frame, ladder))
    plot(frame, paths[2])
    return paths
