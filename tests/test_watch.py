"""What else went on: other processes, compilers, and a GPU that this machine need not have."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from diffusion_fast import watch as watching
from diffusion_fast.watch import Watch

CORES = psutil.cpu_count() or 1
SPIN = "import time; end = time.monotonic() + 30\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_others_did_is_told_from_what_was_done_here() -> None:
    other = subprocess.Popen((sys.executable, "-c", SPIN))
    try:
        with Watch("cpu") as beside:
            spin(1.0)
    finally:
        other.kill()
        other.wait()
    # Two that spin on one core get half of it each; on several, one each.
    assert beside.account(1)["others_cpu_share"] > 0.4 / CORES
    own = beside.after["own_s"] - beside.before["own_s"]
    assert 0.3 < own < 1.2


def test_a_recompilation_is_counted() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    with Watch("cpu") as quiet:
        compiled(torch.ones(2))
    with Watch("cpu") as busy:
        compiled(torch.ones(3))
    assert [each.account(1)["recompilations"] for each in (quiet, busy)] == [0, 1]
    torch._dynamo.reset()


def test_a_gpus_state_energy_and_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([(1000.0, 0x01), (1600.0, 0x24)])

    def gpu() -> dict[str, Any]:
        energy_j, reasons = next(states)
        return {"sm_clock_mhz": 1980.0, "energy_j": energy_j, "reasons": reasons, "gpu_processes": 2.0}

    class Graph:
        def capture_begin(self, pool: int) -> int:
            return pool

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(watching, "_gpu", gpu)
    watch = Watch("cuda")
    assert Graph().capture_begin(7) == 7
    with watch:
        Graph().capture_begin(pool=8)
        Graph().capture_begin(9)
    found = watch.account(images=20)
    assert (found["cuda_graphs"], found["cuda_graph_captures"]) == (1, 2)
    assert found["energy_per_image_j"] == pytest.approx(30)
    assert (found["sm_clock_mhz_before"], found["sm_clock_mhz"], found["gpu_processes"]) == (1980, 1980, 2)
    assert found["held_back"] == "power cap, thermal slowdown"


def test_what_nvml_does_not_say_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def silent(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(pynvml, "nvmlInit", silent)
    assert watching._gpu() == {}
    answers = ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetClockInfo")
    for name in answers:
        monkeypatch.setattr(pynvml, name, lambda *_: 1500)
    for name in dir(pynvml):
        if name.startswith("nvmlDeviceGet") and name not in answers:
            monkeypatch.setattr(pynvml, name, silent)
    assert watching._gpu() == {"sm_clock_mhz": 1500.0, "memory_clock_mhz": 1500.0}
