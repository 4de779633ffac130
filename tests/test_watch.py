"""What else went on: other processes, compilers, and a GPU that this machine need not have."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from diffusion_fast import measure
from diffusion_fast import watch as watching
from diffusion_fast.watch import Watch

CORES = psutil.cpu_count() or 1
SPIN = "import time; end = time.monotonic() + 30\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> None:
    """For so long by this process's own clock: on a busy machine a second of the wall's may be a fifth of one."""
    end = time.process_time() + seconds
    while time.process_time() < end:
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
    assert 0.9 < own < 1.2


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
    states = iter([(1000.0, 3.0, 5e9, 0), (1600.0, 1.0, 45e9, 1000)])

    def gpu() -> dict[str, Any]:
        energy_j, processes, capped_ns, hot_ns = next(states)
        state = {"sm_clock_mhz": 1980.0, "energy_j": energy_j, "gpu_processes": processes}
        return state | {"power cap": capped_ns, "thermal slowdown": hot_ns}

    seconds = iter([0.0, 100.0])
    monkeypatch.setattr(watching.time, "monotonic", lambda: next(seconds))

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
    assert (found["sm_clock_mhz_before"], found["sm_clock_mhz"], found["gpu_processes"]) == (1980, 1980, 3)
    assert found["mean_power_w"] == pytest.approx(6)
    assert found["held_back_by_power_cap"] == pytest.approx(0.4)
    assert found["held_back_by_thermal_slowdown"] == pytest.approx(1e-8)
    assert found["held_back"] == "power cap"  # a microsecond is nothing to speak of


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


def test_graph_breaks_are_counted() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(broken, backend="eager")(torch.ones(2))
    with Watch("cpu") as watch:
        pass
    assert watch.account(1)["graph_breaks"] == 1
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("held", "gib"),
    [({1: 2, "own": 3}, 3.0), ({1: 2}, 2.0), ({1: 1}, None), ({1: 2, 4: 5}, None), ({1: None}, None), ({}, None)],
)
def test_what_the_process_holds_is_its_own_or_that_of_the_only_one(
    monkeypatch: pytest.MonkeyPatch, held: dict[Any, int | None], gib: float | None
) -> None:
    import pynvml

    found = [
        SimpleNamespace(pid=os.getpid() if pid == "own" else -pid, usedGpuMemory=each and each * measure.GIB)
        for pid, each in held.items()
    ]
    monkeypatch.setattr(measure, "nvml_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * measure.GIB)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: found)
    assert measure._process_on_gpu() == ({} if gib is None else {"process_gib": gib})


def test_a_counter_of_nvml_that_answers_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fields(_: Any, wanted: list[int]) -> list[SimpleNamespace]:
        values = [SimpleNamespace(ullVal=number) for number in wanted]
        codes = [pynvml.NVML_SUCCESS, *[pynvml.NVML_ERROR_NOT_SUPPORTED] * (len(wanted) - 1)]
        return [
            SimpleNamespace(fieldId=number, nvmlReturn=code, value=value)
            for number, code, value in zip(wanted, codes, values, strict=True)
        ]

    def silent(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(watching, "nvml_handle", lambda: None)
    for name in dir(pynvml):
        if name.startswith("nvmlDeviceGet"):
            monkeypatch.setattr(pynvml, name, silent)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetFieldValues", fields)
    assert watching._gpu() == {"power cap": 74.0}
    assert pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP == 74
