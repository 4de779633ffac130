"""What machine and which versions a result came from. Read in the worker, outside the timed region."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

# Variables that change how fast these libraries are, but for those that say where things lie or on which device, what
# to print, and for what a build was.
FLAGS = (
    *("TORCH", "PYTORCH_", "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_TF32", "TRITON_", "ATEN_", "DNNL_", "ONEDNN_"),
    *("OMP_", "MKL_", "KMP_", "GOMP_", "LD_PRELOAD", "MALLOC_"),
)
NO_FLAGS = (
    *("_DIR", "_DIRECTORY", "_PATH", "_HOME", "_DEVICES", "_DEVICE_ORDER", "_CAPABILITIES", "_VERSION", "_LOGS"),
    *("_ARCH_LIST", "_BUILD_NUMBER", "_COMPILE_THREADS", "_CACHE_MAXSIZE"),
)
LIBRARIES = ("torch", "diffusers", "transformers", "torchao", "accelerate", "triton", "numpy")


def describe(device: str) -> dict[str, Any]:
    """A flat account of the machine and the versions that decide a measurement."""
    import psutil
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 1024**3, 1),
        "threads": torch.get_num_threads(),
        "affinity": len(os.sched_getaffinity(0)),
        "flags": " ".join(flags()),
        "commit": _commit(),
    }
    facts |= {library: version(library) for library in LIBRARIES}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 1024**3, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return facts


def installed() -> str:
    """Every installed distribution, as lines of a requirements file: of two of one name what is imported, the first."""
    found: dict[str, str] = {}  # setuptools brings older ones of its own, behind all others, once it is imported
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), f"{name}=={distribution.version}\n")
    return "".join(found[name] for name in sorted(found))


def flags() -> list[str]:
    """The environment variables that change how these libraries run, each as NAME=VALUE."""
    return [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(FLAGS) and not name.endswith(NO_FLAGS)
    ]


def version(library: str) -> str | None:
    """Of an installed distribution, without importing it; None where there is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit of this package's checkout, with a + where it has uncommitted changes; None outside one.

    A copy without its history, in an image or on a lent machine, can be told by DIFFUSION_FAST_COMMIT.
    """
    if told := os.environ.get("DIFFUSION_FAST_COMMIT"):
        return told
    folder = Path(__file__).parent
    git = ("git", "-C", str(folder))
    try:
        answer = subprocess.run(
            (*git, "rev-parse", "--show-prefix", "HEAD"), capture_output=True, text=True, check=True
        )
        prefix, head = answer.stdout.split("\n")[:2]
        if prefix != f"{folder.name}/":  # installed somewhere inside another project's checkout
            return None
        changes = subprocess.run(
            (*git, "status", "--porcelain", "--untracked-files=no", str(folder)), capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head[:12] + ("+" if changes.stdout else "")


def _driver() -> str | None:
    import pynvml

    from diffusion_fast.measure import NVML_TROUBLE

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except NVML_TROUBLE:
        return None
