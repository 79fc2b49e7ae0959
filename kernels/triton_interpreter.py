"""Triton's interpreter, made to convert to bf16 as devices do.

Duty: f32 goes to the nearest bf16, ties to even, and a whole number to the bf16 next to it: what
`.to(tl.bfloat16)` compiles to for every device. The interpreter of Triton 3.6 and 3.7 cuts the low
half of an f32 off instead, always toward zero, so that what it computes drifts as nothing on a
device does; and it takes a whole number for the bits of a bf16. Corrected once, where kernels begin
to be interpreted; a Triton that converts rightly, or elsewhere, is left as it is.
"""

from __future__ import annotations

from functools import lru_cache, wraps
from typing import Any

import numpy as np


@lru_cache
def round_as_devices() -> None:
    """Correct the interpreter of this process, if it needs it."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_convert_float") and not _rounds(interpreter, tl):
        interpreter._convert_float = _rounding(interpreter, tl)
    builder: Any = getattr(interpreter, "InterpreterBuilder", None)
    if hasattr(builder, "cast_impl") and not _counts(interpreter, tl):
        builder.cast_impl = _counting(interpreter, tl)


def _rounds(interpreter: Any, tl: Any) -> bool:
    """Does three quarters of the way to the next bf16 go there?"""
    between = np.array([1 + 0.75 * 2**-7], np.float32)
    return bool(interpreter._convert_float(between, tl.float32, tl.bfloat16, None)[0] == 0x3F81)


def _rounding(interpreter: Any, tl: Any) -> Any:
    convert, nearest = interpreter._convert_float, interpreter._ir.ROUNDING_MODE.RTNE

    @wraps(convert)
    def corrected(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if given == tl.float32 and wanted == tl.bfloat16 and mode in (None, nearest):
            return to_bf16(data)
        return convert(data, given, wanted, mode)

    return corrected


def _counts(interpreter: Any, tl: Any) -> bool:
    """Is the whole number 1 the bf16 1?"""
    one = interpreter.TensorHandle(np.array([1]), tl.int64)
    made = interpreter.InterpreterBuilder().cast_impl(one, tl.bfloat16)
    return bool(made.data[0] == 0x3F80)


def _counting(interpreter: Any, tl: Any) -> Any:
    cast = interpreter.InterpreterBuilder.cast_impl

    @wraps(cast)
    def corrected(self: Any, source: Any, wanted: Any) -> Any:
        if wanted.scalar == tl.bfloat16 and not source.dtype.scalar.is_floating():
            return interpreter.TensorHandle(to_bf16(source.data), wanted.scalar)
        return cast(self, source, wanted)

    return corrected


def to_bf16(data: Any) -> Any:
    """Numbers as the bits of the nearest bf16, ties to even."""
    numbers = np.asarray(data).astype(np.float32)
    bits = numbers.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), near).astype(np.uint16)
