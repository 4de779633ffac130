"""scripts/calibrate.py: what today's statistics say of the rounds that it recorded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "results" / "2026-11-23-calibration"


@pytest.fixture(scope="module")
def calibrate() -> Any:
    spec: Any = importlib.util.spec_from_file_location("calibrate", ROOT / "scripts" / "calibrate.py")
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize(
    ("case", "fewest", "most"),
    [("aa-5-rounds", 0.02, 0.08), ("aa-until-1-percent", 0.02, 0.08), ("slower-until-2-percent", 0.9, 1)],
)
def test_two_hundred_recorded_comparisons(calibrate: Any, case: str, fewest: float, most: float) -> None:
    planned = {name: rounds.planned for name, _, rounds in calibrate.CASES["cheap"]}[case]
    found = calibrate.judged(RECORD / f"cheap-{case}.jsonl", planned)
    assert len(found) == 200
    assert fewest <= sum(each.seen is True for each in found) / 200 <= most
