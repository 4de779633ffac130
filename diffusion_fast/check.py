"""Is one set of measurements slower than another, by more than is allowed? And can that be told?"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_fast import stats
from diffusion_fast.recipes import AA, LADDERS

SAME = ("model", "weights", "device", "steps", "batch_size", "height", "width", "guidance_scale")
FINGERPRINT = ("machine", "versions", "flags")

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a check came to, and the sentence that says so."""

    outcome: Literal["ok", "slower", "unknown"]
    sentence: str


def check(
    baseline: Sequence[Row], candidate: Sequence[Row], known: Sequence[Row], max_slowdown: float, across: bool = False
) -> Verdict:
    """Compare the latencies of two sets of measurements, each of one recipe: rows as `load_runs()` has them.

    What both sides have measured in the same rounds is compared within the rounds. Otherwise a ladder is one sample,
    and the spread between ladders is the sides' own where both have several; else it is that of ladders `aa` on the
    same machine, which are looked for among `known`: all that was measured. `max_slowdown` is 0.03 for 3%.

    Of the baseline those count that have the candidate's machine, versions and flags; `across` lets them differ.

    Raises ValueError where a side is empty or of several recipes, or where the two can't be compared.
    """
    sides = {"baseline": _finished(baseline), "candidate": _finished(candidate)}
    for side, rows in sides.items():
        if not rows:
            there = ", ".join(sorted({str(row["recipe"]) for row in _finished(known)})) or "none"
            raise ValueError(f"The {side} matches no finished measurement; finished ones are of the recipes: {there}.")
        recipes = sorted({_recipe(row) for row in rows})
        if len(recipes) > 1:
            called_so = Counter(name for name, _ in recipes)  # where several are, it is said what they consist of
            each = (name if called_so[name] == 1 else f"{name} ({parts})" for name, parts in recipes)
            raise ValueError(f"The {side} must match one recipe, and matches {len(recipes)}: {', '.join(each)}.")
    here = {_fingerprint(row) for row in sides["candidate"]}
    like = [row for row in sides["baseline"] if _fingerprint(row) in here]
    if like and not across:  # a baseline that grows over the years has been on other drivers and versions, too
        sides["baseline"] = like
    for name in (*SAME, *(() if across else FINGERPRINT)):
        values = sorted({_text(row, name) for rows in sides.values() for row in rows})
        if len(values) > 1:
            more = ": --across compares them nevertheless" if name in FINGERPRINT else ""
            raise ValueError(f"The measurements differ in {name} ({' and '.join(values)}){more}.")

    theirs, ours = ({_name(row) for row in rows} for rows in sides.values())
    if shared := ours & theirs:
        raise ValueError(f"Baseline and candidate share {len(shared)} of their runs: make the queries tell them apart.")

    one = sides["baseline"][0]
    again = {recipe.name for recipe in LADDERS[AA]}
    aa = [row for row in _finished(known) if row["recipe"] in again and alike(row, one)]
    ratio, how = _paired(**sides) or _unpaired(**sides, aa=aa)
    names = f"the candidate ({sides['candidate'][0]['recipe']})", f"the baseline ({one['recipe']})"
    if ratio.low is None or ratio.high is None:
        return Verdict("unknown", f"Can't tell whether {names[0]} is slower than {names[1]}: {how}.")
    percent = [100 * (each - 1) for each in (ratio.ratio, ratio.low, ratio.high)]
    allowed = f"the {100 * max_slowdown:.3g}% that are allowed"
    said = (
        f"{names[0].capitalize()} takes {abs(percent[0]):.1f}% {'more' if percent[0] > 0 else 'less'} time than "
        f"{names[1]} (95% interval {percent[1]:+.1f}% to {percent[2]:+.1f}%, {how})"
    )
    if ratio.low > 1 + max_slowdown:
        return Verdict("slower", f"{said}: more than {allowed}.")
    if ratio.high <= 1 + max_slowdown:
        return Verdict("ok", f"{said}: within {allowed}.")
    return Verdict("unknown", f"{said}: can't tell whether that is more than {allowed}.")


def alike(one: Row, other: Row) -> bool:
    """Whether two measurements have the same settings, machine, versions and flags."""
    return all(_text(one, name) == _text(other, name) for name in (*SAME, *FINGERPRINT))


def _fingerprint(row: Row) -> tuple[str, ...]:
    return tuple(_text(row, name) for name in FINGERPRINT)


def _text(row: Row, name: str) -> str:
    """A column that isn't there, in runs of before it was, is as empty as one that says nothing."""
    value = row.get(name)
    return "" if value is None else str(value)


def _recipe(row: Row) -> tuple[str, str]:
    """Its name, and what it consists of."""
    mode = f", {row['compile_mode']}" if row.get("compile_mode") else ""
    kept = f", without {row['kept_layers']}" if row.get("kept_layers") else ""
    return row["recipe"], f"{row['optimizations']}{mode}{kept}"


def _name(row: Row) -> tuple[Any, ...]:
    return tuple(row[part] for part in ("ladder_id", "rung", "round", "attempt"))


def _finished(rows: Sequence[Row]) -> list[Row]:
    """Of several attempts at a measurement the last that finished."""
    ordered = sorted((row for row in rows if row["status"] == "FINISHED"), key=lambda row: int(row["attempt"]))
    return list({(row["ladder_id"], row["rung"], row["round"]): row for row in ordered}.values())


def _paired(baseline: list[Row], candidate: list[Row]) -> tuple[stats.Ratio, str] | None:
    """The ratio within rounds that both sides have, if these are at least two; of several ladders, a ratio each.

    Ladders that broke off before their planned rounds are left out where there are others.
    """
    theirs = {(row["ladder_id"], row["round"]): row for row in baseline}
    both = [(row, theirs[key]) for row in candidate if (key := (row["ladder_id"], row["round"])) in theirs]
    if len(both) < 2:
        return None
    ladders: dict[str, dict[int, float]] = {}
    told: dict[str, list[int]] = {}
    for row, other in both:
        log = math.log(row["latency_median_s"] / other["latency_median_s"])
        ladders.setdefault(row["ladder_id"], {})[row["round"]] = log
        told.setdefault(row["ladder_id"], []).append(row["planned_rounds"])
    planned = {ladder: stats.planned_rounds(counts) for ladder, counts in told.items()}
    whole = {ladder: rounds for ladder, rounds in ladders.items() if len(rounds) >= planned[ladder]}
    if len(whole) < 2 and not any(len(rounds) > 1 for rounds in whole.values()):
        whole = ladders
    left = f", without {len(ladders) - len(whole)} that broke off" if len(whole) < len(ladders) else ""
    if len(whole) == 1:
        ((ladder, rounds),) = whole.items()
        return stats.mean_ratio(rounds, planned[ladder]), f"{len(rounds)} rounds that both have{left}"
    # What differs from ladder to ladder, all rounds of a ladder share.
    means = {number: statistics.fmean(each.values()) for number, each in enumerate(whole.values(), 1)}
    return stats.mean_ratio(means, len(means)), f"{len(means)} ladders that both are in{left}"


def _unpaired(baseline: list[Row], candidate: list[Row], aa: list[Row]) -> tuple[stats.Ratio, str]:
    """The ratio of ladders' latencies, by the spread between ladders."""
    ours, theirs = (list(_by_ladder(rows).values()) for rows in (candidate, baseline))
    counts = f"{len(ours)} and {len(theirs)} ladders"
    if len(ours) > 1 and len(theirs) > 1:
        return stats.ratio_of_two(ours, theirs), f"{counts}, Welch's t"
    if several := [side for side in (ours, theirs) if len(side) > 1]:
        return stats.ratio_by_known_spread(ours, theirs, several), f"{counts}, by the spread of the several"
    # A ladder of more rounds varies less: only as many of an `aa` count as these ladders have.
    rounds = min(Counter(row["ladder_id"] for row in (*baseline, *candidate)).values())
    enough = {key for key, number in Counter((row["rung"], row["ladder_id"]) for row in aa).items() if number >= rounds}
    by_recipe: dict[tuple[str, str], list[Row]] = {}
    for row in aa:
        if row["round"] <= rounds and (row["rung"], row["ladder_id"]) in enough:
            by_recipe.setdefault((row["rung"], _recipe(row)[1]), []).append(row)
    logs = {key: list(_by_ladder(rows).values()) for key, rows in by_recipe.items()}
    spreads = {key: each for key, each in logs.items() if len(each) > 1}
    own = {_recipe(row)[1] for row in (*baseline, *candidate)}
    # Of these very recipes, where both have some: an eager one says little of the noise of one that is compiled.
    known = {key: each for key, each in spreads.items() if key[1] in own}
    if {key[1] for key in known} != own:
        known = spreads
    if not known:
        return (
            stats.Ratio(math.exp(statistics.mean(ours) - statistics.mean(theirs)), 1),
            "they share no two rounds, one ladder says nothing of the spread between ladders, and no two ladders `aa` "
            "of this machine, these settings and as many rounds tell it: run `diffusion-fast ladder --ladder aa` "
            "several times, with the same model, steps and sizes (and `--recipe`)",
        )
    ratio = stats.ratio_by_known_spread(ours, theirs, list(known.values()))
    of = ", ".join(sorted({row["optimizations"] for key in known for row in by_recipe[key]}))
    return ratio, f"{counts}, the spread between ladders from {max(map(len, known.values()))} ladders `aa` of {of}"


def _by_ladder(rows: list[Row]) -> dict[str, float]:
    """The logarithm of each ladder's latency, the median of its rounds'."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["ladder_id"], []).append(row["latency_median_s"])
    return {ladder: math.log(statistics.median(seconds)) for ladder, seconds in found.items()}
