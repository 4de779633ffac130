"""GPU kernels for numbers of eight bits: what Inductor writes in two passes, or not at all.

Rows (of a linear layer's input) get a scale each, images (of a convolution's input) one each, both computed at run
time: q = round(x / scale), with scale = max|x| / the format's largest number. A product of such numbers is scaled back
where it is accumulated, before anything is written.

Each operation is a custom operator of torch, `diffusion_fast::NAME`, so that torch.compile takes it into a graph as it
stands. Its Python body is what it means, in plain PyTorch, and what runs on a CPU. On CUDA a Triton kernel runs
instead, which its `launch_NAME` starts. Nothing here waits for the device, but for the first call of a shape that is
autotuned.

Rounding is to nearest, ties to even. In fp8 a NaN stays NaN, and infinity makes its whole row NaN. int8 has no such
number: a NaN becomes some integer.
"""

# No postponed annotations here: torch reads an operator's schema from them.
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "diffusion_fast.kernels needs Triton 3.6 or later (pip install 'triton>=3.6', on Linux)"
    ) from error

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 2.0**-100  # for what is all zero: 1 / scale has to be a number
Quantized = tuple[torch.Tensor, torch.Tensor]


def _largest(dtype: torch.dtype) -> float:
    if dtype not in LARGEST:
        raise ValueError(f"quantized to {dtype}: it takes {' or '.join(map(str, LARGEST))}")
    return LARGEST[dtype]


def _quantize(x: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """x in fp32 by scales that broadcast to it. Multiplied by 1 / scale, as the kernels do, to the last bit."""
    scale = (amax / _largest(dtype)).clamp(min=SMALLEST_SCALE)
    scaled = x * (1 / scale)
    if dtype == torch.int8:
        scaled = scaled.clamp(-127, 127).round()
    return scaled.to(dtype), scale


def _quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    q, scale = _quantize(x, x.abs().amax(-1, keepdim=True), dtype)
    return q, scale.reshape(-1, 1)


def _empty_rows(x: torch.Tensor, columns: int, dtype: torch.dtype) -> Quantized:
    """Room for the quantized rows of x, and for their scales."""
    _largest(dtype)
    q = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    return q, torch.empty((x.shape[:-1].numel(), 1), dtype=torch.float32, device=x.device)


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
    return {"LARGEST": _largest(dtype), "SMALLEST": SMALLEST_SCALE}


def launch_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """`quantize_rows` by its Triton kernel. A copy is made of an x that isn't contiguous."""
    q, scale = _empty_rows(x, x.shape[-1], dtype)
    if q.numel():
        shape = _row_shape(x.shape[-1])
        _quantize_rows_kernel[(len(scale),)](x.contiguous(), q, scale, **shape, **_limits(dtype))
    return q, scale


def launch_geglu_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """`geglu_quantize_rows` by its Triton kernel. A copy is made of an x that isn't contiguous."""
    columns = _half(x)
    q, scale = _empty_rows(x, columns, dtype)
    if q.numel():
        shape = _row_shape(columns)
        _geglu_quantize_rows_kernel[(len(scale),)](x.contiguous(), q, scale, **shape, **_limits(dtype))
    return q, scale


def launch_layer_norm_quantize_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> Quantized:
    """`layer_norm_quantize_rows` by its Triton kernel. A copy is made of an x that isn't contiguous."""
    q, scale = _empty_rows(x, x.shape[-1], dtype)
    if q.numel():
        _layer_norm_quantize_rows_kernel[(len(scale),)](
            x.contiguous(), weight.contiguous(), bias.contiguous(), q, scale, eps,
            **_row_shape(x.shape[-1]), **_limits(dtype),
        )  # fmt: skip
    return q, scale


def _half(x: torch.Tensor) -> int:
    if x.shape[-1] % 2:
        raise ValueError(f"GEGLU of {x.shape[-1]} columns: an even number is hidden and gate")
    return x.shape[-1] // 2


@torch.library.custom_op("diffusion_fast::quantize_rows", mutates_args=(), device_types="cpu")
def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row by a scale of its own: x (..., columns) → q of its shape, scale (rows, 1) in fp32.

    x is bf16, fp16 or fp32, `dtype` torch.float8_e4m3fn or torch.int8 (else ValueError). Rows are what comes before
    the last dimension, flattened. x ≈ q * scale, each number to half a unit in its last place.
    """
    return _quantize_rows(x.float(), dtype)


@torch.library.custom_op("diffusion_fast::geglu_quantize_rows", mutates_args=(), device_types="cpu")
def geglu_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden * gelu(gate), quantized by rows: x (..., 2 * columns) → q (..., columns), scale (rows, 1) in fp32.

    x is what GEGLU's projection made, as diffusers lays it out: hidden, then gate. GELU is the exact one, by the error
    function. Everything is fp32 until it is quantized: eager PyTorch would round GELU and the product to x's dtype on
    the way, Inductor would not; neither shows beside fp8's 3 bits, and rounding costs instructions.
    GLU variants: https://arxiv.org/abs/2002.05202
    """
    _half(x)
    hidden, gate = x.float().chunk(2, -1)
    return _quantize_rows(hidden * F.gelu(gate), dtype)


@torch.library.custom_op("diffusion_fast::layer_norm_quantize_rows", mutates_args=(), device_types="cpu")
def layer_norm_quantize_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm over the last dimension, quantized by rows: x (..., columns) → q of its shape, scale (rows, 1), fp32.

    weight and bias are (columns,), of any float dtype. Everything is fp32 until it is quantized.
    """
    return _quantize_rows(F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps), dtype)


quantize_rows.register_kernel("cuda")(launch_quantize_rows)
geglu_quantize_rows.register_kernel("cuda")(launch_geglu_quantize_rows)
layer_norm_quantize_rows.register_kernel("cuda")(launch_layer_norm_quantize_rows)


@quantize_rows.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    return _empty_rows(x, x.shape[-1], dtype)


@geglu_quantize_rows.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    return _empty_rows(x, _half(x), dtype)


@layer_norm_quantize_rows.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype) -> Quantized:
    return _empty_rows(x, x.shape[-1], dtype)
