"""Time and memory of a callable. Nothing here knows what a pipeline is."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pynvml

MIN_CALLS = 10
MIN_CALLS_IN_ROUNDS = 5  # where at least MANY_ROUNDS are planned: processes differ by more than their calls do
MANY_ROUNDS = 3
MIN_SECONDS = 3.0
MAX_WARMUP = 5
AGREEMENT = 0.05  # two warm-up calls that differ by less are a steady state
GIB = 1024**3
# No answer; a driver and a library of different versions; a question that this version of pynvml doesn't know.
NVML_TROUBLE = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, AttributeError)


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of one call and what it returned. On a GPU by CUDA events around it, waited for at the end."""
    if device == "cpu":
        start = time.perf_counter()
        value = function()
        return time.perf_counter() - start, value
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    value = function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000, value


def warm_up(function: Callable[[], Any], device: str) -> tuple[list[float], bool]:
    """Call until two calls in a row agree within 5%, at most 5 times. Returns their seconds and whether they agreed."""
    seconds: list[float] = []
    while len(seconds) < MAX_WARMUP:
        seconds.append(timed(function, device)[0])
        if len(seconds) > 1 and abs(seconds[-1] - seconds[-2]) <= AGREEMENT * seconds[-2]:
            return seconds, True
    return seconds, False


def samples(function: Callable[[], Any], device: str, rounds: int = 1) -> tuple[list[float], list[Any]]:
    """Seconds and values of at least 10 calls, 5 in each of three `rounds` or more, and of at least 3 seconds."""
    least = MIN_CALLS if rounds < MANY_ROUNDS else MIN_CALLS_IN_ROUNDS
    seconds: list[float] = []
    values: list[Any] = []
    while len(seconds) < least or sum(seconds) < MIN_SECONDS:
        second, value = timed(function, device)
        seconds.append(second)
        values.append(value)
    return seconds, values


def release_memory(device: str) -> None:
    """Give back what the allocator holds without using it: reserved memory counts from here."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The median, the 10th and the 90th percentile."""
    median, low, high = np.quantile(seconds, (0.5, 0.1, 0.9))
    return float(median), float(low), float(high)


class PeakMemory:
    """The peak of a stretch of work, in GiB: allocated and reserved on a GPU, resident on a CPU.

    On Linux a process may reset its own peak resident size by writing 5 to clear_refs (proc(5)).
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, float]:
        if self.device == "cpu":
            status = Path("/proc/self/status").read_text()
            kibibytes = int(status.partition("VmHWM:")[2].split()[0])
            return {"peak_rss_gib": kibibytes * 1024 / GIB, "process_gib": psutil.Process().memory_info().rss / GIB}
        import torch

        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            **_process_on_gpu(),
        }


def _process_on_gpu() -> dict[str, float]:
    """What the driver says that this process holds, its context and kernels included; nothing where it doesn't say.

    In a container the driver may know processes by other numbers than they know themselves: then a process that is
    alone on the GPU is this one.
    """
    import torch

    try:
        handle = nvml_handle()
        held = {each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except NVML_TROUBLE:
        return {}
    own = held.get(os.getpid(), next(iter(held.values())) if len(held) == 1 else None)
    return {"process_gib": own / GIB} if own and own >= torch.cuda.memory_reserved() else {}


def nvml_handle() -> Any:
    """NVML's handle of the GPU that torch uses, which NVML may number otherwise. Raises one of NVML_TROUBLE."""
    import torch

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def now(device: str) -> float:
    """Seconds, when the device has done all that it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def standing_in(owner: Any, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within, calls of `owner.method` go to what `make` makes of it."""
    original, had_own = getattr(owner, method), method in vars(owner)
    setattr(owner, method, make(original))
    try:
        yield
    finally:
        if had_own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)


class Stopwatches:
    """Measure parts of a call by standing in for methods while it runs, by a clock, or whatever else counts up."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.totals: dict[str, float] = {}
        self.first_arguments: dict[str, Any] = {}

    @contextmanager
    def on(self, name: str, owner: Any, method: str) -> Iterator[None]:
        """Within, calls of `owner.method` add to `totals[name]`, and their first argument is kept."""

        def stopped(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = self.clock()
                value = original(*args, **kwargs)
                self.totals[name] = self.totals.get(name, 0.0) + self.clock() - start
                self.first_arguments[name] = args[0] if args else None
                return value

            return call

        with standing_in(owner, method, stopped):
            yield
