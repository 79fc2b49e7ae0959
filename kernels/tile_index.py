"""Index algebra of tile programs: where an element of a view comes from.

Duty: affine index arithmetic for `cellc.kernels.tile`. Comes in: the index, one `Index` a
dimension, at which a view's result is wanted; goes out: the index at which its operand is read, or
None where that is not affine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cellc.cells import CellOp
from cellc.kernels.tile_ir import Index
from cellc.ops import Shape


def strides_of(shape: Shape) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def flat_index(space: Shape) -> Index:
    """Row-major position of a point of `space`; coordinates of size 1 do not count."""
    return Index(0, tuple(s if n > 1 else 0 for n, s in zip(space, strides_of(space), strict=True)))


def offset_of(index: Sequence[Index], shape: Shape, zero: Index) -> Index:
    """Row-major offset of element `index` in a row of `shape`."""
    total = zero
    for at, stride in zip(index, strides_of(shape), strict=True):
        total = total + at * stride
    return total


def moved_back(
    op: CellOp, index: Sequence[Index], shape: Shape, space: Shape
) -> tuple[Index, ...] | None:
    """The index in the operand (of `shape`) of element `index` of a view of it."""
    attrs = op.attributes
    zero = Index(0, (0,) * len(space))
    if op.op == "expand":
        return tuple(zero if n == 1 else at for n, at in zip(shape, index, strict=True))
    if op.op == "permute":
        dims = attrs["dims"]
        assert isinstance(dims, tuple)
        return tuple(index[dims.index(d)] for d in range(len(shape)))
    if op.op == "flip":
        dims = attrs["dims"]
        assert isinstance(dims, tuple)
        return tuple(
            (at * -1).shift(shape[d] - 1) if d in dims else at for d, at in enumerate(index)
        )
    if op.op == "slice":
        dim, start, step = attrs["dim"], attrs["start"], attrs["step"]
        assert isinstance(dim, int) and isinstance(start, int) and isinstance(step, int)
        return tuple((at * step).shift(start) if d == dim else at for d, at in enumerate(index))
    if op.op == "window":
        dim, step, spread = attrs["dim"], attrs["step"], attrs["spread"]
        assert isinstance(dim, int) and isinstance(step, int) and isinstance(spread, int)
        *outer, within = index
        return tuple(at * step + within * spread if d == dim else at for d, at in enumerate(outer))
    assert op.op == "reshape", op.op
    return _split(offset_of(index, op.type.shape, zero), shape, space)


def _split(flat: Index, shape: Shape, space: Shape) -> tuple[Index, ...] | None:
    """A flat offset as one index a dimension of `shape`, where every part is affine."""
    parts = []
    for size in reversed(shape[1:]):
        low = Index(flat.const % size, tuple(c if c % size else 0 for c in flat.coefs))
        bound = low.const + sum(c * (n - 1) for c, n in zip(low.coefs, space, strict=True) if c > 0)
        if any(c < 0 for c in low.coefs) or bound >= size:
            return None
        parts.append(low)
        flat = Index(flat.const // size, tuple(0 if c % size else c // size for c in flat.coefs))
    return (flat, *reversed(parts)) if shape else ()


def merge_groups(space: Shape, dims: Sequence[int], indices: Sequence[Index]) -> list[list[int]]:
    """Runs of dimensions that every index passes as one; dimensions of size 1 are dropped."""
    groups: list[list[int]] = []
    for d in dims:
        if space[d] == 1:
            continue
        last = groups[-1][-1] if groups else -1
        if groups and all(i.coefs[last] == i.coefs[d] * space[d] for i in indices):
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups


def regrouped(index: Index, groups: Sequence[Sequence[int]]) -> Index:
    return Index(index.const, tuple(index.coefs[g[-1]] if g else 0 for g in groups))
