"""Triton's interpreter, made to round as devices do.

Duty: f32 to bf16 goes to the nearest, ties to even: what `.to(tl.bfloat16)` compiles to for every
device. The interpreter of Triton 3.6 and 3.7 cuts the low half off instead, which is always toward
zero, so that what it computes drifts as nothing on a device does. Done once, where kernels begin to
be interpreted; a Triton that rounds, or that converts elsewhere, is left as it is.
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

    convert = getattr(interpreter, "_convert_float", None)
    if convert is None or _rounds(convert, tl):
        return

    @wraps(convert)
    def corrected(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        nearest = mode is None or mode == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and given == tl.float32 and wanted == tl.bfloat16:
            return to_bf16(data)
        return convert(data, given, wanted, mode)

    interpreter._convert_float = corrected


def _rounds(convert: Any, tl: Any) -> bool:
    """Does three quarters of the way to the next bf16 go there?"""
    between = np.array([1 + 0.75 * 2**-7], np.float32)
    return bool(convert(between, tl.float32, tl.bfloat16, None)[0] == 0x3F81)


def to_bf16(data: Any) -> Any:
    """f32 numbers as the bits of the nearest bf16, ties to even."""
    numbers = np.asarray(data, np.float32)
    bits = numbers.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), near).astype(np.uint16)
