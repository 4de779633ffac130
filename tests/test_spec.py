"""Data goes to JSON and comes back whole."""

import json
from dataclasses import replace

from diffusion_fast.spec import Failure, Ladder, Recipe, Result
from tests.conftest import failure, planned, result


def test_results_failures_and_ladders_survive_json() -> None:
    ladder = planned()
    for made, kind in ((result(ladder.rungs[3]), Result), (failure(ladder.rungs[0]), Failure), (ladder, Ladder)):
        assert kind.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_fields_of_a_later_version_are_ignored() -> None:
    made = result(planned().rungs[0])
    assert Result.from_dict(made.to_dict() | {"from_the_future": 1}) == made


def test_equal_measurements_share_their_conditions_whatever_they_are_called() -> None:
    spec = planned().rungs[3]
    renamed = replace(spec, ladder_id="x", rung="y", round=2, attempt=3, recipe="z", tag="mine")
    reordered = replace(spec, optimizations=tuple(reversed(spec.optimizations)))
    assert spec.conditions == renamed.conditions == reordered.conditions
    assert spec.conditions != replace(spec, seed=1).conditions


def test_dtype_follows_from_the_optimizations() -> None:
    baseline, bf16, *_ = planned().rungs
    assert (baseline.dtype, bf16.dtype) == ("float32", "bfloat16")


def test_plus_keeps_what_was_there() -> None:
    assert Recipe("a", ("x",)).plus("b", "y", "z") == Recipe("b", ("x", "y", "z"))
