"""Rows become a table, a CSV and a plot."""

import csv
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from diffusion_fast import report

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
