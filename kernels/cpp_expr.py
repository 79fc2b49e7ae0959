"""Print one instruction of a tile program as a C++ expression.

Duty: the scalar semantics of every operation, as torch has it. Comes in: an instruction; goes out:
an expression over v0, v1, .. with the functions of runtime.h, always qualified, so that no row of
the cell can hide one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cellc import ops
from cellc.kernels.tile import POINTS, Instr

C_TYPES = {
    "f32": "float", "f64": "double", "i64": "int64_t", "i32": "int32_t", "i16": "int16_t",
    "i8": "int8_t", "u8": "uint8_t", "bool": "bool",
}  # fmt: skip
CALLS_LIBM = frozenset(
    "log log1p expm1 sin cos tan atan erf fmod remainder floor_div pow atan2 gelu softplus".split()
)

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
}  # fmt: skip
_LOGICAL = {"logical_and": "&", "logical_or": "|", "logical_xor": "^"}
_OURS = "sigmoid sign relu silu gelu gelu_tanh softplus maximum minimum floor_div"
_NAMED_AS_IN_C = (
    "exp log log1p expm1 sqrt sin cos tan atan tanh erf floor ceil round trunc abs "
    "fmod remainder pow atan2"
)
_CALLS = {
    **{name: name for name in _OURS.split()},
    **{name: f"{name}_" for name in _NAMED_AS_IN_C.split()},
}
_POWERS = {
    2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", 1.0: "{0}", 0.5: "cellc::sqrt_({0})", -1.0: "1 / {0}",
    -0.5: "1 / cellc::sqrt_({0})", -2.0: "1 / ({0} * {0})",
}  # fmt: skip


def stored(dtype: str) -> str:
    """The C++ type of an element in memory."""
    return "uint8_t" if dtype == "bool" else C_TYPES[dtype]


def expression(x: Instr, dtypes: Sequence[str], element: str, body: Sequence[Instr]) -> str:
    """Instruction `x` of `body`; `dtypes` are its arguments', `element` is what it loads."""
    if x.op == "const":
        return literal(x.value, x.dtype)
    if x.op in POINTS:
        return element + " != 0" * (x.dtype == "bool")
    args = [f"v{a}" for a in x.args]
    if x.op == "cast":
        return _cast(args[0], dtypes[0], x.dtype)
    if x.op == "pow":
        return _power(x, args, body)
    if x.op in ("fmod", "remainder", "floor_div") and x.dtype not in ops.FLOAT_DTYPES:
        return f"cellc::int_{x.op}<{C_TYPES[x.dtype]}>({args[0]}, {args[1]}, &t.bad[r])"
    return _operation(x, args, dtypes)


def _operation(x: Instr, args: Sequence[str], dtypes: Sequence[str]) -> str:
    if x.op == "mul" and x.dtype == "f64":
        return f"cellc::product({', '.join(args)})"
    if x.op in _INFIX:
        return f"{args[0]} {_INFIX[x.op]} {args[1]}"
    if x.op in _LOGICAL:
        return f"({args[0]} != 0) {_LOGICAL[x.op]} ({args[1]} != 0)"
    if x.op in _CALLS:
        return f"cellc::{_CALLS[x.op]}({', '.join(args)})"
    if x.op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    simple = {
        "neg": "-{0}",
        "rsqrt": "1 / cellc::sqrt_({0})",
        "reciprocal": "1 / {0}",
        "logical_not": "{0} == 0",
        "isnan": "{0} != {0}",
        "bitwise_not": "!{0}" if x.dtype == "bool" else "~{0}",
    }
    return simple[x.op].format(*args)


def _cast(arg: str, given: str, wanted: str) -> str:
    if wanted == "bool":
        return f"{arg} != 0"
    if wanted == "u8" and given in ops.FLOAT_DTYPES:
        return f"cellc::u8({arg})"
    return f"{C_TYPES[wanted]}({arg})"


def _power(x: Instr, args: Sequence[str], body: Sequence[Instr]) -> str:
    if x.dtype not in ops.FLOAT_DTYPES:
        return f"cellc::int_pow<{C_TYPES[x.dtype]}>({args[0]}, {args[1]})"
    exponent = body[x.args[1]]
    if exponent.op == "const" and float(exponent.value) in _POWERS:
        return _POWERS[float(exponent.value)].format(args[0])
    return f"cellc::pow_({', '.join(args)})"


def literal(value: bool | int | float, dtype: str) -> str:
    """A constant, rounded to its type as torch rounds it."""
    if dtype == "bool":
        return str(bool(value)).lower()
    if dtype not in ops.FLOAT_DTYPES:
        whole = int(value)
        return "INT64_MIN" if whole == -(2**63) else f"{whole}" + "LL" * (dtype == "i64")
    with np.errstate(over="ignore"):
        number = float(np.float32(value)) if dtype == "f32" else float(value)
    if math.isnan(number):
        return "NAN"
    if math.isinf(number):
        return "INFINITY" if number > 0 else "-INFINITY"
    text = repr(float(value)) if dtype == "f64" or number == 0 else str(np.float32(value))
    return (text if "." in text or "e" in text else f"{text}.0") + "f" * (dtype == "f32")
