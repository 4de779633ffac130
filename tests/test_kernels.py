"""Triton kernels, run by Triton's interpreter on a CPU, against float64.

    TRITON_INTERPRET=1 pytest tests/test_kernels.py

The interpreter has to be chosen before Triton is imported, so that this is a process of its own. In any other process
test_kernels_hopper.py starts it. What the interpreter can't tell is there too: whether the kernels compile for a GPU.
"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton isn't installed: the kernels are for GPUs, and for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "not in this process: test_kernels_hopper.py runs these with TRITON_INTERPRET=1", allow_module_level=True
    )

from diffusion_fast import attention_kernels, kernels, norm_kernels, operators
from tests import interpreter

interpreter.mend()

DTYPES = pytest.mark.parametrize("dtype", operators.LARGEST, ids=str)
FLOATS = pytest.mark.parametrize("of", (torch.float32, torch.bfloat16, torch.float16), ids=str)
RELATIVE = 2.0**-22  # what a few roundings in fp32 do to a number
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")  # autograd isn't ours


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awkward(rows: int, columns: int, of: torch.dtype, seed: int) -> torch.Tensor:
    """Normal rows of different sizes; among them all zero, one huge number, all negative, tiny ones, ± the largest."""
    x = torch.randn(rows, columns, generator=seeded(seed)) * torch.logspace(-3, 2, rows)[:, None]
    x[0] = 0
    if rows > 4:
        x[1, columns // 2] = 3e4
        x[2] = -x[2].abs()
        x[3] = 1e-7
        x[4, ::2], x[4, 1::2] = 60000.0, -60000.0
    return x.to(of)


def half_unit(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of the 8-bit format, at numbers given in float64."""
    if dtype == torch.int8:
        return torch.full_like(scaled, 0.5)
    exponent = torch.frexp(scaled)[1].double() - 1  # |scaled| = m * 2**exponent, 1 <= m < 2
    return torch.exp2(exponent.clamp(min=-6) - 4)  # 3 bits of mantissa: a unit is 2**(exponent - 3)


def assert_quantized(
    made: operators.Quantized, exact: torch.Tensor, dtype: torch.dtype, slack: torch.Tensor | float = 0.0
) -> None:
    """That q and scale are the nearest there are to `exact` (float64), which itself was known up to `slack`."""
    q, scale = made
    assert q.dtype == dtype and q.shape == exact.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (exact.shape[:-1].numel(), 1)
    exact = exact.reshape(len(scale), -1)
    slack = slack.reshape(exact.shape) if isinstance(slack, torch.Tensor) else torch.full_like(exact, slack)
    wanted = (exact.abs().amax(-1, keepdim=True) / operators.LARGEST[dtype]).clamp(min=operators.SMALLEST_SCALE)
    off = slack.amax(-1, keepdim=True) / operators.LARGEST[dtype] + wanted * RELATIVE
    assert ((scale.double() - wanted).abs() <= off).all()
    scaled = exact / scale.double()
    allowed = half_unit(scaled, dtype) + scaled.abs() * RELATIVE + slack / scale.double() * 1.01
    assert ((q.reshape(exact.shape).double() - scaled).abs() <= allowed).all()


ANY = random.Random(0)  # shapes that nobody chose, the same ones each time
SHAPES = (
    *((1, 1), (3, 2), (5, 3), (7, 16), (5, 40), (9, 100), (6, 640), (2, 1280), (2, 5000), (154, 64)),
    *((ANY.randint(1, 40), ANY.randint(1, 900)) for _ in range(3)),
)


@DTYPES
@FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_quantized_to_the_nearest(shape: tuple[int, int], of: torch.dtype, dtype: torch.dtype) -> None:
    x = awkward(*shape, of, seed=sum(shape))
    made = kernels.launch_quantize_rows(x, dtype)
    assert_quantized(made, x.double(), dtype)
    q, scale = operators.quantize_rows(x, dtype)  # what it means, on a CPU: the same to the last bit
    assert torch.equal(made[0].view(torch.uint8), q.view(torch.uint8)) and torch.equal(made[1], scale)


@DTYPES
@FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu_is_quantized_to_the_nearest(shape: tuple[int, int], of: torch.dtype, dtype: torch.dtype) -> None:
    rows, columns = shape
    x = awkward(rows, 2 * columns, of, seed=sum(shape))
    if rows > 4:
        x[4] *= 0.01  # its products are beyond fp16, not fp32: quantized they are fine, but not what is asked here
    hidden, gate = x.double().chunk(2, -1)
    exact = hidden * torch.nn.functional.gelu(gate)
    # The kernel's GELU is within 6e-7, or the rounding of what is larger; the product rounds once more.
    slack = hidden.abs() * (6e-7 + gate.abs() * RELATIVE)
    assert_quantized(kernels.launch_geglu_quantize_rows(x, dtype), exact, dtype, slack)
    assert_quantized(operators.geglu_quantize_rows(x, dtype), exact, dtype, slack)


def test_gelu_is_exact_to_six_in_ten_million_everywhere() -> None:
    gate = torch.cat(
        [torch.linspace(-8, 8, 801), torch.logspace(1, 38, 38), -torch.logspace(1, 38, 38), torch.zeros(1)]
    )
    x = torch.stack([torch.ones_like(gate), gate], -1)  # rows of one column: the scale is the number itself
    _, scale = kernels.launch_geglu_quantize_rows(x, torch.int8)
    exact = torch.nn.functional.gelu(gate.double()).abs()
    assert ((scale[:, 0].double() * 127 - exact).abs() <= 6e-7 + exact * RELATIVE).all()


@DTYPES
@FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_is_quantized_to_the_nearest(shape: tuple[int, int], of: torch.dtype, dtype: torch.dtype) -> None:
    rows, columns = shape
    x = awkward(rows, columns, of, seed=sum(shape))
    weight, bias = torch.randn(2, columns, generator=seeded(columns)).to(of)
    exact = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
    # fp32 statistics: a mean of numbers up to `largest` is off by that times a few roundings, and so are differences.
    largest, spread = (
        x.double().abs().amax(-1, keepdim=True),
        (x.double().var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
    )
    slack = (
        weight.double().abs() * (largest / spread + exact.abs() / weight.double().abs().clamp(min=1e-3)) + bias.abs()
    )
    slack = slack * 4e-7 * (1 + math.log2(columns))
    assert_quantized(kernels.launch_layer_norm_quantize_rows(x, weight, bias, 1e-5, dtype), exact, dtype, slack)
    assert_quantized(operators.layer_norm_quantize_rows(x, weight, bias, 1e-5, dtype), exact, dtype, slack)


@DTYPES
def test_rows_are_what_precedes_the_last_dimension(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, generator=seeded(0))
    whole, flat = kernels.launch_quantize_rows(x, dtype), kernels.launch_quantize_rows(x.reshape(6, 40), dtype)
    assert whole[0].shape == (2, 3, 40) and torch.equal(
        whole[0].view(torch.int8).reshape(6, 40), flat[0].view(torch.int8)
    )
    turned = torch.randn(40, 6, generator=seeded(1)).t()  # not contiguous
    made, plain = kernels.launch_quantize_rows(turned, dtype), operators.quantize_rows(turned, dtype)
    assert torch.equal(made[0].view(torch.int8), plain[0].contiguous().view(torch.int8))
    none = kernels.launch_geglu_quantize_rows(torch.empty(0, 8), dtype)
    assert none[0].shape == (0, 4) and none[1].shape == (0, 1)


def test_a_row_of_fp8_with_a_nan_is_all_nan_or_stays_one() -> None:
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = math.nan, math.inf
    q, scale = kernels.launch_quantize_rows(x, torch.float8_e4m3fn)
    back = q.float() * scale
    assert back[0, 3].isnan() and back[1].isnan().all() and torch.equal(back[2], x[2])


def test_other_formats_and_odd_halves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float8_e4m3fn or torch\.int8"):
        operators.quantize_rows(torch.ones(2, 2), torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.float8_e4m3fn or torch\.int8"):
        kernels.launch_quantize_rows(torch.ones(2, 2), torch.uint8)
    with pytest.raises(ValueError, match="GEGLU of 5 columns"):
        operators.geglu_quantize_rows(torch.ones(2, 5), torch.int8)


PRODUCTS = (
    *((1, 1, 16), (5, 7, 16), (33, 40, 48), (17, 130, 80), (154, 64, 64), (70, 20, 640)),
    *((ANY.randint(1, 90), ANY.randint(1, 90), 16 * ANY.randint(1, 12)) for _ in range(3)),
)


@DTYPES
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("rows, columns, depth", PRODUCTS)
def test_products_are_those_of_the_quantized_numbers(
    rows: int, columns: int, depth: int, biased: bool, dtype: torch.dtype
) -> None:
    q, scale_q = operators.quantize_rows(awkward(rows, depth, torch.float32, seed=rows), dtype)
    w, scale_w = operators.quantize_rows(torch.randn(columns, depth, generator=seeded(1)), dtype)
    scale_w = scale_w.reshape(1, -1)
    bias = torch.randn(columns, generator=seeded(2)).bfloat16() if biased else None
    made = kernels.launch_triton_matmul(q, w, scale_q, scale_w, bias, torch.float32)
    product = q.double() @ w.double().t()
    if dtype == torch.int8:
        exact = product.to(torch.int32).float() * scale_q * scale_w  # to the last bit, where no bias is added
        assert biased or torch.equal(made, exact)
    size = (q.double().abs() @ w.double().abs().t()) * scale_q * scale_w
    exact = product * scale_q * scale_w + (0 if bias is None else bias.double())
    # Integers add up exactly; a sum of `depth` products in fp32 is off by a unit for each, at worst.
    allowed = size * 2.0**-24 * (depth if dtype != torch.int8 else 4) + exact.abs() * RELATIVE + 1e-30
    for result in (made, operators.scaled_matmul(q, w, scale_q, scale_w, bias, torch.float32)):
        assert result.shape == (rows, columns)
        assert ((result.double() - exact).abs() <= allowed).all()
    for out_dtype in (torch.bfloat16, torch.float16):  # as torch rounds what was made in fp32
        rounded = kernels.launch_triton_matmul(q, w, scale_q, scale_w, bias, out_dtype)
        assert torch.equal(rounded, made.to(out_dtype))


def test_integers_add_up_beyond_what_a_float_holds() -> None:
    q, w = torch.full((3, 5120), 127, dtype=torch.int8), torch.full((5, 5120), 127, dtype=torch.int8)
    q[1, 0], w[2] = 126, -127
    ones = torch.ones
    made = kernels.launch_triton_matmul(q, w, ones(3, 1), ones(1, 5), None, torch.float32)
    assert made[0, 0] == float(torch.tensor(127 * 127 * 5120, dtype=torch.float32)) and (made[:, 2] < 0).all()
    assert torch.equal(made, operators.scaled_matmul(q, w, ones(3, 1), ones(1, 5), None, torch.float32))


GATED = ((1, 16, 16), (5, 32, 16), (33, 80, 48), (70, 208, 64), (130, 48, 640))  # the second are hidden and gate


def gated(
    h: torch.Tensor, g: torch.Tensor, off_h: torch.Tensor, off_g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden * gelu(gate) of float64, and how far off it may be where they were known up to `off_h` and `off_g`."""
    exact = h * torch.nn.functional.gelu(g)
    slope = 1.13  # GELU's at most
    # The kernel's GELU is within 6e-7, or the rounding of what is larger; the product rounds once more.
    off = (h.abs() + off_h) * (slope * off_g + 6e-7 + g.abs() * RELATIVE) + off_h * g.abs() * slope
    return exact, off + exact.abs() * RELATIVE


@pytest.mark.parametrize("of", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("rows, columns, depth", GATED)
def test_a_linear_and_its_geglu_are_rounded_once(
    rows: int, columns: int, depth: int, biased: bool, of: torch.dtype
) -> None:
    x = (torch.randn(rows, depth, generator=seeded(rows)) * torch.logspace(-3, 0.5, rows)[:, None]).to(of)
    w = (torch.randn(columns, depth, generator=seeded(1)) / depth**0.5).to(of)
    bias = torch.randn(columns, generator=seeded(2)).to(of)
    if not biased:
        bias.zero_()
    hidden, gate = (x.double() @ w.double().t() + bias.double()).chunk(2, -1)  # as diffusers lays them out
    sizes = (x.double().abs() @ w.double().abs().t() + bias.double().abs()).chunk(2, -1)
    # Products of 16 bits are exact in fp32; their sum is off by a unit for each, at worst.
    exact, slack = gated(hidden, gate, *(size * 2.0**-24 * (depth + 2) for size in sizes))
    half = 2.0 ** -(8 if of == torch.bfloat16 else 11) * (exact.abs() + slack) + 2.0**-25  # of a unit
    given = (x, operators.in_turns(w), operators.in_turns(bias) if biased else None)
    for made in (kernels.launch_linear_geglu(*given), operators.linear_geglu(*given)):
        assert made.dtype == of and made.shape == (rows, columns // 2) and made.is_contiguous()
        assert ((made.double() - exact).abs() <= slack + half).all()


@DTYPES
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("rows, columns, depth", GATED)
def test_geglu_of_a_product_is_that_of_the_quantized_numbers(
    rows: int, columns: int, depth: int, biased: bool, dtype: torch.dtype
) -> None:
    q, scale_q = operators.quantize_rows(torch.randn(rows, depth, generator=seeded(rows)), dtype)
    plain = torch.randn(columns, depth, generator=seeded(1)) / depth**0.5
    w, scale_w = operators.quantize_rows(operators.in_turns(plain), dtype)
    scale_w = scale_w.reshape(1, -1)
    bias = torch.randn(columns, generator=seeded(2)).bfloat16() if biased else None

    def apart(turned: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(half.flatten(-2) for half in turned.unflatten(-1, (-1, 2, operators.TOGETHER)).unbind(-2))

    product = (q.double() @ w.double().t()) * scale_q.double() * scale_w.double()
    size = (q.double().abs() @ w.double().abs().t()) * scale_q.double() * scale_w.double()
    product += 0 if bias is None else bias.double()
    off = (size + product.abs()) * 2.0**-24 * (depth + 4 if dtype != torch.int8 else 6)
    exact, slack = gated(*apart(product), *apart(off))
    for launch in (kernels.launch_scaled_matmul_geglu, operators.scaled_matmul_geglu):
        made = launch(q, w, scale_q, scale_w, bias, torch.float32)
        assert made.shape == (rows, columns // 2)
        assert ((made.double() - exact).abs() <= slack).all()
        for out_dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(launch(q, w, scale_q, scale_w, bias, out_dtype), made.to(out_dtype))
        narrow = launch(q, w, scale_q, scale_w, bias, torch.float8_e4m3fn).float()
        assert ((narrow - made).abs() <= made.abs() / 16 + 2.0**-10).all()


def test_without_scales_rows_are_what_they_are() -> None:
    q = torch.randint(-100, 100, (5, 32), dtype=torch.int8, generator=seeded(0))
    w = torch.randint(-100, 100, (16, 32), dtype=torch.int8, generator=seeded(1))
    scale_w, ones = torch.rand(1, 16, generator=seeded(2)), torch.ones(5, 1)
    for launch in (
        *(kernels.launch_scaled_matmul, kernels.launch_triton_matmul, operators.scaled_matmul),
        *(kernels.launch_scaled_matmul_geglu, operators.scaled_matmul_geglu),
    ):
        with_ones = launch(q, w, ones, scale_w, None, torch.float32)
        assert torch.equal(launch(q, w, None, scale_w, None, torch.float32), with_ones)


def test_an_embedding_that_all_images_share_is_added_to_each() -> None:
    x, one = torch.randn(2, 64, 5, 5, generator=seeded(0)), torch.ones(64)
    shared = torch.randn(1, 64, generator=seeded(1)).expand(2, -1)
    made, plain = (
        norm(x, 8, one, one, 1e-5, False, None, shared)
        for norm in (norm_kernels.launch_group_norm_nhwc, operators.group_norm_nhwc)
    )
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)


def test_hidden_and_gate_take_turns_of_eight_rows() -> None:
    turned = operators.in_turns(torch.arange(48))
    assert turned.tolist() == [*range(8), *range(24, 32), *range(8, 16), *range(32, 40), *range(16, 24), *range(40, 48)]
    x, w = torch.randn(2, 3, 16, generator=seeded(0)).bfloat16(), torch.randn(32, 16, generator=seeded(1)).bfloat16()
    made = kernels.launch_linear_geglu(x, w, None)
    assert made.shape == (2, 3, 16) and kernels.launch_linear_geglu(x[:0], w, None).shape == (0, 3, 16)
    assert torch.equal(made.reshape(6, 16), kernels.launch_linear_geglu(x.reshape(6, 16), w, None))
    turned_x = x.reshape(6, 16).t().contiguous().t()  # not contiguous
    assert torch.equal(made.reshape(6, 16), kernels.launch_linear_geglu(turned_x, w, None))


def test_gated_linears_that_cant_be_are_refused() -> None:
    x, w = torch.ones(2, 16).bfloat16(), torch.ones(32, 16).bfloat16()
    with pytest.raises(ValueError, match=r"both torch\.float16"):
        operators.linear_geglu(x.float(), w.float(), None)
    with pytest.raises(ValueError, match=r"\(2, 16\) by \(32, 8\)"):
        kernels.launch_linear_geglu(x, w[:, :8], None)
    with pytest.raises(ValueError, match="of 24 columns"):
        kernels.launch_linear_geglu(x, w[:24], None)
    with pytest.raises(ValueError, match="of 24 columns"):
        operators.in_turns(w[:24])
    with pytest.raises(ValueError, match="bias has 16 numbers: 32"):
        kernels.launch_linear_geglu(x, w, w[0])
    with pytest.raises(ValueError, match="rows of 8 bytes"):
        kernels.launch_linear_geglu(x[:, :4], w[:, :4], None)
    q, one = torch.ones(2, 16, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="scale_q has 1 numbers: 2"):
        kernels.launch_scaled_matmul_geglu(q, q.repeat(8, 1), one, torch.ones(1, 16), None, torch.bfloat16)


@DTYPES
def test_products_keep_leading_dimensions(dtype: torch.dtype) -> None:
    q, scale_q = operators.quantize_rows(torch.randn(2, 3, 16, generator=seeded(0)), dtype)
    w, scale_w = operators.quantize_rows(torch.randn(4, 16, generator=seeded(1)), dtype)
    given = (q, w, scale_q, scale_w.reshape(1, -1), None, torch.bfloat16)
    made, plain = kernels.launch_scaled_matmul(*given), operators.scaled_matmul(*given)
    assert made.shape == plain.shape == (2, 3, 4)
    torch.testing.assert_close(made, plain)
    none = kernels.launch_scaled_matmul(q[:0], w, scale_q[:0], scale_w.reshape(1, -1), None, torch.bfloat16)
    assert none.shape == (0, 3, 4)


def test_products_that_cant_be_are_refused() -> None:
    q, one = torch.ones(4, 24, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="rows of 24 bytes"):
        kernels.launch_triton_matmul(q, q, torch.ones(4, 1), torch.ones(1, 4), None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"a product of torch\.int8 and torch\.float32"):
        operators.scaled_matmul(q, q.float(), one, one, None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"\(4, 24\) by \(4, 8\)"):
        operators.scaled_matmul(q, q[:, :8], one, one, None, torch.bfloat16)
    with pytest.raises(ValueError, match="scale_q has 1 numbers: 4 are needed"):
        operators.scaled_matmul(q, q, one, one, None, torch.bfloat16)
    with pytest.raises(ValueError, match="norm's weight has 24 numbers: 8"):
        kernels.launch_layer_norm_quantize_rows(torch.ones(2, 8), torch.ones(24), torch.ones(8), 1e-5, torch.int8)


@DTYPES
@FLOATS
@pytest.mark.parametrize("shape", ((1, 1, 1, 1), (2, 3, 5, 7), (3, 40, 9, 4), (1, 8, 40, 31)), ids=str)
def test_images_are_quantized_to_the_nearest(
    shape: tuple[int, ...], of: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOST_PARTS", 16)  # so that a part is more than one block
    x = torch.randn(shape, generator=seeded(sum(shape))) * torch.logspace(-2, 3, shape[0])[:, None, None, None]
    x[0, 0, -1] *= 50
    if shape[0] > 2:
        x[1] = 0
    x = x.to(of)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        q, scale = kernels.launch_quantize_image(given, dtype)
        assert q.is_contiguous(memory_format=torch.channels_last) and scale.shape == shape[:1]
        assert_quantized((q.flatten(1).contiguous(), scale[:, None]), x.double().flatten(1), dtype)
        plain = operators.quantize_image(given, dtype)
        assert torch.equal(q.view(torch.uint8), plain[0].view(torch.uint8)) and torch.equal(scale, plain[1])


CONVOLUTIONS = (  # images, in, out, height, width, kernel, stride, padding
    (2, 16, 5, 5, 7, 3, 1, 1),
    (1, 48, 40, 3, 18, 3, 1, 1),  # channels and width that no tile divides
    (2, 32, 8, 6, 4, 3, 2, 1),
    (1, 64, 33, 4, 36, 3, 2, 1),
    (3, 32, 16, 4, 4, 1, 1, 0),
    (1, 32, 16, 6, 6, 2, 2, 0),
    (1, 16, 16, 5, 5, 5, 1, 2),
    (1, 32, 16, 6, 9, 3, 3, 1),
    (1, 16, 16, 5, 6, 3, 1, 0),
    *((ANY.randint(1, 3), 16 * ANY.randint(1, 4), *(ANY.randint(3, 48) for _ in range(3)), 3, 1, 1) for _ in range(2)),
)


@pytest.mark.parametrize("of", operators.CONVOLVED, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_are_those_of_the_quantized_numbers(case: tuple[int, ...], of: torch.dtype) -> None:
    images, channels, columns, height, width, kernel, stride, padding = case
    x = (
        torch.randn(images, channels, height, width, generator=seeded(0))
        * torch.logspace(0, 2, images)[:, None, None, None]
    )
    w = torch.randn(columns, channels, kernel, kernel, generator=seeded(1))
    scale = scale_w = None
    if of in operators.LARGEST:
        (q, scale), (qw, scale_w) = operators.quantize_image(x, of), operators.quantize_filters(w, of)
    else:
        q, qw = x.to(of), w.to(of)
    plain = torch.nn.functional.conv2d(q.double(), qw.double(), stride=stride, padding=padding)
    size = torch.nn.functional.conv2d(q.double().abs(), qw.double().abs(), stride=stride, padding=padding)
    factor = 1.0 if scale is None or scale_w is None else scale.double()[:, None, None, None] * scale_w[:, None, None]
    bias = torch.randn(columns, generator=seeded(2)).bfloat16()
    residual = torch.randn(plain.shape, generator=seeded(3)).bfloat16()
    for added in ((None, None), (bias, residual)):
        exact = plain * factor + (0 if added[0] is None else bias.double()[:, None, None])
        exact += 0 if added[1] is None else residual.double()
        given = (q, qw, scale, scale_w, *added, stride, padding, torch.float32)
        # Integers add up exactly; a sum of products in fp32 is off by a unit for each, at worst.
        allowed = (size * factor + 4) * 2.0**-24 * (channels * kernel**2 if of != torch.int8 else 4)
        made = kernels.launch_convolution_nhwc(*given)
        for result in (made, operators.convolution_nhwc(*given)):
            assert result.shape == exact.shape and result.is_contiguous(memory_format=torch.channels_last)
            assert ((result.double() - exact).abs() <= allowed).all()
        if of == torch.int8 and added == (None, None) and scale is not None and scale_w is not None:
            both = scale[:, None, None, None] * scale_w[:, None, None]
            assert torch.equal(made, plain.to(torch.int32).float() * both)
    if case in CONVOLUTIONS[:3]:  # as torch rounds what was made in fp32, also where it is turned in the smaller type
        rest = (stride, padding, torch.bfloat16)
        assert torch.equal(
            kernels.launch_convolution_nhwc(q, qw, scale, scale_w, bias, residual, *rest), made.bfloat16()
        )
        wide = kernels.launch_convolution_nhwc(q, qw, scale, scale_w, bias, None, stride, padding, torch.float32)
        narrow = kernels.launch_convolution_nhwc(q, qw, scale, scale_w, bias, None, *rest)
        assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("case", (*CONVOLUTIONS, (1, 16, 16, 5, 40, 3, 1, 1), (1, 16, 16, 8, 9, 7, 1, 3)), ids=str)
def test_a_shifted_image_is_shifted_within_its_edges(case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    images, channels, columns, height, width, kernel, stride, padding = case
    (candidate,) = kernels._convolution_kernel.configs
    monkeypatch.setitem(candidate.kwargs, "SECOND", 16)  # pixels of a tile: one case has tiles without an edge
    x = torch.randn(images, channels, height, width, generator=seeded(0)).clamp(min=-0.3)
    shift = torch.linspace(-1, 3, images)
    w = torch.randn(columns, channels, kernel, kernel, generator=seeded(1))
    (q, scale), (qw, scale_w) = (
        operators.quantize_image(x - shift[:, None, None, None], torch.int8),
        operators.quantize_filters(w, torch.int8),
    )
    exact = torch.nn.functional.conv2d(q.double(), qw.double(), stride=stride, padding=padding)
    exact *= scale.double()[:, None, None, None] * scale_w[:, None, None]
    raised = shift.double()[:, None, None, None].expand(x.shape)
    exact += torch.nn.functional.conv2d(raised, w.double(), stride=stride, padding=padding)
    given = (q, qw, scale, scale_w, None, None, stride, padding, torch.float32, shift, w.sum(1))
    # The weights' sums are two halves in bf16, each off by a 2**-9 of itself at most: a 2**-18 of the sum. As much
    # again is for what fp32 does to the sums before and after.
    within = torch.ones(1, 1, height, width, dtype=torch.double)
    reach = torch.nn.functional.conv2d(within, w.double().sum(1, keepdim=True).abs(), stride=stride, padding=padding)
    allowed = 2.0**-17 * shift.double().abs()[:, None, None, None] * reach + 1e-5 * exact.abs() + 1e-5
    for result in (kernels.launch_convolution_nhwc(*given), operators.convolution_nhwc(*given)):
        assert ((result.double() - exact).abs() <= allowed).all()
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_that_cant_be_are_refused() -> None:
    def convolve(x: torch.Tensor, w: torch.Tensor, stride: int) -> None:
        kernels.launch_convolution_nhwc(x, w, None, None, None, None, stride, 1, torch.bfloat16)

    x, w = torch.ones(1, 8, 5, 6, dtype=torch.int8), torch.ones(4, 8, 3, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="8 channels: they have to fill"):
        convolve(x, w, 1)
    with pytest.raises(ValueError, match=r"one of torch\.float8_e4m3fn, torch\.int8, "):
        convolve(x, w.float(), 1)
    with pytest.raises(ValueError, match="weights for 16"):
        convolve(x, w.repeat(1, 2, 1, 1), 1)
    x16, w16, one = x.repeat(1, 2, 1, 1), w.repeat(1, 2, 1, 1), torch.ones(1)
    with pytest.raises(ValueError, match="or neither"):
        kernels.launch_convolution_nhwc(x16, w16, one, None, None, None, 1, 1, torch.bfloat16)
    with pytest.raises(ValueError, match="scale_w has 1 numbers: 4"):
        kernels.launch_convolution_nhwc(x16, w16, one, one, None, None, 1, 1, torch.bfloat16)
    rest = (1, 1, torch.bfloat16)
    with pytest.raises(ValueError, match="a shift of its images and the sums of its weights, or neither"):
        kernels.launch_convolution_nhwc(x16, w16, None, None, None, None, *rest, one)
    with pytest.raises(ValueError, match="sums has 4 numbers: 36"):
        kernels.launch_convolution_nhwc(x16, w16, None, None, None, None, *rest, one, torch.ones(4))
    with pytest.raises(ValueError, match="5×6 pixels, with stride 2"):
        convolve(x.repeat(1, 4, 1, 1), w.repeat(1, 4, 1, 1), 2)


NORMS = (  # images, channels, height, width, groups
    (1, 2, 1, 1, 1),
    (2, 32, 5, 7, 32),
    (2, 12, 9, 11, 3),  # no multiple of eight channels
    (3, 64, 13, 10, 8),
    (2, 320, 11, 12, 32),  # 10 channels a group, and so on to 80, as in SDXL; rows that no tile divides
    (1, 640, 7, 9, 32),
    (2, 960, 6, 7, 32),
    (1, 1280, 8, 5, 32),
    (2, 1920, 5, 5, 32),
    (1, 2560, 7, 5, 32),
    (1, 128, 40, 41, 32),
    (1, 72, 3, 3, 1),
)


def assert_normed(
    made: torch.Tensor, x: torch.Tensor, given: torch.Tensor, groups: int, silu: bool, *affine: torch.Tensor
) -> None:
    """That `made` is the group norm of `given` (float64: x and what is added to it), as closely as fp32 knows x."""
    exact = torch.nn.functional.group_norm(given, groups, *(each.double() for each in affine), 1e-5)
    exact = torch.nn.functional.silu(exact) if silu else exact
    # A number, its mean and the shift are rounded to fp32 where they are as large as x, and divided by what x varies.
    grouped = given.unflatten(1, (groups, -1)).flatten(2)
    size = grouped.abs().amax(-1) / (grouped.var(-1, correction=0) + 1e-5).sqrt() + 1
    size = size.repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None]
    weight, bias = (each.double().abs()[:, None, None] for each in affine)
    unit = torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0.0
    allowed = (size * weight + bias + exact.abs()) * 2.0**-21 + exact.abs() * unit * 1.01 + 1e-7
    assert made.dtype == x.dtype and made.shape == x.shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert ((made.double() - exact).abs() <= allowed).all()


@FLOATS
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_group_norms_are_exact_to_rounding(shape: tuple[int, ...], of: torch.dtype) -> None:
    images, channels, height, width, groups = shape
    x = torch.randn(images, channels, height, width, generator=seeded(sum(shape)))
    x = (x * torch.logspace(-1, 1, channels)[:, None, None] + torch.linspace(-2, 5, images)[:, None, None, None]).to(of)
    weight, bias, x_bias = torch.randn(3, channels, generator=seeded(channels)).to(of)
    wider = torch.randn(images, 3 * channels, generator=seeded(1)).to(of)
    embedding = wider[:, channels : 2 * channels]  # a part of all blocks'
    for silu, added in ((False, (None, None)), (True, (x_bias, None)), (True, (x_bias, embedding))):
        wide = x.double()
        for each in added:
            wide = wide if each is None else wide + each.double()[..., None, None]
        given = operators.channels_last(x) if silu else x
        for operation in (norm_kernels.launch_group_norm_nhwc, operators.group_norm_nhwc):
            made = operation(given, groups, weight, bias, 1e-5, silu, *added)
            assert_normed(made, x, wide, groups, silu, weight, bias)


@DTYPES
@pytest.mark.parametrize("size", (0.05, 1.0))  # of the weights: with the small ones -0.278 is what is reached
@pytest.mark.parametrize("silu", (False, True))
@pytest.mark.parametrize("shape", (NORMS[2], NORMS[4], NORMS[10]), ids=str)
def test_group_norms_are_quantized_to_the_nearest(
    shape: tuple[int, ...], silu: bool, size: float, dtype: torch.dtype
) -> None:
    images, channels, height, width, groups = shape
    x = operators.channels_last(torch.randn(images, channels, height, width, generator=seeded(sum(shape)))).bfloat16()
    weight, bias, x_bias = torch.randn(3, channels, generator=seeded(channels)) * size
    bias -= 1.5 * (size < 1)
    embedding = torch.randn(images, channels, generator=seeded(1))
    wide = (x.double() + x_bias.double()[:, None, None] + embedding.double()[:, :, None, None]).contiguous()
    exact = torch.nn.functional.group_norm(wide, groups, weight.double(), bias.double(), 1e-5)
    least = exact.amin((1, 2, 3))
    exact = torch.nn.functional.silu(exact) if silu else exact
    for operation in (norm_kernels.launch_group_norm_quantize_nhwc, operators.group_norm_quantize_nhwc):
        q, scale, shift = operation(x, groups, weight, bias, 1e-5, silu, dtype, x_bias, embedding)
        assert q.shape == x.shape and q.dtype == dtype and q.is_contiguous(memory_format=torch.channels_last)
        low, high = exact.amin((1, 2, 3)), exact.amax((1, 2, 3))
        if silu:
            low = torch.where(least < operators.SILU_LEAST_AT, operators.SILU_LEAST, low)
        middle = (low + high) / 2 if silu and dtype == torch.int8 else torch.zeros_like(low)
        reach = torch.maximum(high - middle, middle - low)
        torch.testing.assert_close(scale.double(), reach / operators.LARGEST[dtype], rtol=1e-5, atol=0)
        assert ((shift.double() - middle).abs() <= reach * 1e-5).all()
        scaled = (exact - shift.double()[:, None, None, None]) / scale.double()[:, None, None, None]
        off = (q.double() - scaled).abs()
        assert (off <= half_unit(scaled, dtype) * 1.001 + operators.LARGEST[dtype] * 1e-5).all()


@DTYPES
def test_an_image_with_what_is_no_number_has_no_scale(dtype: torch.dtype) -> None:
    x = torch.randn(3, 320, 5, 6, generator=seeded(0))
    x[1, 170, 2, 3] = float("nan")
    for operation in (norm_kernels.launch_group_norm_quantize_nhwc, operators.group_norm_quantize_nhwc):
        _, scale, _ = operation(x, 32, torch.ones(320), torch.zeros(320), 1e-5, True, dtype)
        assert scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("multiprocessors", (1, 40))  # few parts of many tiles, or many of one
@pytest.mark.parametrize("mean", (0.0, 100.0, -1e4))
def test_a_large_mean_doesnt_cancel(mean: float, multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_kernels, "_multiprocessors", lambda device: multiprocessors)
    weight, bias = torch.ones(64), torch.zeros(64)
    x = operators.channels_last(torch.randn(2, 64, 61, 43, generator=seeded(0)) + mean)
    made = norm_kernels.launch_group_norm_nhwc(x, 8, weight, bias, 1e-5, False)
    assert_normed(made, x, x.double(), 8, False, weight, bias)
    # The worst case: all else is taken relative to where a part begins. 2**-11 is half of a unit in fp16's last place.
    x[0, :32, 0, 0] = mean + 300
    made = norm_kernels.launch_group_norm_nhwc(x, 8, weight, bias, 1e-5, False)
    exact = torch.nn.functional.group_norm(x.double(), 8, eps=1e-5)
    assert ((made - exact).abs() <= exact.abs() * 2.0**-11 + abs(mean) * 2.0**-21 + 2.0**-12).all()


def test_an_image_of_one_number_is_its_bias() -> None:
    x = operators.channels_last(torch.full((1, 64, 9, 9), 3.7))
    made = norm_kernels.launch_group_norm_nhwc(x, 8, torch.ones(64), torch.full((64,), 0.5), 1e-5, False)
    assert ((made - 0.5).abs() <= 1e-3).all()  # fp32's rounding of 3.7, over the root of 1e-5
    assert norm_kernels.launch_group_norm_nhwc(x[:0], 8, torch.ones(64), torch.ones(64), 1e-5, True).shape[0] == 0


def test_spans_are_whole_groups_and_fill_their_lanes() -> None:
    for channels in (128, 256, 320, 512, 640, 960, 1280, 1920, 2560):
        made = norm_kernels.spans(channels, 32)
        assert made.width == made.groups * channels // 32 and made.width % 8 == 0 and made.width <= made.block
        assert made.count * made.width >= channels > (made.count - 1) * made.width
        assert channels / (made.count * made.block) > 0.8
        for images, pixels in ((1, 1024 * 1024), (2, 1024), (64, 16384)):
            count, part, rows = norm_kernels.parts(images, pixels, made, programs=396)
            assert part % rows == 0 and count * part >= pixels > (count - 1) * part
            assert count == 1 or images * made.count * count <= 396  # one wave


def test_group_norms_that_cant_be_are_refused() -> None:
    x, one, embedding = torch.ones(2, 6, 3, 3), torch.ones(6), torch.ones(1, 6)
    for norm in (operators.group_norm_nhwc, norm_kernels.launch_group_norm_nhwc):
        with pytest.raises(ValueError, match="whose channels 4 groups divide"):
            norm(x, 4, one, one, 1e-5, False)
        with pytest.raises(ValueError, match="whose channels 3 groups divide"):
            norm(x[0], 3, one, one, 1e-5, False)
        with pytest.raises(ValueError, match="norm's x_bias has 5 numbers: 6"):
            norm(x, 3, one, one, 1e-5, False, one[:5])
        with pytest.raises(ValueError, match=r"an embedding of \(1, 6\): \(2, 6\) is needed"):
            norm(x, 3, one, one, 1e-5, False, None, embedding)


# Batch, queries, keys, heads, head dimension; the interpreter's tiles are of 32 queries and 32 keys, ALONE if no more.
ATTENDED = (
    *((1, 1, 1, 1, 8), (2, 33, 20, 3, 40), (1, 40, 32, 2, 128)),  # one block of keys
    *((2, 40, 77, 2, 64), (1, 5, 65, 2, 72)),  # the last block isn't whole
    *((1, 64, 128, 2, 64), (2, 3, 256, 1, 32)),  # all are
)


def attended(
    batch: int, queries: int, keys: int, heads: int, dimension: int, of: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and keys and values as slices of one tensor. Keys grow, so that the largest score is found late."""
    q = torch.randn(batch, queries, heads * dimension, generator=seeded(queries)).to(of)
    both = torch.randn(batch, keys, 2 * heads * dimension, generator=seeded(keys))
    k, v = (both * torch.linspace(0.2, 3, keys)[:, None]).to(of).chunk(2, -1)
    return tuple(each.unflatten(-1, (heads, dimension)) for each in (q, k, v))  # type: ignore[return-value]


def exactly_attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and what rounding may add to it: of the weights, of the result, and of scores in fp32."""
    weights = (torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale).softmax(-1)
    exact, size = (torch.einsum("bhqk,bkhd->bqhd", weights, each.double()) for each in (v, v.abs()))
    unit = torch.finfo(q.dtype).eps / 2
    # fp16 has no small numbers: weights below 6e-5 of the largest are rounded to a multiple of 6e-8.
    least = torch.finfo(q.dtype).smallest_normal * unit * v.double().abs().sum(1, keepdim=True)
    return exact, size * (unit + 1e-4) + exact.abs() * unit + least


@pytest.mark.parametrize("of", operators.HALVES, ids=str)
@pytest.mark.parametrize("case", ATTENDED, ids=str)
def test_attention_is_exact_to_rounding(case: tuple[int, ...], of: torch.dtype) -> None:
    given = attended(*case, of)
    exact, allowed = exactly_attended(*given, 0.3)
    for attend in (attention_kernels.launch_attention, operators.attention):
        made = attend(*given, 0.3)
        assert made.dtype == of and made.is_contiguous() and made.shape == given[0].shape
        assert ((made.double() - exact).abs() <= allowed).all()


def test_attention_reads_a_fused_projection_as_it_lies_and_copies_what_it_cant() -> None:
    batch, tokens, heads, dimension = 2, 70, 2, 64
    fused = torch.randn(batch, tokens, 3 * heads * dimension, generator=seeded(0)).bfloat16()
    q, k, v = (each.unflatten(-1, (heads, dimension)) for each in fused.chunk(3, -1))
    descriptors = [attention_kernels._described(each) for each in (q, k, v)]
    assert [each.base.data_ptr() for each in descriptors] == [each.data_ptr() for each in (q, k, v)]
    assert {tuple(each.strides) for each in descriptors} == {(tokens * 384, 384, 64, 1)}
    made = attention_kernels.launch_attention(q, k, v, 0.125)
    apart = [each.clone(memory_format=torch.contiguous_format) for each in (q, k, v)]
    assert torch.equal(made, attention_kernels.launch_attention(*apart, 0.125))
    for awkward_one in (
        torch.randn(2, 70, 2, 72)[..., 1:65].bfloat16(),  # an odd address, were it a slice
        torch.randn(2, 2, 64, 70).bfloat16().permute(0, 3, 1, 2),  # dimensions far from each other
        torch.randn(1, 70, 2, 64).bfloat16().expand(2, -1, -1, -1),  # no stride at all
        torch.randn(2, 70, 2, 72).bfloat16()[..., 1:65],
    ):
        descriptor = attention_kernels._described(awkward_one)
        assert descriptor.base.data_ptr() % 16 == 0 and all(each % 8 == 0 for each in descriptor.strides[:3])
        made, plain = (
            attend(awkward_one, k, v, 0.125) for attend in (attention_kernels.launch_attention, operators.attention)
        )
        torch.testing.assert_close(made, plain, atol=1e-2, rtol=2e-2)


def test_attention_of_a_nan_stays_one() -> None:
    q, k, v = (torch.ones(1, 3, 2, 8).bfloat16() for _ in range(3))
    q[:, 2] = math.nan
    for attend in (attention_kernels.launch_attention, operators.attention):
        made = attend(q, k, v, 1.0)
        assert made[:, 2].isnan().all() and (made[:, :2] == 1).all()


def test_attention_that_cant_be_is_refused() -> None:
    q, k = torch.ones(1, 3, 2, 16).bfloat16(), torch.ones(1, 5, 2, 16).bfloat16()
    for attend in (attention_kernels.launch_attention, operators.attention):
        with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float16 and torch\.bfloat16: all"):
            attend(q, k.half(), k, 1.0)
        with pytest.raises(ValueError, match=r"attention of torch\.float32"):
            attend(q.float(), k.float(), k.float(), 1.0)
        with pytest.raises(ValueError, match="only the tokens of the first may differ"):
            attend(q, k, k[:, :4], 1.0)
        with pytest.raises(ValueError, match="only the tokens of the first may differ"):
            attend(q[:, :, :1], k, k, 1.0)
        with pytest.raises(ValueError, match="only the tokens of the first may differ"):
            attend(q, k[:, :0], k[:, :0], 1.0)
        with pytest.raises(ValueError, match="heads of 12: they have to be a multiple of 8, 128 at most"):
            attend(q[..., :12], k[..., :12], k[..., :12], 1.0)
        with pytest.raises(ValueError, match="heads of 160"):
            attend(q.repeat(1, 1, 1, 10), k.repeat(1, 1, 1, 10), k.repeat(1, 1, 1, 10), 1.0)
        with pytest.raises(ValueError, match=r"scaled by -1\.0: it has to be above 0"):
            attend(q, k, k, -1.0)
    assert attention_kernels.launch_attention(q[:, :0], k, k, 1.0).shape == (1, 0, 2, 16)


def operations(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(2, 3, 16, generator=seeded(0))
    q, scale_q = operators.quantize_rows(x, dtype)
    w, scale_w = operators.quantize_rows(x[0], dtype)
    image = torch.randn(2, 16, 4, 4, generator=seeded(0))
    (pixels, scale), (filters, scales) = (
        operators.quantize_image(image, dtype),
        operators.quantize_filters(image, dtype),
    )
    sums = image.sum(1)
    turns, scale_turns = operators.quantize_rows(torch.randn(16, 16, generator=seeded(1)), dtype)
    halves = (x.bfloat16(), turns.bfloat16(), torch.ones(16).bfloat16())
    halves_of_heads = torch.randn(2, 5, 3, 2, 16, generator=seeded(0)).bfloat16()
    return [
        (operators.linear_geglu, halves),
        (
            operators.scaled_matmul_geglu,
            (q, turns, scale_q, scale_turns.reshape(1, -1), torch.ones(16), torch.bfloat16),
        ),
        (operators.scaled_matmul, (q, w, scale_q, scale_w.reshape(1, -1), torch.ones(3), torch.bfloat16)),
        (operators.quantize_image, (image, dtype)),
        (operators.convolution_nhwc, (pixels, filters, scale, scales, torch.ones(2), None, 2, 1, torch.bfloat16)),
        (operators.convolution_nhwc, (pixels, filters, scale, scales, None, None, 1, 1, torch.bfloat16, scale, sums)),
        (operators.quantize_rows, (x, dtype)),
        (operators.geglu_quantize_rows, (x, dtype)),
        (operators.layer_norm_quantize_rows, (x, torch.ones(16), torch.zeros(16), 1e-5, dtype)),
        (operators.group_norm_nhwc, (image, 4, torch.ones(16), torch.zeros(16), 1e-5, True, None, image[:, :, 0, 0])),
        (operators.group_norm_quantize_nhwc, (image, 4, torch.ones(16), torch.zeros(16), 1e-5, True, dtype)),
        (operators.attention, (*halves_of_heads.unbind(2), 0.25)),
    ]


@DTYPES
def test_operators_hold_what_torch_asks_of_them(dtype: torch.dtype) -> None:
    for operator, arguments in operations(dtype):
        # The check of the schema multiplies the inputs, which torch can't in fp8.
        skipped = any(getattr(each, "dtype", None) == torch.float8_e4m3fn for each in arguments)
        torch.library.opcheck(operator, arguments, test_utils=OPCHECKS[1:] if skipped else OPCHECKS)


@DTYPES
def test_operators_are_traced_into_one_graph(dtype: torch.dtype) -> None:
    for operator, arguments in operations(dtype):
        torch.compiler.reset()  # each is a new graph of the same lambda
        compiled = torch.compile(lambda *given, call=operator: call(*given), fullgraph=True, backend="eager")
        ours, plain = compiled(*arguments), operator(*arguments)
        pairs = zip(ours, plain, strict=True) if isinstance(plain, tuple) else [(ours, plain)]
        for one, other in pairs:
            assert torch.equal(one.float(), other.float()) and one.stride() == other.stride()
