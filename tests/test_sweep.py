"""A sweep: its points, its table and plot, its commands, and one with real workers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffusion_fast import ladder as climbing
from diffusion_fast import load_runs, plan, report, spool, sweep, tracking
from diffusion_fast.cli import main
from diffusion_fast.optimizations import compiles
from diffusion_fast.recipes import COMPILE
from diffusion_fast.spec import SWEEP, Ladder, Outcome, Recipe, RunSpec
from tests.conftest import CPU, H100, failure, keep, result

PACKAGE = Path(sweep.__file__).parent


def points(
    batch_sizes: str = "1,2",
    sizes: str = "64,96",
    recipe: Recipe = Recipe("sdpa", ("bf16", "sdpa")),  # noqa: B008 - frozen
    model: str = "tiny",
    device: plan.Device = CPU,
) -> Ladder:
    found = plan.find_model(model)
    one = plan.plan_ladder(SWEEP, (recipe,), found, device, plan.Settings(steps=2))
    return sweep.plan_points(one, found, batch_sizes, sizes)


def test_a_sweep_is_one_recipe_at_every_size_with_every_batch_size() -> None:
    ladder = points("2,1", "96,64")
    assert [spec.rung for spec in ladder.rungs] == ["00-64x64-b1", "01-64x64-b2", "02-96x96-b1", "03-96x96-b2"]
    assert [(spec.height, spec.width, spec.batch_size) for spec in ladder.rungs] == [
        (64, 64, 1),
        (64, 64, 2),
        (96, 96, 1),
        (96, 96, 2),
    ]
    assert {(spec.recipe, spec.ladder, spec.role) for spec in ladder.rungs} == {("sdpa", "sweep", "rung")}
    assert {spec.accuracy_prompts for spec in points("1", "128").rungs} == {0}  # at its own size tiny would be judged
    assert ladder.reference is None
    assert Ladder.from_dict(ladder.to_dict()) == ladder


def test_what_is_for_batches_is_swept_where_one_of_them_is_large_enough() -> None:
    slicing = Recipe("mine", ("bf16", "vae_slicing"))
    ladder = points("1,4", "64", slicing)
    assert [(spec.batch_size, spec.optimizations) for spec in ladder.rungs] == [
        (1, ("bf16", "vae_slicing")),
        (4, ("bf16", "vae_slicing")),
    ]
    assert ladder.notes == ("vae_slicing has no effect on batches of 1",)
    assert points("2,4", "64", slicing).notes == ()
    with pytest.raises(ValueError, match="vae_slicing has no effect on batches of 1: --batch-sizes takes one of 2 or"):
        points("1", "64", slicing)


def test_what_is_not_asked_for_are_the_published_points() -> None:
    assert {spec.height for spec in points(sizes="auto").rungs} == {64, 96, 128, 192}
    of_sdxl = points("1,2,4,8,16", "auto", COMPILE, "sdxl", H100)
    assert sorted({spec.height for spec in of_sdxl.rungs}) == [512, 768, 1024, 1536]
    assert len(of_sdxl.rungs) == 20
    assert {option.name: option.default for option in main.commands["sweep"].params}["batch_sizes"] == "1,2,4,8,16"


def test_names_sort_as_the_points_do_however_many_there_are() -> None:
    names = [spec.rung for spec in points(",".join(map(str, range(1, 41))), "64,72,80").rungs]
    assert len(names) == 120
    assert names == sorted(names)
    assert names[7] == "007-64x64-b8"


def test_a_recipe_that_compiles_says_that_the_cache_is_shared() -> None:
    assert "all points share one compile cache" in points(recipe=COMPILE, device=H100, model="sdxl").notes
    assert "all points share one compile cache" not in points().notes


def a_sweep(folder: Path, seconds: dict[str, float | None], memory: bool = False) -> Path:
    """A spooled sweep whose points took these seconds; None ran out of memory."""
    ladder = points()
    made = spool.save_ladder(folder, ladder)
    for spec in ladder.rungs:
        if spec.rung not in seconds:
            continue
        taken = seconds[spec.rung]
        if taken is None:
            keep(made, failure(spec, reason="out_of_memory", message="OutOfMemoryError: 3 GiB more\nand a long story"))
        else:
            limits = {"mfu": 0.25} if memory else {}
            gib = {"peak_rss_gib": 0.5} | ({"peak_reserved_gib": 0.75} if memory else {})
            keep(made, result(spec, taken, memory=gib, limits=limits))
    return made


FOUR = {"00-64x64-b1": 1.0, "01-64x64-b2": 1.6, "02-96x96-b1": 2.0, "03-96x96-b2": None}


def test_the_growth_table_has_rates_and_no_speed_ups(tmp_path: Path) -> None:
    text = report.markdown(report.from_spool(a_sweep(tmp_path, FOUR)), ["a note"])
    assert text.splitlines() == [
        "| size | batch | median s | s an image | images/s | peak GiB | first call s | cache |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| 64×64 | 1 | 1 | 1 | 1 | 0.50 | 9.0 | none |",
        "| 64×64 | 2 | 1.6 | 0.8 | 1.25 | 0.50 | 9.0 | none |",
        "| 96×96 | 1 | 2 | 2 | 0.5 | 0.50 | 9.0 | none |",
        "| 96×96 | 2 | out_of_memory: OutOfMemoryError: 3 GiB more |  |  |  |  |  |",
        "",
        "growth of sdpa (bf16, sdpa): tiny (embedded weights), 2 steps, a processor",
        "",
        "Note: a note.",
    ]


def test_what_is_known_on_a_gpu_alone_and_recompilations_are_columns_where_they_are(tmp_path: Path) -> None:
    folder = a_sweep(tmp_path, {"00-64x64-b1": 1.0, "01-64x64-b2": 1.6}, memory=True)
    header, _, first, *_ = report.markdown(report.from_spool(folder)).splitlines()
    assert "| images/s | peak GiB | reserved GiB | MFU | first call s | cache |" in header
    assert " | 0.75 | 25.0% | " in first
    spec = spool.read_ladder(folder).rungs[2]
    keep(folder, result(spec, surroundings={"recompilations": 2.0}))
    frame = report.from_spool(folder)
    header, _, first, _, last, *_ = report.markdown(frame).splitlines()
    assert header.endswith("| cache | recompilations |")
    assert (first.endswith("|  |"), last.endswith("| 2 |")) == (True, True)
    assert "02-96x96-b1 compiled, or captured a CUDA graph, while it was measured" in report.warnings(frame)


def test_over_rounds_a_point_is_its_rounds_median(tmp_path: Path) -> None:
    ladder = points("1", "64")
    folder = spool.save_ladder(tmp_path, ladder)
    for number, seconds in enumerate((1.0, 4.0, 2.0), 1):
        keep(folder, result(replace(ladder.rungs[0], round=number, planned_rounds=3), seconds))
    lines = report.markdown(report.from_spool(folder)).splitlines()
    assert lines[0].endswith("| cache | rounds |")
    assert lines[2] == "| 64×64 | 1 | 2 | 2 | 0.5 | 0.50 | 9.0 | none | 3 |"


def test_the_plot_has_a_line_a_size_and_names_what_failed(tmp_path: Path) -> None:
    rows = report.records(report.from_spool(a_sweep(tmp_path, FOUR)))
    assert sweep.lines(rows, "images_per_s") == {
        "64×64": ([1, 2], [1.0, 1.25]),
        "96×96, failed: batch 2": ([1], [0.5]),
    }
    assert sweep.lines(rows, "peak_memory_gib")["64×64"] == ([1, 2], [0.5, 0.5])


def test_the_plot_is_two_panels_over_the_logarithm_of_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.append(figure))
    drawn: list[pyplot.Figure] = []
    report.plot(report.from_spool(a_sweep(tmp_path, FOUR)), tmp_path / "plot.png")
    (figure,) = drawn
    rates, memory = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["images a second", "peak memory, GiB"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
        assert len(axes.get_lines()) == 2
    assert list(rates.get_lines()[0].get_xydata().flat) == [1, 1, 2, 1.25]
    assert list(memory.get_lines()[1].get_xydata().flat) == [1, 0.5]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > image.height


def test_a_plot_of_failures_alone_is_there_too(tmp_path: Path) -> None:
    report.plot(report.from_spool(a_sweep(tmp_path, dict.fromkeys(FOUR))), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.fixture
def pretended(store: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """By point the compile cache it was given. Workers finish at once, and hold no more than two images of 64×64."""
    given: dict[str, Path | None] = {}

    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        assert spec.role == "rung"  # nothing is compared, so there is no reference
        given[spec.rung] = shared_cache
        cache = {"cache_state": "shared"} if compiles(spec.optimizations) else {}
        pixels = spec.batch_size * spec.height * spec.width
        outcome = failure(spec, reason="out_of_memory") if pixels > 2 * 64 * 64 else result(spec, pixels / 1e4, **cache)
        keep(folder, outcome)
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    return given


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ("sweep", *arguments), catch_exceptions=False)


def test_a_point_that_runs_out_of_memory_stops_nothing_and_all_is_recorded(
    pretended: dict[str, Path | None], tmp_path: Path
) -> None:
    done = invoke("--recipe", "sdpa", "--steps", "2", "--batch-sizes", "1,2,4", "--sizes", "64")
    assert done.exit_code == 1
    assert "3 of 3 rungs to measure" in done.output
    assert "1 of 3 measurements failed" in done.output
    assert "images/s" in done.output
    assert "speed-up" not in done.output
    frame = load_runs()
    assert frame["status"].tolist() == ["FINISHED", "FINISHED", "FAILED"]
    assert frame["reason"].tolist()[2] == "out_of_memory"
    assert frame["images_per_s"].tolist()[:2] == pytest.approx([1e4 / 4096] * 2)
    assert frame["s_per_image"].tolist()[:2] == pytest.approx([0.4096] * 2)
    assert frame["speedup"].isna().all()
    assert set(frame["ladder"]) == {"sweep"}

    client = tracking.connect(None)
    (parent,) = client.search_runs(["1"], "tags.kind = 'ladder' and tags.ladder = 'sweep'")
    assert "| 64×64 | 2 | 0.8192 |" in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["images_per_s/01-64x64-b2"] == pytest.approx(1e4 / 4096)
    assert not [name for name in parent.data.metrics if "speedup" in name]
    assert "report.png" in {item.path for item in client.list_artifacts(parent.info.run_id)}

    reports = {}
    for name, arguments in {"from-spool": ["spool"], "from-mlflow": []}.items():
        done = CliRunner().invoke(main, ["report", *arguments, "--output", name], catch_exceptions=False)
        assert done.exit_code == 0
        assert "images/s" in done.output
        assert {path.name for path in Path(name).iterdir()} == {"report.csv", "report.md", "report.png"}
        reports[name] = (tmp_path / name / "report.md").read_text()
    assert reports["from-spool"].startswith(reports["from-mlflow"])  # the spool also knows the ladder's notes


def test_resume_measures_what_is_missing_in_whatever_order_it_is_typed(
    pretended: dict[str, Path | None], tmp_path: Path
) -> None:
    invoke("--no-track", "--batch-sizes", "1,2,4", "--sizes", "64")
    done = invoke("--no-track", "--batch-sizes", "4,2,1", "--sizes", "64", "--resume")
    assert (done.exit_code, "1 of 3 rungs to measure" in done.output) == (1, True)
    assert "02-64x64-b4, attempt 2" in done.output
    assert len(spool.find_ladders(tmp_path / "spool")) == 1
    invoke("--no-track", "--batch-sizes", "1,2,4", "--sizes", "64,72", "--resume")  # is another sweep
    assert len(spool.find_ladders(tmp_path / "spool")) == 2


def test_all_points_share_one_compile_cache_that_can_be_another(
    pretended: dict[str, Path | None], tmp_path: Path
) -> None:
    done = invoke("--no-track", "--recipe", "compile", "--batch-sizes", "1,2", "--sizes", "64")
    (folder,) = spool.find_ladders(tmp_path / "spool")
    assert set(pretended.values()) == {Path("spool") / folder.name / ".cache" / "all"}
    assert "all points share one compile cache" in done.output
    invoke("--no-track", "--recipe", "compile", "--batch-sizes", "1,2", "--sizes", "64", "--cache-dir", "mine")
    assert set(pretended.values()) == {Path("mine")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sizes", "100"), "--sizes takes multiples of 8, not 100."),
        (
            ("--model", "flux-schnell", "--weights", "random", "--sizes", "520"),
            "--sizes takes multiples of 16, not 520.",
        ),
        (("--sizes", "64,0"), "--sizes takes whole numbers above 0 with commas between them, not '0'."),
        (("--sizes", "64,64"), "--sizes has 64 twice."),
        (("--sizes", "64,large"), "not 'large'."),
        (("--sizes", "-64"), "not '-64'."),
        (("--sizes", ""), "not ''."),
        (("--batch-sizes", "0"), "--batch-sizes takes whole numbers above 0 with commas between them, not '0'."),
        (("--batch-sizes", "1,2,01"), "--batch-sizes has 1 twice."),
        (("--batch-sizes", "1,,2"), "not ''."),
        (("--batch-sizes", "1.5"), "not '1.5'."),
        (("--batch-size", "2"), "No such option '--batch-size'"),
        (("--recipe", "sdpaa"), "nearest are sdpa"),
        (("--steps", "0"), "steps must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    pretended: dict[str, Path | None], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert says in done.output
    assert pretended == {}
    assert not (tmp_path / "spool").exists()


def test_points_of_different_versions_are_not_compared(pretended: dict[str, Path | None], tmp_path: Path) -> None:
    folder = a_sweep(tmp_path, {"00-64x64-b1": 1.0})
    keep(folder, result(spool.read_ladder(folder).rungs[1], environment={"cpu": "a processor", "torch": "2.11.0"}))
    told = "01-64x64-b2 was measured with torch 2.11.0 and 00-64x64-b1 with torch 2.13.0"
    assert f"not to be compared: {told}" in report.warnings(report.from_spool(folder))
    for more, code in ((), 2), (("--across",), 0):
        done = CliRunner().invoke(main, ["report", str(folder), *more], catch_exceptions=False)
        assert (done.exit_code, told in done.output) == (code, True)


def test_a_sweep_has_no_noise_floor_of_another_shape(tmp_path: Path) -> None:
    folder = a_sweep(tmp_path, FOUR)
    (made,) = points("1", "64").rungs
    aa = pd.DataFrame(
        report.rows.row(result(replace(made, rung=rung, round=number)), result(made))
        for rung in ("00-a", "01-b")
        for number in (1, 2)
    )
    assert report.noise_floor(report.from_spool(folder), [aa]) == ""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sweep")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        environment.pop(name, None)
    command = ("sweep", "--recipe", "sdpa", "--steps", "2", "--batch-sizes", "1,2", "--sizes", "64,96")
    done = subprocess.run(
        (sys.executable, "-m", "diffusion_fast", *command, "--tracking-uri", uri, "--experiment", "sweeps"),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, uri


@pytest.mark.full
def test_every_point_was_measured(measured: tuple[Path, str]) -> None:
    folder, uri = measured
    frame = load_runs("sweeps", tracking_uri=uri)
    assert frame["rung"].tolist() == ["00-64x64-b1", "01-64x64-b2", "02-96x96-b1", "03-96x96-b2"]
    assert set(frame["status"]) == {"FINISHED"}
    assert frame["problem"].tolist() == [""] * 4
    assert (frame["images_per_s"] * frame["latency_median_s"]).tolist() == pytest.approx([1, 2, 1, 2])
    assert frame["recompilations"].tolist() == [0] * 4
    # Nothing is compared; but operations are counted, and a second image takes as many as the first but for its prompt.
    assert frame[["psnr_db", "ssim", "one_step_error_max", "speedup", "prompt_count"]].isna().all(axis=None)
    assert (frame["mfu"] > 0).all()
    small, two_small, large, two_large = frame["tflop"]
    assert small < large
    assert 1.5 * small < two_small < 2 * small
    assert 1.5 * large < two_large < 2 * large
    (ladder,) = spool.find_ladders(folder / "spool")
    assert not (ladder / "reference").exists()
    sizes = [Image.open(path).size for path in sorted(ladder.glob("*/r1-a1/image.png"))]
    assert sizes == [(64, 64), (64, 64), (96, 96), (96, 96)]
