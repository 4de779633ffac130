"""A rung's compile caches as one file: packed after its measurement, checked and unpacked before another one's.

Packed is all that torch.compile, Inductor and Triton left on disk, with it what autotuning chose, and an account of
what that fits. All of it is code, which a process runs when it finds it: a checksum tells damage, not malice.

Why not torch.compiler.save_cache_artifacts: docs/experiments.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_fast import environment, plan, spool
from diffusion_fast.optimizations import compiles
from diffusion_fast.spec import Ladder, RunSpec

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "torchao")
# What a C++ compiler may use of a processor, among all the flags that Linux has for one.
INSTRUCTIONS = re.compile(r"(sse|ssse|avx|amx|fma|f16c|bmi|gfni|vaes|vpclmul|popcnt|movbe|abm|asimd|sve|bf16|i8mm)\w*")
# What reading a file raises that isn't whole, or is no compile cache.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, TypeError, ValueError, RuntimeError)


def facts(spec: RunSpec) -> dict[str, str | list[str]]:
    """What must be the same for a compile cache to be of use: the machine, the versions, and what is compiled.

    Weights, prompt and steps are in no graph. Raises ValueError where the device doesn't answer.
    """
    device = plan.find_device(spec.device)
    if device.capability:
        machine: dict[str, str | list[str]] = {
            "GPU": device.name,
            "compute capability": ".".join(map(str, device.capability)),
            "CUDA": _cuda_version(),
        }
    else:
        machine = {
            "CPU": environment.cpu_name(),
            "instruction set": _instructions(),
            "cores": str(len(os.sched_getaffinity(0))),  # Inductor's C++ is written for a number of threads
        }
    return {
        **machine,
        "architecture": platform.machine(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: environment.version(name) or "none" for name in LIBRARIES},
        "flags": environment.flags(),
        "model": spec.model,
        "optimizations": list(spec.optimizations),
        "compile mode": spec.compile_mode,
        "height": str(spec.height),
        "width": str(spec.width),
        "batch size": str(spec.batch_size),
    }


def _cuda_version() -> str:
    """torch's CUDA, read from its file: the parent doesn't import torch."""
    torch = importlib.util.find_spec("torch")
    text = (Path(torch.origin or "").parent / "version.py").read_text() if torch else ""
    found = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.MULTILINE)
    return found[1] if found else "none"


def _instructions() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flag for flag in flags.partition(":")[2].split() if INSTRUCTIONS.fullmatch(flag))


def save(spec: RunSpec, cache: Path, file: Path) -> None:
    """Pack the folder `cache`, which `spec` has filled, whole or not at all.

    Raises OSError, and ValueError where the device doesn't answer.
    """
    partial = file.with_name(f".{file.name}")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
            checksums = {}
            for path in sorted(cache.rglob("*")):
                if path.is_file() and path.suffix != ".lock":
                    name, content = str(path.relative_to(cache)), path.read_bytes()
                    checksums[name] = hashlib.sha256(content).hexdigest()
                    packed.writestr(name, content)
            manifest = {"measurement_id": spec.measurement_id, "fits": facts(spec), "sha256": checksums}
            packed.writestr(MANIFEST, json.dumps(manifest, indent=1))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def start_from(file: Path, planned: Ladder) -> Ladder:
    """The ladder, with its one rung starting from a saved cache.

    Raises ValueError where the file isn't whole, or is of no use to what the rung compiles here.
    """
    (spec,) = planned.rungs
    if not compiles(spec.optimizations):
        raise ValueError(f"--load-cache: {spec.recipe} compiles nothing.")
    try:
        with zipfile.ZipFile(file) as packed:
            manifest = json.loads(packed.read(MANIFEST))
            source, fits, listed = str(manifest["measurement_id"]), dict(manifest["fits"]), dict(manifest["sha256"])
            found = {name: hashlib.sha256(packed.read(name)).hexdigest() for name in packed.namelist()}
    except DAMAGE as error:
        raise ValueError(f"{file} is no compile cache, or is damaged: {type(error).__name__}: {error}.") from error
    if broken := sorted(name for name, _ in listed.items() ^ found.items() if name != MANIFEST):
        raise ValueError(f"{file} is damaged: {broken[0]} is not what its checksum says.")
    if clauses := _differences(fits, facts(spec)):
        raise ValueError(f"The compile cache of {source} doesn't fit: it was made with {', '.join(clauses)}.")
    return replace(planned, rungs=(replace(spec, saved_cache=source),))


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A clause for each fact that differs: "torch 2.11.0 (here 2.13.0)"; of lists, what only one of them has."""
    found = []
    for name in here | there:
        old, new = there.get(name, "none"), here.get(name, "none")
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list):
            old, new = ([each for each in one if each not in other] for one, other in ((old, new), (new, old)))
        found.append(f"{name} {_listed(old)} (here {_listed(new)})")
    return found


def _listed(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value) or "none"


def unpack(file: Path, cache: Path) -> None:
    """Fill the folder `cache`, unless it's there already. It is whole or not there. Raises OSError."""
    if cache.exists():
        return
    partial = cache.with_name(f".{cache.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    with zipfile.ZipFile(file) as packed:
        packed.extractall(partial, [name for name in packed.namelist() if name != MANIFEST])
    # Triton looks for a kernel's files under the paths at which they were written, and compiles where there are none.
    for group in partial.rglob("__grp__*"):
        folder = cache.resolve() / group.parent.relative_to(partial)
        names = spool.read_json(group)["child_paths"]
        spool.write_json(group, {"child_paths": {name: str(folder / name) for name in names}})
    partial.replace(cache)
