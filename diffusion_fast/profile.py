"""Where a call's time goes: kernels by class, from a short call under torch.profiler.

Unlike the timed calls this one is instrumented, and the device is waited for after each part, so that a kernel belongs
to the part in which it ran. Shares are what it is good for; how long a call takes, the timed calls say.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_fast import graphs, spool
from diffusion_fast.measure import now, standing_in
from diffusion_fast.optimizations import Build

STEPS = 4  # the first one is left out: what comes before it isn't a step
TOP = 10  # kernels of a part that the table shows
PARTS = ("denoising_step", "vae_decode", "text_encoding")
MARK = "diffusion_fast:"

# The first pattern that a kernel's name, or its operator's on a CPU, matches. Names as of cuBLAS, cuDNN, CUTLASS,
# PyTorch's own kernels, those of kernels.py, and the templates that Inductor fills in (triton_tem_): a matmul, a
# convolution or flex attention with what was fused into it.
CLASSES = {
    "attention": r"sdpa|flash|fmha|attention|softmax|triton_tem_\w*_(badd)?bmm_",
    "convolution": r"conv(?!ert)|fprop|implicit_gemm|winograd",
    "linear": r"gemm|gemv|nvjet|splitk|cublas|_mm\b|_mm_|::mm|addmm|::linear|linear_geglu|matmul|_int_mm|scaled_mm",
    "norm": r"norm|moments|welford|var_mean|computefusedparams",
    "copies": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|::cat\b|catarray|clone|contiguous|fill_|fillfunctor",
    "pointwise": r"elementwise|triton_|quantize|amax|^aten::",
    "other": r"",
}
# Inductor's other kernels are named after every operator that anything in them stems from, also after those that others
# compute: a convolution whose bias they add, a matmul for which they quantize. They are none of these themselves.
FUSED = re.compile(r"triton_(?!tem_)[a-z]{3}_fused")  # pointwise, reduction, persistent reduction, foreach, …
COPYING = (
    r"clone|copy|_to_copy|contiguous|cat|stack|constant_pad_nd|repeat|fill|full|view|_unsafe_view|reshape|"
    r"_reshape_alias|t|transpose|permute|expand|slice|select|narrow|split|split_with_sizes|chunk|unbind|(un)?squeeze|"
    r"(un)?flatten|as_strided|alias|detach"
)
CLASSES_FUSED = {
    "attention": r"softmax",
    "norm": r"norm(?!al)|welford|var_mean",  # the second pass of a norm, pointwise, too
    "copies": rf"fused(_({COPYING}))+(_\d+)?$",  # nothing else
    "pointwise": r"",
}
VIEWS = re.compile(
    r"aten::(empty\w*|resize_|t|\w*view\w*|as_strided\w*|expand\w*|permute|transpose|\w*reshape\w*|(un)?squeeze|"
    r"select|slice|narrow|split\w*|chunk|unbind|unflatten|detach\w*|alias|item|_local_scalar_dense|linear|conv2d)"
)  # on a CPU: operators that compute nothing themselves
ATTENTION_OPERATORS = ("aten::bmm", "aten::baddbmm")  # their kernels are gemms, and attention alone has them here
COLUMNS = ("part", "class", "kernel", "times", "ms", "us")  # of the table of all kernels: us is that of one of them


@dataclass(frozen=True)
class Kernel:
    """Something that ran: microseconds of the trace's clock, and the bytes that it was given, where that is known."""

    name: str
    kind: str
    start: float
    busy: float  # on a CPU without what it called
    read_and_written: int | None = None

    @property
    def end(self) -> float:
        return self.start + self.busy


@dataclass(frozen=True)
class Part:
    """A step, decoding or encoding: when it was at work, and what ran then."""

    ranges: list[tuple[float, float]]
    kernels: list[Kernel]


def profile(build: Build, folder: Path, flops: dict[str, dict[str, float]], limits: dict[str, float]) -> dict[str, Any]:
    """Profile a call of STEPS steps; leave trace, table and all kernels in `folder`. Returns the table as data."""
    device = build.spec.device
    short = replace(build, spec=replace(build.spec, steps=min(STEPS, build.spec.steps)))
    parts = split(_record(short, folder, kept=True), device)
    names = build.spec.optimizations
    # What is replayed doesn't say what its kernels are given, and without a graph packages aren't used either.
    if "cuda_graph" in names and "ahead_of_time" not in names:
        with graphs.none():
            parts = with_sizes(parts, split(_record(short, folder), device))
    found = summarize(parts, device, flops)
    spool.write_text(folder / spool.PROFILE, table(found, limits))
    spool.write_text(folder / spool.KERNELS, kernels_csv(parts))
    return found


def _record(build: Build, folder: Path, kept: bool = False) -> dict[str, Any]:
    """The trace of a call; packed, it is left in `folder` where it is to be kept."""
    import torch

    from diffusion_fast.pipeline import call

    device = build.spec.device
    call(build)  # schedulers and caching allocators have their first time with this many steps, too
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler, ExitStack() as stack:
        stack.enter_context(_marked(device, "text_encoding", build.pipe, "encode_prompt"))
        stack.enter_context(_marked(device, "vae_decode", build.pipe.vae, "decode"))
        # A step is what lies between two of the scheduler's: denoiser, guidance, scheduler.
        stack.enter_context(_marked(device, "scheduler", build.pipe.scheduler, "step"))
        call(build)
    plain = folder / spool.TRACE.removesuffix(".gz")
    profiler.export_chrome_trace(str(plain))
    text = plain.read_bytes()
    plain.unlink()
    if kept:
        with gzip.open(folder / spool.TRACE, "wb", compresslevel=6) as packed:
            packed.write(text)
    trace: dict[str, Any] = json.loads(text)
    return trace


def _marked(device: str, name: str, owner: Any, method: str) -> AbstractContextManager[None]:
    """Within, calls of `owner.method` are ranges of the trace that end when the device has done all."""
    import torch

    def mark(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)  # pipelines look at what their scheduler's step takes
        def call(*args: Any, **kwargs: Any) -> Any:
            now(device)
            with torch.profiler.record_function(MARK + name):
                value = original(*args, **kwargs)
                now(device)
            return value

        return call

    return standing_in(owner, method, mark)


def classify(name: str, operator: str = "") -> str:
    """The class of a kernel by its name, and by the operator that launched it where the trace knows that."""
    if operator in ATTENTION_OPERATORS or name in ATTENTION_OPERATORS:
        return "attention"
    if VIEWS.fullmatch(name):
        return "other"
    name = name.lower()
    classes = CLASSES_FUSED if FUSED.match(name) else CLASSES
    return next(kind for kind, pattern in classes.items() if re.search(pattern, name))


def split(trace: dict[str, Any], device: str) -> dict[str, Part]:
    """What ran in each part."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    kernels = _on_gpu(events) if device == "cuda" else _on_cpu(events)
    found: dict[str, Part] = {}
    for part, ranges in _ranges(events).items():
        inside = [each for each in kernels if any(begin <= each.start + each.busy / 2 <= end for begin, end in ranges)]
        found[part] = Part(ranges, inside)
    return found


def with_sizes(parts: dict[str, Part], others: dict[str, Part]) -> dict[str, Part]:
    """The parts; kernels that lack it have the bytes that those of the same name are given in `others`, on average."""
    found = {}
    for name, part in parts.items():
        sizes: dict[str, list[int]] = {}
        for each in others[name].kernels:
            if each.read_and_written is not None:
                sizes.setdefault(each.name, []).append(each.read_and_written)
        means = {kernel: round(statistics.mean(each)) for kernel, each in sizes.items()}
        kernels = [
            replace(each, read_and_written=means.get(each.name)) if each.read_and_written is None else each
            for each in part.kernels
        ]
        found[name] = replace(part, kernels=kernels)
    return found


def summarize(parts: dict[str, Part], device: str, flops: dict[str, dict[str, float]]) -> dict[str, Any]:
    """By part and class the milliseconds, TFLOP/s and GB/s of one step, decoding or encoding; and the top kernels."""
    return {name: _summarized(part, flops.get(name, {}), device) for name, part in parts.items()}


def kernels_csv(parts: dict[str, Part]) -> str:
    """Every kernel by part, what takes longest first: how often a step, decoding or encoding runs it, and how long."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, part in parts.items():
        for each in _by_name(part):
            us = 1000 * each["ms"] / each["times"]
            row = (round(each["times"], 3), round(each["ms"], 6), round(us, 3))  # to nanoseconds, as the trace is
            writer.writerow((name, each["class"], each["name"], *row))
    return text.getvalue()


def _ranges(events: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """When each part was at work."""
    marked: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(MARK):
            span = (event["ts"], event["ts"] + event["dur"])
            marked.setdefault(event["name"].removeprefix(MARK), []).append(span)
    ends = sorted(end for _, end in marked.pop("scheduler", []))
    return {part: marked.get(part, []) for part in PARTS} | {"denoising_step": list(itertools.pairwise(ends))}


def _on_gpu(events: list[dict[str, Any]]) -> list[Kernel]:
    launchers = {
        event["args"]["External id"]: event
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    found = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launcher = launchers.get(event.get("args", {}).get("External id"), {})
            kind = classify(event["name"], launcher.get("name", ""))
            # Inductor tells the profiler what each of its kernels is given, and under the kernel's name.
            given = launcher.get("args", {}) if event["name"].startswith(launcher.get("name") or "?") else {}
            size = event["args"].get("bytes") or _bytes(given)
            found.append(Kernel(event["name"], kind, event["ts"], event["dur"], size))
    return found


def _on_cpu(events: list[dict[str, Any]]) -> list[Kernel]:
    """Operators of the thread that calls the pipeline, without what they call themselves."""
    caller = next((each["tid"] for each in events if str(each["name"]).startswith(MARK)), None)
    operators = [each for each in events if each.get("cat") == "cpu_op" and each["tid"] == caller]
    operators.sort(key=lambda each: (each["ts"], -each["dur"]))
    open_: list[dict[str, Any]] = []
    own: Counter[int] = Counter()
    for index, each in enumerate(operators):
        while open_ and open_[-1]["until"] <= each["ts"]:
            open_.pop()
        own[index] += each["dur"]
        if open_:
            own[open_[-1]["index"]] -= each["dur"]
        open_.append({"until": each["ts"] + each["dur"], "index": index})
    return [
        Kernel(each["name"], classify(each["name"]), each["ts"], own[index]) for index, each in enumerate(operators)
    ]


SIZES = {"float": 4, "c10::Half": 2, "c10::BFloat16": 2, "double": 8, "long int": 8, "int": 4, "signed char": 1}


def _bytes(given: dict[str, Any]) -> int | None:
    """Of all tensors that a kernel is given: what it reads and writes if it touches each element once."""
    shapes, types = given.get("Input Dims"), given.get("Input type")
    if not shapes or not types:
        return None
    total = 0
    for shape, kind in zip(shapes, types, strict=True):
        if shape and kind in SIZES:
            count = SIZES[kind]
            for length in shape:
                count *= length
            total += count
    return total or None


def _summarized(part: Part, flops: dict[str, float], device: str) -> dict[str, Any]:
    """Per range: milliseconds by class, and the kernels that take longest."""
    ranges, kernels = part.ranges, part.kernels
    count = max(len(ranges), 1)
    wall = sum(end - begin for begin, end in ranges)
    classes: dict[str, dict[str, float]] = {}
    for kind in CLASSES:
        mine = [each for each in kernels if each.kind == kind]
        busy = sum(each.busy for each in mine)
        if not mine:
            continue
        classes[kind] = {"ms": busy / count / 1000, "kernels": len(mine) / count}
        if flops.get(kind) and busy:
            classes[kind]["tflops"] = flops[kind] / (busy / count / 1e6) / 1e12
        known = [each for each in mine if each.read_and_written is not None]
        if sum(each.busy for each in known) > busy / 2:  # GB/s of a class is that of its kernels whose bytes are known
            moved = sum(each.read_and_written or 0 for each in known)
            classes[kind]["gbs"] = moved / sum(each.busy for each in known) / 1000
    idle = wall - (_union(kernels) if device == "cuda" else sum(each.busy for each in kernels))
    classes["idle"] = {"ms": max(idle, 0.0) / count / 1000}
    return {"ms": wall / count / 1000, "ranges": len(ranges), "classes": classes, "top": _by_name(part)[:TOP]}


def _union(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    busy, until = 0.0, float("-inf")
    for each in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, each.end - max(each.start, until))
        until = max(until, each.end)
    return busy


def _by_name(part: Part) -> list[dict[str, Any]]:
    """Per range: every kernel, what takes longest first."""
    count = max(len(part.ranges), 1)
    spent, times = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for each in part.kernels:
        spent[each.name, each.kind] += each.busy  # type: ignore[assignment]
        times[each.name, each.kind] += 1
    return [
        {"name": name, "class": kind, "ms": busy / count / 1000, "times": times[name, kind] / count}
        for (name, kind), busy in spent.most_common()
    ]


def table(found: dict[str, Any], limits: dict[str, float]) -> str:
    """Markdown: a table of classes for each part, then its top kernels."""
    tflops, gbs = limits.get("matmul_ceiling_tflops"), limits.get("copy_ceiling_gbs")

    def of(value: float | None, ceiling: float | None) -> str:
        share = f" ({value / ceiling:.0%})" if value is not None and ceiling else ""
        return f"{value:.3g}{share}" if value is not None else ""

    lines = [
        "Milliseconds under the profiler; in brackets the share of what this device reaches in a large matmul or copy."
    ]
    for part, facts in found.items():
        if not facts["ranges"]:
            continue
        lines += [f"\n## {part}: {facts['ms']:.3g} ms", "", "| class | ms | share | kernels | TFLOP/s | GB/s |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        for kind, each in facts["classes"].items():
            row = (f"{each['ms']:.3g}", f"{each['ms'] / facts['ms']:.0%}", f"{each.get('kernels', 0):.0f}")
            lines += [f"| {kind} | {' | '.join(row)} | {of(each.get('tflops'), tflops)} | {of(each.get('gbs'), gbs)} |"]
        lines += [*_gap(facts["classes"]), "", "| kernel | class | times | ms |", "|---|---|--:|--:|"]
        for each in facts["top"]:
            name = each["name"].replace("|", "\\|")[:90]
            lines += [f"| `{name}` | {each['class']} | {each['times']:.3g} | {each['ms']:.3g} |"]
    return "\n".join(lines) + "\n"


def _gap(classes: dict[str, dict[str, float]]) -> list[str]:
    """A sentence on how long the device waits for a kernel."""
    kernels = sum(each.get("kernels", 0) for each in classes.values())
    if not kernels:
        return []
    return ["", f"{kernels:,.0f} kernels; {1000 * classes['idle']['ms'] / kernels:,.1f} µs between two on average."]
