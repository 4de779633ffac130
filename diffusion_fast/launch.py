"""Start a worker, wait for it, and say what came of it: a result, or a failure with its reason."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from diffusion_fast import spool
from diffusion_fast.spec import REFERENCE, Failure, Outcome, RunSpec


def launch(spec: RunSpec, ladder_folder: Path, timeout_s: float, shared_cache: Path | None = None) -> Outcome | None:
    """Run one worker to its end. None: a reference was made, which has no outcome but its file.

    Compile caches are the rung's own, kept for later attempts, unless `shared_cache` is given.
    """
    folder = spool.run_folder(ladder_folder, spec)
    folder.mkdir(parents=True, exist_ok=spec.role == REFERENCE)  # only a reference is tried again in the same folder
    (folder / spool.FAILURE).unlink(missing_ok=True)
    spool.write_json(folder / spool.SPEC, spec.to_dict())
    cache = (shared_cache or spool.cache_folder(ladder_folder, spec)).resolve()
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "DIFFUSION_FAST_SHARED_CACHE": "1" if shared_cache else "",
        **_ptxas(),
    }
    start = time.monotonic()
    with (folder / spool.LOG).open("w") as log:
        # A session of its own, so that killing it takes the compiler's processes along. A crash leaves its stack.
        process = subprocess.Popen(
            (sys.executable, "-X", "faulthandler", "-m", "diffusion_fast.worker", str(folder)),
            stdin=subprocess.DEVNULL,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):  # a worker that crashed may have left its compiler's processes
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    outcome = spool.read_outcome(folder)
    if outcome is not None or (spec.role == REFERENCE and spool.has_reference(ladder_folder)):
        return outcome
    failure = Failure(
        spec=spec,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        reason="timeout" if timed_out else "killed",
        message=f"not done after {timeout_s:g} s" if timed_out else _death(process.returncode),
        stage=_last_stage(folder),
        elapsed_s=time.monotonic() - start,
    )
    spool.write_json(folder / spool.FAILURE, failure.to_dict())
    return failure


def _ptxas() -> dict[str, str]:
    """One assembler for Inductor's compile workers and the process that benchmarks what they compiled.

    torch's workers use torch's own ptxas and the parent uses Triton's. Triton's cache keys hold the version: where the
    two differ (torch 2.11 and Triton 3.6 on CUDA 13), no kernel that a worker compiled is ever found, and max-autotune
    compiles every choice again, one by one. See docs/experiments.md.
    """
    torch = importlib.util.find_spec("torch")
    found = Path(torch.origin or "").parent / "bin" / "ptxas" if torch else Path()
    if "TRITON_PTXAS_PATH" in os.environ or not found.is_file():
        return {}
    return {"TRITON_PTXAS_PATH": str(found)}


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by SIGKILL: by a person, or by the kernel because memory ran out"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"the worker left with exit code {code} and no result"


def _last_stage(folder: Path) -> str:
    progress = folder / spool.PROGRESS
    lines = progress.read_text().splitlines() if progress.is_file() else []
    return lines[-1].partition(" s  ")[2] if lines else "starting"
