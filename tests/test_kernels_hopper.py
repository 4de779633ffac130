"""That the kernels compile for a Hopper GPU, without one: Triton brings NVIDIA's assembler along.

What it took (registers that overflowed, tensor cores not used) is read from the machine code. And what Triton's
interpreter says of their numbers, in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton isn't installed: the kernels are for GPUs, and for Linux")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing: run without TRITON_INTERPRET")

from diffusion_fast import attention_kernels, kernels, norm_kernels, operators  # noqa: E402

HERE = Path(__file__).parent


def one_and_full(values: Iterable[Any]) -> list[Any]:
    """Parameters of which the first is in every run of the tests, and the others are of the full matrix."""
    marks = itertools.chain([()], itertools.repeat(pytest.mark.full))
    return [pytest.param(each, id=str(each), marks=mark) for each, mark in zip(values, marks, strict=False)]


@pytest.mark.timeout(1800)
def test_the_interpreter_agrees_with_float64() -> None:
    # Nine tenths of this file's time: by as many processes as there are around it, which are done long before.
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-x", "-n", workers, str(HERE / "test_kernels.py")),
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(
    kernel: Any, types: dict[str, str], folder: Path, plain: tuple[str, ...] = (), **constants: Any
) -> tuple[str, dict[str, int]]:
    """A kernel's PTX and what its machine code takes. Pointers and integers, but the `plain`, are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if name not in (*constants, *plain) and (types[name].startswith("*") or types[name] == "i32")
        },
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = (triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return made.asm["ptx"], usage | {"SHARED": made.metadata.shared}


@pytest.mark.parametrize("q", ("*fp8e4nv", "*i8"))
@pytest.mark.parametrize("columns", one_and_full((8192, 640, 1280, 2560, 5120)))
@pytest.mark.parametrize("name", ("quantize_rows", "geglu_quantize_rows", "layer_norm_quantize_rows"))
def test_rows_stay_in_registers(name: str, columns: int, q: str, tmp_path: Path) -> None:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), "*bf16") | {
        "q_ptr": q,
        "scale_ptr": "*fp32",
        "eps": "fp32",
    }
    limits = {"LARGEST": 448.0, "SMALLEST": operators.SMALLEST_SCALE}
    ptx, usage = compiled(getattr(kernels, f"_{name}_kernel"), types, tmp_path, **kernels._row_shape(columns), **limits)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 64  # so that a multiprocessor holds 1024 threads at least
    assert "ld.global.L1::evict_first.v4" in ptx or ".v4.b32" in ptx  # 16 bytes a load
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx or q == "*i8"


TRITON_TYPES = {"i8": 1, "fp8e4nv": 1, "bf16": 2}  # and their bytes


@pytest.mark.parametrize("of", ("i8", "fp8e4nv"))
@pytest.mark.parametrize("config", one_and_full(kernels._matmul_kernel.configs))
def test_products_use_the_tensor_cores_and_the_copy_engine(config: Any, of: str, tmp_path: Path) -> None:
    tile = config.kwargs
    types = dict.fromkeys(("ROWS", "OUT", "IN"), "i32") | dict.fromkeys(("scale_q", "scale_w"), "*fp32")
    types |= {
        name: f"tensordesc<{of}[{tile[side]}, {tile['DEPTH']}]>" for name, side in (("q", "FIRST"), ("w", "SECOND"))
    }
    assert_on_tensor_cores(
        *compiled(
            kernels._matmul_kernel.fn, types | {"out": "*bf16", "bias": "*bf16"}, tmp_path, INTEGER=of == "i8",
            BIASED=True, num_warps=config.num_warps, num_stages=config.num_stages, **tile,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("of", "out"), [*((each, "bf16") for each in TRITON_TYPES), ("fp8e4nv", "fp8e4nv")])
@pytest.mark.parametrize("config", one_and_full(kernels._linear_geglu_kernel.configs))
def test_linears_with_geglu_never_wait_between_their_products(config: Any, of: str, out: str, tmp_path: Path) -> None:
    tile, item = config.kwargs, TRITON_TYPES[of]
    types = dict.fromkeys(("ROWS", "OUT", "IN"), "i32") | dict.fromkeys(("scale_x", "scale_w"), "*fp32")
    types |= {
        name: f"tensordesc<{of}[{tile[side]}, {tile['DEPTH'] // item}]>"
        for name, side in (("x", "FIRST"), ("w", "SECOND"))
    }
    ptx, usage = compiled(
        kernels._linear_geglu_kernel.fn, types | {"out": f"*{out}", "bias": "*bf16"}, tmp_path, INTEGER=of == "i8",
        ITEM=item, SCALED=item == 1, BIASED=True, TOGETHER=operators.TOGETHER,
        num_warps=config.num_warps, num_stages=config.num_stages, **tile,
    )  # fmt: skip
    assert_on_tensor_cores(ptx, usage)
    # Hidden and gate are in the thread that multiplies them, and what is written goes by 16 bytes, but for the bias. In
    # eight bits a thread has two neighbours, two bytes, to put into shared memory, and writes eight bytes at least.
    assert ptx.count("shfl.sync") <= 1
    assert "st.global.v4" in ptx or (out != "bf16" and "st.global.v2" in ptx)
    assert ptx.count("st.shared.b16") <= (2 if out == "bf16" else 40)
    # Where the assembler finds no registers for what is under way, it has each product wait for the one before.
    code = machine_code(tmp_path / "kernel.cubin")
    assert code.count("WARPGROUP.DEPBAR") <= 3 < len(re.findall(r"[HQI]GMMA\.", code))


def machine_code(cubin: Path) -> str:
    import triton

    command = (triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("added", (False, True))
@pytest.mark.parametrize(("of", "shifted"), [*((each, False) for each in TRITON_TYPES), ("i8", True)])
@pytest.mark.parametrize("config", one_and_full(kernels._convolution_kernel.configs))
def test_convolutions_use_the_tensor_cores_and_the_copy_engine(
    config: Any, of: str, shifted: bool, added: bool, tmp_path: Path
) -> None:
    tile, item = config.kwargs, TRITON_TYPES[of]
    depth = tile["DEPTH"] // item
    types = dict.fromkeys(("IMAGES", "HEIGHT", "WIDTH", "CHANNELS", "OUT"), "i32")
    types |= dict.fromkeys(("scale", "scale_w", "shift", "sums"), "*fp32")
    types |= dict.fromkeys(("bias", "residual", "out"), "*bf16")
    types["x"] = f"tensordesc<{of}[1, {tile['SECOND'] // 16}, 1, 16, {depth}]>"
    types["w"] = f"tensordesc<{of}[{tile['FIRST']}, {depth}]>"
    assert_on_tensor_cores(
        *compiled(
            kernels._convolution_kernel.fn, types, tmp_path, TAPS=9, ACROSS=3, STRIDE=1, PADDING=1,
            INTEGER=of == "i8", ITEM=item, SCALED=item == 1, BIASED=True, ADDED=added, SHIFTED=shifted, ROOM=16,
            TILE_WIDTH=16,
            num_warps=config.num_warps, num_stages=config.num_stages, **tile,
        )
    )  # fmt: skip


class Hopper:
    """A driver that says what the GPU is, and has none."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def test_candidates_are_compiled_before_the_first_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    attending = attention_kernels._attention_kernel
    monkeypatch.setattr(attending.fn, "device_caches", type(attending.fn.device_caches)(attending.fn.create_binder))
    q, k, v = (attention_kernels._described(torch.empty(1, 1024, 2, 64, dtype=torch.bfloat16)) for _ in range(3))
    out = torch.empty(1, 1024, 2, 64, dtype=torch.bfloat16)
    given = {"q": q, "k": k, "v": v, "out": out, "scale": 1.0, "QUERIES": 1024, "KEYS": 1024, "HEADS": 2}
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    attending.nargs = given
    asked = {"DIM": 64, "WIDTH": 64, "ALONE": False, "grid": (1,), "warmup": False}
    candidates = attending.prune_configs(asked)
    made = list(attending.fn.device_caches[0][0].values())
    assert len(made) == len(candidates) == 5 and all(each.asm["cubin"] for each in made)


KEYS = {"whole": 1024, "ragged": 1000, "alone": 77}
# Of the width of a head and its keys: what SDXL has, then what else is taken.
ATTENTIONS = ((64, "whole"), (64, "alone"), (64, "ragged"), (32, "whole"), (128, "ragged"))


def attention_cases() -> list[Any]:
    tuner, found = attention_kernels._attention_kernel, []
    for width, keys in () if INTERPRETED else ATTENTIONS:
        given = {"ALONE": keys == "alone", "WIDTH": width}
        tried = attention_kernels._fitting(tuner.configs, {"KEYS": KEYS[keys]}, **given)
        for number, each in enumerate(tried):
            marks = pytest.mark.full if number else ()
            found.append(pytest.param(width, keys, each, id=f"{width} {keys} {each}", marks=marks))
    return found


@pytest.mark.parametrize("width, keys, config", attention_cases())
def test_attention_leaves_its_scores_in_registers(width: int, keys: str, config: Any, tmp_path: Path) -> None:
    tile = config.kwargs
    types = dict.fromkeys(("QUERIES", "KEYS", "HEADS"), "i32") | {"scale": "fp32", "out": "*bf16"}
    types |= {
        name: f"tensordesc<bf16[1, {tile[side]}, 1, {width}]>"
        for name, side in (("q", "FIRST"), ("k", "SECOND"), ("v", "SECOND"))
    }
    ptx, usage = compiled(
        attention_kernels._attention_kernel.fn, types, tmp_path, plain=("QUERIES", "KEYS", "HEADS"), DIM=width,
        WIDTH=width, ALONE=keys == "alone",
        num_warps=config.num_warps, num_stages=config.num_stages, **tile,
    )  # fmt: skip
    assert usage["STACK"] == usage["LOCAL"] == 0 and usage["SHARED"] <= 227 * 1024
    assert usage["REG"] * 32 * config.num_warps <= 65536 // (2 if width <= 64 and tile["FIRST"] <= 64 else 1)
    assert "cp.async.bulk.tensor" in ptx and "ld.global" not in ptx and "st.global.v4" in ptx
    assert not re.findall(r"ex2\.approx\.f32", ptx)  # without ftz small numbers take three more instructions
    code = machine_code(tmp_path / "kernel.cubin").splitlines()
    products = [number for number, line in enumerate(code) if "HGMMA." in line]
    rounds = 1 if keys == "alone" else 2  # the loop's, and the last block's
    rows = tile["FIRST"] // 16 // config.num_warps  # products of 64 rows for each instruction's 16 deep
    assert len(products) == rounds * rows * (width // 16 + tile["SECOND"] // 16)
    # Weights are where the second product wants them, but for the queries on their way in and the result's on its out.
    within = "\n".join(code[products[0] : products[-1]])
    assert not re.search(r"\b(STS|STSM|LDS|LDSM|LDG|STG)\b", within)
    # Queries stay in their registers: lent to the weights of one round, they would be taken for queries by the next.
    first_sides: dict[bool, set[str]] = {False: set(), True: set()}
    for number in products:
        first_sides["tnspB" in code[number]] |= set(re.findall(r"HGMMA\S+ R\d+, (R\d+),", code[number]))
    assert all(first_sides.values()) and not first_sides[False] & first_sides[True]
    # Nor does the assembler have each of a product's instructions wait for the one before.
    assert "\n".join(code).count("WARPGROUP.DEPBAR") <= 5 < len(products)


def assert_on_tensor_cores(ptx: str, usage: dict[str, int]) -> None:
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
    # Both operands in shared memory, none in registers; but for what a convolution's shift adds behind its loop.
    in_registers = re.findall(r"wgmma\.mma_async\.(\S+) \{[^}]*\}, \{", ptx)
    shifting = re.search(r"wgmma\.mma_async\S+\.s32\.s8\.s8", ptx)
    assert not [each for each in in_registers if not (shifting and each.endswith(".f32.bf16.bf16"))]
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["SHARED"] <= 227 * 1024


NORMED = (2560, 320, 640, 960, 1280, 1920, 128, 256, 512)  # channels of SDXL's UNet and VAE, 32 groups


@pytest.mark.parametrize("x", ("bf16", "fp32"))
@pytest.mark.parametrize("channels", one_and_full(NORMED))
def test_group_norms_stay_in_registers(channels: int, x: str, tmp_path: Path) -> None:
    shape = norm_kernels.spans(channels, 32)
    count, _, rows = norm_kernels.parts(
        1, 1024 * 1024, shape, programs=132 * norm_kernels.RESIDENT
    )  # the most there are
    pointers = ("x_ptr", "x_bias_ptr", "embedding_ptr", "weight_ptr", "bias_ptr", "out_ptr")
    types = dict.fromkeys(pointers, f"*{x}") | dict.fromkeys(("PIXELS", "PART", "PARTS_THERE"), "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("statistics_ptr", "limits_ptr", "affine_ptr", "reached_ptr"), "*fp32")
    types |= dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
    constants: dict[str, Any] = {
        "CHANNELS": channels, "WIDTH": shape.width, "PER_GROUP": channels // 32, "BLOCK": shape.block, "ROWS": rows,
        "GROUPS": triton.next_power_of_2(shape.groups), "STAGES": norm_kernels.STAGES, "BIASED": True, "EMBEDDED": 9600,
        "PARTS": triton.next_power_of_2(count), "SPANS": triton.next_power_of_2(shape.count), "SILU": True,
        "TOGETHER": 16, "LARGEST": 448.0, "SMALLEST": operators.SMALLEST_SCALE,
    }  # fmt: skip
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("statistics", {"LIMITED": False}),
        ("statistics", {"LIMITED": True}),
        ("limits", {}),
        ("apply", {}),
        ("quantize", {"SHIFTED": False}),
        ("quantize", {"SHIFTED": True}),
    )
    for name, more in cases:
        kernel = getattr(norm_kernels, f"_group_norm_{name}_kernel")
        given = {each: value for each, value in (constants | more).items() if each in kernel.arg_names}
        plain = ("PIXELS", "PART", "PARTS_THERE")
        types["q_ptr"] = "*i8" if more.get("SHIFTED") else "*fp8e4nv"
        ptx, usage = compiled(kernel, types, tmp_path, plain=plain, num_warps=norm_kernels.WARPS, **given)
        assert usage["STACK"] == usage["LOCAL"] == 0
        if x == "bf16" and name != "limits":
            resident = norm_kernels.RESIDENT_LIMITED if more.get("LIMITED") else norm_kernels.RESIDENT
            assert usage["REG"] * 32 * norm_kernels.WARPS * resident <= 65536
        if name != "limits":
            # 16 bytes a load, on its way to shared memory while the tiles before it are worked on.
            assert set(re.findall(r"cp\.async\.\S*\.shared\.global [^;]*\], (\w+)", ptx)) == {"0x10"}
        if name == "apply":
            assert "st.global.v4.b32" in ptx
        if name == "quantize":
            assert more["SHIFTED"] or "cvt.rn.satfinite.e4m3x2.f32" in ptx
            assert re.search(r"st\.global\.v[24]\.b32", ptx)


def test_a_stride_reads_whole_blocks_of_channels_only() -> None:
    """As the autotuner asks, before it times anything: it doesn't in the interpreter."""
    tuner = kernels._convolution_kernel
    for channels, stride, item, depths in ((320, 1, 1, {64, 128}), (320, 2, 1, {64}), (320, 2, 2, {64, 128})):
        tuner.nargs = {"CHANNELS": channels}
        kept = kernels._whole_channels(tuner.configs, tuner.nargs, STRIDE=stride, ITEM=item)
        assert {each.kwargs["DEPTH"] for each in kept} == depths
