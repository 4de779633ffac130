"""Outcomes on disk."""

from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_fast import ladder as climbing
from diffusion_fast import spool
from tests.conftest import failure, keep, planned, result


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    spool.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        spool.write_json(path, {"x": float("nan")})
    assert spool.read_json(path) == {"x": 1}
    assert [each.name for each in path.parent.iterdir()] == ["b.json"]


def test_attempts_are_never_overwritten_and_the_last_result_counts(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    spec = ladder.rungs[3]
    keep(folder, failure(spec))
    assert spool.next_attempt(folder, spec) == 2
    keep(folder, result(replace(spec, attempt=2), 2.0))
    keep(folder, failure(replace(spec, attempt=10)))
    assert spool.next_attempt(folder, spec) == 11
    assert [outcome.spec.attempt for _, outcome in spool.outcomes(folder)] == [1, 2, 10]
    assert spool.last_outcomes(folder) == {(spec.rung, 1): result(replace(spec, attempt=2), 2.0)}


def test_an_unfinished_attempt_is_no_outcome_but_keeps_its_number(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    spool.write_json(spool.run_folder(folder, ladder.rungs[0]) / spool.SPEC, ladder.rungs[0].to_dict())
    assert list(spool.outcomes(folder)) == []
    assert climbing.missing(folder)[0].attempt == 2


def test_what_is_missing_is_what_has_no_result(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    keep(folder, result(ladder.rungs[0]))
    keep(folder, failure(ladder.rungs[1]))
    todo = climbing.missing(folder)
    assert [(spec.rung, spec.attempt) for spec in todo] == [
        ("01-bf16", 2),
        ("02-sdpa", 1),
        ("03-compile", 1),
        ("04-fused-qkv", 1),
        ("05-int8-dynamic", 1),
    ]
    assert [spec.rung for spec in climbing.missing(folder, ("compile", "00-baseline"))] == ["03-compile"]
    with pytest.raises(ValueError, match=r"nearest are .*compile"):
        climbing.missing(folder, ("compil",))


def test_every_other_round_goes_backwards_and_what_a_round_has_is_left_out(tmp_path: Path) -> None:
    ladder = planned("cpu")
    folder = spool.save_ladder(tmp_path, ladder)
    keep(folder, result(ladder.rungs[0]))
    keep(folder, result(replace(ladder.rungs[1], round=2)))
    todo = climbing.missing(folder, rounds=3, planned=2)
    assert [(spec.rung[:2], spec.round) for spec in todo] == [
        *[("01", 1), ("02", 1)],
        *[("02", 2), ("00", 2)],
        *[("00", 3), ("01", 3), ("02", 3)],
    ]
    assert {spec.planned_rounds for spec in todo} == {2}
    assert len({spec.conditions for spec in (*ladder.rungs, *todo)}) == 3
    assert len({spool.run_folder(folder, spec) for spec in todo}) == len(todo)
    assert [(spec.rung[:2], spec.round) for spec in climbing.missing(folder, ("sdpa",), rounds=2)] == [("00", 2)]


def test_a_ladder_is_resumed_only_by_its_equal(tmp_path: Path) -> None:
    older, newer, other, tagged = planned(), planned(), planned(seed=1), planned(tag="mine")
    elsewhere = replace(planned(), machine={"device": "another", "torch": "1"})
    loaded = replace(older, rungs=tuple(replace(spec, saved_cache="another") for spec in older.rungs))
    for number, ladder in enumerate((older, newer, other, tagged, elsewhere, loaded), 1):
        spool.save_ladder(tmp_path, replace(ladder, id=str(number)))
    assert climbing.find_resumable(tmp_path, planned()) == tmp_path / "2"
    assert climbing.find_resumable(tmp_path, loaded) == tmp_path / "6"
    assert climbing.find_resumable(tmp_path, planned(steps=3)) is None
    assert climbing.find_resumable(tmp_path / "nowhere", planned()) is None


def test_two_processes_do_not_work_on_one_ladder(tmp_path: Path) -> None:
    folder = spool.save_ladder(tmp_path, planned())
    with spool.alone(folder), pytest.raises(ValueError, match="by another process"), spool.alone(folder):
        pass
    with spool.alone(folder):
        pass


def test_what_can_not_be_read_is_named(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    keep(folder, result(ladder.rungs[0]))
    (folder / "00-baseline" / "r1-a1.bak").mkdir()  # a copy of a person's own is no attempt
    path = keep(folder, result(ladder.rungs[1])) / spool.RESULT
    path.write_text('{"samples_s": ')
    with pytest.raises(ValueError, match=r"01-bf16/r1-a1/result\.json can't be read"):
        list(spool.outcomes(folder))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"01-bf16/r1-a1/result\.json can't be read"):
        list(spool.outcomes(folder))


def test_ladders_are_found_wherever_one_points(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path / "results" / "h100", ladder)
    for where in (folder, folder.parent, folder.parent.parent):
        assert spool.find_ladders(where) == [folder]
