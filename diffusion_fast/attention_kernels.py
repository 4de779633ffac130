"""Attention as a Triton kernel: scores never leave the chip (FlashAttention, https://arxiv.org/abs/2307.08691).

Importing this module has CUDA tensors go to it. No memory is set to zero first, and nothing waits for the device but
the first call of a shape, which is autotuned.
"""

import math
from typing import Any

import torch

from diffusion_fast.kernels import INTERPRETED, _at_once, _time  # first: it says what it needs where there is no Triton
from diffusion_fast.operators import attention, check_attention

# isort: split
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# A program has FIRST queries of one head and goes through its keys and values, SECOND at a time, which Hopper's copy
# engine brings. Descriptors are of (batch, tokens, heads, dim), so that slices of a fused projection are read where
# they lie, and what is beyond the tokens, or beyond a head that is no power of two wide, arrives as zero.
#
# What limits it, for heads of 64, is not the tensor cores: a tile of 128 by 128 takes them 1,024 cycles, and the
# exponentials as many. Both are kept busy by programs beside each other on a multiprocessor, of which one multiplies
# while the other exponentiates, and by the second product, waited for only when the next block's first one is through.
# Registers decide how many programs there are: heads of 64 take 108 to 190 a thread. FlashAttention-3's overlap within
# a program (https://arxiv.org/abs/2407.08608) isn't to be had from Triton 3.6: with scores kept for the next round, the
# assembler has each product wait for the one before. Neither are its specialized warps: Triton splits the queries
# among them, but not the queries' descriptor.
#
# Queries go through registers: their tile is reshaped, and the product's first side is not taken from shared memory
# then. 16 or 32 registers a thread, in exchange for half of what the first product reads there.
#
# One block of keys (a prompt's) needs no loop over them, and no sums to be scaled again. There it is copying that takes
# the time, 32 KiB of keys and values for the 8 or 16 of queries, and waiting for it: a program keeps the block for
# TILES of queries, each of which is copied while the one before is worked on.
ONE_BLOCK = 32 if INTERPRETED else 128  # keys


def _set_tiles(arguments: dict[str, Any]) -> None:
    for name, side in (("q", "FIRST"), ("k", "SECOND"), ("v", "SECOND")):
        arguments[name].block_shape = [1, arguments[side], 1, arguments["WIDTH"]]


def _fitting(candidates: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """One block has to hold all keys, and heads of 128 leave registers for 16 rows a warp, not for 32."""
    if constants["ALONE"]:
        least = max(64, triton.next_power_of_2(arguments["KEYS"]))
        candidates = [each for each in candidates if each.kwargs["SECOND"] == least]
    else:
        candidates = [each for each in candidates if each.kwargs["TILES"] == 1]
    rows = 32 if constants["WIDTH"] <= 64 else 16
    return [each for each in candidates if each.kwargs["FIRST"] <= rows * each.num_warps]


@triton.autotune(
    configs=[
        triton.Config(
            {"FIRST": first, "SECOND": second, "TILES": tiles}, num_warps=warps, num_stages=stages, pre_hook=_set_tiles
        )
        for first, second, tiles, warps, stages in (
            (
                (128, 64, 1, 8, 3),
                (128, 64, 1, 4, 3),
                (128, 128, 1, 8, 2),
                (64, 128, 1, 4, 2),
                (64, 64, 1, 4, 3),
                *((64, second, tiles, 4, 3) for second in (64, 128) for tiles in (2, 4)),
            )
            if not INTERPRETED
            else ((32, 32, 2, 4, 1),)
        )
    ],
    key=["QUERIES", "KEYS", "HEADS", "DIM"],
    prune_configs_by=_at_once(lambda: _attention_kernel, _fitting),  # type: ignore[has-type]
    do_bench=_time,
)
@triton.jit(do_not_specialize=["QUERIES", "KEYS", "HEADS"])
def _attention_kernel(
    q, k, v, out, scale, QUERIES, KEYS, HEADS, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ALONE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """q (BATCH, QUERIES, HEADS, DIM), k and v (BATCH, KEYS, HEADS, DIM) → out as q; scale is for exponents of two.

    Heads are WIDTH wide as a tile. KEYS are ALONE in one block, for TILES of queries, or in many.
    """
    # A head's queries first: its keys and values stay in the cache that all multiprocessors share.
    tiles = tl.cdiv(QUERIES, FIRST * TILES if ALONE else FIRST)
    head, part = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = head // HEADS, head % HEADS
    if ALONE:
        keys = k.load([batch, 0, head, 0]).reshape(SECOND, WIDTH)
        values = v.load([batch, 0, head, 0]).reshape(SECOND, WIDTH)
        there = (tl.arange(0, SECOND) < KEYS)[None, :]
        for tile in range(0, TILES):
            first = (part * TILES + tile) * FIRST
            queries = q.load([batch, first, head, 0]).reshape(FIRST, WIDTH)
            scores = tl.where(there, tl.dot(queries, keys.T), float("-inf"))
            weights = tl.exp2(scores * scale - (tl.max(scores, 1) * scale)[:, None])
            total = tl.sum(weights, 1)
            _store(out, tl.dot(weights.to(v.dtype), values), total, batch, first, head, QUERIES, HEADS, DIM)
    else:
        first = part * FIRST
        queries = q.load([batch, first, head, 0]).reshape(FIRST, WIDTH)
        most = tl.full((FIRST,), float("-inf"), dtype=tl.float32)  # of the scores so far, times scale
        total = tl.zeros((FIRST,), dtype=tl.float32)  # of the weights
        made = tl.zeros((FIRST, WIDTH), dtype=tl.float32)
        whole = KEYS // SECOND * SECOND
        for start in range(0, whole, SECOND):
            scores = tl.dot(queries, k.load([batch, start, head, 0]).reshape(SECOND, WIDTH).T)
            weights, most, total, shrunk = _weights(scores, scale, most, total)
            values = v.load([batch, start, head, 0]).reshape(SECOND, WIDTH)
            made = tl.dot(weights.to(v.dtype), values, made * shrunk[:, None])
        # A block that ends beyond the keys. Reading queries after the loop, too, has the assembler keep them: else
        # (12.8 and 13.0, blocks of 64 keys) their registers hold the first round's weights from then on, and every
        # later round multiplies weights by keys.
        if whole < KEYS:
            scores = tl.dot(queries, k.load([batch, whole, head, 0]).reshape(SECOND, WIDTH).T)
            scores = tl.where((whole + tl.arange(0, SECOND) < KEYS)[None, :], scores, float("-inf"))
            weights, most, total, shrunk = _weights(scores, scale, most, total)
            values = v.load([batch, whole, head, 0]).reshape(SECOND, WIDTH)
            made = tl.dot(weights.to(v.dtype), values, made * shrunk[:, None])
        _store(out, made, total, batch, first, head, QUERIES, HEADS, DIM)


@triton.jit
def _store(out, made, total, batch, first, head, QUERIES, HEADS, DIM: tl.constexpr):
    """Sums (FIRST, WIDTH) over the sum of their weights, as far as there are queries and a head is wide."""
    made *= (1 / total)[:, None]
    row, column = first + tl.arange(0, made.shape[0]), tl.arange(0, made.shape[1])
    at = out + (batch.to(tl.int64) * QUERIES + row)[:, None] * (HEADS * DIM) + head * DIM + column[None, :]
    tl.store(at, made.to(out.dtype.element_ty), mask=(row < QUERIES)[:, None] & (column < DIM)[None, :])


@triton.jit
def _weights(scores, scale, most, total):
    """A block's weights, and by which factor what was made of the blocks before it shrinks."""
    now = tl.maximum(most, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - now[:, None])
    shrunk = tl.exp2(most - now)
    return weights, now, total * shrunk + tl.sum(weights, 1), shrunk


def _described(tensor: torch.Tensor) -> TensorDescriptor:
    """A descriptor of (batch, tokens, heads, dim), whose tile the autotuner's hook will fill in.

    A copy is made of what the copy engine can't read: it wants an address and strides in multiples of 16 bytes.
    """
    item, strides = tensor.element_size(), list(tensor.stride())
    for i in (2, 1, 0):
        if tensor.shape[i] == 1:  # torch leaves the stride open, the copy engine doesn't
            strides[i] = strides[i + 1] * tensor.shape[i + 1]
    if tensor.data_ptr() % 16 or strides[3] != 1 or any(each <= 0 or each * item % 16 for each in strides[:3]):
        return _described(tensor.clone(memory_format=torch.contiguous_format))
    return TensorDescriptor(tensor, list(tensor.shape), strides, [1] * 4)


def launch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`attention` by its Triton kernel. A copy is made of what doesn't begin and go on in multiples of 16 bytes."""
    check_attention(q, k, v, scale)
    batch, queries, heads, dimension = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():

        def programs(chosen: dict[str, Any]) -> tuple[int]:
            tiles = chosen["TILES"] if chosen["ALONE"] else 1
            return (batch * heads * triton.cdiv(queries, chosen["FIRST"] * tiles),)

        _attention_kernel[programs](
            _described(q), _described(k), _described(v), out, scale * math.log2(math.e), queries, keys, heads,
            DIM=dimension, WIDTH=max(32, triton.next_power_of_2(dimension)), ALONE=keys <= ONE_BLOCK,
        )  # fmt: skip
    return out


attention.register_kernel("cuda")(launch_attention)
