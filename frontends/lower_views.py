"""Lowering of views: on position dimensions index algebra, on row dimensions operations on rows.

Duty: rules for reshape, permute, select, slice, split, cat, stack, scatter, expand and flip, used
by `frontends.lower`. Each takes the emitter, the dimension classes, the node and its operands; None
means that the rule does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from cellc.frontends.arguments import argument, base_name, permutation, segments
from cellc.frontends.dims import Dims
from cellc.frontends.values import Emitter, Rows, Weight
from cellc.graph import Node
from cellc.ops import RowType, Shape

Lowered: TypeAlias = "Rows | Weight"
Result: TypeAlias = "list[Lowered] | None"


def _rows(e: Emitter, dims: Dims, node: Node, operand: int, value: Lowered) -> Rows:
    """An operand as rows; a weight takes the form that its dimensions' classes ask for."""
    if isinstance(value, Rows):
        return value
    source = node.operands[operand]
    wanted = dims.row_dims(*source)
    return e.convert(value, _weight_dims(dims, node, value, wanted))


def _weight_dims(
    dims: Dims, node: Node, value: Weight, wanted: tuple[bool, ...]
) -> tuple[bool, ...]:
    """A weight indexed by position: the indexed dimension is one of positions."""
    if base_name(node.op) in ("select", "slice", "unbind", "split"):
        dim = argument(node, 1, "dim", 0) % len(value.shape)
        return tuple(r and i != dim for i, r in enumerate(wanted))
    return wanted


def _axis(value: Rows, dim: int) -> int:
    """Axis of the references for position dimension `dim`."""
    return sum(not r for r in value.row_dims[:dim])


def unsqueeze_dim(value: Rows, dim: int) -> Rows:
    refs = np.expand_dims(value.refs, _axis(value, dim))
    row_dims = (*value.row_dims[:dim], False, *value.row_dims[dim:])
    return Rows(refs, row_dims, value.type, (*value.shape[:dim], 1, *value.shape[dim:]))


def squeeze_dim(e: Emitter, value: Rows, dim: int) -> Rows:
    shape = (*value.shape[:dim], *value.shape[dim + 1 :])
    row_dims = (*value.row_dims[:dim], *value.row_dims[dim + 1 :])
    if value.row_dims[dim]:
        at = sum(value.row_dims[:dim])
        rows = e.reshape_rows(value, (*value.type.shape[:at], *value.type.shape[at + 1 :]))
        return Rows(rows.refs, row_dims, rows.type, shape)
    return Rows(np.squeeze(value.refs, _axis(value, dim)), row_dims, value.type, shape)


def permute(e: Emitter, value: Rows, order: Sequence[int]) -> Rows:
    row_dims = tuple(value.row_dims[i] for i in order)
    shape = tuple(value.shape[i] for i in order)
    positions = [i for i in range(len(order)) if not value.row_dims[i]]
    rows = [i for i in range(len(order)) if value.row_dims[i]]
    refs = value.refs.transpose([positions.index(i) for i in order if not value.row_dims[i]])
    inner = tuple(rows.index(i) for i in order if value.row_dims[i])
    moved = Rows(refs, row_dims, value.type, shape)
    if inner == tuple(range(len(inner))):
        return moved
    return e.row_op(moved, "permute", (("dims", inner),), shape, row_dims)


def _permute(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    return [permute(e, value, permutation(node, len(value.shape)))]


def _view(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    return [reshape(e, value, node.outputs[0][0])]


def reshape(e: Emitter, value: Rows, shape: Shape) -> Rows:
    """Reshape segment by segment; one that mixes positions and rows is made all rows."""
    if 0 in shape:
        row_dims = (False,) * (len(shape) - 1) + (True,) if shape else ()
        positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
        row = tuple(s for s, r in zip(shape, row_dims, strict=True) if r)
        if 0 not in positions:
            row_dims, positions, row = (False,) * len(shape), shape, ()
        return Rows(np.zeros(positions, np.int64), row_dims, RowType(row, value.type.dtype), shape)
    row_flags = [False] * len(shape)
    wanted = list(value.row_dims)
    for left, right in segments(value.shape, shape):
        rows = any(value.row_dims[i] for i in left)
        for i in left:
            wanted[i] = rows
        for j in right:
            row_flags[j] = rows
    value = e.convert(value, wanted)
    row_shape = tuple(s for s, r in zip(shape, row_flags, strict=True) if r)
    positions = tuple(s for s, r in zip(shape, row_flags, strict=True) if not r)
    rows_value = e.reshape_rows(value, row_shape)
    return Rows(rows_value.refs.reshape(positions), tuple(row_flags), rows_value.type, shape)


def _expand(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    shape = node.outputs[0][0]
    for _ in range(len(shape) - len(value.shape)):
        value = unsqueeze_dim(value, 0)
    target = dims.row_dims(node.id)
    wanted = tuple(
        value.row_dims[i] if value.shape[i] == shape[i] and shape[i] != 1 else target[i]
        for i in range(len(shape))
    )
    value = e.convert(value, wanted)
    positions = tuple(s for s, r in zip(shape, wanted, strict=True) if not r)
    rows = tuple(s for s, r in zip(shape, wanted, strict=True) if r)
    value = Rows(np.broadcast_to(value.refs, positions), wanted, value.type, shape)
    if value.type.shape != rows:
        value = e.row_op(value, "expand", (("shape", rows),), shape, wanted)
    return [value]


def _slice_dim(e: Emitter, value: Rows, dim: int, start: int, stop: int, step: int) -> Rows:
    size = len(range(start, stop, step))
    shape = (*value.shape[:dim], size, *value.shape[dim + 1 :])
    if not value.row_dims[dim]:
        index = [slice(None)] * value.refs.ndim
        index[_axis(value, dim)] = slice(start, stop, step)
        return Rows(value.refs[tuple(index)], value.row_dims, value.type, shape)
    if size == value.shape[dim]:
        return value
    rows = e.slice_rows(value, sum(value.row_dims[:dim]), start, stop, step)
    return Rows(rows.refs, value.row_dims, rows.type, shape)


def _slice(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    dim = argument(node, 1, "dim", 0) % len(value.shape)
    bounds = slice(
        argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    )
    return [_slice_dim(e, value, dim, *bounds.indices(value.shape[dim]))]


def _select(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    dim = argument(node, 1, "dim", 0) % len(value.shape)
    index = argument(node, 2, "index") % value.shape[dim]
    return [squeeze_dim(e, _slice_dim(e, value, dim, index, index + 1, 1), dim)]


def _split(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    dim = argument(node, 2, "dim", 0) % len(value.shape)
    start = 0
    pieces: list[Lowered] = []
    for shape, _ in node.outputs:
        pieces.append(_slice_dim(e, value, dim, start, start + shape[dim], 1))
        start += shape[dim]
    return pieces


def _unbind(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    dim = argument(node, 1, "dim", 0) % len(value.shape)
    return [
        squeeze_dim(e, _slice_dim(e, value, dim, i, i + 1, 1), dim) for i in range(value.shape[dim])
    ]


def _unfold(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    if not value.shape or 0 in value.shape:
        return None
    dim, size, step = (argument(node, i, "") for i in (1, 2, 3))
    dim, shape = dim % len(value.shape), node.outputs[0][0]
    row_dims = (*value.row_dims, value.row_dims[dim])
    if value.row_dims[dim]:
        attrs = (("dim", sum(value.row_dims[:dim])), ("size", size), ("step", step), ("spread", 1))
        return [e.row_op(value, "window", attrs, shape, row_dims)]
    axis = _axis(value, dim)
    windows = np.lib.stride_tricks.sliding_window_view(value.refs, size, axis)
    taken = [slice(None)] * axis + [slice(None, None, step)]
    return [Rows(windows[tuple(taken)], row_dims, value.type, shape)]


def _flip(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    value = _rows(e, dims, node, 0, operands[0])
    gone = [d % len(value.shape) for d in argument(node, 1, "dims")]
    refs = np.flip(value.refs, tuple(_axis(value, d) for d in gone if not value.row_dims[d]))
    value = Rows(refs, value.row_dims, value.type, value.shape)
    inner = tuple(sum(value.row_dims[:d]) for d in gone if value.row_dims[d])
    if inner:
        value = e.row_op(value, "flip", (("dims", inner),), value.shape, value.row_dims)
    return [value]


def _cat(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    shape, dtype = node.outputs[0]
    dim = argument(node, 1, "dim", 0) % len(shape)
    pieces = [value for value in operands if value.shape != (0,)]
    return [_join(e, dims, node, pieces, shape, dtype, dim)]


def _stack(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    shape, dtype = node.outputs[0]
    dim = argument(node, 1, "dim", 0) % len(shape)
    pieces: list[Lowered] = []
    for value in operands:
        if isinstance(value, Weight):
            pieces.append(e.view_weight(value, (*value.shape[:dim], 1, *value.shape[dim:])))
        else:
            pieces.append(unsqueeze_dim(value, dim))
    return [_join(e, dims, node, pieces, shape, dtype, dim)]


def _join(
    e: Emitter,
    dims: Dims,
    node: Node,
    pieces: Sequence[Lowered],
    shape: Shape,
    dtype: str,
    dim: int,
) -> Rows:
    wanted = list(dims.row_dims(node.id))
    rows = [p for p in pieces if isinstance(p, Rows)]
    for i in range(len(shape)):
        votes = [p.row_dims[i] for p in rows if p.shape[i] != 1]
        if i != dim and votes:
            wanted[i] = any(votes)
        elif i == dim and votes and len(set(votes)) == 1 and len(votes) == len(pieces):
            wanted[i] = votes[0]
    made = [_typed(e, e.convert(p, wanted), dtype) for p in pieces]
    if len(made) == 1:
        return made[0]
    if not wanted[dim]:
        refs = np.concatenate([m.refs for m in made], _axis(made[0], dim))
        return Rows(refs, tuple(wanted), made[0].type, shape)
    at = sum(wanted[:dim])
    if made[0].refs.size == 0:
        row = tuple(s for s, r in zip(shape, wanted, strict=True) if r)
        return Rows(made[0].refs, tuple(wanted), RowType(row, dtype), shape)
    refs, type = e.emit(
        "cat", [m.refs.reshape(-1) for m in made], (("dim", at),), dtype, made[0].refs.shape
    )
    return Rows(refs, tuple(wanted), type, shape)


def _typed(e: Emitter, value: Rows, dtype: str) -> Rows:
    if value.type.dtype == dtype or value.refs.size == 0:
        return value
    refs, type = e.emit("cast", [value.refs.reshape(-1)], (), dtype, value.refs.shape)
    return Rows(refs, value.row_dims, type, value.shape)


def _scatter(e: Emitter, dims: Dims, node: Node, operands: list[Lowered]) -> Result:
    """Functional `base[.., start:stop:step, ..] = piece` (or one index)."""
    base, piece = _rows(e, dims, node, 0, operands[0]), _rows(e, dims, node, 1, operands[1])
    dim = argument(node, 2, "dim", 0) % len(base.shape)
    if base_name(node.op) == "select_scatter":
        start = argument(node, 3, "index") % base.shape[dim]
        stop, step = start + 1, 1
        piece = unsqueeze_dim(piece, dim)
    else:
        bounds = slice(
            argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)
        )
        start, stop, step = bounds.indices(base.shape[dim])
    wanted = [
        r if i == dim or base.shape[i] == 1 else r or piece.row_dims[i]
        for i, r in enumerate(base.row_dims)
    ]
    base, piece = e.convert(base, wanted), _typed(e, e.convert(piece, wanted), base.type.dtype)
    if base.row_dims[dim]:
        if step != 1:
            return None
        before = _slice_dim(e, base, dim, 0, start, 1)
        after = _slice_dim(e, base, dim, max(stop, start), base.shape[dim], 1)
        parts = [p for p in (before, piece, after) if p.shape[dim]]
        return [_join(e, dims, node, parts, base.shape, base.type.dtype, dim)]
    index = [slice(None)] * base.refs.ndim
    index[_axis(base, dim)] = slice(start, stop, step)
    refs = base.refs.copy()
    refs[tuple(index)] = piece.refs
    return [Rows(refs, base.row_dims, base.type, base.shape)]


RULES: dict[str, Callable[[Emitter, Dims, Node, list[Lowered]], Result]] = {
    **dict.fromkeys("view _unsafe_view _reshape_alias reshape squeeze unsqueeze".split(), _view),
    **dict.fromkeys("permute transpose t".split(), _permute),
    **dict.fromkeys("split split_with_sizes unsafe_split unsafe_split_with_sizes".split(), _split),
    **dict.fromkeys("select_scatter slice_scatter".split(), _scatter),
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "flip": _flip,
    "unfold": _unfold,
    "cat": _cat,
    "stack": _stack,
}
