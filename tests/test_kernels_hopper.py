"""That the kernels compile for a Hopper GPU, without one: Triton brings NVIDIA's assembler along.

What it took (registers that overflowed, tensor cores not used) is read from the machine code. And what Triton's
interpreter says of their numbers, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton isn't installed: the kernels are for GPUs, and for Linux")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing: run without TRITON_INTERPRET")

from diffusion_fast import kernels  # noqa: E402

HERE = Path(__file__).parent


def test_the_interpreter_agrees_with_float64() -> None:
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "test_kernels.py")),
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(kernel: Any, types: dict[str, str], folder: Path, **constants: Any) -> tuple[str, dict[str, int]]:
    """A kernel's PTX and what its machine code takes. Pointers and integers are multiples of 16, as SDXL's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel  # beneath an autotuner
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if name not in constants and (types[name].startswith("*") or types[name] == "i32")
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
@pytest.mark.parametrize("columns", (640, 1280, 2560, 5120, 8192))
@pytest.mark.parametrize("name", ("quantize_rows", "geglu_quantize_rows", "layer_norm_quantize_rows"))
def test_rows_stay_in_registers(name: str, columns: int, q: str, tmp_path: Path) -> None:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), "*bf16") | {
        "q_ptr": q,
        "scale_ptr": "*fp32",
        "eps": "fp32",
    }
    limits = {"LARGEST": 448.0, "SMALLEST": kernels.SMALLEST_SCALE}
    ptx, usage = compiled(getattr(kernels, f"_{name}_kernel"), types, tmp_path, **kernels._row_shape(columns), **limits)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 64  # so that a multiprocessor holds 1024 threads at least
    assert "ld.global.L1::evict_first.v4" in ptx or ".v4.b32" in ptx  # 16 bytes a load
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx or q == "*i8"
