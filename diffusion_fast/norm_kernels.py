"""Group norm of images in channels_last as two Triton kernels: one reads for the statistics, one reads and writes.

Importing this module has `group_norm_nhwc` on CUDA tensors go to them. `launch_group_norm_nhwc` starts them. Nothing
here waits for the device, is autotuned or has to be set to zero first, so that a CUDA graph may capture it.

An image is (pixels, channels) in memory. A program has a span of the channels, some whole groups of them, and a part
of the pixels, of which it reads a tile after the other. It leaves a mean and a sum of squared deviations for each of
its groups; every program of the second kernel combines those of its span again, a few KiB from cache, which is quicker
than a third launch.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_fast.kernels import INTERPRETED  # first: it says what it needs where there is no Triton
from diffusion_fast.operators import channels_last, check_group_norm, empty_like_images, group_norm_nhwc

# isort: split
import triton
import triton.language as tl

WARPS = 8
TILE = 4096  # numbers, 16 a thread: two loads of 16 bytes in bf16
STAGES = 3  # tiles of the loop that are on their way or worked on: 16 KiB of shared memory a program
RESIDENT = 3  # programs that a multiprocessor holds at once (80 registers a thread): one wave of them, and no tail
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


def parts(images: int, pixels: int, given: Spans, multiprocessors: int) -> tuple[int, int, int]:
    """Into how many parts the pixels go, the pixels of each but the last, and those of a tile."""
    rows = max(1, TILE // given.block)
    most = MOST_STATISTICS // triton.next_power_of_2(given.groups)
    wanted = max(1, min(most, RESIDENT * multiprocessors // (images * given.count)))
    part = rows * triton.cdiv(triton.cdiv(pixels, wanted), rows)
    return triton.cdiv(pixels, part), part, rows


# Sums of squares of what lies far from zero cancel, so numbers are taken relative to the part's first pixel, channel by
# channel: that is one of the n numbers, so its squared distance from their mean is at most n times their variance, and
# what cancels is at most n units in the last place (n: pixels of a part, 2000 at most in SDXL); of ordinary numbers, a
# few. Parts and channels are then combined by their means and squared deviations, which don't cancel at all.
# Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, https://doi.org/10.2307/2683386
@triton.jit(do_not_specialize=["PIXELS", "PART"])
def _group_norm_statistics_kernel(
    x_ptr, x_bias_ptr, embedding_ptr, statistics_ptr, PIXELS, PART,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BIASED: tl.constexpr, EMBEDDED: tl.constexpr,
):  # fmt: skip
    """Program (span, part, image): means and squared deviations of the span's groups in a part of the pixels."""
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
    within = row[:, None] * CHANNELS + lane[None, :]
    for start in tl.range(0, pixels, ROWS, num_stages=STAGES):
        mask = (row < pixels - start)[:, None] & inside[None, :]
        x = tl.load(x_ptr + within, mask=mask, other=others)
        off = x.to(tl.float32) - wide_origin[None, :]
        total += off
        squares += off * off
        x_ptr += ROWS * CHANNELS
    count = pixels.to(tl.float32)
    off = tl.sum(total, 0)
    deviations = tl.maximum(tl.sum(squares, 0) - off * off / count, 0.0)
    means = wide_origin + off / count
    if BIASED:
        means += tl.load(x_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if EMBEDDED:
        means += tl.load(embedding_ptr + image * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)

    # From channels to groups: which lane is in which.
    group = tl.arange(0, GROUPS)
    member = (lane // PER_GROUP == group[:, None]) & inside[None, :]
    mean = tl.sum(tl.where(member, means[None, :], 0.0), 1) / PER_GROUP
    apart = means[None, :] - mean[:, None]
    deviation = tl.sum(tl.where(member, deviations[None, :] + apart * apart * count, 0.0), 1)
    at = (image * tl.num_programs(0) + span) * tl.num_programs(1) + part
    tl.store(statistics_ptr + at * (2 * GROUPS) + group, mean)
    tl.store(statistics_ptr + at * (2 * GROUPS) + GROUPS + group, deviation)


@triton.jit(do_not_specialize=["PIXELS", "PART"])
def _group_norm_apply_kernel(
    x_ptr, x_bias_ptr, embedding_ptr, statistics_ptr, weight_ptr, bias_ptr, out_ptr, PIXELS, PART, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BIASED: tl.constexpr, EMBEDDED: tl.constexpr,
    PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Program (span, part, image), as of the other kernel: x (PIXELS, CHANNELS) of an image → out, of its layout."""
    span, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    each, group = tl.arange(0, PARTS), tl.arange(0, GROUPS)
    at = (image * tl.num_programs(0) + span) * tl.num_programs(1) + each
    at = at[:, None] * (2 * GROUPS) + group[None, :]
    there = (each < tl.num_programs(1))[:, None]
    means = tl.load(statistics_ptr + at, mask=there, other=0.0)
    deviations = tl.load(statistics_ptr + at + GROUPS, mask=there, other=0.0)
    counts = tl.maximum(tl.minimum(PIXELS - each * PART, PART), 0).to(tl.float32)[:, None]
    count = PIXELS.to(tl.float32)
    mean = tl.sum(means * counts, 0) / count
    apart = means - mean[None, :]
    variance = tl.sum(deviations + apart * apart * (counts * PER_GROUP), 0) / (count * PER_GROUP)

    # From groups to channels, for which all is one multiplication and one addition.
    lane, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    channel = span * WIDTH + lane
    inside = (lane < WIDTH) & (channel < CHANNELS)
    member = lane // PER_GROUP == group[:, None]
    scale = tl.sum(tl.where(member, tl.rsqrt(variance + eps)[:, None], 0.0), 0)
    shift = -tl.sum(tl.where(member, mean[:, None], 0.0), 0)
    if BIASED:
        shift += tl.load(x_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if EMBEDDED:
        shift += tl.load(embedding_ptr + image * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    shift = shift * scale + tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    # Backwards: what the other kernel read last is still in cache.
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
        made = x.to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            made = made / (1.0 + tl.exp(-made))
        tl.store(out_ptr + within, made.to(out_ptr.dtype.element_ty), mask=mask)
        x_ptr -= ROWS * CHANNELS
        out_ptr -= ROWS * CHANNELS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


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
    """`group_norm_nhwc` by its Triton kernels."""
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    out = empty_like_images(x)
    if not out.numel():
        return out
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    shape = spans(channels, groups)
    count, part, rows = parts(images, pixels, shape, _multiprocessors(x.device))
    lanes = triton.next_power_of_2(shape.groups)
    x = channels_last(x)
    x_bias, embedding = (None if given is None else given.contiguous() for given in (x_bias, embedding))
    statistics = torch.empty((images, shape.count, count, 2, lanes), dtype=torch.float32, device=x.device)
    grid = (shape.count, count, images)
    constants: dict[str, Any] = {
        "CHANNELS": channels, "WIDTH": shape.width, "PER_GROUP": channels // groups, "BLOCK": shape.block,
        "GROUPS": lanes, "ROWS": rows, "STAGES": STAGES, "BIASED": x_bias is not None,
        "EMBEDDED": embedding is not None, "num_warps": WARPS,
    }  # fmt: skip
    _group_norm_statistics_kernel[grid](x, x_bias, embedding, statistics, pixels, part, **constants)
    _group_norm_apply_kernel[grid](
        x, x_bias, embedding, statistics, weight.contiguous(), bias.contiguous(), out, pixels, part, eps,
        PARTS=triton.next_power_of_2(count), SILU=silu, **constants,
    )  # fmt: skip
    return out


group_norm_nhwc.register_kernel("cuda")(launch_group_norm_nhwc)
