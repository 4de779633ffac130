"""Rows become a table, a CSV and a plot."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy.stats import ttest_1samp

from diffusion_fast import report, rows, spool, stats
from diffusion_fast.cli import main
from tests.conftest import failure, keep, planned, result

SEED_COLUMNS = [
    "pipeline_cls",
    "ckpt_id",
    "bf16",
    "sdpa",
    "fused_qkv_projections",
    "upcast_vae",
    "batch_size",
    "num_inference_steps",
    "compile_unet",
    "compile_vae",
    "compile_mode",
    "change_comp_config",
    "do_quant",
    "time (secs)",
    "memory (gbs)",
    "actual_gpu_memory (gbs)",
    "tag",
]


def test_the_table_has_a_line_a_rung_with_its_speed_up(climbed: Callable[..., Path]) -> None:
    text = report.markdown(report.from_spool(climbed()))
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("| 0")]) == 6
    assert "| 00-baseline | 6 | 5.4 | 6.6 | 1.00× |" in text
    assert "| 05-int8-dynamic | 1 | 0.9 | 1.1 | 6.00× |" in text
    assert "speed-ups against 00-baseline" in text


def test_a_failed_rung_shows_its_reason(climbed: Callable[..., Path]) -> None:
    assert "| 01-bf16 | timeout: not done after 10 s |" in report.markdown(report.from_spool(climbed((2.0, None, 1.0))))


def test_results_of_a_version_with_other_optimizations_are_told(tmp_path: Path) -> None:
    ladder = planned("cpu")
    gone = replace(ladder.rungs[0], optimizations=("bf16", "one_that_is_gone", "compile"))
    folder = spool.save_ladder(tmp_path, replace(ladder, rungs=(gone,)))
    keep(folder, result(gone, 2.0))
    assert f"| {gone.rung} | 2 |" in report.markdown(report.from_spool(folder))


def test_without_its_first_rung_a_ladder_has_no_speed_ups(climbed: Callable[..., Path]) -> None:
    text = report.markdown(report.from_spool(climbed((None, 2.0))))
    assert "×" not in text.replace("128×128", "")


def test_an_identical_image_reads_as_infinite(climbed: Callable[..., Path]) -> None:
    first, second, *_ = [line for line in report.markdown(report.from_spool(climbed())).splitlines() if "| 0" in line]
    assert first.split(" | ")[-3] == "∞"
    assert second.split(" | ")[-3] == "40.0"


def test_prompts_are_a_column_where_a_rung_was_judged(climbed: Callable[..., Path]) -> None:
    frame = report.from_spool(climbed((2.0, None, 1.0)))
    lines = report.markdown(frame).splitlines()
    assert lines[0].endswith("| SSIM | prompts right |")
    assert [line.split(" | ")[-1] for line in lines[2:5]] == ["75.0% |", " |", "75.0% |"]
    assert {line.count("|") for line in lines[:5]} == {15}
    without = frame.drop(columns=[name for name in frame if name.startswith("prompt_")])
    lines = report.markdown(without).splitlines()
    assert lines[0].endswith("| SSIM |")
    assert {line.count("|") for line in lines[:5]} == {14}


def test_the_csv_has_the_seeds_columns_first(climbed: Callable[..., Path], tmp_path: Path) -> None:
    paths = report.write(report.from_spool(climbed()), tmp_path / "out")
    assert [path.name for path in paths] == ["report.csv", "report.md", "report.png"]
    with paths[0].open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0])[: len(SEED_COLUMNS)] == SEED_COLUMNS
    last = read[-1]
    assert (last["bf16"], last["do_quant"], last["time (secs)"]) == ("True", "int8dynamic", "1.0")
    assert float(last["speedup"]) == 6.0
    with Image.open(paths[2]) as image:
        assert image.width > 500


def test_a_plot_of_failures_alone_is_empty_but_there(climbed: Callable[..., Path], tmp_path: Path) -> None:
    report.plot(report.from_spool(climbed((None,))), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def in_rounds(folder: Path, seconds: dict[str, list[float | None]], planned_rounds: int = 3) -> Path:
    """A spooled ladder whose rungs took the given seconds in each round; None is a failure."""
    ladder = planned()
    made = spool.save_ladder(folder, ladder)
    for spec in ladder.rungs:
        for number, each in enumerate(seconds.get(spec.recipe, []), 1):
            one = replace(spec, round=number, planned_rounds=planned_rounds)
            warm = (
                {"cache_state": "warm", "first_call_s": 4.0} if number > 1 and "compile" in spec.optimizations else {}
            )
            keep(made, failure(one) if each is None else result(one, each, **warm))
    return made


def test_over_rounds_a_speed_up_is_that_within_rounds_and_has_an_interval(tmp_path: Path) -> None:
    """The machine became twice as slow in the last round, for both alike."""
    folder = in_rounds(tmp_path, {"baseline": [6.0, 6.2, 12.0], "sdpa": [3.0, 3.0, 6.0], "compile": [2.0, 2.0, 4.1]})
    frame = report.from_spool(folder).set_index("rung")
    assert list(frame.loc["00-baseline"][["latency_median_s", "rounds"]]) == [6.2, 3]
    sdpa = frame.loc["02-sdpa"]
    logs = [math.log(ratio) for ratio in (2, 6.2 / 3, 2)]
    low, high = ttest_1samp(logs, 0).confidence_interval(0.95)
    assert list(sdpa[["speedup", "speedup_low", "speedup_high"]]) == pytest.approx(
        [math.exp(each) for each in (sum(logs) / 3, low, high)]
    )
    assert list(frame.loc["03-compile"][["first_call_s", "cache_state", "first_call_warm_s"]]) == [9.0, "cold", 4.0]
    assert list(frame.loc["03-compile"][["first_image_s", "first_image_warm_s"]]) == [13.5, 8.5]  # with 4.5 before it
    text = report.markdown(report.from_spool(folder))
    assert "| 2.02× (1.93–2.12) |" in text
    assert "| 00-baseline | 6.2 | 5.58 | 6.82 | 1.00× |" in text
    assert text.splitlines()[0].endswith("| cache | warm s | PSNR dB | SSIM | prompts right | rounds |")


def test_a_speed_up_whose_interval_holds_1_is_marked(tmp_path: Path) -> None:
    folder = in_rounds(tmp_path, {"baseline": [1.0, 1.0, 1.0], "bf16": [0.98, 1.01, 0.99], "sdpa": [0.5, 0.51, 0.5]})
    lines = {line[2:9]: line for line in report.markdown(report.from_spool(folder)).splitlines()}
    assert "1.01× (0.97–1.05), no difference seen" in lines["01-bf16"]
    assert "no difference" not in lines["02-sdpa"]


def test_rounds_that_were_added_count_for_the_mean_and_not_for_the_spread(tmp_path: Path) -> None:
    seconds = {"baseline": [1.0] * 4, "bf16": [0.5, 0.52, 0.51, 0.9]}
    frame = report.from_spool(in_rounds(tmp_path, seconds, planned_rounds=3)).set_index("rung")
    logs = {number: -math.log(each) for number, each in enumerate([0.5, 0.52, 0.51, 0.9], 1)}
    expected = stats.mean_ratio(logs, 3)
    assert list(frame.loc["01-bf16"][["speedup", "speedup_low", "speedup_high"]]) == pytest.approx(
        [expected.ratio, expected.low, expected.high]
    )


def test_the_published_columns_name_the_published_switches() -> None:
    spec = planned().rungs[0]
    for names, quant, upcast in (
        (("bf16", "int8_weight_only"), "int8weightonly", False),
        (("bf16", "upcast_vae", "int4_weight_only"), "int4weightonly", True),
        (("bf16", "fp8_weight_only"), "", False),
    ):
        found = rows.seed_row(rows.row(result(replace(spec, optimizations=names)), None))
        assert (found["do_quant"], found["upcast_vae"]) == (quant, upcast)


def test_a_report_says_what_repeating_one_prompt_leaves_out(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    keep(folder, result(ladder.rungs[0]))
    keep(folder, result(replace(ladder.rungs[1], optimizations=("bf16", "prompt_embedding_cache"))))
    told = "01-bf16 repeats one prompt, and what was measured is without text encoding"
    assert report.warnings(report.from_spool(folder)) == [told]
    assert f"Warning: {told}." in report.markdown(report.from_spool(folder))


def test_rounds_that_failed_are_told(tmp_path: Path) -> None:
    folder = in_rounds(tmp_path, {"baseline": [1.0, None, 1.0], "bf16": [0.5, 0.5, None], "sdpa": [None, None, None]})
    frame = report.from_spool(folder)
    assert report.warnings(frame) == [
        "00-baseline failed in 1 of its 3 rounds",
        "01-bf16 failed in 1 of its 3 rounds",
        "01-bf16: only 1 of its 2 rounds have a first rung to compare with",
    ]
    found = frame.set_index("rung")
    assert found.loc["01-bf16", "speedup"] == pytest.approx(2)  # of the one round that both have
    assert "| 01-bf16 | 0.5 | 0.45 | 0.55 | 2.00× |" in report.markdown(frame)
    assert "| 02-sdpa | timeout: not done after 10 s |" in report.markdown(frame)
    report.plot(frame, tmp_path / "plot.png")


def test_of_rounds_the_worst_is_warned_of_and_the_median_is_shown(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    beside = [
        {"others_cpu_share": 0.0, "energy_per_image_j": 10.0},
        {"others_cpu_share": 0.6, "energy_per_image_j": 14.0, "held_back": "power cap"},
        {"recompilations": 1.0, "energy_per_image_j": 11.0},
    ]
    for number, surroundings in enumerate(beside, 1):
        keep(folder, result(replace(ladder.rungs[0], round=number, planned_rounds=3), surroundings=surroundings))
    frame = report.from_spool(folder)
    assert report.warnings(frame) == [
        "00-baseline compiled, or captured a CUDA graph, while it was measured",
        "others used 60% of the CPU while 00-baseline was measured",
        "the GPU was held back (power cap) while 00-baseline was measured",
    ]
    assert frame["energy_per_image_j"].tolist() == [11.0]


def test_rounds_of_different_machines_are_told(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    for number in (1, 2):
        for spec in ladder.rungs[:2]:
            environment = {"cpu": f"processor {number}"}
            keep(folder, result(replace(spec, round=number, planned_rounds=2), environment=environment))
    frame = report.from_spool(folder)
    told = "00-baseline: its rounds are of different machines or versions"
    assert report.warnings(frame)[0] == f"{told}: no speed-up"
    assert frame["warnings"][0] == f"{told}: no speed-up"
    assert "speedup" not in frame
    across = report.from_spool(folder, across=True)
    assert report.warnings(across)[0] == told
    assert across["speedup"].tolist() == [1.0, 1.0]


def test_what_went_on_beside_a_measurement_is_told(tmp_path: Path) -> None:
    ladder = planned()
    folder = spool.save_ladder(tmp_path, ladder)
    beside = (
        {"others_cpu_share": 0.05, "recompilations": 0.0, "cuda_graphs": 2.0, "cuda_graph_captures": 0.0},
        {"others_cpu_share": 0.25},
        {"recompilations": 1.0},
        {"gpu_processes": 2.0, "held_back": "power cap"},
    )
    for spec, surroundings in zip(ladder.rungs, beside, strict=False):
        keep(folder, result(spec, surroundings=surroundings))
    assert report.warnings(report.from_spool(folder)) == [
        "others used 25% of the CPU while 01-bf16 was measured",
        "02-sdpa compiled, or captured a CUDA graph, while it was measured",
        "another process was on the GPU while 03-compile was measured",
        "the GPU was held back (power cap) while 03-compile was measured",
    ]


def aa_ladder(folder: Path, seconds: list[tuple[float, float]], about: str = "", **settings: int) -> Path:
    ladder = planned("aa", about=about, **settings)
    made = spool.save_ladder(folder, ladder)
    for number, pair in enumerate(seconds, 1):
        for spec, each in zip(ladder.rungs, pair, strict=True):
            keep(made, result(replace(spec, round=number, planned_rounds=len(seconds)), each))
    return made


def test_the_noise_floor_is_that_of_the_newest_ladder_aa_like_this_one(tmp_path: Path) -> None:
    folder = in_rounds(tmp_path, {"baseline": [1.0, 1.0], "bf16": [0.5, 0.5]})
    frame = report.from_spool(folder)
    assert report.noise_floor(frame, report.floors_in(tmp_path)) == ""
    older = aa_ladder(tmp_path, [(1.0, 1.2), (1.0, 1.3)])
    older.rename(tmp_path / "20250101-000000")
    newest = aa_ladder(tmp_path, [(1.0, 1.0), (1.0, 1.01), (1.0, 0.99)])
    aa_ladder(tmp_path, [(1.0, 1.0), (1.0, 2.0)], steps=7).rename(tmp_path / "20990101-000000")  # of other settings
    aa_ladder(tmp_path, [(1.0, 1.0)]).rename(tmp_path / "20990101-000001")  # one round: no interval
    said = report.noise_floor(frame, report.floors_in(tmp_path))
    assert (
        said
        == f"noise floor: the same recipe (bf16,sdpa) twice came to 1.000× (0.975–1.025) in 3 rounds of {newest.name}"
    )
    compiled = aa_ladder(tmp_path, [(1.0, 1.0), (1.0, 1.0)], about="regional")  # another recipe has its own
    said = report.noise_floor(frame, report.floors_in(tmp_path))
    assert said.count(" twice came to ") == 2 and newest.name in said and compiled.name in said
    done = CliRunner().invoke(main, ["report", str(folder), "--output", str(tmp_path / "out")])
    assert f"Note: {said}" in done.output
    assert f"Note: {said}." in (tmp_path / "out" / "report.md").read_text()


def on_another_machine(folder: Path) -> Path:
    """A spooled ladder that was resumed elsewhere."""
    ladder = planned()
    made = spool.save_ladder(folder, ladder)
    for spec, versions in zip(ladder.rungs, ("2.13.0", "2.13.0", "2.11.0"), strict=False):
        keep(made, result(spec, 2.0, environment={"cpu": "a processor", "torch": versions}))
    return made


def test_another_machine_or_version_makes_no_ratio_unless_asked_for(tmp_path: Path) -> None:
    folder = on_another_machine(tmp_path)
    frame = report.from_spool(folder)
    told = "02-sdpa was measured with torch 2.11.0 and 00-baseline with torch 2.13.0"
    assert report.refused(frame) == [told]
    assert frame.set_index("rung")["speedup"].isna().tolist() == [False, False, True]
    assert f"Warning: no speed-up: {told}." in report.markdown(frame)
    across = report.from_spool(folder, across=True)
    assert report.refused(across) == []
    assert across["speedup"].tolist() == [1.0] * 3
    done = CliRunner().invoke(main, ["report", str(folder), "--output", str(tmp_path / "out")])
    assert (done.exit_code, f"{told}: --across" in done.output) == (2, True)
    done = CliRunner().invoke(main, ["report", str(folder), "--output", str(tmp_path / "out"), "--across"])
    assert done.exit_code == 0


def test_other_flags_make_no_ratio_either(tmp_path: Path) -> None:
    ladder = planned("cpu")
    folder = spool.save_ladder(tmp_path, ladder)
    facts = {"cpu": "a processor", "torch": "2.13.0", "threads": 2}
    for spec, more in zip(ladder.rungs, ({}, {"flags": "OMP_WAIT_POLICY=active"}, {"threads": 1}), strict=True):
        keep(folder, result(spec, environment=facts | more))
    told = report.refused(report.from_spool(folder))
    assert told[0] == "01-compile was measured with OMP_WAIT_POLICY=active and 00-sdpa with no flags"
    assert "threads 1 and 00-sdpa with threads 2" in told[1]


def test_costs_are_a_table_of_their_own(tmp_path: Path) -> None:
    ladder = planned("cpu")
    folder = spool.save_ladder(tmp_path, ladder)
    one_step = {"steps": [0], "error": [0.02], "floor": [0.019], "to_eager": [0.01], "ok": True}
    for spec in ladder.rungs:
        keep(folder, result(spec, memory={"peak_rss_gib": 0.5, "weights_gib": 0.25}, one_step=one_step))
    text = report.markdown(report.from_spool(folder))
    assert "| rung | weights GiB | first image s | step error | eager's | to eager |" in text
    assert "| 01-compile | 0.25 | 13.5 | 2.0e-02 | 1.9e-02 | 1.0e-02 |" in text


def test_of_many_ladders_the_newest_is_taken_and_of_attempts_the_last_that_finished() -> None:
    frame = pd.DataFrame(
        [
            {"ladder_id": "1", "rung": "00-a", "status": "FINISHED", "round": 1, "attempt": 1, "x": 0},
            {"ladder_id": "2", "rung": "00-a", "status": "FINISHED", "round": 1, "attempt": 1, "x": 1},
            {"ladder_id": "2", "rung": "00-a", "status": "FINISHED", "round": 1, "attempt": 2, "x": 2},
            {"ladder_id": "2", "rung": "00-a", "status": "FAILED", "round": 1, "attempt": 3, "x": 3},
            {"ladder_id": "2", "rung": "01-b", "status": "FAILED", "round": 1, "attempt": 1, "x": 4},
        ]
    )
    assert list(report.one_ladder(frame)["x"]) == [2, 4]
    assert list(report.one_ladder(frame, "1")["x"]) == [0]
    with pytest.raises(ValueError, match="known are: 1, 2"):
        report.one_ladder(frame, "3")
    with pytest.raises(ValueError, match="known are: none"):
        report.one_ladder(frame[:0])


def test_an_ablations_ratios_are_against_the_whole_recipe(tmp_path: Path) -> None:
    ladder = planned("ablation")
    folder = spool.save_ladder(tmp_path, ladder)
    for index, spec in enumerate(ladder.rungs):
        keep(folder, result(spec, 1.0 if index == 0 else 1.25))
    frame = report.from_spool(folder)
    assert set(frame["speedup_base"]) == {"00-full"}
    assert frame["speedup"].tolist() == [1.0, *[0.8] * (len(ladder.rungs) - 1)]
    assert f"| {ladder.rungs[2].rung} | 1.25 |" in report.markdown(frame)
