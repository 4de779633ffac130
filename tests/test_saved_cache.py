"""What a rung compiled, as a file: what it holds, what it fits, and what becomes of one that is damaged."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from diffusion_fast import ladder as climbing
from diffusion_fast import load_runs, plan, saved_cache, spool, tracking
from diffusion_fast.cli import main
from diffusion_fast.spec import Ladder, Outcome, Recipe, RunSpec
from diffusion_fast.spec import Result as Measured
from tests.conftest import CPU, H100, keep, result

FILES = {
    "inductor/ab/cab.main.so": b"\x7fELF" * 50,
    "inductor/cd/xy.best_config": b"{}",
    "triton/K/k.cubin": b"\0" * 99,
}
OURS = ("CPU", "instruction set", "cores", "architecture", "Python", *saved_cache.LIBRARIES, "flags", "model")
OURS += ("optimizations", "compile mode", "height", "width", "batch size")


def compiled(device: plan.Device = CPU) -> Ladder:
    """A ladder of one rung that compiles."""
    recipe = Recipe("mine", ("bf16", "sdpa", "compile"))
    return plan.plan_ladder("run", (recipe,), plan.find_model("tiny"), device, plan.Settings())


def fill(cache: Path) -> Path:
    """A rung's compile caches, as a compiler leaves them."""
    for name, content in FILES.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)
    (cache / "inductor" / "locks").mkdir(exist_ok=True)
    (cache / "inductor" / "locks" / "cab.lock").touch()
    group = {"child_paths": {"k.cubin": str(cache / "triton" / "K" / "k.cubin")}}
    (cache / "triton" / "K" / "__grp__k.json").write_text(json.dumps(group))
    return cache


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("__grp__")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A saved cache of `compiled()`."""
    made = tmp_path / "made" / spool.COMPILE_CACHE
    saved_cache.save(compiled().rungs[0], fill(tmp_path / "made" / "cache"), made)
    return made


def told_otherwise(file: Path, name: str) -> Any:
    """Have the file say something else of one fact, and return what it said."""
    with zipfile.ZipFile(file) as packed:
        members = {each: packed.read(each) for each in packed.namelist()}
    manifest = json.loads(members[saved_cache.MANIFEST])
    old = manifest["fits"][name]
    manifest["fits"][name] = [*old, "other"] if isinstance(old, list) else "other"
    with zipfile.ZipFile(file, "w") as packed:
        for each, data in (members | {saved_cache.MANIFEST: json.dumps(manifest).encode()}).items():
            packed.writestr(each, data)
    return old


def test_a_saved_cache_comes_back_somewhere_else_with_tritons_paths(file: Path, tmp_path: Path) -> None:
    ladder = compiled()
    (spec,) = saved_cache.start_from(file, ladder).rungs
    with zipfile.ZipFile(file) as packed:
        assert spec.saved_cache == json.loads(packed.read(saved_cache.MANIFEST))["measurement_id"]
    assert spec.conditions == ladder.rungs[0].conditions  # its latencies are like any other's
    cache = tmp_path / "elsewhere" / "deeper" / "cache"
    saved_cache.unpack(file, cache)
    assert content(cache) == FILES
    group = spool.read_json(cache / "triton" / "K" / "__grp__k.json")
    assert group == {"child_paths": {"k.cubin": str(cache / "triton" / "K" / "k.cubin")}}
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]


def test_a_cache_that_is_there_is_left_alone(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    saved_cache.unpack(file, tmp_path / "cache")
    assert content(tmp_path / "cache") == {}


def test_nothing_is_written_outside_the_cache(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file, "a") as packed:
        packed.writestr("../../outside.so", "")
        packed.writestr("/outside/too", "")
    cache = tmp_path / "a" / "b" / "cache"
    saved_cache.unpack(file, cache)
    assert set(content(cache)) == {*FILES, "outside.so", "outside/too"}
    assert {path.name for path in tmp_path.iterdir()} == {"made", "a"}
    assert [path.name for path in (tmp_path / "a").rglob("outside.so")] == ["outside.so"]
    assert not Path("/outside").exists()


def test_a_rung_that_left_nothing_is_an_empty_cache(tmp_path: Path) -> None:
    saved_cache.save(compiled().rungs[0], tmp_path / "nothing", tmp_path / "file.zip")
    saved_cache.start_from(tmp_path / "file.zip", compiled())
    saved_cache.unpack(tmp_path / "file.zip", tmp_path / "ladder" / "cache")
    assert list((tmp_path / "ladder" / "cache").iterdir()) == []


def test_all_that_is_compared_is_known(file: Path) -> None:
    assert tuple(saved_cache.facts(compiled().rungs[0])) == OURS
    facts = saved_cache.facts(compiled().rungs[0])
    assert facts["torch"] == __import__("torch").__version__
    assert facts["Python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert facts["instruction set"]


@pytest.mark.parametrize("name", OURS)
def test_what_differs_is_refused_by_its_name(file: Path, name: str) -> None:
    old = told_otherwise(file, name)
    here = "none" if isinstance(old, list) else old
    with pytest.raises(ValueError, match="doesn't fit") as refused:
        saved_cache.start_from(file, compiled())
    assert str(refused.value).endswith(f"it was made with {name} other (here {here}).")


@pytest.mark.parametrize("name", ["GPU", "compute capability", "CUDA"])
def test_another_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(plan, "find_device", lambda kind: H100)
    ladder, file = compiled(H100), tmp_path / "file.zip"
    saved_cache.save(ladder.rungs[0], fill(tmp_path / "cache"), file)
    assert saved_cache.start_from(file, ladder).rungs[0].saved_cache
    old = told_otherwise(file, name)
    with pytest.raises(ValueError, match=rf"made with {name} other \(here {old}\)\.$"):
        saved_cache.start_from(file, ladder)


def test_a_gpus_cache_is_refused_on_a_cpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_device", lambda kind: H100)
    with pytest.raises(ValueError, match=r"CPU .* \(here none\)") as refused:
        saved_cache.start_from(file, compiled(H100))
    assert "GPU none (here NVIDIA H100)" in str(refused.value)


def test_cuda_is_told_by_torchs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_cache._cuda_version() == (__import__("torch").version.cuda or "none")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("debug = False\ncuda: Optional[str] = '13.0'\nhip = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    assert saved_cache._cuda_version() == "13.0"


def test_a_file_that_is_not_what_was_saved_is_refused(file: Path) -> None:
    with zipfile.ZipFile(file) as packed:
        members = {each: packed.read(each) for each in packed.namelist()}
    name = "inductor/ab/cab.main.so"
    for changed in (members | {name: b"other"}, members | {"inductor/more.so": b""}, members.keys() - {name}):
        with zipfile.ZipFile(file, "w") as packed:
            for each in changed:
                packed.writestr(each, changed[each] if isinstance(changed, dict) else members[each])
        with pytest.raises(ValueError, match=r"damaged: inductor/\S+\.so is not what its checksum says"):
            saved_cache.start_from(file, compiled())


@pytest.mark.parametrize("harm", ["cut short", "no zip", "empty", "no manifest", "no facts"])
def test_a_file_that_is_no_cache_is_refused(file: Path, harm: str) -> None:
    whole = file.read_bytes()
    if harm in ("cut short", "no zip", "empty"):
        file.write_bytes({"cut short": whole[:-40], "no zip": b"PK" + whole[2:40], "empty": b""}[harm])
    else:
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("other.json" if harm == "no manifest" else saved_cache.MANIFEST, "[]")
    with pytest.raises(ValueError, match=r"compile-cache\.zip is no compile cache, or is damaged: "):
        saved_cache.start_from(file, compiled())


def test_wherever_a_bit_is_wrong_it_is_refused_or_has_no_meaning(file: Path, tmp_path: Path) -> None:
    whole, refused = file.read_bytes(), 0
    ladder = compiled()
    for position in range(0, len(whole), 3):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            saved_cache.start_from(file, ladder)
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
            continue
        cache = tmp_path / str(position)
        saved_cache.unpack(file, cache)
        assert content(cache) == FILES, position
    assert refused > len(whole) / 6


@pytest.fixture
def pretended(store: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, dict[str, bytes]]]:
    """Workers that finish at once and compile what a worker would; what each found in its cache before that."""
    found: list[tuple[str, int, dict[str, bytes]]] = []

    def launch(spec: RunSpec, folder: Path, timeout_s: float, shared_cache: Path | None) -> Outcome | None:
        if spec.role == "reference":
            return None
        cache = spool.cache_folder(folder, spec)
        found.append((spec.rung, spec.round, content(cache)))
        if climbing.compiles(spec.optimizations):
            fill(cache)
        outcome = result(spec)
        keep(folder, outcome)
        return outcome

    monkeypatch.setattr(climbing, "launch", launch)
    return found


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


RUN = ("run", "--device", "cpu", "--with", "bf16,sdpa,compile")


def test_a_cache_goes_to_mlflow_with_its_run_and_comes_back(pretended: Any, tmp_path: Path) -> None:
    done = invoke("ladder", "--device", "cpu", "--ladder", "cpu", "--save-cache", "--rounds", "2")
    assert done.exit_code == 0
    assert done.output.count("  compile cache: spool/") == 2  # of two rungs that compile, and of one round
    frame = load_runs()
    has = [
        spool.COMPILE_CACHE in {each.path for each in tracking.connect(None).list_artifacts(run_id)}
        for run_id in frame["run_id"]
    ]
    assert list(zip(frame["rung"].str[:2], frame["round"], has, strict=True)) == [
        *[("00", 1, False), ("00", 2, False)],
        *[("01", 1, True), ("01", 2, False)],
        *[("02", 1, True), ("02", 2, False)],
    ]
    for run_id, says in ((frame["run_id"][0], "has no compile-cache.zip."), ("0" * 32, "There is no run 000")):
        refused = invoke(*RUN, "--load-cache", run_id, "--spool", "refused")
        assert (refused.exit_code, says in refused.output) == (2, True), refused.output
        assert not Path("refused").exists()
    pretended.clear()
    run_id, source = frame[["run_id", "measurement_id"]].iloc[2]
    again = invoke("run", "--device", "cpu", "--ladder", "cpu", "--recipe", "compile", "--load-cache", run_id)
    assert again.exit_code == 0, again.output
    assert pretended == [("00-compile", 1, FILES)]
    assert load_runs()["saved_cache"].tolist() == [*[""] * 6, source]


def test_a_folder_in_a_spool_will_do_without_mlflow(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke(*RUN, "--no-track", "--save-cache", "true", "--spool", "first")
    (folder,) = Path("first").glob("*/*/r1-a1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    pretended.clear()
    load = (*RUN, "--no-track", "--load-cache", str(folder), "--spool", "second")
    assert invoke(*load, "--rounds", "2").exit_code == 0
    left = FILES | {"inductor/locks/cab.lock": b""}
    assert pretended == [("00-bf16-sdpa-compile", 1, FILES), ("00-bf16-sdpa-compile", 2, left)]
    assert "0 of 1 rungs to measure" in invoke(*load, "--resume").output
    other = invoke(*RUN, "--no-track", "--spool", "second", "--resume")
    assert "1 of 1 rungs to measure" in other.output  # started from nothing it is another measurement


def test_where_nothing_compiles_that_is_said_once(pretended: Any) -> None:
    done = invoke("ladder", "--device", "cpu", "--only", "baseline,bf16", "--save-cache", "--no-track")
    assert done.exit_code == 0
    assert done.output.count("--save-cache saves nothing") == 1
    assert not list(Path("spool").rglob(spool.COMPILE_CACHE))
    assert "saves nothing" not in invoke(*RUN, "--save-cache", "--no-track").output


def test_a_full_disk_costs_the_cache_alone(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    done = invoke(*RUN, "--save-cache", "--no-track")
    assert done.exit_code == 0
    (folder,) = spool.find_ladders(Path("spool"))
    ((run_folder, outcome),) = spool.outcomes(folder)
    assert isinstance(outcome, Measured)
    assert outcome.problem == "its compile cache is not saved: [Errno 28] No space left on device"
    assert not list(run_folder.glob("*compile-cache*"))


REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((*RUN, "--load-cache", "."), "--load-cache: . is no MLflow run id, and no folder with a compile-cache.zip."),
    ((*RUN, "--load-cache", "nowhere/at/all"), "is no MLflow run id, and no folder with a compile-cache.zip"),
    (("run", "--device", "cpu", "--with", "bf16", "--load-cache", "SAVED"), "--load-cache: bf16 compiles nothing."),
    ((*RUN, "--load-cache", "SAVED", "--batch-size", "2"), "made with batch size 1 (here 2)."),
    ((*RUN, "--load-cache", "SAVED", "--cache-dir", "all"), "--cache-dir is one compile cache for all"),
    ((*RUN, "--save-cache", "--cache-dir", "all"), "--cache-dir is one compile cache for all"),
    (("ladder", "--load-cache", "SAVED"), "No such option"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_a_cache_that_can_not_be_had_is_one_sentence_and_exit_code_2(
    pretended: Any, file: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = invoke(*(str(file.parent) if word == "SAVED" else word for word in arguments))
    assert (done.exit_code, says in done.output) == (2, True), done.output
    assert not Path("spool").exists()


def test_without_mlflow_a_run_id_is_refused_with_a_way_out(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = invoke(*RUN, "--no-track", "--load-cache", "0" * 32)
    assert (done.exit_code, "give --load-cache the folder of a run" in done.output) == (2, True)


def test_an_unreachable_server_is_exit_code_1(pretended: Any) -> None:
    done = invoke(*RUN, "--load-cache", "0" * 32, "--tracking-uri", "http://127.0.0.1:9")
    assert (done.exit_code, "MLflow could not be read" in done.output) == (1, True)
