"""Lowering of convolutions: windows, and a product with the weight.

Duty: rules used by `frontends.lower` for convolutions whose windows are small. Along positions a
window is index algebra: the rows of its positions side by side. Along row dimensions it is a view
of the padded row. What lies in a window is then one vector, and the weight a matrix; where every
channel has a filter of its own, products are summed instead. A convolution that is large,
transposed, or whose weight is data, has no rule: it runs through torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from cellc.frontends.arguments import argument
from cellc.frontends.context import Lowered, Lowering
from cellc.frontends.values import Attrs, Emitter, Rows, Weight
from cellc.graph import Node
from cellc.ops import RowType
from cellc.rows import ParamRef, Refs

MOST = 1 << 16  # elements of all windows of a row: torch is good at larger ones
MOST_PIECES = 64  # rows side by side in a window along positions
MOST_GROUPS = 8  # products side by side


@dataclass(frozen=True)
class _Windows:
    """Kernel sizes and how windows move, one a dimension."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    spreads: tuple[int, ...]
    counts: tuple[int, ...]  # of windows


def convolution(lw: Lowering, node: Node) -> list[Lowered] | None:
    """aten.convolution(x, weight, bias, stride, padding, dilation, transposed, .., groups)."""
    x, weight = lw.arg(node, 0), lw.arg(node, 1)
    bias = lw.arg(node, 2) if node.args[2][0] == "t" else None
    if not isinstance(x, Rows) or not isinstance(weight, Weight) or isinstance(bias, Rows):
        return None
    shape, groups = node.outputs[0][0], argument(node, 8, "groups")
    rank = len(weight.shape)
    if argument(node, 6, "transposed") or len(x.shape) != rank or 0 in (*x.shape, *shape):
        return None
    strides, pads, spreads = (_each(argument(node, i, ""), rank - 2) for i in (3, 4, 5))
    windows = _Windows(weight.shape[2:], strides, pads, spreads, shape[2:])
    x = lw.rows_of(x, (x.row_dims[0], True, *x.row_dims[2:]))
    if not _small(x, windows, weight, groups):
        return None
    pieces = _pieces(lw.emitter, _padded(lw, x, windows), windows)
    names = _along(x, windows)
    if groups == weight.shape[0] == x.shape[1] > 1:
        out = _each_channel(lw, pieces, _filters(lw, weight, names))
    else:
        out = _grouped(lw, pieces, _matrices(lw, weight, names, groups))
    if bias is not None:
        added = ParamRef(bias.name, RowType(bias.shape, bias.dtype))
        refs, type = lw.emitter.emit(
            "add", [out.refs.reshape(-1), added], (), out.type.dtype, out.refs.shape
        )
        out = replace(out, refs=refs, type=type)
    return [replace(_channels_first(lw.emitter, out, x), shape=shape)]


def _each(values: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(values) if len(values) == count else tuple(values) * count


def _along(x: Rows, windows: _Windows) -> tuple[list[int], list[int]]:
    """The windows' dimensions that are positions, and those of rows."""
    rows = [i for i in range(len(windows.sizes)) if x.row_dims[2 + i]]
    return [i for i in range(len(windows.sizes)) if i not in rows], rows


def _small(x: Rows, windows: _Windows, weight: Weight, groups: int) -> bool:
    positions, rows = _along(x, windows)
    pieces = math.prod(windows.sizes[i] for i in positions)
    elements = x.shape[1] * pieces * math.prod(windows.sizes[i] * windows.counts[i] for i in rows)
    elements *= x.shape[0] if x.row_dims[0] else 1
    alone = groups == weight.shape[0] == x.shape[1]
    return pieces <= MOST_PIECES and elements <= MOST and (alone or groups <= MOST_GROUPS)


# -- windows ---------------------------------------------------------------------------------------


def _padded(lw: Lowering, x: Rows, windows: _Windows) -> Rows:
    """Zeros around, in all rows or as rows."""
    for i, pad in enumerate(windows.pads):
        dim = 2 + i
        if not pad:
            continue
        if not x.row_dims[dim]:
            zeros = _zeros(lw, x.type)
            around = [(0, 0)] * x.refs.ndim
            around[sum(not r for r in x.row_dims[:dim])] = (pad, pad)
            x = replace(x, refs=np.pad(x.refs, around, constant_values=zeros))
            continue
        at = sum(x.row_dims[:dim])
        edge = RowType((*x.type.shape[:at], pad, *x.type.shape[at + 1 :]), x.type.dtype)
        zeros_everywhere = np.full(x.refs.size, _zeros(lw, edge), np.int64)
        refs, type = lw.emitter.emit(
            "cat",
            [zeros_everywhere, x.refs.reshape(-1), zeros_everywhere],
            (("dim", at),),
            x.type.dtype,
            x.refs.shape,
        )
        x = replace(x, refs=refs, type=type)
    return x


def _zeros(lw: Lowering, type: RowType) -> int:
    return lw.rows.constant(("full", type.shape, type.dtype, 0.0), type)


def _pieces(e: Emitter, x: Rows, windows: _Windows) -> Rows:
    """Rows [batch?, windows.., channels, elements of a window]; references over the others."""
    positions, rows = _along(x, windows)
    made = x
    for i in rows:
        attrs = (
            ("dim", sum(x.row_dims[: 2 + i])),
            ("size", windows.sizes[i]),
            ("step", windows.strides[i]),
            ("spread", windows.spreads[i]),
        )
        made = _applied(e, made, "window", attrs)
    batch = int(x.row_dims[0])
    outer, inner = batch + 1 + len(rows), batch + 1 + 2 * len(rows)
    order = [*range(batch), *range(batch + 1, outer), batch, *range(outer, inner)]
    if order != sorted(order):
        made = _applied(e, made, "permute", (("dims", tuple(order)),))
    shape = made.type.shape[: batch + len(rows) + 1]
    made = e.reshape_rows(made, (*shape, math.prod(made.type.shape[len(shape) :])))
    return _side_by_side(e, made, windows, positions)


def _side_by_side(e: Emitter, x: Rows, windows: _Windows, positions: Sequence[int]) -> Rows:
    """Windows along positions: the elements of each of their rows in turn."""
    if not positions:
        return x
    first = int(not x.row_dims[0])  # the axis of the first of them
    taken: list[Refs] = []
    for offsets in product(*(range(windows.sizes[i]) for i in positions)):
        index = [slice(None)] * first
        for i, offset in zip(positions, offsets, strict=True):
            start = offset * windows.spreads[i]
            stop = start + (windows.counts[i] - 1) * windows.strides[i] + 1
            index.append(slice(start, stop, windows.strides[i]))
        taken.append(x.refs[tuple(index)])
    if len(taken) == 1:
        return replace(x, refs=taken[0])
    last = len(x.type.shape) - 1
    operands = [refs.reshape(-1) for refs in taken]
    refs, type = e.emit("cat", operands, (("dim", last),), x.type.dtype, taken[0].shape)
    return replace(x, refs=refs, type=type)


def _applied(e: Emitter, x: Rows, op: str, attrs: Attrs) -> Rows:
    refs, type = e.emit(op, [x.refs.reshape(-1)], attrs, x.type.dtype, x.refs.shape)
    return replace(x, refs=refs, type=type)


def _channels_first(e: Emitter, out: Rows, x: Rows) -> Rows:
    """[batch?, windows.., channels] as [batch?, channels, windows..]."""
    rank, batch = len(out.type.shape), int(x.row_dims[0])
    order = (*range(batch), rank - 1, *range(batch, rank - 1))
    if order != tuple(range(rank)):
        out = _applied(e, out, "permute", (("dims", order),))
    return replace(out, row_dims=x.row_dims)


# -- products --------------------------------------------------------------------------------------


def _defined(lw: Lowering, op: str, weight: Weight, shape: Sequence[int], *args: object) -> Weight:
    """A view of a weight."""
    templates = tuple(("l", tuple(("v", v) for v in a)) if isinstance(a, tuple) else ("v", a)
                      for a in args)  # fmt: skip
    name = lw.params.define(f"aten.{op}", (("t", 0), *templates), (), [weight.name])
    return Weight(name, tuple(shape), weight.dtype)


def _ordered(lw: Lowering, weight: Weight, order: tuple[int, ...]) -> Weight:
    if order == tuple(range(len(order))):
        return weight
    return _defined(lw, "permute.default", weight, [weight.shape[d] for d in order], order)


def _filters(lw: Lowering, weight: Weight, along: tuple[list[int], list[int]]) -> Weight:
    """[channels, elements of a window]."""
    positions, rows = along
    order = (0, 1, *(2 + i for i in positions), *(2 + i for i in rows))
    made = _ordered(lw, weight, order)
    return lw.emitter.view_weight(made, (weight.shape[0], math.prod(weight.shape[2:])))


def _matrices(
    lw: Lowering, weight: Weight, along: tuple[list[int], list[int]], groups: int
) -> list[Weight]:
    """Of each group [elements of its channels' windows, its outputs]."""
    positions, rows = along
    parts, size = [], weight.shape[0] // groups
    for g in range(groups):
        part = weight
        if groups > 1:
            bounds = (0, g * size, (g + 1) * size)
            part = _defined(lw, "slice.Tensor", weight, (size, *weight.shape[1:]), *bounds)
        order = (1, *(2 + i for i in positions), *(2 + i for i in rows), 0)
        made = _ordered(lw, part, order)
        parts.append(lw.emitter.view_weight(made, (math.prod(weight.shape[1:]), size)))
    return parts


def _each_channel(lw: Lowering, x: Rows, filters: Weight) -> Rows:
    """[.., channels, elements] -> [.., channels]: every channel with its own filter."""
    param = ParamRef(filters.name, RowType(filters.shape, filters.dtype))
    refs, type = lw.emitter.emit("mul", [x.refs.reshape(-1), param], (), x.type.dtype, x.refs.shape)
    last = (("dims", (len(type.shape) - 1,)),)
    return _applied(lw.emitter, replace(x, refs=refs, type=type), "sum", last)


def _grouped(lw: Lowering, x: Rows, matrices: Sequence[Weight]) -> Rows:
    """[.., channels, elements] -> [.., outputs], group by group."""
    e, rank = lw.emitter, len(x.type.shape)
    size = x.type.shape[-2] // len(matrices)
    parts = []
    for g, matrix in enumerate(matrices):
        part = x
        if len(matrices) > 1:
            part = e.slice_rows(x, rank - 2, g * size, (g + 1) * size, 1)
        part = e.reshape_rows(part, (*part.type.shape[:-2], math.prod(part.type.shape[-2:])))
        param = ParamRef(matrix.name, RowType(matrix.shape, matrix.dtype))
        refs = part.refs.reshape(-1)
        parts.append(e.emit("linear", [refs, param], (), x.type.dtype, x.refs.shape))
    refs, type = parts[0]
    if len(parts) > 1:
        refs, type = e.emit(
            "cat",
            [r.reshape(-1) for r, _ in parts],
            (("dim", rank - 2),),
            x.type.dtype,
            x.refs.shape,
        )
    return replace(x, refs=refs, type=type)
