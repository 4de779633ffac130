"""What rounds say about a speed-up, and how many of them an interval of a given width takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its 95% interval; of a single round nothing is known but the ratio."""

    ratio: float
    rounds: int
    low: float | None = None
    high: float | None = None

    @property
    def seen(self) -> bool | None:
        """Whether the interval leaves 1 out: a difference was seen."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high


def mean_ratio(log_ratios: Mapping[int, float], planned: int) -> Ratio:
    """The mean log ratio over rounds (numbered from 1), with Student's t interval.

    Ratios are taken within rounds, so that what a machine does to all rungs of a round falls out, and in logs, where
    "twice as fast" and "twice as slow" are equally far from 1.

    Rounds after the first `planned` were added because of these, by `rounds_needed`. The spread of the planned ones
    alone then makes an interval that holds though it was looked at (Stein 1945,
    https://doi.org/10.1214/aoms/1177731088), as long as the noise stays what it was; where it grew, the spread of all
    rounds tells. The wider interval counts.
    """
    mean = statistics.fmean(log_ratios.values())
    reach = _reach(log_ratios, planned)
    if reach is None:
        return Ratio(math.exp(mean), len(log_ratios))
    half = reach / math.sqrt(len(log_ratios))
    return Ratio(math.exp(mean), len(log_ratios), math.exp(mean - half), math.exp(mean + half))


def rounds_needed(log_ratios: Mapping[int, float], planned: int, until: float) -> int | None:
    """How many rounds in all make the interval reach no further than `until` (0.02: 2%) from its middle.

    It is asked again when they were added, for the spread may have grown: what decides is always how wide the interval
    is, never where it is. None: fewer than two of the planned rounds were measured.
    """
    reach = _reach(log_ratios, planned)
    return None if reach is None else max(planned, math.ceil((reach / math.log1p(until)) ** 2))


def planned_rounds(counts: Iterable[int]) -> int:
    """How many rounds were decided on before any was measured, by what each round was told.

    A ladder that is resumed for more rounds tells them more: those were decided on by someone who had seen the first.
    Of a single round nothing could be seen but the ratio. Whoever goes on because of where the ratio is, and not of
    how wide its interval is, isn't covered by any of this.
    """
    told = list(counts)
    return min((count for count in told if count > 1), default=max(told))


def _reach(log_ratios: Mapping[int, float], planned: int) -> float | None:
    """Half the width that the interval would have, were the mean that of a single round."""
    import numpy as np
    from scipy import stats

    at_first = [value for number, value in log_ratios.items() if number <= planned]
    if len(at_first) < 2:
        return None
    return max(
        float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(spread_of) - 1) * np.std(spread_of, ddof=1))
        for spread_of in (at_first, list(log_ratios.values()))
    )


def ratio_of_two(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of two sets of independent latencies, each at least two, given as logarithms: Welch's t interval."""
    import numpy as np
    from scipy import stats

    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)
    difference = float(np.mean(ours) - np.mean(theirs))
    return Ratio(math.exp(difference), min(len(ours), len(theirs)), math.exp(interval.low), math.exp(interval.high))


def ratio_by_known_spread(ours: Sequence[float], theirs: Sequence[float], known: Sequence[Sequence[float]]) -> Ratio:
    """The ratio of two sets of independent latencies, given as logarithms, by the spread that others have.

    `known` are logarithms of latencies of something else, one sequence a thing, each at least two. What of one thing
    was measured together with another's is no further evidence: the degrees of freedom are the longest sequence's.
    """
    import numpy as np
    from scipy import stats

    variance = float(np.average([np.var(each, ddof=1) for each in known], weights=[len(each) - 1 for each in known]))
    scale = math.sqrt(variance * (1 / len(ours) + 1 / len(theirs)))
    difference = float(np.mean(ours) - np.mean(theirs))
    low, high = stats.t.interval(CONFIDENCE, max(map(len, known)) - 1, difference, scale) if scale else [difference] * 2
    return Ratio(math.exp(difference), min(len(ours), len(theirs)), math.exp(low), math.exp(high))
