"""Does an approximation earn its place? Its control is the same recipe without it and with fewer steps, no faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_fast.optimizations import same_work
from diffusion_fast.rows import optimization_names

CLOSENESS = ("prompt_psnr_db", "psnr_db")  # over many pictures where there are many, else of the one


@dataclass(frozen=True)
class Verdict:
    """What one approximation is worth beside its control."""

    rung: str
    control: str
    earned: bool  # closer to the picture of all steps, and more prompts right where that was judged
    sentence: str


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """One for each approximation in a ladder's rows, if the ladder has what is left without it with fewer steps, too.

    An approximation is compared with the fastest control that isn't faster than itself. What else its recipe has, such
    as eight bits, its controls have, too.
    """
    ordered = sorted(rows, key=lambda row: str(row["rung"]))
    if not ordered or ordered[0]["status"] != "FINISHED" or ordered[0].get("weights") == "random":
        return []  # what random weights paint says nothing of a picture
    measured = [row for row in ordered if row["status"] == "FINISHED"]
    found = []
    for row in measured:
        exact = [name for name in optimization_names(row) if same_work((name,))]
        controls = [each for each in measured if optimization_names(each) == exact and each["steps"] <= row["steps"]]
        if exact != optimization_names(row) and len(controls) > 1:
            slower = [each for each in controls if _latency(each) >= _latency(row)]
            found.append(
                _against(row, min(slower, key=_latency)) if slower else _slowest(row, max(controls, key=_latency))
            )
    return found


def _against(row: dict[str, Any], control: dict[str, Any]) -> Verdict:
    ours, theirs = _closeness(row, control)
    closer = ours > theirs
    parts = [
        f"{'closer' if closer else 'not closer'} to the picture of all steps ({ours:.1f} dB against {theirs:.1f} dB)"
    ]
    better = True
    if "prompt_accuracy" in row and "prompt_accuracy" in control:
        better = row["prompt_accuracy"] > control["prompt_accuracy"]
        parts.append(
            f"{'more' if better else 'not more'} prompts right "
            f"({row['prompt_accuracy']:.1%} against {control['prompt_accuracy']:.1%})"
        )
    earned = closer and better
    judged = "earns its place" if earned else "doesn't earn its place"
    return Verdict(
        row["rung"], control["rung"], earned, f"{_named(row)} {judged} beside {_named(control)}: {', '.join(parts)}"
    )


def _closeness(row: dict[str, Any], control: dict[str, Any]) -> tuple[float, float]:
    """The PSNR of both, in dB. One that isn't there is infinite: of what is equal to the reference there is none."""
    name = next((name for name in CLOSENESS if name in row or name in control), CLOSENESS[-1])
    return row.get(name, math.inf), control.get(name, math.inf)


def _slowest(row: dict[str, Any], plain: dict[str, Any]) -> Verdict:
    return Verdict(row["rung"], plain["rung"], False, f"{_named(row)} is no faster than {_named(plain)}")


def _named(row: dict[str, Any]) -> str:
    return f"{row['rung']} ({_latency(row):.3g} s)"


def _latency(row: dict[str, Any]) -> float:
    return float(row["latency_median_s"])
