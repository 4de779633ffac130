"""The operations of operators.py as Triton kernels: what Inductor writes in two passes, or not at all.

Importing this module has CUDA tensors go to them. `launch_NAME` starts the kernel of an operation. Nothing here waits
for the device, but for the first call of a shape that is autotuned.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton import AsyncCompileMode
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "diffusion_fast.kernels needs Triton 3.6 or later (pip install 'triton>=3.6', on Linux)"
    ) from error

from diffusion_fast.operators import (
    SMALLEST_SCALE,
    TOGETHER,
    Quantized,
    channels_last,
    check_length,
    check_linear_geglu,
    check_matmul,
    check_scaled_geglu,
    check_shift,
    convolution_nhwc,
    convolved_shape,
    empty_gated,
    empty_images,
    empty_rows,
    geglu_quantize_rows,
    half_of,
    largest,
    layer_norm_quantize_rows,
    linear_geglu,
    quantize_image,
    quantize_rows,
    scaled_matmul,
    scaled_matmul_geglu,
)


# Rows, one program each, held in registers: read once, written once.
#
# Widths of SDXL (640, 1280, 2560, 5120) are no powers of two, and Triton's blocks are: 2560 in a block of 4096 would
# compute 38% of its lanes for nothing, and GELU makes lanes dear. So a row is two blocks, HEAD and TAIL: 2048 + 512,
# 4096 + 1024, and for a power of two HEAD alone (TAIL 0). Only the TAIL ever needs a mask.
#
# Registers: a warp for every 512 columns of HEAD gives a thread 16 + at most 16 columns (SDXL: 16 + 4), that is two
# 16-byte loads of bf16 for each operand. GEGLU's two operands are 2 × 16 packed registers at most, their product 32 in
# fp32, a row of SDXL's takes 40 in all: far from the 255 that a thread may have, and so few that each multiprocessor
# holds its fill of rows, of which one loads while another computes. (tests/test_kernels_hopper.py reads them from the
# machine code. A row beyond 8192 columns stays with 16 warps and takes more of them.)
def _row_shape(columns: int) -> dict[str, int]:
    """How a row of so many columns is laid out: its two blocks and the warps that hold it."""
    head = 1 << (columns.bit_length() - 1)
    tail = triton.next_power_of_2(columns - head) if columns > head else 0
    return {"COLUMNS": columns, "HEAD": head, "TAIL": tail, "num_warps": max(1, min(16, head // 512))}


@triton.jit
def _scale_of(amax, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale and its inverse, by exact divisions, so that every device computes the same."""
    scale = tl.maximum(tl.div_rn(amax, LARGEST), SMALLEST)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _rounded(scaled, dtype: tl.constexpr):
    """To the nearest number of the format. fp8 needs no clamp: an ulp beyond 448 at most, and below 464 becomes 448."""
    if dtype == tl.int8:
        # Plain conversion would truncate, and slowly. At 1.5 * 2**23 floats are integers: adding it rounds to nearest,
        # ties to even, and leaves the integer in the lowest bits.
        clamped = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        return (clamped + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return scaled.to(dtype)


@triton.jit
def _store_row(
    q_ptr, scale_ptr, row, head, tail, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Quantize and write one row, given as fp32 blocks; the tail is zero beyond the row."""
    amax = tl.max(tl.abs(head))
    if TAIL:
        amax = tl.maximum(amax, tl.max(tl.abs(tail)))
    scale, inverse = _scale_of(amax, LARGEST, SMALLEST)
    tl.store(scale_ptr + row, scale)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_ptr += row * COLUMNS
    tl.store(q_ptr + tl.arange(0, HEAD), _rounded(head * inverse, dtype))
    if TAIL:
        at = HEAD + tl.arange(0, TAIL)
        tl.store(q_ptr + at, _rounded(tail * inverse, dtype), mask=at < COLUMNS)


@triton.jit
def _read(pointers):
    """What is read once and never again: the cache should keep what the next kernel reads instead."""
    return tl.load(pointers, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _read_masked(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * COLUMNS
    head = _read(x_ptr + tl.arange(0, HEAD))
    tail = head
    if TAIL:
        at = HEAD + tl.arange(0, TAIL)
        tail = _read_masked(x_ptr + at, at < COLUMNS)
    _store_row(q_ptr, scale_ptr, row, head, tail, COLUMNS, HEAD, TAIL, LARGEST, SMALLEST)


@triton.jit
def _gelu(x):
    """x Φ(x), within 6e-7 of exact (float's own rounding included), at half the instructions of the library's erf.

    x Φ(x) = max(x, 0) - |x| Φ(-|x|), and log2 Φ(-a) is so smooth that a polynomial of degree 5 in a, minimax for the
    error of the product, will do. Its leading coefficient is negative: far out the power is 0, as it should be.
    """
    a = tl.abs(x)
    exponent = a * -0.0004881018518588424 + 0.007198716771794166
    exponent = exponent * a - 0.05214662860182213
    exponent = exponent * a - 0.45959584690381217
    exponent = exponent * a - 1.1510005418166183
    exponent = exponent * a - 1.0
    return tl.maximum(x, 0.0) - a * tl.exp2(exponent)


@triton.jit
def _gated(hidden, gate):
    return hidden * _gelu(gate)


@triton.jit
def _geglu_quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * (2 * COLUMNS)
    at = tl.arange(0, HEAD)
    hidden, gate = _read(x_ptr + at), _read(x_ptr + COLUMNS + at)
    if TAIL:
        tail_at = HEAD + tl.arange(0, TAIL)
        mask = tail_at < COLUMNS
        tail = _gated(_read_masked(x_ptr + tail_at, mask), _read_masked(x_ptr + COLUMNS + tail_at, mask))
    head = _gated(hidden, gate)
    if not TAIL:
        tail = head
    _store_row(q_ptr, scale_ptr, row, head, tail, COLUMNS, HEAD, TAIL, LARGEST, SMALLEST)


@triton.jit
def _layer_norm_quantize_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, q_ptr, scale_ptr, eps, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * COLUMNS
    at = tl.arange(0, HEAD)
    head = _read(x_ptr + at)
    tail = head
    total = tl.sum(head)
    if TAIL:
        tail_at = HEAD + tl.arange(0, TAIL)
        mask = tail_at < COLUMNS
        tail = _read_masked(x_ptr + tail_at, mask)
        total += tl.sum(tail)
    mean = total / COLUMNS
    # The row is at hand: the squares of differences, which don't cancel as E[x²] - E[x]² would.
    head -= mean
    squares = tl.sum(head * head)
    if TAIL:
        tail = tl.where(mask, tail - mean, 0.0)
        squares += tl.sum(tail * tail)
    deviation = tl.rsqrt(squares / COLUMNS + eps)
    head = head * deviation * tl.load(weight_ptr + at).to(tl.float32) + tl.load(bias_ptr + at).to(tl.float32)
    if TAIL:
        weight = tl.load(weight_ptr + tail_at, mask=mask, other=0.0).to(tl.float32)
        tail = tail * deviation * weight + tl.load(bias_ptr + tail_at, mask=mask, other=0.0).to(tl.float32)
    _store_row(q_ptr, scale_ptr, row, head, tail, COLUMNS, HEAD, TAIL, LARGEST, SMALLEST)


def _limits(dtype: torch.dtype) -> dict[str, float]:
    return {"LARGEST": largest(dtype), "SMALLEST": SMALLEST_SCALE}


def launch_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """`quantize_rows` by its Triton kernel. A copy is made of an x that isn't contiguous."""
    q, scale = empty_rows(x, x.shape[-1], dtype)
    if q.numel():
        shape = _row_shape(x.shape[-1])
        _quantize_rows_kernel[(len(scale),)](x.contiguous(), q, scale, **shape, **_limits(dtype))
    return q, scale


def launch_geglu_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """`geglu_quantize_rows` by its Triton kernel. A copy is made of an x that isn't contiguous."""
    columns = half_of(x)
    q, scale = empty_rows(x, columns, dtype)
    if q.numel():
        shape = _row_shape(columns)
        _geglu_quantize_rows_kernel[(len(scale),)](x.contiguous(), q, scale, **shape, **_limits(dtype))
    return q, scale


def launch_layer_norm_quantize_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> Quantized:
    """`layer_norm_quantize_rows` by its Triton kernel. A copy is made of an x that isn't contiguous."""
    check_length("the layer norm's weight", weight, x.shape[-1])
    check_length("the layer norm's bias", bias, x.shape[-1])
    q, scale = empty_rows(x, x.shape[-1], dtype)
    if q.numel():
        _layer_norm_quantize_rows_kernel[(len(scale),)](
            x.contiguous(), weight.contiguous(), bias.contiguous(), q, scale, eps,
            **_row_shape(x.shape[-1]), **_limits(dtype),
        )  # fmt: skip
    return q, scale


quantize_rows.register_kernel("cuda")(launch_quantize_rows)

geglu_quantize_rows.register_kernel("cuda")(launch_geglu_quantize_rows)

layer_norm_quantize_rows.register_kernel("cuda")(launch_layer_norm_quantize_rows)

# Products and convolutions. Their tiles are brought into shared memory by Hopper's copy engine (a "tensor descriptor"
# says where from), which needs no registers, no address arithmetic and no masks: what lies outside a tensor arrives as
# zero. It wants addresses and strides in multiples of 16 bytes. https://triton-lang.org/main/getting-started/tutorials/
# 09-persistent-matmul.html has the pattern: an autotuner's hook writes each candidate's tile into the descriptors.
INTERPRETED = triton.knobs.runtime.interpret


def _candidates(hook: Any, *tried: tuple[int, int, int, int, int], **constants: Any) -> list[Any]:
    """What is timed at the first call of a shape: the two sides of a tile, the bytes of its depth, warps, stages.

    128 bytes of depth are a full row of shared memory's banks. Stages × (side + side) × depth has to stay below
    227 KiB, or half of that for two programs a multiprocessor. The interpreter has nothing to time and takes one small
    tile.
    """
    return [
        triton.Config(
            {"FIRST": first, "SECOND": second, "DEPTH": depth, **constants},
            num_warps=warps,
            num_stages=stages,
            pre_hook=hook,
        )
        for first, second, depth, warps, stages in (((32, 32, 32, 4, 1),) if INTERPRETED else tried)
    ]


def _time(call: Any, quantiles: Any) -> Any:
    """Milliseconds of a candidate: a fifth of Triton's own patience, of which every new shape would cost a second."""
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _at_once(
    tuner: Callable[[], Any], fitting: Callable[..., list[Any]] = lambda candidates, *_, **__: candidates
) -> Any:
    """A hook for an autotuner, to leave the `fitting` candidates and compile them at the same time.

    It would compile one after the other when it comes to time them: seconds of one core each, in every new process
    without a cache. Those that don't compile are left to it.
    """

    def prune(candidates: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
        left = fitting(candidates, arguments, **constants)
        given = {**arguments, **{name: each for name, each in constants.items() if name not in ("grid", "warmup")}}
        with ThreadPoolExecutor() as pool, AsyncCompileMode(pool, ignore_errors=True):
            for each in left:
                chosen = given | each.all_kwargs()
                if each.pre_hook:
                    each.pre_hook(chosen)
                tuner().fn.warmup(**chosen, grid=(1,))
        return left

    return {"early_config_prune": prune}


def _set_matmul_tiles(arguments: dict[str, Any], rows: str = "q") -> None:
    for name, side in ((rows, "FIRST"), ("w", "SECOND")):
        depth = arguments["DEPTH"] // arguments[name].base.element_size()
        arguments[name].block_shape = [arguments[side], depth]


@triton.autotune(
    configs=_candidates(
        _set_matmul_tiles,
        (128, 256, 128, 8, 4),
        (256, 128, 128, 8, 4),
        (128, 128, 128, 4, 4),
        (128, 128, 128, 4, 3),
        (128, 64, 128, 4, 4),
        (64, 128, 128, 4, 4),
        (64, 64, 128, 4, 6),
    ),
    key=["ROWS", "OUT", "IN", "INTEGER"],
    prune_configs_by=_at_once(lambda: _matmul_kernel),  # type: ignore[has-type]
    do_bench=_time,
)
@triton.jit(do_not_specialize=["ROWS", "IN"])  # machine code for these, too, would only be compiled more often
def _matmul_kernel(
    q, w, scale_q, scale_w, bias, out, ROWS, OUT, IN,
    INTEGER: tl.constexpr, BIASED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """q (ROWS, IN) and w (OUT, IN) of 8 bits → out (ROWS, OUT), a tile of FIRST rows and SECOND columns a program."""
    # Eight tiles of rows by all of columns, then the next eight: what programs beside each other read stays in cache.
    program, across = tl.program_id(0), tl.cdiv(OUT, SECOND)
    group = program // (8 * across)
    rows_in_group = tl.minimum(tl.cdiv(ROWS, FIRST) - group * 8, 8)
    first = (group * 8 + program % (8 * across) % rows_in_group) * FIRST
    second = program % (8 * across) // rows_in_group * SECOND
    accumulator: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros((FIRST, SECOND), dtype=accumulator)
    for depth in range(0, IN, DEPTH):
        total = tl.dot(q.load([first, depth]), w.load([second, depth]).T, total, out_dtype=accumulator)
    row, column = first + tl.arange(0, FIRST), second + tl.arange(0, SECOND)
    scaled = total.to(tl.float32) * tl.load(scale_q + row, mask=row < ROWS)[:, None]
    scaled *= tl.load(scale_w + column, mask=column < OUT)[None, :]
    if BIASED:
        scaled += tl.load(bias + column, mask=column < OUT).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(at, scaled.to(out.dtype.element_ty), mask=(row < ROWS)[:, None] & (column < OUT)[None, :])


def _described(tensor: torch.Tensor) -> TensorDescriptor:
    """A descriptor of a contiguous tensor, whose tile the autotuner's hook will fill in.

    Strides are computed: torch leaves open what that of a dimension of one is, the copy engine doesn't.
    """
    strides = [tensor.shape[i + 1 :].numel() for i in range(tensor.ndim)]
    return TensorDescriptor(tensor, list(tensor.shape), strides, [1] * tensor.ndim)


def _check_rows(w: torch.Tensor) -> None:
    """ValueError where the copy engine can't read the rows."""
    size = w.shape[1] * w.element_size()
    if size % 16:
        raise ValueError(f"a product of rows of {size} bytes: they have to be a multiple of 16")


def _scales(q: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A scale for each row of q, also where its numbers are what they are."""
    return torch.ones((q.shape[:-1].numel(), 1), device=q.device) if scale is None else scale.contiguous()


def launch_scaled_matmul(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_matmul` on a GPU: fp8 to bf16 by torch's own kernel, all else by the Triton kernel."""
    check_matmul(q, w, scale_q, scale_w, bias)
    columns = w.shape[0]
    if q.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16 and columns % 16 == 0 and q.is_cuda:
        # CUTLASS's row-wise kernel. It writes bf16 only, with a bias in bf16, and wants w by columns.
        bias = None if bias is None else bias.to(torch.bfloat16)
        flat = q.reshape(-1, q.shape[-1])
        made = torch._scaled_mm(
            flat, w.t(), _scales(q, scale_q), scale_w, bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return made.reshape(*q.shape[:-1], columns)
    return launch_triton_matmul(q, w, scale_q, scale_w, bias, out_dtype)


def launch_triton_matmul(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_matmul` by its Triton kernel. ValueError where the copy engine can't read the rows."""
    check_matmul(q, w, scale_q, scale_w, bias)
    columns, depth = w.shape
    _check_rows(w)
    out = torch.empty((*q.shape[:-1], columns), dtype=out_dtype, device=q.device)
    if out.numel():
        flat = q.reshape(-1, depth).contiguous()

        def programs(chosen: dict[str, Any]) -> tuple[int]:
            return (triton.cdiv(len(flat), chosen["FIRST"]) * triton.cdiv(columns, chosen["SECOND"]),)

        _matmul_kernel[programs](
            _described(flat), _described(w.contiguous()), _scales(q, scale_q), scale_w.contiguous(), bias, out,
            len(flat), columns, depth, INTEGER=q.dtype == torch.int8, BIASED=bias is not None,
        )  # fmt: skip
    return out


scaled_matmul.register_kernel("cuda")(launch_scaled_matmul)


# A feed-forward's first linear with its GEGLU: what is activated and multiplied is still in registers, so that half as
# much is written, and nothing read again.
#
# Weights come in turns, 8 rows of hidden and 8 of gate (operators.in_turns). A tensor-core instruction leaves each
# thread two neighbouring columns of every 8, so that a thread has hidden and gate of the same two numbers: splitting
# them moves nothing, and the result lies as any product's does. One product of 256 columns rather than two of 128, of
# hidden and of gate: the first side is read from shared memory once, and fewer transfers are waited for.
#
# While a tile is activated the tensor cores idle, unless there is another program: some 2,500 cycles beside 10,000 (640
# numbers deep) or 20,000 (1,280) of products. A PERSISTENT program makes tile after tile in one loop over all of their
# steps (flatten), so that the next one's first steps are copied meanwhile. It has three stages, because the fourth's
# place is where the tile that is written gets its order.
def _set_geglu_tiles(arguments: dict[str, Any]) -> None:
    _set_matmul_tiles(arguments, rows="x")


@triton.autotune(
    configs=[
        *_candidates(_set_geglu_tiles, (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), PERSISTENT=True),
        *_candidates(
            _set_geglu_tiles,
            *((128, 256, 128, 8, 4), (256, 128, 128, 8, 4), (128, 128, 128, 4, 3), (64, 128, 128, 4, 4)),
            PERSISTENT=False,
        ),
    ][: 1 if INTERPRETED else None],
    key=["ROWS", "OUT", "IN", "INTEGER", "SCALED"],
    prune_configs_by=_at_once(lambda: _linear_geglu_kernel),  # type: ignore[has-type]
    do_bench=_time,
)
@triton.jit(do_not_specialize=["ROWS", "IN"])
def _linear_geglu_kernel(
    x, w, scale_x, scale_w, bias, out, ROWS, OUT, IN,
    INTEGER: tl.constexpr, ITEM: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, TOGETHER: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, DEPTH: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """x (ROWS, IN) and w (OUT, IN), its rows in turns → out (ROWS, OUT / 2): tiles of FIRST rows and SECOND / 2
    columns, every num_programs-th a program's."""
    BLOCK: tl.constexpr = DEPTH // ITEM
    HALF: tl.constexpr = SECOND // 2
    accumulator: tl.constexpr = tl.int32 if INTEGER else tl.float32
    across = tl.cdiv(OUT, SECOND)
    tiles = tl.cdiv(ROWS, FIRST) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        group = tile // (8 * across)  # as in _matmul_kernel
        rows_in_group = tl.minimum(tl.cdiv(ROWS, FIRST) - group * 8, 8)
        first = (group * 8 + tile % (8 * across) % rows_in_group) * FIRST
        second = tile % (8 * across) // rows_in_group * SECOND
        total = tl.zeros((FIRST, SECOND), dtype=accumulator)
        for depth in range(0, IN, BLOCK):
            total = tl.dot(x.load([first, depth]), w.load([second, depth]).T, total, out_dtype=accumulator)
        row, turned = first + tl.arange(0, FIRST), second + tl.arange(0, SECOND)
        made = total.to(tl.float32)
        if SCALED:
            made *= tl.load(scale_x + row, mask=row < ROWS)[:, None]
            made *= tl.load(scale_w + turned, mask=turned < OUT)[None, :]
        if BIASED:
            made += tl.load(bias + turned, mask=turned < OUT).to(tl.float32)[None, :]
        turns = made.reshape(FIRST, HALF // TOGETHER, 2, TOGETHER).permute(0, 1, 3, 2)
        hidden, gate = tl.split(turns)
        made = _gated(hidden, gate).reshape(FIRST, HALF)
        column = second // 2 + tl.arange(0, HALF)
        at = out + row.to(tl.int64)[:, None] * (OUT // 2) + column[None, :]
        tl.store(at, made.to(out.dtype.element_ty), mask=(row < ROWS)[:, None] & (column < OUT // 2)[None, :])


def _processors(device: torch.device) -> int:
    """Programs that run at a time, one a multiprocessor. In the interpreter a few, of several tiles each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _launch_geglu(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_x: torch.Tensor | None,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    columns, depth = w.shape
    _check_rows(w)
    out = empty_gated(x, w, out_dtype)
    if out.numel():
        flat = x.reshape(-1, depth).contiguous()

        def programs(chosen: dict[str, Any]) -> tuple[int]:
            tiles = triton.cdiv(len(flat), chosen["FIRST"]) * triton.cdiv(columns, chosen["SECOND"])
            return (min(tiles, _processors(x.device)) if chosen["PERSISTENT"] else tiles,)

        _linear_geglu_kernel[programs](
            _described(flat), _described(w.contiguous()),
            *(None if each is None else each.contiguous() for each in (scale_x, scale_w, bias)), out,
            len(flat), columns, depth, INTEGER=x.dtype == torch.int8, ITEM=x.element_size(),
            SCALED=scale_x is not None, BIASED=bias is not None, TOGETHER=TOGETHER,
        )  # fmt: skip
    return out


def launch_linear_geglu(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear_geglu` by its Triton kernel. ValueError where the copy engine can't read the rows."""
    check_linear_geglu(x, w, bias)
    return _launch_geglu(x, w, None, None, bias, x.dtype)


def launch_scaled_matmul_geglu(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_matmul_geglu` by its Triton kernel. ValueError where the copy engine can't read the rows."""
    check_scaled_geglu(q, w, scale_q, scale_w, bias)
    return _launch_geglu(q, w, _scales(q, scale_q), scale_w, bias, out_dtype)


linear_geglu.register_kernel("cuda")(launch_linear_geglu)

scaled_matmul_geglu.register_kernel("cuda")(launch_scaled_matmul_geglu)

# Images. A sum over nine neighbouring pixels can't be scaled back by a scale for each pixel: an image has one.
#
# Two launches rather than an atomic maximum: nothing has to be set to zero first, and the second one reads the parts'
# maxima, at most 4 KiB, from cache.
MOST_PARTS = 1024


@triton.jit
def _image_amax_kernel(x_ptr, parts_ptr, SIZE, PART, BLOCK: tl.constexpr):
    """The largest |x| of each part of each image: program (part, image); a PART is a whole number of BLOCKs."""
    part, image = tl.program_id(0), tl.program_id(1)
    x_ptr += image.to(tl.int64) * SIZE
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, SIZE), BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)))
    tl.store(parts_ptr + image * tl.num_programs(0) + part, tl.max(largest))


@triton.jit
def _quantize_image_kernel(
    x_ptr, parts_ptr, q_ptr, scale_ptr, SIZE, PARTS, MOST_PARTS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Program (block, image): every one finds the image's scale again, which is quicker than a third launch."""
    block, image = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, MOST_PARTS)
    amax = tl.max(tl.load(parts_ptr + image * PARTS + part, mask=part < PARTS, other=0.0))
    scale, inverse = _scale_of(amax, LARGEST, SMALLEST)
    if block == 0:
        tl.store(scale_ptr + image, scale)
    at = block * BLOCK + tl.arange(0, BLOCK)
    offset = image.to(tl.int64) * SIZE
    x = _read_masked(x_ptr + offset + at, at < SIZE)
    tl.store(q_ptr + offset + at, _rounded(x * inverse, q_ptr.dtype.element_ty), mask=at < SIZE)


def launch_quantize_image(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """`quantize_image` by its Triton kernels."""
    q, scale = empty_images(x, dtype)
    if q.numel():
        images, size = x.shape[0], x[0].numel()
        block = 256 if INTERPRETED else 4096  # 16 numbers a thread
        part = block * triton.cdiv(triton.cdiv(size, block), MOST_PARTS)
        count = triton.cdiv(size, part)
        x = channels_last(x)
        parts = torch.empty((images, count), dtype=torch.float32, device=x.device)
        _image_amax_kernel[(count, images)](x, parts, size, part, BLOCK=block, num_warps=8)
        _quantize_image_kernel[(triton.cdiv(size, block), images)](
            x, parts, q, scale, size, count, MOST_PARTS=MOST_PARTS, BLOCK=block, num_warps=8, **_limits(dtype)
        )
    return q, scale


quantize_image.register_kernel("cuda")(launch_quantize_image)


# A convolution as a product (implicit GEMM, https://arxiv.org/abs/1410.0759): output channels by pixels, summed over
# taps (the kernel's positions) and input channels. A tile of output pixels is TILE_WIDTH wide; what one tap needs for
# it is the same rectangle of the input, shifted, and one transfer for the copy engine: its corner may be at -1, and
# what lies outside arrives as zero, which is the padding. So no address is ever computed for a pixel.
#
# With a stride of two every second pixel is needed. The descriptor shows the input (images, height, width, channels) as
# (images, height / 2, 2, width / 2, 2 * channels), the same memory: even and odd rows by the third index, even and
# odd columns by the channel's, so that the rectangle is without gaps again.
#
# Output channels are the product's first side: the second may be a reshaped tile and stay in shared memory; the first
# would go through registers.
def _set_convolution_tiles(arguments: dict[str, Any]) -> None:
    depth, width = arguments["DEPTH"] // arguments["ITEM"], arguments["TILE_WIDTH"]
    arguments["x"].block_shape = [1, arguments["SECOND"] // width, 1, width, depth]
    arguments["w"].block_shape = [arguments["FIRST"], depth]


@triton.jit
def _shifted(
    scaled, shift, sums, channel, OUT, y, HEIGHT, x, WIDTH, TAPS: tl.constexpr, ACROSS: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    """What an image that lies `shift` above its numbers adds: that times the weights' sum over the taps within it.

    y and x (pixels): the input's pixel under the first tap; HEIGHT and WIDTH: the input's. A product again, of channels
    by taps (ROOM for them) by pixels: choosing tap by tap takes more registers than there are. In two halves, since a
    factor of 16 bits rounds to 8.
    """
    tap = tl.arange(0, ROOM)
    row, column = y[None, :] + (tap // ACROSS)[:, None], x[None, :] + (tap % ACROSS)[:, None]
    within = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH) & (tap < TAPS)[:, None]
    there = (channel < OUT)[:, None] & (tap < TAPS)[None, :]
    each = shift * tl.load(sums + channel[:, None] * TAPS + tap[None, :], mask=there, other=0.0)
    rounded = each.to(tl.bfloat16)
    ones = within.to(tl.float32).to(tl.bfloat16)
    scaled = tl.dot(rounded, ones, scaled)
    return tl.dot((each - rounded.to(tl.float32)).to(tl.bfloat16), ones, scaled)


def _whole_channels(candidates: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """With a stride, channels beyond the last are those of the next column, not zero: none may be read."""
    depths = [(each, each.kwargs["DEPTH"] // constants["ITEM"]) for each in candidates]
    return [each for each, depth in depths if constants["STRIDE"] == 1 or arguments["CHANNELS"] % depth == 0]


@triton.autotune(
    configs=_candidates(
        _set_convolution_tiles,
        (128, 256, 128, 8, 4),
        (128, 128, 128, 4, 3),
        (128, 128, 64, 4, 6),
        (64, 256, 128, 4, 4),
        (64, 128, 128, 4, 4),
        (64, 128, 64, 4, 6),
        (128, 64, 128, 4, 4),
    ),
    key=["IMAGES", "HEIGHT", "WIDTH", "CHANNELS", "OUT", "TAPS", "STRIDE", "INTEGER", "ITEM", "SHIFTED"],
    prune_configs_by=_at_once(lambda: _convolution_kernel, _whole_channels),  # type: ignore[has-type]
    do_bench=_time,
)
@triton.jit(do_not_specialize=["IMAGES", "HEIGHT", "WIDTH", "CHANNELS"])
def _convolution_kernel(
    x, w, scale, scale_w, bias, residual, shift, sums, out, IMAGES, HEIGHT, WIDTH, CHANNELS, OUT,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    INTEGER: tl.constexpr, ITEM: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    SHIFTED: tl.constexpr, ROOM: tl.constexpr,
    TILE_WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x (IMAGES, input's height / STRIDE, STRIDE, input's width / STRIDE, STRIDE * CHANNELS), w (OUT, TAPS * CHANNELS)
    → out (IMAGES, HEIGHT, WIDTH, OUT): a tile of FIRST channels and SECOND pixels a program."""
    BLOCK: tl.constexpr = DEPTH // ITEM
    TILE_HEIGHT: tl.constexpr = SECOND // TILE_WIDTH
    # Channels first: programs beside each other read the same pixels.
    program, channel_tiles = tl.program_id(0), tl.cdiv(OUT, FIRST)
    first, tile = program % channel_tiles * FIRST, program // channel_tiles
    wide, high = tl.cdiv(WIDTH, TILE_WIDTH), tl.cdiv(HEIGHT, TILE_HEIGHT)
    left, top, image = tile % wide * TILE_WIDTH, tile // wide % high * TILE_HEIGHT, tile // wide // high

    accumulator: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros((FIRST, SECOND), dtype=accumulator)
    blocks = tl.cdiv(CHANNELS, BLOCK)
    for step in range(0, TAPS * blocks):
        tap, channel = step // blocks, step % blocks * BLOCK
        # Where the tap is, in input pixels from the tile's corner, less PADDING * STRIDE so as not to divide negatives.
        down, right = tap // ACROSS + PADDING * (STRIDE - 1), tap % ACROSS + PADDING * (STRIDE - 1)
        corner = [
            image, top + down // STRIDE - PADDING, down % STRIDE,
            left + right // STRIDE - PADDING, right % STRIDE * CHANNELS + channel,
        ]  # fmt: skip
        pixels = x.load(corner).reshape(SECOND, BLOCK)
        # A last block of channels reaches into the next tap's weights, but meets zeros in `pixels`.
        total = tl.dot(w.load([first, tap * CHANNELS + channel]), pixels.T, total, out_dtype=accumulator)

    channel = first + tl.arange(0, FIRST)
    pixel = tl.arange(0, SECOND)
    y, across = top + pixel // TILE_WIDTH, left + pixel % TILE_WIDTH
    scaled = total.to(tl.float32)
    if SCALED:
        scaled *= tl.load(scale + image) * tl.load(scale_w + channel, mask=channel < OUT, other=0.0)[:, None]
    if SHIFTED:
        scaled = _shifted(
            scaled, tl.load(shift + image), sums, channel, OUT, y * STRIDE - PADDING, x.shape[1] * STRIDE,
            across * STRIDE - PADDING, x.shape[3] * STRIDE, TAPS, ACROSS, ROOM,
        )  # fmt: skip
    if BIASED:
        scaled += tl.load(bias + channel, mask=channel < OUT, other=0.0).to(tl.float32)[:, None]
    at = ((image.to(tl.int64) * HEIGHT + y) * WIDTH + across)[:, None] * OUT + channel[None, :]
    mask = ((y < HEIGHT) & (across < WIDTH))[:, None] & (channel < OUT)[None, :]
    if ADDED:
        made = scaled.T + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, made.to(out.dtype.element_ty), mask=mask)
    else:  # turned in the type that is written: half the traffic
        tl.store(out + at, scaled.to(out.dtype.element_ty).T, mask=mask)


def _check_copied(x: torch.Tensor, stride: int) -> None:
    """ValueError where the copy engine can't read the image."""
    channels, item = x.shape[1], x.element_size()
    if channels * item % 16:
        raise ValueError(f"a convolution of {channels} channels: they have to fill a multiple of 16 bytes")
    depth = min(each.kwargs["DEPTH"] for each in _convolution_kernel.configs) // item
    if stride > 1 and (x.shape[2] % stride or x.shape[3] % stride or channels % depth):
        raise ValueError(
            f"a convolution of {channels} channels, {x.shape[2]}×{x.shape[3]} pixels, with stride {stride}: it takes "
            f"multiples of {depth} channels and of {stride} pixels"
        )


def launch_convolution_nhwc(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    out_dtype: torch.dtype,
    shift: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """`convolution_nhwc` by its Triton kernel. ValueError where the copy engine can't read the image."""
    images, columns, height, width = shape = convolved_shape(x, w, stride, padding)
    _check_copied(x, stride)
    if (scale is None) != (scale_w is None):
        raise ValueError("a convolution has a scale for its images and one for its weights, or neither")
    check_shift(shift, sums)
    for name, given, length in (
        *(("scale", scale, images), ("scale_w", scale_w, columns), ("the bias", bias, columns)),
        *(("the shift", shift, images), ("sums", sums, columns * w.shape[2] * w.shape[3])),
    ):
        if given is not None:
            check_length(name, given, length)
    if residual is not None:
        check_length("the residual", residual, torch.Size(shape).numel())
    out = torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    if not out.numel():
        return out
    pixels = channels_last(x).permute(0, 2, 3, 1)
    seen = pixels.reshape(images, x.shape[2] // stride, stride, x.shape[3] // stride, stride * x.shape[1])
    weights = channels_last(w).permute(0, 2, 3, 1).reshape(columns, -1)
    residual = None if residual is None else channels_last(residual)
    tile_width = min(16, triton.next_power_of_2(width))

    def programs(chosen: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(width, tile_width) * triton.cdiv(height, chosen["SECOND"] // tile_width)
        return (images * tiles * triton.cdiv(columns, chosen["FIRST"]),)

    assert seen.is_contiguous() and weights.is_contiguous()  # as permuted from channels_last
    _convolution_kernel[programs](
        _described(seen), _described(weights), scale, scale_w, bias, residual, shift,
        None if sums is None else sums.contiguous(), out, images, height, width, x.shape[1], columns,
        TAPS=w.shape[2] * w.shape[3], ACROSS=w.shape[3], STRIDE=stride, PADDING=padding,
        INTEGER=x.dtype == torch.int8, ITEM=x.element_size(), SCALED=scale is not None, BIASED=bias is not None,
        ADDED=residual is not None, SHIFTED=shift is not None,
        ROOM=max(16, triton.next_power_of_2(w.shape[2] * w.shape[3])), TILE_WIDTH=tile_width,
    )  # fmt: skip
    return out


convolution_nhwc.register_kernel("cuda")(launch_convolution_nhwc)
