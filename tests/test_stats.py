"""Intervals hold as often as they say, also where rounds were added because of them."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from diffusion_fast import stats

TRIALS = 2000
# The share of 2,000 intervals that hold is within this of 95% in all but one of 10,000 tries.
SLACK = 3.9 * math.sqrt(0.95 * 0.05 / TRIALS)


def drawn(generator: np.random.Generator, rounds: int, truth: float = 0.0, spread: float = 0.02) -> dict[int, float]:
    return {number + 1: float(each) for number, each in enumerate(generator.normal(truth, spread, rounds))}


@pytest.mark.parametrize("rounds", [2, 3, 8])
def test_an_interval_holds_in_19_of_20_cases(rounds: int) -> None:
    generator = np.random.default_rng(rounds)
    truth = math.log(1.3)
    found = [stats.mean_ratio(drawn(generator, rounds, truth), rounds) for _ in range(TRIALS)]
    held = [each.low <= 1.3 <= each.high for each in found if each.low is not None and each.high is not None]
    assert len(held) == TRIALS
    assert abs(np.mean(held) - 0.95) < SLACK


def test_it_is_the_t_interval_of_the_log_ratios() -> None:
    ratios = {1: 0.10, 2: 0.14, 3: 0.11, 4: 0.13}
    found = stats.mean_ratio(ratios, 4)
    low, high = scipy_stats.ttest_1samp(list(ratios.values()), 0).confidence_interval(0.95)
    assert (found.ratio, found.low, found.high) == pytest.approx([math.exp(each) for each in (0.12, low, high)])
    assert (found.rounds, found.seen) == (4, True)
    assert stats.mean_ratio({1: 0.10, 2: -0.12}, 2).seen is False


@pytest.mark.parametrize("until", [0.01, 0.03])
@pytest.mark.parametrize("growth", [1.0, 4.0])
def test_rounds_that_were_added_by_the_spread_leave_the_interval_true(until: float, growth: float) -> None:
    """Also where noise grows after the first rounds, of which their spread knows nothing."""
    generator = np.random.default_rng(7)
    held, narrow = [], []
    for _ in range(TRIALS):
        first = drawn(generator, 5)
        ratios, enough = dict(first), 5
        while (needed := stats.rounds_needed(ratios, 5, until)) is not None and needed > enough:
            more = drawn(generator, needed - enough, spread=0.02 * growth)
            ratios |= {enough + number: each for number, each in more.items()}
            enough = needed
        found = stats.mean_ratio(ratios, 5)
        assert found.low is not None
        assert found.high is not None
        held.append(not found.seen)
        narrow.append(found.high / found.ratio <= 1 + until + 1e-9)
    assert np.mean(held) > 0.95 - SLACK
    assert all(narrow)


@pytest.mark.parametrize("counts", [(3, 3), (2, 8)])
def test_the_interval_of_two_independent_sets_holds_whatever_their_spreads(counts: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(counts))
    found = [
        stats.ratio_of_two(
            generator.normal(0.1, 0.02, counts[0]).tolist(), generator.normal(0, 0.05, counts[1]).tolist()
        )
        for _ in range(TRIALS)
    ]
    held = [each.low <= math.exp(0.1) <= each.high for each in found if each.low is not None and each.high is not None]
    # Welch's degrees of freedom are an approximation: by 2 and 8 it errs to the safe side.
    assert 0.95 - SLACK < np.mean(held) < 0.99


@pytest.mark.parametrize("others", [2, 3, 10])
def test_the_interval_by_a_known_spread_holds_for_single_ladders(others: int) -> None:
    """Of an `aa`, both names' latencies share what a ladder has of its own: as few degrees of freedom as of one."""
    generator = np.random.default_rng(others)
    held = []
    for _ in range(TRIALS):
        ours, theirs = generator.normal(0.1, 0.03, 1).tolist(), generator.normal(0, 0.03, 1).tolist()
        known = generator.normal(1, 0.03, (2, others)).tolist()
        found = stats.ratio_by_known_spread(ours, theirs, known)
        assert found.low is not None and found.high is not None
        held.append(found.low <= math.exp(0.1) <= found.high)
    assert 0.95 - SLACK < np.mean(held) < 0.995


def test_one_round_has_no_interval() -> None:
    found = stats.mean_ratio({1: math.log(2)}, 1)
    assert (found.ratio, found.low, found.high, found.seen) == (pytest.approx(2), None, None, None)
    # Of the planned rounds but one was measured: the spread of those that were added because of it doesn't count.
    assert stats.mean_ratio({2: 0.1, 3: 0.2, 4: 0.3}, 2).low is None
    assert stats.rounds_needed({1: 0.1}, 5, 0.02) is None


def test_rounds_that_agree_wholly_have_an_interval_of_no_width() -> None:
    found = stats.mean_ratio({1: 0.1, 2: 0.1, 3: 0.1}, 3)
    assert [found.low, found.high] == pytest.approx([found.ratio] * 2)
    assert stats.rounds_needed({1: 0.1, 2: 0.1}, 2, 0.02) == 2


@pytest.mark.parametrize(("told", "planned"), [([5, 5, 5, 5, 5], 5), ([3, 3, 3, 10, 10], 3), ([1, 5, 5], 5), ([1], 1)])
def test_rounds_were_planned_before_any_was_seen(told: list[int], planned: int) -> None:
    assert stats.planned_rounds(told) == planned
