"""How close a measurement comes to what the device can do: operations counted, ceilings measured.

The model: Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785
"""

from __future__ import annotations

import functools
import math
import statistics
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

from diffusion_fast import graphs
from diffusion_fast.measure import GIB, Stopwatches, timed
from diffusion_fast.modules import stored_bytes
from diffusion_fast.optimizations import Build, left_out

KINDS = ("linear", "convolution", "attention")
LINEARS = ("scaled_matmul", "linear_geglu", "scaled_matmul_geglu")  # operators of ours: rows, weights, and what else
# Batched matmuls are attention's alone, and the rest of what is counted are its fused kernels.
KIND_OF = {
    **dict.fromkeys(("aten.mm", "aten.addmm", "aten._int_mm", "aten._scaled_mm"), "linear"),
    **dict.fromkeys(("aten._weight_int4pack_mm", "aten._weight_int4pack_mm_for_cpu"), "linear"),
    **dict.fromkeys((f"diffusion_fast.{name}" for name in LINEARS), "linear"),
    **dict.fromkeys(("aten.convolution", "diffusion_fast.convolution_nhwc"), "convolution"),
}
PARTS = ("text_encoding", "denoising_step", "vae_decode")
MATRIX = {"cuda": 8192, "cpu": 1024}  # rows of the square matrices: large enough to fill the device
COPIED = {"cuda": GIB, "cpu": GIB // 4}  # bytes: more than any cache holds
REPEATS = 10


def count_flops(build: Build) -> dict[str, dict[str, float]]:
    """Floating-point operations of a call's parts, by PARTS and, in each, by KINDS.

    A multiplication and an addition are two. Counted while the pipeline makes a step for one image, by
    torch.utils.flop_counter, which can't look into a compiled or captured graph: such parts run eagerly meanwhile, with
    less memory for one image than for all. The prompt is encoded once a call, the rest is done for each image.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

    from diffusion_fast.pipeline import call

    def counted(kind: str) -> float:
        counts = counter.get_flop_counts().get("Global", {})
        return float(sum(count for name, count in counts.items() if KIND_OF.get(str(name), "attention") == kind))

    pipe, steps = build.pipe, build.model.least_steps

    def packed(one: Any, *_: Any, out_shape: Any, **__: Any) -> Any:  # of weights whose own shape says nothing
        return 2 * math.prod(out_shape) * one[-1]

    unknown_to_torch = {  # by the shapes of their arguments
        torch.ops.aten._int_mm: lambda one, other, **_: 2 * one[0] * one[1] * other[1],
        torch.ops.aten._weight_int4pack_mm: packed,
        torch.ops.aten._weight_int4pack_mm_for_cpu: packed,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
            query, key, value
        ),
    }
    own = torch.ops.diffusion_fast
    if hasattr(own, "scaled_matmul"):  # where an optimization has imported them
        for name in LINEARS:
            unknown_to_torch[getattr(own, name)] = lambda rows, w, *_, **__: 2 * math.prod(rows) * w[0]
        unknown_to_torch[own.attention] = lambda q, k, *_, **__: 4 * math.prod(q) * k[1]
        unknown_to_torch[own.convolution_nhwc] = lambda x, w, *_, out_shape, **__: conv_flop_count(x, w, out_shape)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(graphs.none())
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=unknown_to_torch))
        by_kind = {kind: Stopwatches(functools.partial(counted, kind)) for kind in KINDS}
        for watches in by_kind.values():
            stack.enter_context(watches.on("text_encoding", pipe, "encode_prompt"))
            stack.enter_context(watches.on("denoising_step", build.denoiser, "forward"))
            for _, owner, attribute in build.prompt_calls:  # a step's work, done once
                stack.enter_context(watches.on("prompt", owner, attribute))
            stack.enter_context(watches.on("vae_decode", pipe.vae, "decode"))
        call(replace(build, spec=replace(build.spec, steps=steps, batch_size=1)))
    images = build.spec.batch_size
    times = {"text_encoding": 1, "denoising_step": images / steps, "vae_decode": images}
    found = {part: {kind: times[part] * each.totals[part] for kind, each in by_kind.items()} for part in PARTS}
    for kind, watches in by_kind.items():
        found["denoising_step"][kind] += images * watches.totals.get("prompt", 0.0)
    return found


def ceilings(build: Build) -> dict[str, float]:
    """What the device reaches: TFLOP/s of a large matmul, GB/s of a large copy, in and out.

    The matmul is in the recipe's dtype, or in fp32 where a CPU is faster at that: without units for bf16 it is more
    than a hundred times as fast, and operations in bf16 would seem to use more than the whole device.
    """
    import torch

    device, rows = build.spec.device, MATRIX[build.spec.device]

    def product(dtype: Any) -> Any:
        one, other = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        return lambda: one @ other

    in_dtype = product(getattr(torch, build.dtype))
    fastest_s = _median_s(product(torch.float32), device) if device == "cpu" else math.inf
    if timed(in_dtype, device)[0] < REPEATS * fastest_s:  # a single one tells that it isn't worth repeating
        fastest_s = min(fastest_s, _median_s(in_dtype, device))
    source = torch.randint(256, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device)
    return {
        "matmul_ceiling_tflops": 2 * rows**3 / fastest_s / 1e12,
        "copy_ceiling_gbs": 2 * COPIED[device] / copy_s / 1e9,
    }


def _median_s(function: Any, device: str) -> float:
    seconds = [timed(function, device)[0] for _ in range(REPEATS + 2)]
    return statistics.median(seconds[2:])


def weight_bytes(build: Build) -> dict[str, int]:
    """Bytes of parameters and buffers by network, quantized ones as they are stored."""
    return {name: _bytes_of(network) for name, network in build.networks()}


def _bytes_of(network: Any) -> int:
    return sum(map(stored_bytes, chain(network.parameters(), network.buffers())))


def limits(build: Build, flops: dict[str, dict[str, float]], latency_s: float) -> dict[str, float]:
    """How much of the device a call of `latency_s` seconds uses. Parts that such calls are without don't count.

    `floor_s` is the sum over the call's parts of what takes longer, to compute them or to read their weights once.
    """
    found = ceilings(build)
    calls = dict(zip(PARTS, (1, build.spec.steps, 1), strict=True)) | dict.fromkeys(
        left_out(build.spec.optimizations), 0
    )
    sizes = weight_bytes(build)
    of_denoiser, of_vae = sizes[build.model.denoiser], _bytes_of(build.pipe.vae.decoder)
    read = dict(zip(PARTS, (sum(sizes.values()) - of_denoiser - sizes["vae"], of_denoiser, of_vae), strict=True))
    needed = {part: sum(flops[part].values()) for part in PARTS}
    total = sum(needed[part] * calls[part] for part in PARTS)
    floor_s = sum(
        calls[part]
        * max(needed[part] / found["matmul_ceiling_tflops"] / 1e12, read[part] / found["copy_ceiling_gbs"] / 1e9)
        for part in PARTS
    )
    return found | {
        "tflop": total / 1e12,
        "mfu": total / latency_s / 1e12 / found["matmul_ceiling_tflops"],
        "floor_s": floor_s,
        "floor_percent": 100 * floor_s / latency_s,
    }
