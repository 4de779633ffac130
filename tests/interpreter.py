"""Triton's interpreter, mended where it doesn't compute what a GPU does, doesn't run at all, or takes twice as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
NUMPY = {"add": "add", "sub": "subtract", "mul": "multiply"}
BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}

convert_by_triton = interpreter._convert_float
patch_by_triton = interpreter._patch_lang_tensor
dot_by_triton = interpreter.InterpreterBuilder.create_dot


def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """Triton 3.6's loses the carry where a mantissa rounds up to the next power of two, and truncates subnormals.

    To fp8 it saturates, as the processor's instruction does, and torch's conversion doesn't.
    """
    if source not in TORCH or target not in TORCH:
        return convert_by_triton(data, source, target, mode)
    given = torch.from_numpy(data.copy())
    floats = given if given.is_floating_point() else given.view(TORCH[source])
    if target == tl.float8e4nv:
        floats = floats.clamp(-448.0, 448.0)
    made = floats.to(TORCH[target])
    return made.view(BITS[made.itemsize]).numpy()


def patch(tensor: Any, scope: Any) -> None:
    """A loop as long as an argument says: numpy 2.4 no longer makes an int of an array with one element."""
    patch_by_triton(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """bf16, which numpy doesn't have, is kept as integers, and would be multiplied as such."""
    if a.dtype.scalar == tl.bfloat16:
        floats = [convert(each.data, tl.bfloat16, tl.float32, None).view("float32") for each in (a, b)]
        a, b = (interpreter.TensorHandle(each, tl.float32) for each in floats)
    return dot_by_triton(self, a, b, *rest)


def check_overflow(self: Any, a: Any, b: Any, operation: Any) -> None:
    """Triton's own interprets a dozen operations for each one of integers, and asks nothing of what comes out."""
    kind = a.type.scalar
    assert kind == b.type.scalar and kind.is_int()
    if kind.int_bitwidth < 64:
        made = getattr(np, NUMPY[operation.__name__])(*(each.handle.data.astype(np.int64) for each in (a, b)))
        assert made.size == 0 or (kind.get_int_min_value() <= made.min() and made.max() <= kind.get_int_max_value()), (
            f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"
        )


def mend() -> None:
    """For the rest of the process, which is the interpreter's own."""
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = create_dot
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    # Triton looks through its whole language for what is to be interpreted at each call of a function, the kernels' own
    # and `tl.sum` alike, and puts some of it back afterwards. Here that is done once, in all modules that kernels see.
    assert all(module in globals().values() for module in (tl, core))
    interpreter._patch_lang(mend)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
