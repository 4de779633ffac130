"""Operations that have kernels of our own, in plain PyTorch: what they mean, and what runs on a CPU.

Most are on numbers of eight bits; linears that end in GEGLU and the group norm at the end are in 16 or 32, too, and
attention in 16 only.

Rows (of a linear layer's input) get a scale each, images (of a convolution's input) one each, both computed at run
time: q = round(x / scale), with scale = max|x| / the format's largest number. A product of such numbers is scaled back
where it is accumulated, before anything is written.

Each is a custom operator of torch, `diffusion_fast::NAME`, so that torch.compile takes it into a graph as it stands.
kernels.py, norm_kernels.py and attention_kernels.py have Triton kernels for CUDA.

Rounding is to nearest, ties to even. In fp8 a NaN stays NaN, and infinity makes its whole row NaN. int8 has no such
number: a NaN becomes some integer.
"""

# No postponed annotations here: torch reads an operator's schema from them.
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}

CONVOLVED = (*LARGEST, torch.bfloat16, torch.float16)

SMALLEST_SCALE = 2.0**-100  # for what is all zero: 1 / scale has to be a number

Quantized = tuple[torch.Tensor, torch.Tensor]


def largest(dtype: torch.dtype) -> float:
    if dtype not in LARGEST:
        raise ValueError(f"quantized to {dtype}: it takes {' or '.join(map(str, LARGEST))}")
    return LARGEST[dtype]


def quantized(x: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """x in fp32 by scales that broadcast to it. Multiplied by 1 / scale, as the kernels do, to the last bit."""
    scale = (amax / largest(dtype)).clamp(min=SMALLEST_SCALE)
    scaled = x * (1 / scale)
    if dtype == torch.int8:
        scaled = scaled.clamp(-127, 127).round()
    return scaled.to(dtype), scale


def quantized_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """x (..., columns) in fp32, each row by a scale of its own (rows, 1)."""
    q, scale = quantized(x, x.abs().amax(-1, keepdim=True), dtype)
    return q, scale.reshape(-1, 1)


def empty_rows(x: torch.Tensor, columns: int, dtype: torch.dtype) -> Quantized:
    """Room for the quantized rows of x, and for their scales."""
    largest(dtype)
    q = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    return q, torch.empty((x.shape[:-1].numel(), 1), dtype=torch.float32, device=x.device)


def check_length(what: str, tensor: torch.Tensor, length: int) -> None:
    """A kernel would read beyond what is too short."""
    if tensor.numel() != length:
        raise ValueError(f"{what} has {tensor.numel()} numbers: {length} are needed")


def half_of(x: torch.Tensor) -> int:
    if x.shape[-1] % 2:
        raise ValueError(f"GEGLU of {x.shape[-1]} columns: an even number is hidden and gate")
    return x.shape[-1] // 2


@torch.library.custom_op("diffusion_fast::quantize_rows", mutates_args=(), device_types="cpu")
def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row by a scale of its own: x (..., columns) → q of its shape, scale (rows, 1) in fp32.

    x is bf16, fp16 or fp32, `dtype` torch.float8_e4m3fn or torch.int8 (else ValueError). Rows are what comes before
    the last dimension, flattened. x ≈ q * scale, each number to half a unit in its last place.
    """
    return quantized_rows(x.float(), dtype)


@torch.library.custom_op("diffusion_fast::geglu_quantize_rows", mutates_args=(), device_types="cpu")
def geglu_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden * gelu(gate), quantized by rows: x (..., 2 * columns) → q (..., columns), scale (rows, 1) in fp32.

    x is what GEGLU's projection made, as diffusers lays it out: hidden, then gate. GELU is the exact one, by the error
    function. Everything is fp32 until it is quantized: eager PyTorch would round GELU and the product to x's dtype on
    the way, Inductor would not; neither shows beside fp8's 3 bits, and rounding costs instructions.
    GLU variants: https://arxiv.org/abs/2002.05202
    """
    half_of(x)
    hidden, gate = x.float().chunk(2, -1)
    return quantized_rows(hidden * F.gelu(gate), dtype)


@torch.library.custom_op("diffusion_fast::layer_norm_quantize_rows", mutates_args=(), device_types="cpu")
def layer_norm_quantize_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm over the last dimension, quantized by rows: x (..., columns) → q of its shape, scale (rows, 1), fp32.

    weight and bias are (columns,), of any float dtype. Everything is fp32 until it is quantized.
    """
    return quantized_rows(F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps), dtype)


@quantize_rows.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    return empty_rows(x, x.shape[-1], dtype)


@geglu_quantize_rows.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    return empty_rows(x, half_of(x), dtype)


@layer_norm_quantize_rows.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype) -> Quantized:
    return empty_rows(x, x.shape[-1], dtype)


def check_matmul(
    q: torch.Tensor, w: torch.Tensor, scale_q: torch.Tensor | None, scale_w: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if q.dtype != w.dtype or q.dtype not in LARGEST:
        raise ValueError(f"a product of {q.dtype} and {w.dtype}: both have to be {' or both '.join(map(str, LARGEST))}")
    if w.ndim != 2 or q.shape[-1] != w.shape[1]:
        raise ValueError(f"a product of {tuple(q.shape)} by {tuple(w.shape)}: rows of both have to be equally long")
    if scale_q is not None:
        check_length("scale_q", scale_q, q.shape[:-1].numel())
    check_length("scale_w", scale_w, w.shape[0])
    if bias is not None:
        check_length("the bias", bias, w.shape[0])


@torch.library.custom_op("diffusion_fast::scaled_matmul", mutates_args=(), device_types="cpu")
def scaled_matmul(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """A linear layer of quantized rows and weights: q (..., in), w (out, in) → (..., out) in `out_dtype`.

    q and w are both torch.float8_e4m3fn or both torch.int8 (else ValueError), w by rows as torch.nn.Linear has it;
    scale_q (rows, 1) and scale_w (1, out) in fp32, bias (out,) or None; a scale_q of None is that of a q whose numbers
    are what they are. What is accumulated (int32, exact; for fp8 fp32) is scaled before it is written:
    (q @ w.T) * scale_q * scale_w + bias. On a GPU `in` is a multiple of 16, the number of rows any.
    """
    check_matmul(q, w, scale_q, scale_w, bias)
    wide = torch.float64 if q.dtype == torch.int8 else torch.float32  # exact for integers, and faster than int32
    product = (q.reshape(-1, q.shape[-1]).to(wide) @ w.to(wide).t()).float()
    for scale in (scale_q, scale_w):
        product *= 1 if scale is None else scale
    if bias is not None:
        product += bias.float()
    return product.to(out_dtype).reshape(*q.shape[:-1], len(w))


@scaled_matmul.register_fake
def _(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_matmul(q, w, scale_q, scale_w, bias)
    return torch.empty((*q.shape[:-1], w.shape[0]), dtype=out_dtype, device=q.device)


TOGETHER = 8  # rows of hidden, and then as many of gate


def in_turns(rows: torch.Tensor) -> torch.Tensor:
    """Weights or bias of GEGLU's linear, (2 * inner, ...), as `linear_geglu` takes them. Done once, beforehand.

    diffusers has them as hidden, then gate; here are 8 rows of hidden, 8 of gate, and so on. ValueError where `inner`
    is no multiple of 8.
    """
    check_turns(len(rows))
    return rows.reshape(2, -1, TOGETHER, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def check_turns(rows: int) -> None:
    if rows % (2 * TOGETHER):
        raise ValueError(f"GEGLU's linear of {rows} columns: hidden and gate have to have a multiple of {TOGETHER}")


def check_linear_geglu(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dtype != w.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"a product of {x.dtype} and {w.dtype}: both have to be torch.bfloat16 or both torch.float16")
    if w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"a product of {tuple(x.shape)} by {tuple(w.shape)}: rows of both have to be equally long")
    check_turns(w.shape[0])
    if bias is not None:
        check_length("the bias", bias, w.shape[0])


def check_scaled_geglu(
    q: torch.Tensor, w: torch.Tensor, scale_q: torch.Tensor | None, scale_w: torch.Tensor, bias: torch.Tensor | None
) -> None:
    check_matmul(q, w, scale_q, scale_w, bias)
    check_turns(w.shape[0])


def gated_in_turns(product: torch.Tensor) -> torch.Tensor:
    """hidden * gelu(gate) of columns in turns: (..., 2 * inner) → (..., inner), in fp32 throughout."""
    hidden, gate = product.unflatten(-1, (-1, 2, TOGETHER)).unbind(-2)
    made: torch.Tensor = hidden * F.gelu(gate)
    return made.flatten(-2)


def empty_gated(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], w.shape[0] // 2), dtype=dtype, device=x.device)


@torch.library.custom_op("diffusion_fast::linear_geglu", mutates_args=(), device_types="cpu")
def linear_geglu(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer and its GEGLU: x (..., in), w (2 * inner, in), bias (2 * inner,) or None → (..., inner).

    x and w are both bf16 or both fp16 (else ValueError), which the result is too; w and bias are as `in_turns` makes
    them. hidden * gelu(gate) is accumulated and activated in fp32, by the exact GELU, and rounded once. On a GPU `in`
    is a multiple of 8. GLU variants: https://arxiv.org/abs/2002.05202
    """
    check_linear_geglu(x, w, bias)
    product = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    return gated_in_turns(product).to(x.dtype)


@linear_geglu.register_fake
def _(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    check_linear_geglu(x, w, bias)
    return empty_gated(x, w, x.dtype)


@torch.library.custom_op("diffusion_fast::scaled_matmul_geglu", mutates_args=(), device_types="cpu")
def scaled_matmul_geglu(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`linear_geglu` of quantized rows and weights: as `scaled_matmul`, then GEGLU: (..., inner) in `out_dtype`.

    w (2 * inner, in), scale_w (1, 2 * inner) and bias are in turns (`in_turns`). Nothing is rounded in between. An
    `out_dtype` of torch.float8_e4m3fn is for scales that leave nothing beyond 448.
    """
    check_scaled_geglu(q, w, scale_q, scale_w, bias)
    return gated_in_turns(scaled_matmul(q, w, scale_q, scale_w, bias, torch.float32)).to(out_dtype)


@scaled_matmul_geglu.register_fake
def _(
    q: torch.Tensor,
    w: torch.Tensor,
    scale_q: torch.Tensor | None,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_scaled_geglu(q, w, scale_q, scale_w, bias)
    return empty_gated(q, w, out_dtype)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty_images(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    largest(dtype)
    q = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return q, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@torch.library.custom_op("diffusion_fast::quantize_image", mutates_args=(), device_types="cpu")
def quantize_image(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image by a scale of its own: x (images, channels, height, width) → q of its shape, scale (images,), fp32.

    x is bf16, fp16 or fp32 and best in torch.channels_last, which q always is (else it is copied first); `dtype` is
    torch.float8_e4m3fn or torch.int8 (else ValueError).
    """
    made, scale = quantized(x.float(), x.float().abs().amax((1, 2, 3), keepdim=True), dtype)
    q, _ = empty_images(x, dtype)
    return q.copy_(made), scale.flatten()


@quantize_image.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    return empty_images(x, dtype)


def quantize_filters(w: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """A convolution's weights, each output channel by a scale of its own, as `convolution_nhwc` takes them.

    w (out, in, height, width) → q of its shape in torch.channels_last, scale (out,) in fp32. Done once, beforehand.
    """
    filters = channels_last(w).permute(0, 2, 3, 1)
    q, scale = quantize_rows(filters.reshape(len(w), -1), dtype)
    return q.reshape(filters.shape).permute(0, 3, 1, 2), scale.flatten()


def convolved_shape(x: torch.Tensor, w: torch.Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    if x.dtype != w.dtype or x.dtype not in CONVOLVED:
        raise ValueError(
            f"a convolution of {x.dtype} by {w.dtype}: both have to be one of {', '.join(map(str, CONVOLVED))}"
        )
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"a convolution of {x.shape[1]} channels by weights for {w.shape[1]}: groups are not known")
    height, width = ((x.shape[i] + 2 * padding - w.shape[i]) // stride + 1 for i in (2, 3))
    return x.shape[0], w.shape[0], height, width


def check_shift(shift: torch.Tensor | None, sums: torch.Tensor | None) -> None:
    if (shift is None) != (sums is None):
        raise ValueError("a convolution has a shift of its images and the sums of its weights, or neither")


@torch.library.custom_op("diffusion_fast::convolution_nhwc", mutates_args=(), device_types="cpu")
def convolution_nhwc(
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
    """A 2D convolution: x (images, in, height, width), w (out, in, kernel height, kernel width) → (images, out, ...).

    x and w are both torch.float8_e4m3fn, torch.int8, bf16 or fp16 (else ValueError), x as `quantize_image` makes it;
    scale (images,) and scale_w (out,) in fp32, both None for what isn't quantized. bias is (out,) or None, residual of
    the result's shape or None, and added at the end. Everything is best in torch.channels_last, which the result is.
    Where an image's numbers are larger than x * scale says by its `shift` (images,), `sums` (out, kernel height, kernel
    width) are those of the weights over `in`, both in fp32. What lies beyond the image's edges is 0, not `shift`.
    What is accumulated (int32, exact; else fp32) is scaled before it is written. On a GPU `in` fills a multiple of 16
    bytes; a stride beyond 1 divides height and width, and wants `in` to fill a multiple of 64 bytes.
    """
    shape = convolved_shape(x, w, stride, padding)
    check_shift(shift, sums)
    wide = torch.float64 if x.dtype == torch.int8 else torch.float32
    made = F.conv2d(x.to(wide), w.to(wide), stride=stride, padding=padding).float()
    if scale is not None and scale_w is not None:
        made *= scale[:, None, None, None] * scale_w[:, None, None]
    if shift is not None and sums is not None:
        ones = torch.ones((1, 1, *x.shape[2:]), device=x.device)
        made += shift[:, None, None, None] * F.conv2d(ones, sums[:, None], stride=stride, padding=padding)
    if bias is not None:
        made += bias.float()[:, None, None]
    if residual is not None:
        made += residual
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last).copy_(made)


@convolution_nhwc.register_fake
def _(
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
    shape = convolved_shape(x, w, stride, padding)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


def check_group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x_bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
) -> None:
    if x.ndim != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"a group norm of {tuple(x.shape)}: it takes images whose channels {groups} groups divide")
    images, channels = x.shape[:2]
    for name, given in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if given is not None:
            check_length(f"the group norm's {name}", given, channels)
    if embedding is not None and embedding.shape != (images, channels):
        raise ValueError(f"an embedding of {tuple(embedding.shape)}: {(images, channels)} is needed")


@torch.library.custom_op("diffusion_fast::group_norm_nhwc", mutates_args=(), device_types="cpu")
def group_norm_nhwc(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Group norm of x + x_bias + embedding, then SiLU where `silu`: (images, channels, height, width) → the same shape.

    x is bf16, fp16 or fp32 and best in torch.channels_last, which the result of x's dtype always is (else x is copied
    first). weight and bias are (channels,). x_bias (channels,) is the bias of the convolution that made x, embedding
    (images, channels) what a residual block adds to its image for the time step: neither costs a pass of its own here.
    Everything is fp32 until it is written. ValueError where the groups don't divide the channels or a length is wrong.
    Wu and He 2018, https://arxiv.org/abs/1803.08494
    """
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    made = normed(x, groups, weight, bias, eps, x_bias, embedding)
    return empty_like_images(x).copy_(F.silu(made) if silu else made)


def normed(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    x_bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
) -> torch.Tensor:
    wide = x.float().contiguous()  # in channels_last PyTorch subtracts squares on a CPU, where a large mean cancels
    if x_bias is not None:
        wide = wide + x_bias.float()[:, None, None]
    if embedding is not None:
        wide = wide + embedding.float()[:, :, None, None]
    return F.group_norm(wide, groups, weight.float(), bias.float(), eps)


def empty_like_images(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@group_norm_nhwc.register_fake
def _(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
) -> torch.Tensor:
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    return empty_like_images(x)


SILU_LEAST_AT, SILU_LEAST = -1.2784645, -0.27846455  # where SiLU is least, and what it is there


def is_shifted(silu: bool, dtype: torch.dtype) -> bool:
    """Whether `group_norm_quantize_nhwc` counts an image's numbers from the middle of their range, and not from 0."""
    return silu and dtype == torch.int8


@torch.library.custom_op("diffusion_fast::group_norm_quantize_nhwc", mutates_args=(), device_types="cpu")
def group_norm_quantize_nhwc(
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
    """`group_norm_nhwc`, each image quantized by a scale of its own: → q of x's shape, scale and shift (images,), fp32.

    As `quantize_image` has them, but nothing is rounded to x's dtype in between. Behind SiLU an image's numbers in int8
    are q * scale + shift, the shift in the middle between the least and the largest: few are negative and none is below
    -0.278, so that without it half of the 255 steps would be left unused. Else the shift is 0; fp8 is finest there.
    Where SiLU was given a number below that where it is least, -0.278 counts as reached. Where a number is no number,
    the image's scale is none. Jacob et al. 2017, https://arxiv.org/abs/1712.05877
    """
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    made = normed(x, groups, weight, bias, eps, x_bias, embedding)
    least = made.amin((1, 2, 3), keepdim=True)
    if silu:
        made = F.silu(made)
    low, high = made.amin((1, 2, 3), keepdim=True), made.amax((1, 2, 3), keepdim=True)
    if silu:
        low = torch.where(least < SILU_LEAST_AT, SILU_LEAST, low)
    shift = (low + high) / 2 if is_shifted(silu, dtype) else torch.zeros_like(low)
    made, scale = quantized(made - shift, torch.maximum(high - shift, shift - low), dtype)
    q, _ = empty_images(x, dtype)
    return q.copy_(made), scale.flatten(), shift.flatten()


@group_norm_quantize_nhwc.register_fake
def _(
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
    check_group_norm(x, groups, weight, bias, x_bias, embedding)
    q, scale = empty_images(x, dtype)
    return q, scale, torch.empty_like(scale)


WIDEST_HEAD = 128
HALVES = (torch.bfloat16, torch.float16)


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
    if {q.dtype, k.dtype, v.dtype} not in ({HALVES[0]}, {HALVES[1]}):
        raise ValueError(
            f"attention of {q.dtype}, {k.dtype} and {v.dtype}: all have to be one of {', '.join(map(str, HALVES))}"
        )
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or not k.shape[1]:
        raise ValueError(
            f"attention of {tuple(q.shape)} to {tuple(k.shape)} and {tuple(v.shape)}: all are (batch, tokens, heads, "
            "head dimension), and only the tokens of the first may differ"
        )
    if not takes_heads_of(q.shape[-1]):
        raise ValueError(f"attention by heads of {q.shape[-1]}: they have to be a multiple of 8, {WIDEST_HEAD} at most")
    if not scale > 0:  # the kernel scales the largest score, which for others isn't the largest scaled one
        raise ValueError(f"attention scaled by {scale}: it has to be above 0")


def takes_heads_of(dimension: int) -> bool:
    """Whether `attention` takes heads so wide."""
    return 0 < dimension <= WIDEST_HEAD and dimension % 8 == 0


@torch.library.custom_op("diffusion_fast::attention", mutates_args=(), device_types="cpu")
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q kᵀ scale) v by heads: q (batch, queries, heads, dim), k and v (batch, keys, heads, dim) → q's shape and
    dtype.

    All are bf16 or all fp16, views of a fused projection's result as they lie, and `dim` is a multiple of 8 up to 128
    (else ValueError). There is no mask. Accumulated in fp32; on a GPU the softmax's numbers are rounded to q's dtype
    before they meet v, as everywhere.
    FlashAttention: https://arxiv.org/abs/2205.14135
    """
    check_attention(q, k, v, scale)
    wide_q, wide_k, wide_v = (each.transpose(1, 2).float() for each in (q, k, v))
    # Not by scaled_dot_product_attention, which on a CPU makes 0 of a NaN.
    made = (wide_q @ wide_k.transpose(-1, -2) * scale).softmax(-1) @ wide_v
    return made.transpose(1, 2).to(q.dtype).contiguous()


@attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    check_attention(q, k, v, scale)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
