"""Time and memory of a callable."""

import functools
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from diffusion_fast import measure


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], Callable[[], int]]:
    """Makes a function whose calls take the given seconds, on a clock of the test's own."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(seconds: list[float]) -> Callable[[], int]:
        left = iter(seconds)
        calls = [0]

        def call() -> int:
            now[0] += next(left)
            calls[0] += 1
            return calls[0]

        return call

    return make


def test_warm_up_ends_when_two_calls_agree(clock: Callable[[list[float]], Callable[[], int]]) -> None:
    assert measure.warm_up(clock([9, 2, 1.95, 1]), "cpu") == (pytest.approx([9, 2, 1.95]), True)


def test_warm_up_gives_up_after_five_and_says_so(clock: Callable[[list[float]], Callable[[], int]]) -> None:
    assert measure.warm_up(clock([9, 7, 5, 3, 1, 1]), "cpu") == (pytest.approx([9, 7, 5, 3, 1]), False)


def test_short_calls_are_timed_for_three_seconds(clock: Callable[[list[float]], Callable[[], int]]) -> None:
    seconds, values = measure.samples(clock([0.125] * 100), "cpu")
    assert len(seconds) == 24
    assert values == list(range(1, 25))


@pytest.mark.parametrize(("rounds", "calls"), [(1, 10), (2, 10), (3, 5)])
def test_long_calls_are_timed_ten_times_or_five_in_each_of_many_rounds(
    rounds: int, calls: int, clock: Callable[[list[float]], Callable[[], int]]
) -> None:
    assert len(measure.samples(clock([5.0] * 20), "cpu", rounds)[0]) == calls


def test_quantiles_of_a_known_distribution() -> None:
    sample = list(np.random.default_rng(0).permutation(np.linspace(0, 1, 101)))
    assert measure.quantiles(sample) == pytest.approx((0.5, 0.1, 0.9))


PEAK = """
import numpy as np
from diffusion_fast import measure
before = np.ones(600 * 2**17)  # twice as much as below, freed before the reset
del before
peak = measure.PeakMemory("cpu")
quiet = peak.read()["peak_rss_gib"]
block = np.ones(300 * 2**17)
del block
print(peak.read()["peak_rss_gib"] - quiet)
"""


def test_peak_memory_is_the_peak_since_the_reset() -> None:
    # In a process of its own: in one that has idle memory, the system may take that away meanwhile.
    done = subprocess.run((sys.executable, "-c", PEAK), capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(300 / 1024, abs=0.02)


def test_stopwatches_time_a_method_and_put_it_back() -> None:
    class Owner:
        def work(self, value: int) -> int:
            time.sleep(0.02)
            return value + 1

    owner, watches = Owner(), measure.Stopwatches(functools.partial(measure.now, "cpu"))
    with watches.on("work_s", owner, "work"):
        assert owner.work(1) == 2
        assert owner.work(2) == 3
    assert 0.04 <= watches.totals["work_s"] < 0.5
    assert watches.first_arguments["work_s"] == 2
    assert "work" not in vars(owner)
