"""A worker's end is always an outcome, whatever the end was."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from diffusion_fast import launch, spool
from diffusion_fast.spec import Failure, RunSpec
from tests.conftest import planned


def prepared(tmp_path: Path, **changes: object) -> tuple[Path, RunSpec]:
    ladder = planned(steps=1)
    return spool.save_ladder(tmp_path, ladder), replace(ladder.rungs[0], **changes)  # type: ignore[arg-type]


def impostor(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in the interpreter's place; its last argument is the run folder."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nfor folder; do :; done\nprintf "     0.1 s  loading\\n" > "$folder/progress.txt"\n{script}\n'
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_killed_worker_is_a_failure_with_the_stage_it_had_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec = prepared(tmp_path)
    impostor(tmp_path, "kill -KILL $$", monkeypatch)
    outcome = launch.launch(spec, folder, timeout_s=60)
    assert isinstance(outcome, Failure)
    assert (outcome.reason, outcome.stage) == ("killed", "loading")
    assert "SIGKILL" in outcome.message
    assert spool.read_outcome(spool.run_folder(folder, spec)) == outcome


def test_a_worker_that_takes_too_long_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec = prepared(tmp_path)
    child = tmp_path / "child"
    impostor(tmp_path, f"sleep 60 & echo $! > {child}\nwait", monkeypatch)
    outcome = launch.launch(spec, folder, timeout_s=1)
    assert isinstance(outcome, Failure)
    assert (outcome.reason, outcome.message) == ("timeout", "not done after 1 s")
    with suppress(psutil.NoSuchProcess):
        process, until = psutil.Process(int(child.read_text())), time.monotonic() + 5  # ends late on a busy machine
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_parent_ends_the_worker(tmp_path: Path, number: signal.Signals) -> None:
    """`timeout` and schedulers end it with SIGTERM, and with SIGKILL in the end."""
    command = (sys.executable, "-m", "diffusion_fast", "run", "--no-track", "--spool", str(tmp_path / "spool"))
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    while "importing" not in parent.stdout.readline():
        assert parent.poll() is None
    workers = psutil.Process(parent.pid).children()
    assert workers
    parent.send_signal(number)
    _, left = psutil.wait_procs(workers, timeout=2)  # it has hardly begun to import
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in left)  # in a container that has no init
    _, said = parent.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert parent.returncode == 130
        assert "--resume goes on" in said


def test_a_worker_that_leaves_without_a_word_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, spec = prepared(tmp_path)
    impostor(tmp_path, "exit 3", monkeypatch)
    outcome = launch.launch(spec, folder, timeout_s=60)
    assert isinstance(outcome, Failure)
    assert "exit code 3" in outcome.message


def test_an_exception_in_the_worker_is_a_failure_with_its_traceback_and_log(tmp_path: Path) -> None:
    folder, spec = prepared(tmp_path, weights=str(tmp_path / "nothing"))
    outcome = launch.launch(spec, folder, timeout_s=300)
    assert isinstance(outcome, Failure)
    assert (outcome.reason, outcome.stage) == ("exception", "loading")
    assert "nothing" in outcome.message
    assert "Traceback" in outcome.traceback
    assert "Traceback" in (spool.run_folder(folder, spec) / spool.LOG).read_text()
    assert outcome.environment["torch"]


def test_a_crash_in_a_library_leaves_where_it_was_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, spec = prepared(tmp_path)
    crash = 'exec {} "$1" "$2" -c "import os; os.kill(os.getpid(), 11)"'
    impostor(tmp_path, crash.format(sys.executable), monkeypatch)
    outcome = launch.launch(spec, folder, timeout_s=60)
    assert isinstance(outcome, Failure)
    assert "SIGSEGV" in outcome.message
    log = (spool.run_folder(folder, spec) / spool.LOG).read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert 'File "<string>", line 1' in log


def test_running_out_of_memory_is_its_own_reason() -> None:
    import torch

    from diffusion_fast import worker

    assert worker._reason(torch.OutOfMemoryError("CUDA out of memory")) == "out_of_memory"
    assert worker._reason(MemoryError()) == "out_of_memory"
    assert worker._reason(RuntimeError("memory")) == "exception"
    assert worker._reason(worker.BrokenImageError("black")) == "broken_image"


def test_caches_are_a_rungs_own_unless_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, spec = prepared(tmp_path)
    seen = tmp_path / "seen"
    impostor(
        tmp_path, f"echo $TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR $DIFFUSION_FAST_SHARED_CACHE >> {seen}", monkeypatch
    )
    launch.launch(spec, folder, timeout_s=60)
    launch.launch(replace(spec, attempt=2), folder, timeout_s=60, shared_cache=tmp_path / "all")
    own = folder / ".cache" / "00-baseline"
    assert seen.read_text().splitlines() == [
        f"{own}/inductor {own}/triton",
        f"{tmp_path}/all/inductor {tmp_path}/all/triton 1",
    ]


def test_inductors_workers_and_its_parent_assemble_with_the_same_ptxas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torch"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    assert launch._ptxas() == {}
    (package / "bin" / "ptxas").touch()
    assert launch._ptxas() == {"TRITON_PTXAS_PATH": str(package / "bin" / "ptxas")}
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/mine")
    assert launch._ptxas() == {}
