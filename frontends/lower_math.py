"""Lowering of reductions and products.

Duty: rules used by `frontends.lower`. A reduction over positions becomes ragged; a product with a
weight is a linear map of every row; a product of data is one of rows, or products and a sum over
positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cellc.frontends import lower_views
from cellc.frontends.arguments import argument, base_name
from cellc.frontends.context import Lowered, Lowering, common_dims
from cellc.frontends.values import Rows, Weight
from cellc.graph import Node
from cellc.ops import RowType, Shape
from cellc.rows import ParamRef, RaggedRefs


def reduce(lw: Lowering, node: Node) -> list[Lowered] | None:
    name = {"max": "amax", "min": "amin"}.get(base_name(node.op), base_name(node.op))
    value = lw.rows_of(lw.arg(node, 0))
    shape, dtype = node.outputs[0]
    dims = argument(node, 1, "dim")
    keepdim = bool(argument(node, 2, "keepdim", False))
    rank = len(value.shape)
    gone = _dims(dims, rank)
    if name in ("argmax", "argmin"):
        if dims is None and rank != 1:
            return None
        if not all(value.row_dims[i] for i in gone):
            value = lw.rows_of(value, [r or i in gone for i, r in enumerate(value.row_dims)])
    if value.refs.size == 0 or 0 in value.shape:
        return None
    if name in ("sum", "mean", "prod") and value.type.dtype != dtype:
        value = _cast(lw, value, dtype)
    if name in ("any", "all") and value.type.dtype != "bool":
        value = _cast(lw, value, "bool")
    rows = _reduce_rows(lw, name, value, gone, dtype)
    rows = _reduce_positions(lw, name, rows, value, gone, dtype)
    if keepdim:
        for i in sorted(gone):
            axis = sum(not r for r in rows.row_dims[:i])
            row_dims = (*rows.row_dims[:i], False, *rows.row_dims[i:])
            rows = Rows(
                np.expand_dims(rows.refs, axis),
                row_dims,
                rows.type,
                (*rows.shape[:i], 1, *rows.shape[i:]),
            )
    return [rows]


def _dims(dims: Any, rank: int) -> set[int]:
    if dims is None or dims == []:
        return set(range(rank))
    return (
        {d % max(rank, 1) for d in (dims if isinstance(dims, list) else [dims])} if rank else set()
    )


def _cast(lw: Lowering, value: Rows, dtype: str) -> Rows:
    if value.type.dtype == dtype:
        return value
    refs, type = lw.emitter.emit("cast", [value.refs.reshape(-1)], (), dtype, value.refs.shape)
    return Rows(refs, value.row_dims, type, value.shape)


def _reduce_rows(lw: Lowering, name: str, value: Rows, gone: set[int], dtype: str) -> Rows:
    """Reduce the row dimensions among `gone`; they vanish from the row."""
    inner = tuple(sum(value.row_dims[:i]) for i in sorted(gone) if value.row_dims[i])
    if not inner:
        return value
    out = dtype if name not in ("amax", "amin") else value.type.dtype
    refs, type = lw.emitter.emit(
        name, [value.refs.reshape(-1)], (("dims", inner),), out, value.refs.shape
    )
    return Rows(refs, value.row_dims, type, value.shape)


def _reduce_positions(
    lw: Lowering, name: str, rows: Rows, value: Rows, gone: set[int], dtype: str
) -> Rows:
    """Reduce the position dimensions among `gone` as a ragged reduction; all of `gone` leave the
    shape.
    """
    positions = [i for i, r in enumerate(value.row_dims) if not r]
    axes = [k for k, i in enumerate(positions) if i in gone]
    kept = [i for i in range(len(value.shape)) if i not in gone]
    row_dims = tuple(value.row_dims[i] for i in kept)
    shape = tuple(value.shape[i] for i in kept)
    refs = rows.refs
    length = int(np.prod([refs.shape[a] for a in axes], dtype=np.int64)) if axes else 1
    if not axes or (length == 1 and not lw.whole):  # a stack of one is like one of more
        refs = refs.reshape([s for k, s in enumerate(refs.shape) if k not in axes])
        return Rows(refs, row_dims, rows.type, shape)
    moved = np.moveaxis(refs, axes, range(-len(axes), 0))
    outer = moved.shape[: moved.ndim - len(axes)]
    flat = moved.reshape(-1, length)
    offsets = np.arange(len(flat) + 1, dtype=np.int64) * length
    out, type = lw.emitter.emit(
        f"ragged_{name}", [RaggedRefs(offsets, flat.reshape(-1))], (), rows.type.dtype, outer
    )
    return Rows(out, row_dims, type, shape)


def matrix(lw: Lowering, node: Node) -> list[Lowered] | None:
    """mm, bmm, mv: a linear map where one side is a weight, else a product of data."""
    a, b = lw.arg(node, 0), lw.arg(node, 1)
    shape, dtype = node.outputs[0]
    if base_name(node.op) == "mv":
        column = _unsqueeze_last(lw, b)
        product = _product(lw, a, column, (*shape, 1), dtype)
        return (
            None if product is None else [lower_views.squeeze_dim(lw.emitter, product, len(shape))]
        )
    product = _product(lw, a, b, shape, dtype)
    return None if product is None else [product]


def _unsqueeze_last(lw: Lowering, value: Lowered) -> Lowered:
    if isinstance(value, Weight):
        return lw.emitter.view_weight(value, (*value.shape, 1))
    return Rows(value.refs[..., None], (*value.row_dims, False), value.type, (*value.shape, 1))


def _product(lw: Lowering, a: Lowered, b: Lowered, shape: Shape, dtype: str) -> Rows | None:
    if isinstance(a, Weight) and isinstance(b, Weight):
        a = lw.rows_of(a, (*[False] * (len(a.shape) - 1), True))
    if isinstance(b, Weight) and isinstance(a, Rows):
        b = lw.matrix(b)
    if isinstance(b, Weight) and len(b.shape) == 2 and isinstance(a, Rows):
        return _linear(lw, a, b, shape)
    if isinstance(a, Weight) and len(a.shape) == 2 and isinstance(b, Rows):
        flipped = lower_views.permute(lw.emitter, b, [1, 0])
        out = _linear(lw, flipped, lw.emitter.transpose_weight(a), shape[::-1])
        return lower_views.permute(lw.emitter, out, [1, 0])
    if isinstance(a, Weight) or isinstance(b, Weight):
        return None
    return _data_product(lw, a, b, shape, dtype)


def _linear(lw: Lowering, x: Rows, weight: Weight, shape: Shape) -> Rows:
    x = lw.rows_of(x, (*x.row_dims[:-1], True))
    row_dims = x.row_dims
    if x.refs.size == 0:
        type = RowType((*x.type.shape[:-1], weight.shape[1]), x.type.dtype)
        return Rows(x.refs, row_dims, type, shape)
    param = ParamRef(weight.name, RowType(weight.shape, weight.dtype))
    refs, type = lw.emitter.emit(
        "linear", [x.refs.reshape(-1), param], (), x.type.dtype, x.refs.shape
    )
    return Rows(refs, row_dims, type, shape)


def _data_product(lw: Lowering, a: Rows, b: Rows, shape: Shape, dtype: str) -> Rows | None:
    """[.., n, k] x [.., k, m] of data: a matrix product of rows, or products and a sum over
    positions.
    """
    rank = len(shape)
    if a.row_dims[-1] and b.row_dims[-2] and not any(a.row_dims[:-2]) and not any(b.row_dims[:-2]):
        row_dims = (*[False] * (rank - 2), a.row_dims[-2], b.row_dims[-1])
        positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
        left = lw.emitter.reshape_rows(
            a, (*([a.shape[-2]] if a.row_dims[-2] else [1]), a.shape[-1])
        )
        right = lw.emitter.reshape_rows(
            b, (b.shape[-2], *([b.shape[-1]] if b.row_dims[-1] else [1]))
        )
        lr = left.refs if a.row_dims[-2] else left.refs[..., None]
        rr = right.refs if b.row_dims[-1] else right.refs[..., None]
        if not a.row_dims[-2] and not b.row_dims[-1]:
            lr, rr = left.refs[..., None], right.refs[..., None, :]
        elif not a.row_dims[-2]:
            rr = right.refs[..., None]
            lr = left.refs
        elif not b.row_dims[-1]:
            lr = left.refs[..., None]
            rr = right.refs
        operands = [np.broadcast_to(r, positions).reshape(-1) for r in (lr, rr)]
        if operands[0].size == 0:
            return None
        refs, type = lw.emitter.emit("matmul", operands, (), dtype, positions)
        rows = Rows(refs, row_dims, type, shape)
        return lw.emitter.reshape_rows(
            rows, tuple(s for s, r in zip(shape, row_dims, strict=True) if r)
        )
    return _sum_of_products(lw, a, b, shape, dtype)


def _sum_of_products(lw: Lowering, a: Rows, b: Rows, shape: Shape, dtype: str) -> Rows | None:
    wide = (*shape[:-1], a.shape[-1], shape[-1])
    left = lower_views.unsqueeze_dim(a, len(a.shape))
    right = lower_views.unsqueeze_dim(b, len(b.shape) - 2)
    row_dims = common_dims([left, right], wide)
    positions = tuple(s for s, r in zip(wide, row_dims, strict=True) if not r)
    operands = [lw.align(v, wide, row_dims) for v in (left, right)]
    if 0 in wide:
        return None
    refs, type = lw.emitter.emit("mul", operands, (), dtype, positions)
    row_shape = tuple(s for s, r in zip(wide, row_dims, strict=True) if r)
    value = Rows(refs, row_dims, type, wide)
    if type.shape != row_shape:
        value = lw.emitter.reshape_rows(
            value, (1,) * (len(row_shape) - len(type.shape)) + type.shape
        )
    gone = {len(wide) - 2}
    return _reduce_positions(
        lw, "sum", _reduce_rows(lw, "sum", value, gone, dtype), value, gone, dtype
    )
