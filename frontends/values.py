"""Values while lowering: tensors as arrays of row references, and the conversions between their
forms.

Duty: hold a traced tensor as (references over its positions, type of its rows), and move dimensions
between the two. Used by `frontends.lower` alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cellc.ops import RowType, Shape, result_shape
from cellc.params import Params
from cellc.rows import ParamRef, RaggedRefs, Refs, RowGraph, RowOperand, ScalarRef

Attrs = tuple[tuple[str, Hashable], ...]


@dataclass(frozen=True)
class Rows:
    """A tensor: `refs` over its position dimensions, rows of its other dimensions (`row_dims`
    True).
    """

    refs: Refs
    row_dims: tuple[bool, ...]
    type: RowType
    shape: Shape


@dataclass(frozen=True)
class Weight:
    """A tensor that is made of weights alone."""

    name: str
    shape: Shape
    dtype: str


class Emitter:
    """Adds row operations for one traced node at a time."""

    def __init__(self, rows: RowGraph, params: Params) -> None:
        self.rows, self.params = rows, params
        self._point: Hashable = None
        self._origin = ""
        self._ordinal = 0

    def at(self, point: Hashable, origin: str) -> None:
        """What follows belongs to this program point."""
        self._point, self._origin, self._ordinal = point, origin, 0

    def emit(
        self,
        op: str,
        operands: Sequence[RowOperand],
        attrs: Attrs,
        dtype: str,
        positions: Shape,
    ) -> tuple[Refs, RowType]:
        """One operation at every position; returns its results' references, shaped like the
        positions.
        """
        shapes = [self.shape_of(o) for o in operands]
        type = RowType(result_shape(op, shapes, dict(attrs)), dtype)
        return self.emit_typed(op, operands, attrs, (type,), positions)[0], type

    def emit_typed(
        self,
        op: str,
        operands: Sequence[RowOperand],
        attrs: Attrs,
        types: Sequence[RowType],
        positions: Shape,
    ) -> list[Refs]:
        n = int(np.prod(positions, dtype=np.int64))
        point = (self._point, self._ordinal)
        self._ordinal += 1
        if n == 0:
            return [np.zeros(positions, np.int64) for _ in types]
        node = self.rows.add(op, attrs, operands, types, n, point, self._origin)
        return [np.arange(b, b + n, dtype=np.int64).reshape(positions) for b in node.bases]

    def shape_of(self, operand: RowOperand) -> Shape:
        if isinstance(operand, ParamRef):
            return operand.type.shape
        if isinstance(operand, ScalarRef):
            return ()
        if isinstance(operand, RaggedRefs):
            return self._type_of(operand.refs).shape
        return self._type_of(operand).shape

    def _type_of(self, refs: Refs) -> RowType:
        return self.rows.type_of(int(refs.flat[0]))

    # -- conversions
    # ----------------------------------------------------------------------------------------

    def row_op(
        self, value: Rows, op: str, attrs: Attrs, shape: Shape, row_dims: tuple[bool, ...]
    ) -> Rows:
        """The same operation on every row of a value, whose tensor becomes `shape`."""
        row_shape = tuple(s for s, r in zip(shape, row_dims, strict=True) if r)
        if value.refs.size == 0:
            return Rows(value.refs, row_dims, RowType(row_shape, value.type.dtype), shape)
        type = RowType(result_shape(op, [value.type.shape], dict(attrs)), value.type.dtype)
        (refs,) = self.emit_typed(op, [value.refs.reshape(-1)], attrs, (type,), value.refs.shape)
        return Rows(refs, row_dims, type, shape)

    def reshape_rows(self, value: Rows, row_shape: Shape) -> Rows:
        """Rows of another shape, same elements; `row_dims` and `shape` are left to the caller."""
        if value.type.shape == row_shape:
            return value
        type = RowType(row_shape, value.type.dtype)
        if value.refs.size == 0:
            return replace(value, type=type)
        attrs = (("shape", row_shape),)
        (refs,) = self.emit_typed(
            "reshape", [value.refs.reshape(-1)], attrs, (type,), value.refs.shape
        )
        return replace(value, refs=refs, type=type)

    def convert(self, value: Rows | Weight, row_dims: Sequence[bool]) -> Rows:
        """The same tensor with other dimensions in its rows: rows are joined or cut."""
        if isinstance(value, Weight):
            return self.unroll(value, tuple(row_dims))
        for dim, wanted in enumerate(row_dims):
            if value.row_dims[dim] != wanted:
                value = self._join(value, dim) if wanted else self._cut(value, dim)
        return value

    def _join(self, value: Rows, dim: int) -> Rows:
        """Make a position dimension part of the rows."""
        axis = sum(not r for r in value.row_dims[:dim])
        at = sum(value.row_dims[:dim])
        row_dims = (*value.row_dims[:dim], True, *value.row_dims[dim + 1 :])
        size = value.shape[dim]
        row_shape = (*value.type.shape[:at], 1, *value.type.shape[at:])
        pieces = [np.take(value.refs, i, axis) for i in range(size)]
        if not pieces or pieces[0].size == 0:
            empty = (*row_shape[:at], size, *row_shape[at + 1 :])
            refs = np.zeros([s for i, s in enumerate(value.refs.shape) if i != axis], np.int64)
            if refs.size:
                refs[...] = self.rows.constant(
                    ("full", empty, value.type.dtype, 0), RowType(empty, value.type.dtype)
                )
            return Rows(refs, row_dims, RowType(empty, value.type.dtype), value.shape)
        shaped = [self.reshape_rows(replace(value, refs=p), row_shape) for p in pieces]
        if size == 1:
            return Rows(shaped[0].refs, row_dims, shaped[0].type, value.shape)
        operands = [s.refs.reshape(-1) for s in shaped]
        refs, type = self.emit("cat", operands, (("dim", at),), value.type.dtype, pieces[0].shape)
        return Rows(refs, row_dims, type, value.shape)

    def _cut(self, value: Rows, dim: int) -> Rows:
        """Make a row dimension a position dimension."""
        at = sum(value.row_dims[:dim])
        axis = sum(not r for r in value.row_dims[:dim])
        row_dims = (*value.row_dims[:dim], False, *value.row_dims[dim + 1 :])
        row_shape = (*value.type.shape[:at], *value.type.shape[at + 1 :])
        size = value.shape[dim]
        pieces = []
        for i in range(size):
            piece = self.slice_rows(value, at, i, i + 1, 1) if size > 1 else value
            pieces.append(self.reshape_rows(piece, row_shape).refs)
        if not pieces:
            shape = list(value.refs.shape)
            shape.insert(axis, 0)
            return Rows(
                np.zeros(shape, np.int64),
                row_dims,
                RowType(row_shape, value.type.dtype),
                value.shape,
            )
        type = RowType(row_shape, value.type.dtype)
        return Rows(np.stack(pieces, axis), row_dims, type, value.shape)

    def slice_rows(self, value: Rows, at: int, start: int, stop: int, step: int) -> Rows:
        """Slice row dimension `at`; `shape` is left to the caller."""
        attrs = (("dim", at), ("start", start), ("stop", stop), ("step", step))
        if value.refs.size == 0:
            shape = result_shape("slice", [value.type.shape], dict(attrs))
            return replace(value, type=RowType(shape, value.type.dtype))
        refs, type = self.emit(
            "slice", [value.refs.reshape(-1)], attrs, value.type.dtype, value.refs.shape
        )
        return replace(value, refs=refs, type=type)

    def unroll(self, weight: Weight, row_dims: tuple[bool, ...]) -> Rows:
        """A weight whose position dimensions are indexed like data: one constant row a position."""
        positions = tuple(s for s, r in zip(weight.shape, row_dims, strict=True) if not r)
        type = RowType(
            tuple(s for s, r in zip(weight.shape, row_dims, strict=True) if r), weight.dtype
        )
        refs = np.zeros(positions, np.int64)
        for i in range(refs.size):
            refs.flat[i] = self.rows.constant(("param", weight.name, row_dims, i), type)
        return Rows(refs, row_dims, type, weight.shape)

    def full(
        self, shape: Shape, dtype: str, value: bool | int | float, row_dims: tuple[bool, ...]
    ) -> Rows:
        """A tensor filled with one number: the same constant row everywhere."""
        positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
        type = RowType(tuple(s for s, r in zip(shape, row_dims, strict=True) if r), dtype)
        ref = self.rows.constant(("full", type.shape, dtype, value), type)
        return Rows(np.full(positions, ref, np.int64), row_dims, type, shape)

    def cast_weight(self, weight: Weight, dtype: str) -> Weight:
        if weight.dtype == dtype:
            return weight
        args = (("t", 0),)
        name = self.params.define(
            "aten._to_copy.default", args, (("dtype", ("d", dtype)),), [weight.name]
        )
        return Weight(name, weight.shape, dtype)

    def view_weight(self, weight: Weight, shape: Shape) -> Weight:
        if weight.shape == shape:
            return weight
        args = (("t", 0), ("l", tuple(("v", s) for s in shape)))
        name = self.params.define("aten.reshape.default", args, (), [weight.name])
        return Weight(name, shape, weight.dtype)

    def transpose_weight(self, weight: Weight) -> Weight:
        """The transposed 2-D weight; a transpose of a transpose is the weight itself."""
        shape = (weight.shape[1], weight.shape[0])
        return Weight(
            self.params.define("aten.t.default", (("t", 0),), (), [weight.name]),
            shape,
            weight.dtype,
        )
