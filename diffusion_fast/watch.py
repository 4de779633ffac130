"""What else went on while something was measured: in the machine and in the compiler, read before and after."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import psutil

from diffusion_fast.measure import NVML_TROUBLE, nvml_handle

# NVML's fields that count the nanoseconds in which the GPU would have run faster, had it been let.
HELD_BACK = {74: "power cap", 269: "thermal slowdown", 270: "hardware thermal slowdown", 271: "power brake"}
HELD_BACK_SHARE = 0.01  # of the time: less is no word's worth


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
        both = self.before.keys() & self.after.keys()
        for name in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w"):
            if name in both:
                found |= {f"{name}_before": self.before[name], name: self.after[name]}
        if "gpu_processes" in both:
            found["gpu_processes"] = max(self.before["gpu_processes"], self.after["gpu_processes"])
        if "energy_j" in both:
            joules = self.after["energy_j"] - self.before["energy_j"]
            found |= {"energy_per_image_j": joules / images, "mean_power_w": joules / spent["wall_s"]}
        held = {
            reason: (self.after[reason] - self.before[reason]) / 1e9 / spent["wall_s"]
            for reason in HELD_BACK.values()
            if reason in both
        }
        found |= {f"held_back_by_{reason.replace(' ', '_')}": share for reason, share in held.items() if share > 0}
        named = ", ".join(reason for reason, share in held.items() if share > HELD_BACK_SHARE)
        return found | ({"held_back": named} if named else {})


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
    except NVML_TROUBLE:
        return {}
    questions: dict[str, Callable[[], float]] = {
        "sm_clock_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        "temperature_c": lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        "gpu_processes": lambda: float(len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }
    found: dict[str, Any] = {}
    for name, ask in questions.items():
        try:
            found[name] = ask()
        except NVML_TROUBLE:
            continue
    with suppress(*NVML_TROUBLE):
        for field in pynvml.nvmlDeviceGetFieldValues(handle, list(HELD_BACK)):
            if field.nvmlReturn == pynvml.NVML_SUCCESS:
                found[HELD_BACK[field.fieldId]] = float(field.value.ullVal)
    return found
