"""What else went on while something was measured: in the machine and in the compiler, read before and after."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Self

import psutil

from diffusion_fast.measure import nvml_handle

# NVML's clock event reasons that mean the GPU would have run faster, had it been let.
HELD_BACK = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Watch:
    """Around a measurement: `with watch: …`, then `watch.account(images)`. CUDA graphs count from its making on."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.captures = 0
        if device == "cuda":
            import torch

            capture_begin = torch.cuda.CUDAGraph.capture_begin

            def counted(graph: Any, *args: Any, **kwargs: Any) -> Any:
                self.captures += 1
                return capture_begin(graph, *args, **kwargs)

            torch.cuda.CUDAGraph.capture_begin = counted  # type: ignore[assignment, method-assign]

    def __enter__(self) -> Self:
        self.before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self.after = self._read()

    def _read(self) -> dict[str, Any]:
        cpu = psutil.cpu_times()
        return {
            "wall_s": time.monotonic(),
            "busy_s": sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0) - getattr(cpu, "guest", 0.0),
            "own_s": sum(os.times()[:2]),
            "graphs": _dynamo("stats", "unique_graphs"),
            "graph_breaks": _dynamo("graph_break"),
            "captures": self.captures,
            "load_average": os.getloadavg()[0],
            **(_gpu() if self.device == "cuda" else {}),
        }

    def account(self, images: int) -> dict[str, float | str]:
        """What is worth knowing, flat: shares of all cores, graphs, the GPU's state, joules of each of `images`."""
        spent = {
            name: self.after[name] - self.before[name] for name in ("wall_s", "busy_s", "own_s", "graphs", "captures")
        }
        available_s = spent["wall_s"] * (psutil.cpu_count() or 1)
        found: dict[str, float | str] = {
            "others_cpu_share": max(0.0, (spent["busy_s"] - spent["own_s"]) / available_s),
            "load_average": self.before["load_average"],
            "graph_breaks": float(self.after["graph_breaks"]),
            "recompilations": float(spent["graphs"]),
            "cuda_graphs": float(self.before["captures"]),
            "cuda_graph_captures": float(spent["captures"]),
        }
        for name in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "gpu_processes"):
            if name in self.before and name in self.after:
                found |= {f"{name}_before": self.before[name], name: self.after[name]}
        if "energy_j" in self.before and "energy_j" in self.after:
            found["energy_per_image_j"] = (self.after["energy_j"] - self.before["energy_j"]) / images
        reasons = int(self.before.get("reasons", 0)) | int(self.after.get("reasons", 0))
        held = ", ".join(text for bit, text in HELD_BACK.items() if reasons & bit)
        return found | ({"held_back": held} if held else {})


def _dynamo(group: str, name: str = "") -> int:
    """One of Dynamo's counters in this process, or the sum of a group of them."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0
    counters = dynamo.counters[group]
    return int(counters[name] if name else sum(counters.values()))


def _gpu() -> dict[str, Any]:
    """The GPU's state as NVML says it; what it doesn't say on this machine isn't there."""
    import pynvml

    try:
        handle = nvml_handle()
    except pynvml.NVMLError:
        return {}
    questions: dict[str, Callable[[], float]] = {
        "sm_clock_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        "temperature_c": lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        "reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        "gpu_processes": lambda: float(len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }
    found: dict[str, Any] = {}
    for name, ask in questions.items():
        try:
            found[name] = ask()
        except pynvml.NVMLError:
            continue
    return found
