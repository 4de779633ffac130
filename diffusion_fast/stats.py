"""What rounds say about a speed-up, and how many of them an interval of a given width takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Speedup:
    """A ratio of latencies with its 95% interval; of a single round nothing is known but the ratio."""

    ratio: float
    rounds: int
    low: float | None = None
    high: float | None = None

    @property
    def seen(self) -> bool | None:
        """Whether the interval leaves 1 out: a difference was seen."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high


def speedup(log_ratios: Mapping[int, float], planned: int) -> Speedup:
    """The mean log ratio over rounds (numbered from 1), with Student's t interval.

    Ratios are taken within rounds, so that what a machine does to all rungs of a round falls out, and in logs, where
    "twice as fast" and "twice as slow" are equally far from 1. Rounds after the first `planned` were added because of
    these, by `rounds_needed`: then the spread is that of the planned ones alone, which is what makes the interval hold
    though it was looked at (Stein 1945, https://doi.org/10.1214/aoms/1177731088).
    """
    import numpy as np
    from scipy import stats

    mean = float(np.mean(list(log_ratios.values())))
    spread_of = _planned(log_ratios, planned)
    if len(spread_of) < 2:
        return Speedup(math.exp(mean), len(log_ratios))
    scale = float(np.std(spread_of, ddof=1)) / math.sqrt(len(log_ratios))
    # Rounds that agree to the last digit leave scipy no distribution.
    low, high = stats.t.interval(CONFIDENCE, len(spread_of) - 1, mean, scale) if scale > 0 else (mean, mean)
    return Speedup(math.exp(mean), len(log_ratios), math.exp(low), math.exp(high))


def rounds_needed(log_ratios: Mapping[int, float], planned: int, until: float) -> int:
    """How many rounds in all make the interval reach no further than `until` (0.02: 2%) from its middle.

    The second stage of Stein's procedure: decided once, by the spread of the planned rounds. Raises ValueError where
    these are fewer than two.
    """
    import numpy as np
    from scipy import stats

    spread_of = _planned(log_ratios, planned)
    if len(spread_of) < 2:
        raise ValueError("An interval needs at least two rounds that were measured.")
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(spread_of) - 1) * np.std(spread_of, ddof=1))
    return max(planned, math.ceil((reach / math.log1p(until)) ** 2))


def _planned(log_ratios: Mapping[int, float], planned: int) -> list[float]:
    return [value for number, value in log_ratios.items() if number <= planned]
