"""Slower, not slower, or can't be told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from diffusion_fast import spool, tracking
from diffusion_fast.check import check
from diffusion_fast.cli import main
from tests.conftest import keep, planned, result

Row = dict[str, Any]
FACTS: Row = {
    **{"model": "tiny", "weights": "embedded", "device": "cpu", "steps": 30, "batch_size": 1, "height": 128},
    **{"width": 128, "guidance_scale": 5.0, "machine": "cpu x", "versions": "torch 2.13.0", "status": "FINISHED"},
}


def measured(recipe: str, seconds: list[float], ladder: str = "one", **more: Any) -> list[Row]:
    """Rounds of one ladder."""
    names = {"recipe": recipe, "optimizations": recipe, "rung": f"00-{recipe}", "attempt": 1, "ladder_id": ladder}
    planned_rounds = more.pop("planned_rounds", len(seconds))
    rounds = [{"latency_median_s": each, "round": number} for number, each in enumerate(seconds, 1)]
    return [FACTS | names | {"planned_rounds": planned_rounds} | each | more for each in rounds]


def ladders(recipe: str, seconds: list[float], name: str = "", **more: Any) -> list[Row]:
    """One round each of several ladders."""
    found = [measured(recipe, [each], f"{name or recipe}-{number}", **more) for number, each in enumerate(seconds)]
    return [row for rows in found for row in rows]


@pytest.mark.parametrize(
    ("candidate", "outcome", "said"),
    [
        (
            [1.05, 1.051, 1.049, 1.05],
            "slower",
            "takes 5.0% more time than the baseline (base) (95% interval +4.9% to +5.1%",
        ),
        ([0.97, 0.975, 0.965, 0.97], "ok", "takes 3.0% less time"),
        ([1.02, 1.021, 1.019, 1.02], "ok", "within the 3% that are allowed"),
        ([1.00, 1.08, 0.99, 1.06], "unknown", "can't tell whether that is more than the 3% that are allowed"),
    ],
)
def test_rounds_that_both_have_are_compared_within(candidate: list[float], outcome: str, said: str) -> None:
    """The machine became twice as slow after the first two rounds."""
    drift = [1.0, 1.0, 2.0, 2.0]
    theirs = measured("new", [each * slow for each, slow in zip(candidate, drift, strict=True)])
    verdict = check(measured("base", drift), theirs, [], 0.03)
    assert verdict.outcome == outcome
    assert said in verdict.sentence
    assert "4 rounds that both have" in verdict.sentence
    assert verdict.sentence.startswith("The candidate (new)")


def test_several_ladders_a_side_are_compared_by_their_own_spread() -> None:
    verdict = check(ladders("base", [1.0, 1.01, 0.99]), ladders("new", [1.10, 1.11, 1.09]), [], 0.03)
    assert (verdict.outcome, "3 and 3 ladders, Welch's t" in verdict.sentence) == ("slower", True)
    verdict = check(ladders("base", [1.0, 1.2, 0.9]), ladders("new", [1.10, 1.11, 1.09]), [], 0.03)
    assert verdict.outcome == "unknown"


def test_one_ladder_against_several_is_compared_by_the_spread_of_the_several() -> None:
    verdict = check(ladders("base", [1.0, 1.01, 0.99, 1.0]), measured("new", [1.10]), [], 0.03)
    assert (verdict.outcome, "1 and 4 ladders, by the spread of the several" in verdict.sentence) == ("slower", True)
    assert check(ladders("base", [1.0, 1.2, 0.9]), measured("new", [1.10]), [], 0.03).outcome == "unknown"


def test_runs_that_both_queries_match_are_no_comparison() -> None:
    new = measured("new", [2.0, 2.0], "pr")
    with pytest.raises(ValueError, match="share 2 of their runs"):
        check([*measured("new", [1.0, 1.0], "main"), *(dict(row) for row in new)], new, [], 0.03)


def test_single_ladders_are_compared_by_the_spread_of_ladders_aa() -> None:
    base, new = measured("base", [1.0], "x"), measured("new", [1.1], "y")
    verdict = check(base, new, [], 0.03)
    assert (verdict.outcome, "--ladder aa` several times" in verdict.sentence) == ("unknown", True)
    aa = [*ladders("a", [1.0, 1.002, 0.998, 1.001], "aa"), *ladders("b", [1.001, 1.003, 0.998, 1.0], "aa")]
    verdict = check(base, new, aa, 0.03)
    assert (verdict.outcome, "the spread between ladders from 4 ladders `aa`" in verdict.sentence) == ("slower", True)
    longer = measured("new", [1.1, 1.1], "y"), measured("base", [1.0, 1.0], "x")
    assert check(longer[1], longer[0], aa, 0.03).outcome == "unknown"  # a ladder of more rounds varies less
    noisy = [*ladders("a", [1.0, 1.1, 0.9, 1.2], "aa")]
    assert check(base, new, noisy, 0.03).outcome == "unknown"
    elsewhere = [row | {"machine": "another"} for row in aa]
    assert "several times" in check(base, new, elsewhere, 0.03).sentence


def test_ladders_aa_of_the_recipes_that_are_compared_go_before_those_of_another() -> None:
    base, new = measured("base", [1.0], "before"), measured("new", [1.05], "after")
    eager = ladders("a", [1.0, 1.4, 0.8, 1.2], "eager")
    assert check(base, new, eager, 0.03).outcome == "unknown"
    own = ladders("a", [1.0, 1.002, 0.998, 1.001], "own", optimizations="base")
    assert check(base, new, [*eager, *own], 0.03).outcome == "unknown"  # who says that the other one is as quiet?
    theirs = ladders("a", [1.0, 1.001, 0.999, 1.002], "theirs", optimizations="new")
    verdict = check(base, new, [*eager, *own, *theirs], 0.03)
    assert (verdict.outcome, "from 4 ladders `aa` of base, new)" in verdict.sentence) == ("slower", True)


def test_equal_ladders_are_seldom_called_slower_and_slower_ones_often() -> None:
    generator = np.random.default_rng(0)

    def verdict(truth: float) -> str:
        noise = generator.normal(0, 0.01, (2, 3))
        base, new = np.exp(noise[0]), truth * np.exp(noise[1])
        return check(ladders("base", base.tolist()), ladders("new", new.tolist()), [], 0.03).outcome

    assert [verdict(1.0) for _ in range(200)].count("slower") <= 3
    assert [verdict(1.15) for _ in range(200)].count("slower") >= 190


@pytest.mark.parametrize(
    ("base", "new", "message"),
    [
        ([], measured("new", [1.0]), "The baseline matches no finished measurement"),
        (measured("base", [1.0], status="FAILED"), measured("new", [1.0]), "The baseline matches no finished"),
        (
            measured("base", [1.0]),
            [*measured("new", [1.0]), *measured("other", [1.0])],
            r"The candidate must match one recipe, and matches 2: new, other\.$",
        ),
        (
            measured("base", [1.0]),
            [*measured("new", [1.0]), *measured("new", [1.0], "two", optimizations="bf16"), *measured("other", [1.0])],
            r"matches 3: new \(bf16\), new \(new\), other\.$",
        ),
        (measured("base", [1.0]), measured("new", [1.0], steps=20), r"differ in steps \(20 and 30\)\.$"),
        (measured("base", [1.0]), measured("new", [1.0], machine="y"), r"differ in machine \(cpu x and y\): --across"),
    ],
)
def test_what_makes_no_comparison_is_refused(base: list[Row], new: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(base, new, [], 0.03)


def test_machines_are_compared_where_asked() -> None:
    verdict = check(measured("base", [1.0, 1.0]), measured("new", [1.1, 1.1], machine="y"), [], 0.03, across=True)
    assert verdict.outcome == "slower"


def test_of_attempts_the_last_that_finished_counts() -> None:
    tries = [*measured("new", [9.0, 9.0]), *measured("new", [1.0, 1.0], attempt=10)]
    tries += measured("new", [7.0, 7.0], attempt=11, status="FAILED")
    assert check(measured("base", [1.0, 1.0]), tries, [], 0.03).outcome == "ok"


@pytest.mark.usefixtures("store")
def test_the_command_asks_mlflow_and_says_it_by_its_exit_code(tmp_path: Path) -> None:
    ladder = planned("cpu")
    folder = spool.save_ladder(tmp_path / "spool", ladder)
    for number in (1, 2, 3):
        for spec, seconds in zip(ladder.rungs, (2.0, 1.0, 1.1), strict=True):
            keep(folder, result(replace(spec, round=number, planned_rounds=3), seconds + number / 10_000))
    tracking.finish(folder)

    def run(base: str, new: str, *more: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["check", "--baseline", base, "--candidate", new, *more])
        return done.exit_code, done.output

    recipe: Callable[[str], str] = "params.recipe = '{}'".format
    code, said = run(recipe("compile"), recipe("fused-qkv"))
    assert (code, "takes 10.0% more time than the baseline (compile)" in said) == (1, True)
    assert run(recipe("compile"), recipe("fused-qkv"), "--max-slowdown", "12%")[0] == 0
    assert run(recipe("sdpa"), recipe("compile") + " and tags.round = '1'")[0] == 3
    assert run(recipe("sdpa"), recipe("nothing"))[0] == 2
    code, said = run(recipe("sdpa"), "recipe is compile")
    assert (code, "is not an MLflow search string" in said) == (2, True)
    assert run(recipe("sdpa"), "params.model = 'tiny'")[0] == 2


def test_of_a_baseline_that_grew_over_versions_those_of_the_candidate_count() -> None:
    old = measured("base", [9.0, 9.0], "old", versions="torch 2.11.0")
    base = [*old, *ladders("base", [1.0, 1.01, 0.99])]
    verdict = check(base, ladders("new", [1.10, 1.11, 1.09]), [], 0.03)
    assert (verdict.outcome, "3 and 3 ladders" in verdict.sentence) == ("slower", True)


def test_of_several_ladders_each_is_one_ratio_whatever_its_rounds() -> None:
    """Within a ladder rounds agree to 0.1%; between ladders the ratio differs by 10%."""
    noise = [0.9995, 1.0, 1.0005, 1.0, 0.9998]
    shifts = {"one": 0.97, "two": 1.07}
    base = [row for name in shifts for row in measured("base", noise, name)]
    new = [row for name, shift in shifts.items() for row in measured("new", [each * shift for each in noise], name)]
    verdict = check(base, new, [], 0.03)
    assert (verdict.outcome, "2 ladders that both are in" in verdict.sentence) == ("unknown", True)


def test_a_ladder_that_broke_off_is_left_out() -> None:
    rounds = [1.0, 1.001, 0.999]
    base = [*measured("base", rounds, "whole"), *measured("base", [1.0], "broken", planned_rounds=3)]
    new = [
        *measured("new", [1.05 * each for each in rounds], "whole"),
        *measured("new", [1.03], "broken", planned_rounds=3),
    ]
    verdict = check(base, new, [], 0.03)
    assert verdict.outcome == "slower"
    assert "3 rounds that both have, without 1 that broke off" in verdict.sentence
    # Where no ladder is whole, or has an interval of its own, each still is one ratio.
    fragments = [measured(recipe, [1.0], name, planned_rounds=3) for recipe in ("base", "new") for name in "ab"]
    verdict = check([*fragments[0], *fragments[1]], [*fragments[2], *fragments[3]], [], 0.03)
    assert "2 ladders that both are in" in verdict.sentence


def test_layers_that_were_kept_make_another_recipe() -> None:
    base = [*measured("base", [1.0, 1.0], "one"), *measured("base", [1.1, 1.1], "two", kept_layers="a,b")]
    with pytest.raises(ValueError, match=r"must match one recipe, and matches 2: .*without a,b"):
        check(base, measured("new", [1.0, 1.0]), [], 0.03)


def test_runs_from_before_there_were_flags_are_like_those_without() -> None:
    verdict = check(measured("base", [1.0, 1.0]), measured("new", [1.1, 1.1], flags=""), [], 0.03)
    assert verdict.outcome == "slower"
    with pytest.raises(ValueError, match="differ in flags"):
        check(measured("base", [1.0, 1.0]), measured("new", [1.1, 1.1], flags="OMP_NUM_THREADS=1"), [], 0.03)
