"""Group norm of images in channels_last as Triton kernels: one reads for the statistics, one reads again and writes.

Importing this module has CUDA tensors go to them. `launch_NAME` starts the kernels of an operation. Nothing here waits
for the device, is autotuned or has to be set to zero first, so that a CUDA graph may capture it.

An image is (pixels, channels) in memory. A program has a span of the channels, some whole groups of them, and a part
of the pixels, of which it reads a tile after the other. It leaves a mean and a sum of squared deviations for each of
its groups; every program of the second kernel combines those of its span again, a few KiB from cache, which is quicker
than a third launch.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_fast.kernels import (
    INTERPRETED,
    _rounded,
    _scale_of,
)  # first: it says what it needs where there is no Triton
from diffusion_fast.operators import (
    SILU_LEAST,
    SILU_LEAST_AT,
    SMALLEST_SCALE,
    channels_last,
    check_group_norm,
    empty_images,
    empty_like_images,
    group_norm_nhwc,
    group_norm_quantize_nhwc,
    is_shifted,
    largest,
)

# isort: split
import triton
import triton.language as tl

WARPS = 8
TILE = 4096  # numbers, 16 a thread: two loads of 16 bytes in bf16
STAGES = 3  # tiles of the loop that are on their way or worked on: 16 KiB of shared memory a program
# Programs that a multiprocessor holds at once: one wave of them, and no tail. Those that look for the largest number
# take 112 registers a thread, the others 80.
RESIDENT, RESIDENT_LIMITED = 3, 2
MOST_STATISTICS = 4096  # parts × groups, which a program of the second kernel holds in registers at its start
LEAST_BLOCK = 64  # channels: a line of 128 bytes in bf16


@dataclass(frozen=True)
class Spans:
    """How channels are dealt out: `width` of them (`groups` whole groups) a program, in `block` lanes."""

    groups: int
    width: int
    block: int
    count: int


@functools.cache
def spans(channels: int, groups: int) -> Spans:
    """The spans that leave fewest lanes without a channel, and of those the narrowest.

    Blocks of lanes are powers of two, and SDXL's channels (320, 640, 960, ...) are not: 320 would take 512 lanes, three
    spans of 120 channels take 384. Narrow spans have few groups, and many parts. They start at a multiple of eight
    channels where that can be, for loads of 16 bytes.
    """
    per_group = channels // groups
    multiple = 8 if channels % 8 == 0 else 1
    tried = []
    for taken in range(1, groups + 1):
        width = taken * per_group
        if width % multiple == 0:
            block = max(LEAST_BLOCK, triton.next_power_of_2(width))
            tried.append(Spans(taken, width, block, triton.cdiv(groups, taken)))
    return min(tried, key=lambda each: (each.count * each.block, each.block))


def parts(images: int, pixels: int, given: Spans, programs: int) -> tuple[int, int, int]:
    """Into how many parts the pixels go, the pixels of each but the last, and those of a tile."""
    rows = max(1, TILE // given.block)
    most = MOST_STATISTICS // triton.next_power_of_2(given.groups)
    wanted = max(1, min(most, programs // (images * given.count)))
    part = rows * triton.cdiv(triton.cdiv(pixels, wanted), rows)
    return triton.cdiv(pixels, part), part, rows


# Sums of squares of what lies far from zero cancel, so numbers are taken relative to the part's first pixel, channel by
# channel: that is one of the n numbers, so its squared distance from their mean is at most n times their variance, and
# what cancels is at most n units in the last place (n: pixels of a part, some 5,300 at most in SDXL); of ordinary
# numbers, a few. Parts and channels are then combined by their means and squared deviations, which don't cancel at all.
# Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, https://doi.org/10.2307/2683386
@triton.jit(do_not_specialize=["PIXELS", "PART"])
def _group_norm_statistics_kernel(
    x_ptr, x_bias_ptr, embedding_ptr, statistics_ptr, limits_ptr, PIXELS, PART,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BIASED: tl.constexpr, EMBEDDED: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Program (span, part, image): means and squared deviations of the span's groups in a part of the pixels.

    Where it is LIMITED also the least and the largest x of each channel there.
    """
    span, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    channel = span * WIDTH + lane
    inside = (lane < WIDTH) & (channel < CHANNELS)
    first = part * PART
    pixels = tl.minimum(PIXELS - first, PART)
    x_ptr += (image.to(tl.int64) * PIXELS + first) * CHANNELS + span * WIDTH
    origin = tl.load(x_ptr + lane, mask=inside, other=0.0)
    wide_origin = origin.to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    others = tl.broadcast_to(origin[None, :], (ROWS, BLOCK))
    least = tl.broadcast_to(wide_origin[None, :], (ROWS, BLOCK))
    largest = least
    within = row[:, None] * CHANNELS + lane[None, :]
    for start in tl.range(0, pixels, ROWS, num_stages=STAGES):
        mask = (row < pixels - start)[:, None] & inside[None, :]
        x = tl.load(x_ptr + within, mask=mask, other=others)
        wide = x.to(tl.float32)
        off = wide - wide_origin[None, :]
        total += off
        squares += off * off
        if LIMITED:
            least = tl.minimum(least, wide)
            largest = tl.maximum(largest, wide)
        x_ptr += ROWS * CHANNELS
    count = pixels.to(tl.float32)
    off = tl.sum(total, 0)
    deviations = tl.maximum(tl.sum(squares, 0) - off * off / count, 0.0)
    means = wide_origin + off / count
    if BIASED:
        means += tl.load(x_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if EMBEDDED:
        means += tl.load(embedding_ptr + image * EMBEDDED + channel, mask=inside, other=0.0).to(tl.float32)

    # From channels to groups: which lane is in which.
    group = tl.arange(0, GROUPS)
    member = (lane // PER_GROUP == group[:, None]) & inside[None, :]
    mean = tl.sum(tl.where(member, means[None, :], 0.0), 1) / PER_GROUP
    apart = means[None, :] - mean[:, None]
    deviation = tl.sum(tl.where(member, deviations[None, :] + apart * apart * count, 0.0), 1)
    at = (image * tl.num_programs(0) + span) * tl.num_programs(1) + part
    tl.store(statistics_ptr + at * (2 * GROUPS) + group, mean)
    tl.store(statistics_ptr + at * (2 * GROUPS) + GROUPS + group, deviation)
    if LIMITED:
        tl.store(limits_ptr + at * (2 * BLOCK) + lane, tl.min(least, 0))
        tl.store(limits_ptr + at * (2 * BLOCK) + BLOCK + lane, tl.max(largest, 0))


@triton.jit
def _affine(
    x_bias_ptr, embedding_ptr, statistics_ptr, weight_ptr, bias_ptr, span, spans, parts, image, PIXELS, PART, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    BIASED: tl.constexpr, EMBEDDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What each channel of a span is multiplied by and what is added then: all that a group norm is."""
    each, group = tl.arange(0, PARTS), tl.arange(0, GROUPS)
    at = ((image * spans + span) * parts + each)[:, None] * (2 * GROUPS) + group[None, :]
    there = (each < parts)[:, None]
    means = tl.load(statistics_ptr + at, mask=there, other=0.0)
    deviations = tl.load(statistics_ptr + at + GROUPS, mask=there, other=0.0)
    counts = tl.maximum(tl.minimum(PIXELS - each * PART, PART), 0).to(tl.float32)[:, None]
    count = PIXELS.to(tl.float32)
    mean = tl.sum(means * counts, 0) / count
    apart = means - mean[None, :]
    variance = tl.sum(deviations + apart * apart * (counts * PER_GROUP), 0) / (count * PER_GROUP)

    # From groups to channels.
    lane = tl.arange(0, BLOCK)
    channel = span * WIDTH + lane
    inside = (lane < WIDTH) & (channel < CHANNELS)
    member = lane // PER_GROUP == group[:, None]
    factor = tl.sum(tl.where(member, tl.rsqrt(variance + eps)[:, None], 0.0), 0)
    addend = -tl.sum(tl.where(member, mean[:, None], 0.0), 0)
    if BIASED:
        addend += tl.load(x_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if EMBEDDED:
        addend += tl.load(embedding_ptr + image * EMBEDDED + channel, mask=inside, other=0.0).to(tl.float32)
    factor *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return factor, addend * factor + tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _write_span(
    x_ptr, out_ptr, span, part, image, factor, addend, shift, inverse, PIXELS, PART, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Read a part of the pixels a second time and write it. Backwards: what was read last is still in cache."""
    lane, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    inside = (lane < WIDTH) & (span * WIDTH + lane < CHANNELS)
    first = part * PART
    pixels = tl.minimum(PIXELS - first, PART)
    last = (pixels - 1) // ROWS * ROWS
    offset = (image.to(tl.int64) * PIXELS + first + last) * CHANNELS + span * WIDTH
    x_ptr += offset
    out_ptr += offset
    within = row[:, None] * CHANNELS + lane[None, :]
    for done in tl.range(0, pixels, ROWS, num_stages=STAGES):
        mask = (row < pixels - last + done)[:, None] & inside[None, :]
        x = tl.load(x_ptr + within, mask=mask, other=0.0, eviction_policy="evict_first")
        made = x.to(tl.float32) * factor[None, :] + addend[None, :]
        if SILU:
            made = _silu(made)
        if QUANTIZED:
            tl.store(out_ptr + within, _rounded((made - shift) * inverse, out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(out_ptr + within, made.to(out_ptr.dtype.element_ty), mask=mask)
        x_ptr -= ROWS * CHANNELS
        out_ptr -= ROWS * CHANNELS


@triton.jit(do_not_specialize=["PIXELS", "PART"])
def _group_norm_apply_kernel(
    x_ptr, x_bias_ptr, embedding_ptr, statistics_ptr, weight_ptr, bias_ptr, out_ptr, PIXELS, PART, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BIASED: tl.constexpr, EMBEDDED: tl.constexpr, PARTS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Program (span, part, image), as of the other kernel: x (PIXELS, CHANNELS) of an image → out, of its layout."""
    span, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor, addend = _affine(
        x_bias_ptr, embedding_ptr, statistics_ptr, weight_ptr, bias_ptr, span, tl.num_programs(0), tl.num_programs(1),
        image, PIXELS, PART, eps, CHANNELS, WIDTH, PER_GROUP, BLOCK, GROUPS, BIASED, EMBEDDED, PARTS,
    )  # fmt: skip
    _write_span(
        x_ptr, out_ptr, span, part, image, factor, addend, 0.0, 1.0, PIXELS, PART, CHANNELS, WIDTH, BLOCK, ROWS, STAGES,
        SILU, False,
    )  # fmt: skip


# Quantized, an image has one scale, so that its least and its largest number have to be known before anything is
# written. What a channel's x becomes is monotone up to SiLU, which falls to LEAST_AT and rises from there: the largest
# y is what the least or the largest x becomes, and so is the least y, unless x comes below LEAST_AT: then LEAST counts
# as reached.
LEAST_AT = tl.constexpr(SILU_LEAST_AT)
LEAST = tl.constexpr(SILU_LEAST)


@triton.jit(do_not_specialize=["PIXELS", "PART"])
def _group_norm_limits_kernel(
    x_bias_ptr, embedding_ptr, statistics_ptr, limits_ptr, weight_ptr, bias_ptr, affine_ptr, reached_ptr,
    PARTS_THERE, PIXELS, PART, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    BIASED: tl.constexpr, EMBEDDED: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Program (span, image): factor and addend of each channel, and the least and the largest y of the span."""
    span, spans, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    factor, addend = _affine(
        x_bias_ptr, embedding_ptr, statistics_ptr, weight_ptr, bias_ptr, span, spans, PARTS_THERE, image, PIXELS, PART,
        eps, CHANNELS, WIDTH, PER_GROUP, BLOCK, GROUPS, BIASED, EMBEDDED, PARTS,
    )  # fmt: skip
    lane, each = tl.arange(0, BLOCK), tl.arange(0, TOGETHER)
    least = tl.full((TOGETHER, BLOCK), float("inf"), dtype=tl.float32)
    largest = tl.full((TOGETHER, BLOCK), float("-inf"), dtype=tl.float32)
    for start in range(0, PARTS_THERE, TOGETHER):
        at = ((image * spans + span) * PARTS_THERE + start + each)[:, None] * (2 * BLOCK) + lane[None, :]
        there = (start + each < PARTS_THERE)[:, None]
        least = tl.minimum(least, tl.load(limits_ptr + at, mask=there, other=float("inf")))
        largest = tl.maximum(largest, tl.load(limits_ptr + at + BLOCK, mask=there, other=float("-inf")))
    one, other = tl.min(least, 0) * factor + addend, tl.max(largest, 0) * factor + addend
    if SILU:
        fell = tl.minimum(one, other) < LEAST_AT
        one, other = _silu(one), _silu(other)
    low, high = tl.minimum(one, other), tl.maximum(one, other)
    if SILU:
        low = tl.where(fell, LEAST, low)
    inside = (lane < WIDTH) & (span * WIDTH + lane < CHANNELS)
    at = image * spans + span
    # Minima pass over what is no number. A group that has one has no mean, and so no factor.
    unknown = tl.max((inside & (factor != factor)).to(tl.int32)) > 0
    low, high = tl.min(tl.where(inside, low, float("inf"))), tl.max(tl.where(inside, high, float("-inf")))
    tl.store(reached_ptr + 2 * at, tl.where(unknown, float("nan"), low))
    tl.store(reached_ptr + 2 * at + 1, high)
    tl.store(affine_ptr + at * (2 * BLOCK) + lane, factor)
    tl.store(affine_ptr + at * (2 * BLOCK) + BLOCK + lane, addend)


@triton.jit(do_not_specialize=["PIXELS", "PART"])
def _group_norm_quantize_kernel(
    x_ptr, affine_ptr, reached_ptr, q_ptr, scale_ptr, shift_ptr, PIXELS, PART,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    SPANS: tl.constexpr, SILU: tl.constexpr, SHIFTED: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Program (span, part, image): x (PIXELS, CHANNELS) of an image → q, of its layout, the image's scale and shift."""
    span, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, lane, each = image * tl.num_programs(0), tl.arange(0, BLOCK), tl.arange(0, SPANS)
    there = each < tl.num_programs(0)
    low = tl.load(reached_ptr + 2 * (at + each), mask=there, other=float("inf"))
    unknown = tl.max((low != low).to(tl.int32)) > 0
    low, high = tl.min(low), tl.max(tl.load(reached_ptr + 2 * (at + each) + 1, mask=there, other=float("-inf")))
    shift = (low + high) / 2 if SHIFTED else 0.0
    scale, inverse = _scale_of(tl.maximum(high - shift, shift - low), LARGEST, SMALLEST)
    if (span == 0) & (part == 0):
        tl.store(scale_ptr + image, tl.where(unknown, float("nan"), scale))
        tl.store(shift_ptr + image, shift)
    factor = tl.load(affine_ptr + (at + span) * (2 * BLOCK) + lane)
    addend = tl.load(affine_ptr + (at + span) * (2 * BLOCK) + BLOCK + lane)
    _write_span(
        x_ptr, q_ptr, span, part, image, factor, addend, shift, inverse, PIXELS, PART, CHANNELS, WIDTH, BLOCK, ROWS,
        STAGES, SILU, True,
    )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Work:
    """What the kernels of one call are given in common."""

    x: torch.Tensor  # in channels_last
    x_bias: torch.Tensor | None
    embedding: torch.Tensor | None
    statistics: torch.Tensor  # (images, spans, parts, 2, groups of a span)
    pixels: int
    part: int
    grid: tuple[int, int, int]  # spans, parts, images
    constants: dict[str, Any]  # EMBEDDED: from an image's embedding to the next one's; 0: there is none
    tiles: dict[str, int]  # constants of those that go through the pixels


def _work(
    x: torch.Tensor, groups: int, x_bias: torch.Tensor | None, embedding: torch.Tensor | None, resident: int
) -> Work:
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    shape = spans(channels, groups)
    count, part, rows = parts(images, pixels, shape, resident * _multiprocessors(x.device))
    lanes = triton.next_power_of_2(shape.groups)
    if embedding is not None and (embedding.stride(1) != 1 or not embedding.stride(0)):
        embedding = embedding.contiguous()
    constants = {
        "CHANNELS": channels, "WIDTH": shape.width, "PER_GROUP": channels // groups, "BLOCK": shape.block,
        "GROUPS": lanes, "BIASED": x_bias is not None, "EMBEDDED": 0 if embedding is None else embedding.stride(0),
    }  # fmt: skip
    return Work(
        channels_last(x),
        None if x_bias is None else x_bias.contiguous(),
        embedding,
        torch.empty((images, shape.count, count, 2, lanes), dtype=torch.float32, device=x.device),
        pixels,
        part,
        (shape.count, count, images),
        constants,
        {"ROWS": rows, "STAGES": STAGES, "num_warps": WARPS},
    )


def launch_group_norm_nhwc(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
) -> torch.Tensor:
    """`group_norm_nhwc` by its Triton kernels: two launches."""
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    out = empty_like_images(x)
    if not out.numel():
        return out
    work = _work(x, groups, x_bias, embedding, RESIDENT)
    added, constants = (work.x_bias, work.embedding), work.constants | work.tiles
    _group_norm_statistics_kernel[work.grid](
        work.x, *added, work.statistics, None, work.pixels, work.part, LIMITED=False, **constants
    )
    _group_norm_apply_kernel[work.grid](
        work.x, *added, work.statistics, weight.contiguous(), bias.contiguous(), out, work.pixels, work.part, eps,
        PARTS=triton.next_power_of_2(work.grid[1]), SILU=silu, **constants,
    )  # fmt: skip
    return out


group_norm_nhwc.register_kernel("cuda")(launch_group_norm_nhwc)


def launch_group_norm_quantize_nhwc(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
    x_bias: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`group_norm_quantize_nhwc` by its Triton kernels: three launches, the one in between on what is in cache."""
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    q, scale = empty_images(x, dtype)
    shift = torch.empty_like(scale)
    if not q.numel():
        return q, scale, shift
    work = _work(x, groups, x_bias, embedding, RESIDENT_LIMITED)
    images, spans, parts = len(x), work.grid[0], work.grid[1]
    block = work.constants["BLOCK"]
    limits, affine, reached = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((images, spans, parts, 2, block), (images, spans, 2, block), (images, spans, 2))
    )
    weight, bias = weight.contiguous(), bias.contiguous()
    added, tiles = (work.x_bias, work.embedding), work.tiles
    _group_norm_statistics_kernel[work.grid](
        work.x, *added, work.statistics, limits, work.pixels, work.part, LIMITED=True, **work.constants, **tiles
    )
    _group_norm_limits_kernel[(spans, images)](
        *added, work.statistics, limits, weight, bias, affine, reached, parts, work.pixels, work.part, eps,
        PARTS=triton.next_power_of_2(parts), SILU=silu, TOGETHER=16, num_warps=WARPS, **work.constants,
    )  # fmt: skip
    _group_norm_quantize_kernel[work.grid](
        work.x, affine, reached, q, scale, shift, work.pixels, work.part, CHANNELS=x.shape[1],
        WIDTH=work.constants["WIDTH"], BLOCK=block, SPANS=triton.next_power_of_2(spans), SILU=silu,
        SHIFTED=is_shifted(silu, dtype), LARGEST=largest(dtype), SMALLEST=SMALLEST_SCALE, **tiles,
    )  # fmt: skip
    return q, scale, shift


group_norm_quantize_nhwc.register_kernel("cuda")(launch_group_norm_quantize_nhwc)
