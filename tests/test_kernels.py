"""Triton kernels, run by Triton's interpreter on a CPU, against float64.

    TRITON_INTERPRET=1 pytest tests/test_kernels.py

The interpreter has to be chosen before Triton is imported, so that this is a process of its own. In any other process
test_kernels_hopper.py starts it. What the interpreter can't tell is there too: whether the kernels compile for a GPU.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton isn't installed: the kernels are for GPUs, and for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "not in this process: test_kernels_hopper.py runs these with TRITON_INTERPRET=1", allow_module_level=True
    )

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from diffusion_fast import kernels  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", kernels.LARGEST, ids=str)
FLOATS = pytest.mark.parametrize("of", (torch.float32, torch.bfloat16, torch.float16), ids=str)
TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
RELATIVE = 2.0**-22  # what a few roundings in fp32 do to a number
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")  # autograd isn't ours


@pytest.fixture(autouse=True)
def conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions between floats as a GPU does them.

    The interpreter's own lose the carry where a mantissa rounds up to the next power of two, and truncate subnormals.
    """
    own = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in TORCH or target not in TORCH:
            return own(data, source, target, mode)
        bits = torch.from_numpy(data.copy())
        floats = bits if bits.is_floating_point() else bits.view(TORCH[source])
        made = floats.to(TORCH[target])
        return made.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[made.itemsize]).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


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
    made: kernels.Quantized, exact: torch.Tensor, dtype: torch.dtype, slack: torch.Tensor | float = 0.0
) -> None:
    """That q and scale are the nearest there are to `exact` (float64), which itself was known up to `slack`."""
    q, scale = made
    assert q.dtype == dtype and q.shape == exact.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (exact.shape[:-1].numel(), 1)
    exact = exact.reshape(len(scale), -1)
    slack = slack.reshape(exact.shape) if isinstance(slack, torch.Tensor) else torch.full_like(exact, slack)
    wanted = (exact.abs().amax(-1, keepdim=True) / kernels.LARGEST[dtype]).clamp(min=kernels.SMALLEST_SCALE)
    off = slack.amax(-1, keepdim=True) / kernels.LARGEST[dtype] + wanted * RELATIVE
    assert ((scale.double() - wanted).abs() <= off).all()
    scaled = exact / scale.double()
    allowed = half_unit(scaled, dtype) + scaled.abs() * RELATIVE + slack / scale.double() * 1.01
    assert ((q.reshape(exact.shape).double() - scaled).abs() <= allowed).all()


SHAPES = ((1, 1), (3, 2), (5, 3), (7, 16), (5, 40), (9, 100), (6, 640), (2, 1280), (2, 5000), (154, 64))


@DTYPES
@FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_quantized_to_the_nearest(shape: tuple[int, int], of: torch.dtype, dtype: torch.dtype) -> None:
    x = awkward(*shape, of, seed=sum(shape))
    made = kernels.launch_quantize_rows(x, dtype)
    assert_quantized(made, x.double(), dtype)
    q, scale = kernels.quantize_rows(x, dtype)  # what it means, on a CPU: the same to the last bit
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
    assert_quantized(kernels.geglu_quantize_rows(x, dtype), exact, dtype, slack)


def test_gelu_is_exact_to_six_in_ten_million_everywhere() -> None:
    gate = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.logspace(1, 38, 95), -torch.logspace(1, 38, 95), torch.zeros(1)]
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
    assert_quantized(kernels.layer_norm_quantize_rows(x, weight, bias, 1e-5, dtype), exact, dtype, slack)


@DTYPES
def test_rows_are_what_precedes_the_last_dimension(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, generator=seeded(0))
    whole, flat = kernels.launch_quantize_rows(x, dtype), kernels.launch_quantize_rows(x.reshape(6, 40), dtype)
    assert whole[0].shape == (2, 3, 40) and torch.equal(
        whole[0].view(torch.int8).reshape(6, 40), flat[0].view(torch.int8)
    )
    turned = torch.randn(40, 6, generator=seeded(1)).t()  # not contiguous
    made, plain = kernels.launch_quantize_rows(turned, dtype), kernels.quantize_rows(turned, dtype)
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
        kernels.quantize_rows(torch.ones(2, 2), torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.float8_e4m3fn or torch\.int8"):
        kernels.launch_quantize_rows(torch.ones(2, 2), torch.uint8)
    with pytest.raises(ValueError, match="GEGLU of 5 columns"):
        kernels.geglu_quantize_rows(torch.ones(2, 5), torch.int8)


def row_operators(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(2, 3, 8, generator=seeded(0))
    return [
        (kernels.quantize_rows, (x, dtype)),
        (kernels.geglu_quantize_rows, (x, dtype)),
        (kernels.layer_norm_quantize_rows, (x, torch.ones(8), torch.zeros(8), 1e-5, dtype)),
    ]


@DTYPES
def test_operators_hold_what_torch_asks_of_them(dtype: torch.dtype) -> None:
    for operator, arguments in row_operators(dtype):
        torch.library.opcheck(operator, arguments, test_utils=OPCHECKS)


@DTYPES
def test_operators_are_traced_into_one_graph(dtype: torch.dtype) -> None:
    for operator, arguments in row_operators(dtype):
        compiled = torch.compile(lambda *given, call=operator: call(*given), fullgraph=True, backend="eager")
        for ours, plain in zip(compiled(*arguments), operator(*arguments), strict=True):
            assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8))
