"""On a GPU: what each kernel of diffusion_fast takes at shapes of SDXL and SD 1.5, beside what PyTorch has for it.

    python3 -u scripts/bench_kernels.py --json kernels.json
    python3 -u scripts/bench_kernels.py --only geglu,convolution --seconds 60
    TRITON_INTERPRET=1 python3 scripts/bench_kernels.py --check   # no GPU: tiny shapes, times mean nothing

First, on small inputs, whether kernels on this device agree with their definitions on a CPU. Then a line a measurement:
the median of 50, by CUDA events around a CUDA graph that goes through several sets of inputs, together larger than the
cache, so that neither launches nor a warm cache are measured. What fails says so, and the rest goes on; when --seconds
are over, so does what is left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_fast import attention_kernels, kernels, norm_kernels, operators

FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
NAMES = {FP8: "fp8", INT8: "int8", BF16: "bf16", torch.float32: "fp32"}
REPEATS = 50
CACHE_BYTES = 150e6  # three times an H100's second-level cache
MOST_COPIES = 16

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One thing to compute, on fresh inputs each time that `make` is called, by each of its variants."""

    name: str
    shape: str
    moved: float  # bytes read and written at least; 0 where operations count
    operations: float
    make: Callable[[], dict[str, Call]]


def normal(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device).to(BF16)


def images(*shape: int, device: str) -> torch.Tensor:
    return normal(*shape, device=device).contiguous(memory_format=torch.channels_last)


def by_torch(x: torch.Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized as one would write it in PyTorch, for Inductor to fuse."""
    x = x.float()
    scale = (x.abs().amax(dims, keepdim=True) / operators.LARGEST[dtype]).clamp(min=1e-12)
    scaled = x / scale
    return (scaled.round() if dtype == INT8 else scaled).to(dtype), scale


def rows_by_torch(x: torch.Tensor) -> object:
    return by_torch(x, (-1,), FP8)


def geglu_by_torch(x: torch.Tensor) -> object:
    hidden, gate = x.chunk(2, -1)
    return by_torch(hidden * F.gelu(gate), (-1,), FP8)


def geglu_alone(x: torch.Tensor) -> object:
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)


def linear_geglu_by_torch(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> object:
    return geglu_alone(F.linear(x, w, bias))


def norm_by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> object:
    return by_torch(F.layer_norm(x, x.shape[-1:], weight, bias), (-1,), FP8)


def norm_alone(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> object:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def image_by_torch(x: torch.Tensor) -> object:
    return by_torch(x, (1, 2, 3), FP8)


def group_norm_by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> object:
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-5)).contiguous(memory_format=torch.channels_last)


def compiled(function: Callable[..., object], check: bool) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager" if check else "inductor")


def row_cases(device: str, check: bool) -> Iterator[Case]:
    sizes = ((8192, 640), (2048, 1280)) if not check else ((3, 40),)
    for rows, width in sizes:
        inner = 4 * width
        geglu, alone = compiled(geglu_by_torch, check), compiled(geglu_alone, check)

        def make_geglu(rows: int = rows, inner: int = inner, geglu: Any = geglu, alone: Any = alone) -> dict[str, Call]:
            x = normal(rows, 2 * inner, device=device)
            return {
                "ours fp8": lambda: kernels.launch_geglu_quantize_rows(x, FP8),
                "ours int8": lambda: kernels.launch_geglu_quantize_rows(x, INT8),
                "inductor fp8": lambda: geglu(x),
                "inductor, not quantized": lambda: alone(x),
                "eager fp8": lambda: geglu_by_torch(x),
            }

        yield Case("geglu_quantize_rows", f"{rows}×{2 * inner}", rows * inner * 5, 0, make_geglu)
    for rows, width in sizes:
        norm, plain = compiled(norm_by_torch, check), compiled(norm_alone, check)

        def make_norm(rows: int = rows, width: int = width, norm: Any = norm, plain: Any = plain) -> dict[str, Call]:
            x, weight, bias = (normal(*shape, device=device) for shape in ((rows, width), (width,), (width,)))
            return {
                "ours fp8": lambda: kernels.launch_layer_norm_quantize_rows(x, weight, bias, 1e-5, FP8),
                "ours int8": lambda: kernels.launch_layer_norm_quantize_rows(x, weight, bias, 1e-5, INT8),
                "inductor fp8": lambda: norm(x, weight, bias),
                "inductor, not quantized": lambda: plain(x, weight, bias),
            }

        yield Case("layer_norm_quantize_rows", f"{rows}×{width}", rows * width * 3, 0, make_norm)
    for rows, width in sizes:
        quantize = compiled(rows_by_torch, check)

        def make_rows(rows: int = rows, width: int = width, quantize: Any = quantize) -> dict[str, Call]:
            x = normal(rows, width, device=device)
            return {
                "ours fp8": lambda: kernels.launch_quantize_rows(x, FP8),
                "ours int8": lambda: kernels.launch_quantize_rows(x, INT8),
                "inductor fp8": lambda: quantize(x),
            }

        yield Case("quantize_rows", f"{rows}×{width}", rows * width * 3, 0, make_rows)


def matmul_cases(device: str, check: bool) -> Iterator[Case]:
    sizes = (
        (2048, 10240, 1280),
        (2048, 1280, 5120),
        (2048, 3840, 1280),
        (2048, 1280, 1280),
        (8192, 5120, 640),
        (8192, 640, 2560),
        (154, 2560, 2048),
        # SD 1.5 at 512×512
        (8192, 2560, 320),
        (8192, 320, 1280),
        (512, 10240, 1280),
        (512, 1280, 5120),
        (512, 3840, 1280),
    )
    for rows, columns, depth in sizes if not check else ((20, 32, 32),):

        def make(rows: int = rows, columns: int = columns, depth: int = depth) -> dict[str, Call]:
            x, w = normal(rows, depth, device=device), normal(columns, depth, device=device)
            bias = normal(columns, device=device)
            q8, sq8 = kernels.launch_quantize_rows(x, FP8)
            w8, sw8 = kernels.launch_quantize_rows(w, FP8)
            qi, sqi = kernels.launch_quantize_rows(x, INT8)
            wi, swi = kernels.launch_quantize_rows(w, INT8)
            sw8, swi = sw8.reshape(1, -1), swi.reshape(1, -1)
            return {
                "cuBLAS bf16": lambda: F.linear(x, w, bias),
                "torch._scaled_mm fp8": lambda: torch._scaled_mm(
                    q8, w8.t(), sq8, sw8, bias, out_dtype=BF16, use_fast_accum=True
                ),
                "ours fp8": lambda: kernels.launch_triton_matmul(q8, w8, sq8, sw8, bias, BF16),
                "ours int8": lambda: kernels.launch_triton_matmul(qi, wi, sqi, swi, bias, BF16),
                "torch._int_mm, not scaled": lambda: torch._int_mm(qi, wi.t()),
            }

        yield Case("scaled_matmul", f"{rows}×{columns}×{depth}", 0, 2 * rows * columns * depth, make)


def geglu_cases(device: str, check: bool) -> Iterator[Case]:
    """A feed-forward's first linear with its GEGLU, and both with what the second linear in eight bits needs."""
    for rows, columns, depth in ((2048, 10240, 1280), (8192, 5120, 640)) if not check else ((20, 32, 32),):
        apart = compiled(linear_geglu_by_torch, check)

        def make(rows: int = rows, columns: int = columns, depth: int = depth, apart: Any = apart) -> dict[str, Call]:
            x, w = normal(rows, depth, device=device), normal(columns, depth, device=device)
            bias = normal(columns, device=device)
            turns, bias_turns = operators.in_turns(w), operators.in_turns(bias)

            def by_us(dtype: torch.dtype, quantized: bool, out_dtype: torch.dtype = BF16) -> Call:
                (q, scale_q), (rows, scale_w) = (kernels.launch_quantize_rows(each, dtype) for each in (x, turns))
                given = (q, rows, scale_q, scale_w.reshape(1, -1), bias_turns, out_dtype)
                if not quantized:
                    return lambda: kernels.launch_scaled_matmul_geglu(*given)
                return lambda: kernels.launch_quantize_rows(kernels.launch_scaled_matmul_geglu(*given), dtype)

            def by_two(dtype: torch.dtype) -> Call:
                (q, scale_q), (rows, scale_w) = (kernels.launch_quantize_rows(each, dtype) for each in (x, w))
                given = (q, rows, scale_q, scale_w.reshape(1, -1), bias, BF16)
                return lambda: kernels.launch_geglu_quantize_rows(kernels.launch_scaled_matmul(*given), dtype)

            return {
                "cuBLAS, Inductor's GEGLU": lambda: apart(x, w, bias),
                "ours bf16": lambda: kernels.launch_linear_geglu(x, turns, bias_turns),
                "ours fp8": by_us(FP8, quantized=False),
                "ours int8": by_us(INT8, quantized=False),
                "_scaled_mm, GEGLU to fp8": by_two(FP8),
                "ours fp8, then to fp8": by_us(FP8, quantized=True),
                "ours fp8, to fp8 at once": by_us(FP8, quantized=False, out_dtype=FP8),
                "ours int8, GEGLU to int8": by_two(INT8),
                "ours int8, then to int8": by_us(INT8, quantized=True),
            }

        yield Case("linear_geglu", f"{rows}×{columns}×{depth}", 0, 2 * rows * columns * depth, make)


def image_cases(device: str, check: bool) -> Iterator[Case]:
    for shape in ((2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32)) if not check else ((2, 16, 4, 4),):
        quantize = compiled(image_by_torch, check)

        def make(shape: tuple[int, ...] = shape, quantize: Any = quantize) -> dict[str, Call]:
            x = images(*shape, device=device)
            return {
                "ours fp8": lambda: kernels.launch_quantize_image(x, FP8),
                "ours int8": lambda: kernels.launch_quantize_image(x, INT8),
                "inductor fp8": lambda: quantize(x),
            }

        size = torch.Size(shape).numel()
        yield Case("quantize_image", "×".join(map(str, shape)), 5 * size, 0, make)  # read twice, written once


NORMED = (  # SDXL's UNet under guidance, then its VAE's decoder, at 1024²
    (2, 320, 128, 128),
    (2, 640, 128, 128),
    (2, 960, 128, 128),
    (2, 640, 64, 64),
    (2, 1280, 64, 64),
    (2, 1920, 64, 64),
    (2, 1280, 32, 32),
    (2, 2560, 32, 32),
    (1, 512, 128, 128),
    (1, 512, 256, 256),
    (1, 256, 512, 512),
    (1, 128, 1024, 1024),
    (1, 256, 1024, 1024),
)


def group_norm_cases(device: str, check: bool) -> Iterator[Case]:
    for shape in NORMED if not check else ((2, 64, 9, 5),):
        norm = compiled(group_norm_by_torch, check)

        def make(shape: tuple[int, ...] = shape, norm: Any = norm) -> dict[str, Call]:
            x = images(*shape, device=device)
            weight, bias = normal(2, shape[1], device=device)
            return {
                "ours": lambda: norm_kernels.launch_group_norm_nhwc(x, 32, weight, bias, 1e-5, True),
                "ours, without SiLU": lambda: norm_kernels.launch_group_norm_nhwc(x, 32, weight, bias, 1e-5, False),
                "inductor": lambda: norm(x, weight, bias),
                "eager": lambda: group_norm_by_torch(x, weight, bias),
                "ours, to fp8": lambda: norm_kernels.launch_group_norm_quantize_nhwc(
                    x, 32, weight, bias, 1e-5, True, FP8
                ),
                "ours, to int8": lambda: norm_kernels.launch_group_norm_quantize_nhwc(
                    x, 32, weight, bias, 1e-5, True, INT8
                ),
                "ours, then to fp8": lambda: kernels.launch_quantize_image(
                    norm_kernels.launch_group_norm_nhwc(x, 32, weight, bias, 1e-5, True), FP8
                ),
            }

        size = torch.Size(shape).numel()
        yield Case("group_norm", "×".join(map(str, shape)), 6 * size, 0, make)  # read twice, written once


def convolution_cases(device: str, check: bool) -> Iterator[Case]:
    sizes = (  # batch 2: in, out, pixels a side, stride
        (320, 320, 128, 1),
        (960, 320, 128, 1),
        (640, 640, 64, 1),
        (1920, 640, 64, 1),
        (1280, 1280, 32, 1),
        (2560, 1280, 32, 1),
        (320, 320, 128, 2),
        # SD 1.5 at 512×512
        (320, 320, 64, 1),
        (640, 640, 32, 1),
        (1280, 1280, 16, 1),
        (2560, 1280, 16, 1),
        (1280, 1280, 8, 1),
        (2560, 1280, 8, 1),
    )
    for channels, columns, side, stride in sizes if not check else ((32, 16, 4, 1), (32, 16, 4, 2)):

        def make(
            channels: int = channels, columns: int = columns, side: int = side, stride: int = stride
        ) -> dict[str, Call]:
            x = images(2, channels, side, side, device=device)
            w = images(columns, channels, 3, 3, device=device)
            bias = normal(columns, device=device)
            residual = images(2, columns, side // stride, side // stride, device=device)

            def by_cudnn(benchmark: bool) -> Call:
                def call() -> object:
                    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=True):
                        return F.conv2d(x, w, bias, stride=stride, padding=1)

                return call

            def by_us(dtype: torch.dtype, added: bool = False, shifted: bool = False) -> Call:
                (q, scale), (filters, scale_w) = (x, None), (w, None)
                if dtype != BF16:
                    q, scale = kernels.launch_quantize_image(x, dtype)
                    filters, scale_w = operators.quantize_filters(w, dtype)
                given = (q, filters, scale, scale_w, bias, residual if added else None, stride, 1, BF16)
                shift = (torch.ones(2, device=device), w.float().sum(1)) if shifted else ()
                return lambda: kernels.launch_convolution_nhwc(*given, *shift)

            return {
                "cuDNN bf16": by_cudnn(False),
                "cuDNN bf16, benchmark": by_cudnn(True),
                "ours fp8": by_us(FP8),
                "ours fp8, residual added": by_us(FP8, added=True),
                "ours int8": by_us(INT8),
                "ours int8, shifted": by_us(INT8, shifted=True),
                "ours bf16": by_us(BF16),
            }

        operations = 2 * 2 * (side // stride) ** 2 * columns * channels * 9
        yield Case("convolution_nhwc", f"{channels}→{columns}, {side}²/{stride}", 0, operations, make)


def attention_cases(device: str, check: bool) -> Iterator[Case]:
    """What SDXL's UNet attends to under guidance: all as slices of a fused projection, as they lie there."""
    sizes = (  # queries, keys, heads
        (4096, 4096, 10),
        (1024, 1024, 20),
        (4096, 77, 10),
        (1024, 77, 20),
    )
    for queries, keys, heads in sizes if not check else ((40, 40, 2), (40, 20, 2)):

        def make(queries: int = queries, keys: int = keys, heads: int = heads) -> dict[str, Call]:
            if queries == keys:
                fused = normal(2, queries, 3 * heads * 64, device=device)
                q, k, v = (each.unflatten(-1, (heads, 64)) for each in fused.chunk(3, -1))
            else:
                q = normal(2, queries, heads, 64, device=device)
                fused = normal(2, keys, 2 * heads * 64, device=device)
                k, v = (each.unflatten(-1, (heads, 64)) for each in fused.chunk(2, -1))
            q_first, k_first, v_first = (each.transpose(1, 2) for each in (q, k, v))

            def by_torch_alone(backend: SDPBackend) -> torch.Tensor:
                with sdpa_kernel(backend):
                    made = F.scaled_dot_product_attention(q_first, k_first, v_first)
                return made.transpose(1, 2).flatten(2)

            # A CPU has none of the others.
            cudnn, flash = (
                SDPBackend.MATH if check else each for each in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
            )
            return {
                "cuDNN bf16": lambda: by_torch_alone(cudnn),
                "flash bf16": lambda: by_torch_alone(flash),
                "ours bf16": lambda: attention_kernels.launch_attention(q, k, v, 0.125),
            }

        yield Case("attention", f"{queries}×{keys}×{heads}", 0, 4 * 2 * heads * queries * keys * 64, make)


def time_calls(calls: list[Call], device: str) -> float:
    """Seconds of one call, the median of REPEATS goes through all of them."""
    for call in (*calls, *calls):  # compiles, tunes, warms up
        call()
    if device == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []  # outputs, lest the next call of the graph write where the last one did
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    for _ in range(5):
        graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for before, after in pairs:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [before.elapsed_time(after) for before, after in pairs]
    return statistics.median(milliseconds) / 1e3 / len(calls)


def agreements(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Each kernel against its definition on a CPU, on inputs with ragged ends; what is returned says how they agree."""

    def compare(made: Any, plain: Any) -> str:
        made, plain = (each if isinstance(each, tuple) else (each,) for each in (made, plain))
        said = []
        for one, other in zip(made, plain, strict=True):
            one, other = one.cpu().double(), other.double()
            differ = (one != other).double().mean().item()
            off = ((one - other).norm() / (other.norm() or 1)).item()  # fp8 is shifted by nothing: 0 to the last bit
            said.append(f"{differ:.2%} differ, by {off:.1e}" + ("" if off < 2e-2 else " DIFFERENT"))
        return "; ".join(said)

    def moved(given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.to(device) if isinstance(each, torch.Tensor) else each for each in given)

    torch.manual_seed(0)
    x, w, bias = torch.randn(37, 640).to(BF16), torch.randn(48, 640).to(BF16), torch.randn(48).to(BF16)
    wide = torch.randn(640).to(BF16)
    image, filters = torch.randn(2, 64, 10, 18).to(BF16), torch.randn(48, 64, 3, 3).to(BF16)
    for dtype in (FP8, INT8):
        (q, scale_q), (rows, scale_w) = operators.quantize_rows(x, dtype), operators.quantize_rows(w, dtype)
        (pixels, scale), (taps, scales) = (
            operators.quantize_image(image, dtype),
            operators.quantize_filters(filters, dtype),
        )
        product = (q, rows, scale_q, scale_w.reshape(1, -1), bias, BF16)  # for GEGLU the rows mean something else
        added = torch.randn(2, 48, 10, 18).to(BF16)
        for name, launch, plain, given in (
            ("quantize_rows", kernels.launch_quantize_rows, operators.quantize_rows, (x, dtype)),
            ("geglu_quantize_rows", kernels.launch_geglu_quantize_rows, operators.geglu_quantize_rows, (x, dtype)),
            (
                "layer_norm_quantize_rows",
                kernels.launch_layer_norm_quantize_rows,
                operators.layer_norm_quantize_rows,
                (x, wide, wide, 1e-5, dtype),
            ),
            ("scaled_matmul", kernels.launch_scaled_matmul, operators.scaled_matmul, product),
            ("scaled_matmul, Triton's", kernels.launch_triton_matmul, operators.scaled_matmul, product),
            ("scaled_matmul_geglu", kernels.launch_scaled_matmul_geglu, operators.scaled_matmul_geglu, product),
            ("quantize_image", kernels.launch_quantize_image, operators.quantize_image, (image, dtype)),
            (
                "convolution_nhwc",
                kernels.launch_convolution_nhwc,
                operators.convolution_nhwc,
                (pixels, taps, scale, scales, bias, None, 1, 1, BF16),
            ),
            (
                "convolution_nhwc, residual",
                kernels.launch_convolution_nhwc,
                operators.convolution_nhwc,
                (pixels, taps, scale, scales, bias, added, 1, 1, BF16),
            ),
            (
                "convolution_nhwc, stride 2",
                kernels.launch_convolution_nhwc,
                operators.convolution_nhwc,
                (pixels, taps, scale, scales, bias, None, 2, 1, BF16),
            ),
            (
                "convolution_nhwc, shifted",
                kernels.launch_convolution_nhwc,
                operators.convolution_nhwc,
                (
                    pixels,
                    taps,
                    scale,
                    scales,
                    bias,
                    None,
                    1,
                    1,
                    BF16,
                    torch.tensor([2.0, -1.0]),
                    filters.float().sum(1),
                ),
            ),
        ):

            def agree(launch: Any = launch, plain: Any = plain, given: tuple[Any, ...] = given) -> str:
                return compare(launch(*moved(given)), plain(*given))

            yield f"{name}, {NAMES[dtype]}", agree

    # Every tile that is tried, for the tuner takes one of them; ragged at all ends, and more tiles than programs.
    sizes = (1100, 5200, 200) if device == "cuda" else (70, 208, 40)
    x, w, bias = (torch.randn(shape).to(BF16) for shape in ((sizes[0], sizes[2]), sizes[1:], sizes[1:2]))
    tuner = kernels._linear_geglu_kernel
    for config in tuner.configs:

        def agree_by(config: Any = config) -> str:
            with only(tuner, config):
                return compare(kernels.launch_linear_geglu(*moved((x, w, bias))), operators.linear_geglu(x, w, bias))

        tile = config.kwargs
        kind = "persistent" if tile["PERSISTENT"] else f"{config.num_stages} stages"
        yield f"linear_geglu, {tile['FIRST']}×{tile['SECOND']}, {kind}", agree_by

    for channels, side in ((320, 37), (1280, 12), (256, 130)):
        x, (weight, bias, x_bias) = torch.randn(2, channels, side, side), torch.randn(3, channels)
        x = x * torch.logspace(-1, 1, channels)[:, None, None] + 3
        for dtype in (BF16, torch.float32):
            norm: tuple[Any, ...] = (x.to(dtype), 32, weight, bias, 1e-5, True, x_bias, torch.randn(2, channels))

            def normed(given: tuple[Any, ...] = norm) -> str:
                return compare(norm_kernels.launch_group_norm_nhwc(*moved(given)), operators.group_norm_nhwc(*given))

            yield f"group_norm, {channels}, {NAMES[dtype]}", normed
        for dtype in (FP8, INT8):
            norm = (x.to(BF16), 32, weight, bias, 1e-5, True, dtype)

            def quantized(given: tuple[Any, ...] = norm) -> str:
                made = norm_kernels.launch_group_norm_quantize_nhwc(*moved(given))
                return compare(made, operators.group_norm_quantize_nhwc(*given))

            yield f"group_norm, {channels}, to {NAMES[dtype]}", quantized

    # Every tile, too: queries that fill none, keys that fill one, many, or some and a bit of the next.
    tuner = attention_kernels._attention_kernel
    for keys in (1024, 1000, 77) if device == "cuda" else (64, 70, 20):
        fused = torch.randn(2, keys, 2 * 3 * 64).to(BF16)
        q, k, v = (each.unflatten(-1, (3, 64)) for each in (torch.randn(2, 333, 3 * 64).to(BF16), *fused.chunk(2, -1)))
        tried = tuner.configs
        if device == "cuda":
            alone = keys <= attention_kernels.ONE_BLOCK
            tried = attention_kernels._fitting(tuner.configs, {"KEYS": keys}, ALONE=alone, WIDTH=64)
        for config in tried:

            def attended(config: Any = config, given: Any = (q, k, v)) -> str:
                with only(tuner, config):
                    made = attention_kernels.launch_attention(*strided(given, device), 0.2)
                return compare(made, operators.attention(*given, 0.2))

            tile = config.kwargs
            shape = f"{tile['TILES']}×{tile['FIRST']}×{tile['SECOND']}, {config.num_warps} warps"
            yield f"attention, {keys}, {shape}", attended

    for width in (40, 72, 128):  # the first as of Stable Diffusion 1.5, the second of PixArt: tiles are wider
        given = tuple(torch.randn(2, 200, 3, width).to(BF16) for _ in range(3))

        def attended_by(given: Any = given) -> str:
            with only(tuner, tuner.configs[0]):
                made = attention_kernels.launch_attention(*moved(given), 0.2)
            return compare(made, operators.attention(*given, 0.2))

        yield f"attention, heads of {width}", attended_by


@contextmanager
def only(tuner: Any, config: Any) -> Iterator[None]:
    """Have a kernel take this tile, without trying any."""
    tried, tuner.configs = tuner.configs, [config]
    try:
        yield
    finally:
        tuner.configs = tried


def strided(given: tuple[torch.Tensor, ...], device: str) -> list[torch.Tensor]:
    """On the device, at the strides that they have here: `to` would lay out slices anew."""
    moved = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device) for each in given]
    return [there.copy_(here) for there, here in zip(moved, given, strict=True)]


def lost(device: str) -> bool:
    """Whether a kernel went so wrong (an address that isn't there) that every later call would fail, too."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def failed(error: BaseException) -> str:
    return f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny shapes in Triton's interpreter, on a CPU")
    parser.add_argument("--json", type=Path, help="where to write the measurements, anew after each")
    parser.add_argument("--only", default="", help="names, or beginnings of them, separated by commas")
    parser.add_argument("--seconds", type=float, default=110, help="start nothing new after so long")
    options = parser.parse_args()
    start = time.monotonic()
    device = "cpu" if options.check else "cuda"
    if not options.check and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: --check runs tiny shapes in Triton's interpreter")
    if options.check:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from tests import interpreter

        interpreter.mend()
    wanted = tuple(filter(None, options.only.split(",")))

    def skipped(name: str) -> bool:
        return bool(wanted) and not name.startswith(wanted)

    about = {
        "device": "cpu" if options.check else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    record: dict[str, Any] = {**about, "agreements": {}, "measurements": []}

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    print(*about.values(), sep=", ")
    for name, agree in agreements(device):
        if skipped(name):
            continue
        try:
            said = agree()
        except Exception as error:  # one kernel's failure is a finding, not the end
            said = failed(error)
        record["agreements"][name] = said
        print(f"{name:46} {said}", flush=True)
    write()

    columns = f"{'kernel':26}{'shape':20}{'by':28}{'µs':>9}{'GB/s':>8}{'TFLOP/s':>9}{'ratio':>7}"
    print(f"\n{columns}   after {time.monotonic() - start:.0f} s")
    families = (
        *(row_cases, matmul_cases, geglu_cases, attention_cases),
        *(convolution_cases, image_cases, group_norm_cases),
    )
    for case in itertools.chain.from_iterable(family(device, options.check) for family in families):
        if skipped(case.name):
            continue
        if time.monotonic() - start > options.seconds:
            print(f"{case.name:26}{case.shape:20}left out: {options.seconds:.0f} s are over", flush=True)
            continue
        measure(case, device, record["measurements"])
        write()
        if lost(device):
            raise SystemExit(
                f"the device is lost to this process: the rest takes another, without {case.name} (--only)"
            )
    print(f"{time.monotonic() - start:.0f} s")


def measure(case: Case, device: str, measurements: list[dict[str, Any]]) -> None:
    """Time each variant of a case, and print and keep it at once. `ratio` is the first variant's time to its own."""
    try:
        made = [case.make()]
        touched = case.moved or 50e6
        copies = 2 if device == "cpu" else max(2, min(MOST_COPIES, round(CACHE_BYTES / touched)))
        made += [case.make() for _ in range(copies - 1)]
    except Exception as error:
        print(f"{case.name:26}{case.shape:20}{failed(error)}", flush=True)
        measurements.append({"kernel": case.name, "shape": case.shape, "error": failed(error)})
        return
    first = None
    for variant in made[0]:
        row: dict[str, Any] = {"kernel": case.name, "shape": case.shape, "by": variant}
        try:
            seconds = time_calls([each[variant] for each in made], device)
        except Exception as error:
            row["error"] = failed(error)
            print(f"{case.name:26}{case.shape:20}{variant:28}{row['error']}", flush=True)
        else:
            first = first or seconds
            row |= {"us": seconds * 1e6, "gb_per_s": case.moved / seconds / 1e9}
            row |= {"tflop_per_s": case.operations / seconds / 1e12, "copies": len(made)}
            speeds = f"{row['gb_per_s']:8.0f}{'':9}" if case.moved else f"{'':8}{row['tflop_per_s']:9.1f}"
            print(
                f"{case.name:26}{case.shape:20}{variant:28}{row['us']:9.1f}{speeds}{first / seconds:7.2f}", flush=True
            )
        measurements.append(row)


if __name__ == "__main__":
    main()
