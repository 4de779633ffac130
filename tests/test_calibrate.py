"""scripts/calibrate.py: what today's statistics say of the rounds that it recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import script

RECORD = Path(__file__).parent.parent / "results" / "2026-11-23-calibration"


@pytest.mark.parametrize(
    ("case", "fewest", "most"),
    [("aa-5-rounds", 0.02, 0.08), ("aa-until-1-percent", 0.02, 0.08), ("slower-until-2-percent", 0.9, 1)],
)
def test_two_hundred_recorded_comparisons(case: str, fewest: float, most: float) -> None:
    calibrate = script("calibrate")
    planned = {name: rounds.planned for name, _, rounds in calibrate.CASES["cheap"]}[case]
    found = calibrate.judged(RECORD / f"cheap-{case}.jsonl", planned)
    assert len(found) == 200
    assert fewest <= sum(each.seen is True for each in found) / 200 <= most
