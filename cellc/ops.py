"""Row operations: the vocabulary of a cell's body.

Duty: name every operation that a cell may hold, with its operands, result shape and FLOPs, in terms
of *one row* (no batch dimension). Comes in from `frontends.lower`, which turns traced torch
operations into these; goes to `kernels`, which prints them as torch calls, C++ or Triton. No torch
here.

Operands of one operation are rows (one value a call), parameters (one value for all calls) or
Python scalars. Broadcasting is NumPy's, on row dimensions. Arithmetic operands have been cast to
the result's dtype beforehand (comparisons: to each other's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]
Attrs = Mapping[str, Hashable]

FLOAT_DTYPES = ("f16", "bf16", "f32", "f64")
INT_DTYPES = ("u8", "i8", "i16", "i32", "i64")
DTYPES = (*FLOAT_DTYPES, *INT_DTYPES, "bool", "c64", "c128")
ITEM_BYTES = {
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "u8": 1,
    "i8": 1,
    "i16": 2,
    "i32": 4,
    "i64": 8,
    "bool": 1,
    "c64": 8,
    "c128": 16,
}


@dataclass(frozen=True, order=True)
class RowType:
    """Shape and dtype of one call's value: what one arena row holds."""

    shape: Shape
    dtype: str

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.dtype))

    def __hash__(self) -> int:  # a key wherever rows are placed: taken once
        return self._hash

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


UNARY = frozenset(
    "neg exp log log1p expm1 sqrt rsqrt abs sin cos tan atan tanh sigmoid relu erf reciprocal "
    "sign floor ceil round trunc silu gelu gelu_tanh softplus logical_not bitwise_not isnan "
    "cast".split()
)
COMPARE = frozenset("eq ne lt le gt ge".split())
BINARY = frozenset(
    "add sub mul div pow maximum minimum fmod remainder floor_div atan2 logical_and logical_or "
    "logical_xor bitwise_and bitwise_or bitwise_xor".split()
)
TERNARY = frozenset(["where"])
POINTWISE = UNARY | BINARY | COMPARE | TERNARY
REDUCE = frozenset("sum mean amax amin prod any all argmax argmin".split())
VIEWS = frozenset("reshape permute expand slice flip window".split())
# The operand of a ragged reduction is a variable-length vector of rows; it reduces over that
# vector.
RAGGED = frozenset(
    f"ragged_{name}" for name in ("sum", "mean", "amax", "amin", "prod", "any", "all")
)
TRANSCENDENTAL = frozenset(
    "exp log log1p expm1 sqrt rsqrt sin cos tan atan tanh sigmoid erf silu gelu "
    "gelu_tanh softplus pow atan2".split()
)


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """Broadcast row shapes as NumPy does; raises ValueError where they do not fit."""
    rank = max(map(len, shapes), default=0)
    out = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if size != 1 and out[i] not in (1, size):
                raise ValueError(f"row shapes {list(shapes)} do not broadcast")
            out[i] = size if size != 1 else out[i]
    return tuple(out)


def _reduced(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    dims = attrs["dims"]
    assert isinstance(dims, tuple)
    return tuple(size for i, size in enumerate(shapes[0]) if i not in dims)


def _slice(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    dim, start, stop, step = (attrs[k] for k in ("dim", "start", "stop", "step"))
    assert (
        isinstance(dim, int)
        and isinstance(start, int)
        and isinstance(stop, int)
        and isinstance(step, int)
    )
    return (*shapes[0][:dim], len(range(start, stop, step)), *shapes[0][dim + 1 :])


def _window(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    dim, size, step, spread = (attrs[k] for k in ("dim", "size", "step", "spread"))
    assert isinstance(dim, int) and isinstance(size, int)
    assert isinstance(step, int) and isinstance(spread, int)
    count = (shapes[0][dim] - (size - 1) * spread - 1) // step + 1
    return (*shapes[0][:dim], count, *shapes[0][dim + 1 :], size)


def _cat(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    dim = attrs["dim"]
    assert isinstance(dim, int)
    return (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])


def _permute(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    dims = attrs["dims"]
    assert isinstance(dims, tuple)
    return tuple(shapes[0][d] for d in dims)


def _given(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    shape = attrs["shape"]
    assert isinstance(shape, tuple)
    return shape


_SHAPES: dict[str, Callable[[Sequence[Shape], Attrs], Shape]] = {
    "reshape": _given,  # (x) attrs shape
    "expand": _given,  # (x) attrs shape, same rank as x
    "permute": _permute,  # (x) attrs dims
    "slice": _slice,  # (x) attrs dim, start, stop, step > 0
    "flip": lambda s, a: s[0],  # (x) attrs dims
    # (x) attrs dim, size, step, spread: out[.., i, .., k] is x[.., i step + k spread, ..]
    "window": _window,
    "cat": _cat,  # (x...) attrs dim
    "linear": lambda s, a: (*s[0][:-1], s[1][1]),  # (x[.., K], weight[K, N], bias[N]?)
    "matmul": lambda s, a: (
        *broadcast([s[0][:-2], s[1][:-2]]),
        s[0][-2],
        s[1][-1],
    ),  # (a[.., M, K], b[.., K, N])
    "embedding": lambda s, a: (*s[1], *s[0][1:]),  # (table[V, ..], index[..])
}


def result_shape(op: str, shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    """Row shape of the result of `op`; scalars have shape ()."""
    if op in POINTWISE:
        return broadcast(shapes)
    if op in REDUCE:
        return _reduced(shapes, attrs)
    if op in RAGGED:
        return shapes[0]
    return _SHAPES[op](shapes, attrs)


def flops(op: str, shapes: Sequence[Shape], out: Shape) -> int:
    """Floating-point operations of one call: 2 a multiply-add, 1 a pointwise or reduced element, 0
    a move. What runs through torch counts where it is a product.
    """
    if op.startswith("aten:"):
        return _torch_flops(op.removeprefix("aten:").partition(".")[0], shapes, out)
    if op == "linear":
        return 2 * math.prod(out) * shapes[0][-1]
    if op == "matmul":
        return 2 * math.prod(out) * shapes[0][-1]
    if op in POINTWISE:
        return 0 if op == "cast" else math.prod(out)
    if op in REDUCE or op in RAGGED:
        return math.prod(shapes[0])
    return 0


def _torch_flops(name: str, shapes: Sequence[Shape], out: Shape) -> int:
    if name == "convolution":
        x, weight = shapes[:2]
        if x[1] == weight[0] != out[1]:  # transposed
            return 2 * math.prod(x) * math.prod(weight[1:])
        return 2 * math.prod(out) * math.prod(weight[1:])
    if name in ("mm", "bmm", "mv"):
        return 2 * math.prod(out) * shapes[0][-1]
    return 0
