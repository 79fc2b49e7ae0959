"""The context of a lowering: values so far, weights, and alignment of operands.

Duty: what the rules of `frontends.lower` share: which nodes depend on weights alone, the request's
inputs as rows, and operands broadcast to an operation's positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np

from cellc.frontends.arguments import argument, base_name
from cellc.frontends.dims import Dims
from cellc.frontends.values import Emitter, Rows, Weight
from cellc.frontends.windows import Cut
from cellc.graph import Graph, Node, Ref
from cellc.ops import RowType, Shape
from cellc.params import Params
from cellc.rows import DataSource, ParamRef, RowGraph, RowOperand

Lowered: TypeAlias = "Rows | Weight"
SMALL_ROWS = 1 << 16  # a weight's positions that may become constant rows


class Lowering:
    """One graph's lowering. `data_points` collects, over all traces of a model, program points that
    met data.
    """

    def __init__(
        self, graph: Graph, params: Params, data_points: set[Hashable], *, whole: bool = False
    ) -> None:
        self.graph, self.params, self.whole = graph, params, whole
        self.rows = RowGraph()
        self.emitter = Emitter(self.rows, params)
        self.dims = Dims(graph, whole=whole)
        self.values: dict[Ref, Lowered] = {}
        self.pieces: dict[int, Rows] = {}  # what operations take of an input that is cut
        self._expanded: dict[str, Lowered] = {}  # an expanded weight: what it repeats
        self.of_weights = self._fold(data_points)

    def _fold(self, data_points: set[Hashable]) -> set[int]:
        """Nodes that depend on weights alone, at program points that never depend on data."""
        candidates: set[int] = set()
        for node in self.graph:
            alone = node.kind in ("param", "const") or (
                bool(node.operands) and all(n in candidates for n, _ in node.operands)
            )
            if alone and (node.kind != "op" or not self._indexes_weight(node)):
                candidates.add(node.id)
            elif node.kind == "op":
                data_points.add((node.point, node.op))
        found: set[int] = set()
        for node in self.graph:
            if node.kind != "op":
                if node.kind != "input":
                    found.add(node.id)
            elif node.id in candidates and (node.point, node.op) not in data_points:
                if all(n in found for n, _ in node.operands):
                    found.add(node.id)
        return found

    def _indexes_weight(self, node: Node) -> bool:
        """A weight indexed by position (a table of positional encodings): its rows are data, not a
        weight.
        """
        if base_name(node.op) not in ("select", "slice") or not node.operands:
            return False
        shape = self.graph.node(node.operands[0][0]).outputs[node.operands[0][1]][0]
        out = node.outputs[0][0]
        dim = argument(node, 1, "dim", 0) % len(shape)
        if base_name(node.op) == "select":
            return len(out) <= 1 and len(shape) == 2 and dim == 0
        if out == shape or dim != 0:
            return False
        return not self.dims.row_dims(node.id)[0] and shape[0] <= SMALL_ROWS

    def input(self, node: Node, leaf: int) -> None:
        cut = self._windows(node, leaf)
        if cut is not None and not cut.whole:
            return  # nothing else reads it
        shape, dtype = node.outputs[0]
        row_dims = self.dims.row_dims(node.id)
        positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
        type = RowType(tuple(s for s, r in zip(shape, row_dims, strict=True) if r), dtype)
        count = int(np.prod(positions, dtype=np.int64))
        base = self.rows.allocate(count, type)
        self.rows.data.append(DataSource(leaf, node.name, base, count, type, row_dims))
        refs = np.arange(base, base + count, dtype=np.int64).reshape(positions)
        self.values[node.id, 0] = Rows(refs, row_dims, type, shape)

    def _windows(self, node: Node, leaf: int) -> Cut | None:
        """Rows of an input that is cut."""
        cut = self.dims.cuts.get(node.id)
        if cut is None:
            return None
        shape, dtype = node.outputs[0]
        type = RowType((cut.windows.size, *shape[1:]), dtype)
        count = cut.windows.count(shape[0])
        base = self.rows.allocate(count, type)
        row_dims = (True,) * len(shape)
        source = DataSource(leaf, node.name, base, count, type, row_dims, cut.windows)
        self.rows.data.append(source)
        for piece, (first, number) in cut.pieces.items():
            refs = np.arange(base + first, base + first + abs(number), dtype=np.int64)
            if number < 0:
                self.pieces[piece] = Rows(refs.reshape(()), row_dims, type, type.shape)
            else:
                shape = (number, *type.shape)
                self.pieces[piece] = Rows(refs, (False, *row_dims), type, shape)
        return cut

    def weight(self, node: Node) -> None:
        names = []
        for operand in node.operands:
            value = self.values[operand]
            assert isinstance(value, Weight)
            names.append(value.name)
        for port, (shape, dtype) in enumerate(node.outputs):
            if base_name(node.op) == "t" and names[0].endswith(".T"):
                name = names[0].removesuffix(".T")
            else:
                name = self.params.define(node.op, node.args, node.kwargs, names, port)
            self.values[node.id, port] = Weight(name, shape, dtype)
            if base_name(node.op) == "expand":
                self._expanded[name] = self.arg(node, 0)

    def matrix(self, weight: Weight) -> Weight:
        """The 2-D weight that one with batch dimensions repeats, where it does; else itself."""
        whole = self._expanded.get(weight.name, weight)
        assert isinstance(whole, Weight)
        if len(whole.shape) > 2 and all(s == 1 for s in whole.shape[:-2]):
            return self.emitter.view_weight(whole, whole.shape[-2:])
        return whole

    # -- what rules use
    # -------------------------------------------------------------------------------------

    def arg(self, node: Node, index: int) -> Lowered:
        kind, operand = node.args[index]
        assert kind == "t", node
        return self.values[node.operands[operand]]

    def rows_of(self, value: Lowered, row_dims: Sequence[bool] | None = None) -> Rows:
        """A value as rows, in the given form or as it is."""
        if isinstance(value, Rows) and row_dims is None:
            return value
        if row_dims is None:
            row_dims = (True,) * len(value.shape)
        return self.emitter.convert(value, row_dims)

    def align(self, value: Lowered, shape: Shape, row_dims: tuple[bool, ...]) -> RowOperand:
        """A value broadcast to `shape`, as an operand of an operation at every position of it."""
        positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
        pad = len(shape) - len(value.shape)
        own = tuple(
            row_dims[pad + i]
            if value.shape[i] != 1 or isinstance(value, Weight)
            else value_row(value, i)
            for i in range(len(value.shape))
        )
        if isinstance(value, Weight):
            fits = all(s == 1 or r for s, r in zip(value.shape, own, strict=True))
            if fits:
                kept = tuple(s for s, r in zip(value.shape, own, strict=True) if r)
                view = self.emitter.view_weight(value, kept)
                return ParamRef(view.name, RowType(view.shape, view.dtype))
        rows = self.rows_of(value, own)
        target = _row_shape(rows, row_dims[pad:])
        rows = self.emitter.reshape_rows(rows, target)
        refs = rows.refs.reshape(_position_shape(rows, row_dims[pad:]))
        return np.broadcast_to(refs, positions).reshape(-1)


def value_row(value: Rows, dim: int) -> bool:
    return value.row_dims[dim]


def _row_shape(rows: Rows, row_dims: Sequence[bool]) -> Shape:
    """Row shape that lines up with an operation's row dimensions: 1 where there is none."""
    shape = [rows.shape[i] if rows.row_dims[i] else 1 for i, r in enumerate(row_dims) if r]
    extra = [rows.shape[i] for i, r in enumerate(row_dims) if not r and rows.row_dims[i]]
    assert all(s == 1 for s in extra)
    while shape and shape[0] == 1:
        shape.pop(0)
    return tuple(shape)


def _position_shape(rows: Rows, row_dims: Sequence[bool]) -> Shape:
    """Shape of the references that lines up with an operation's positions."""
    return tuple(
        rows.shape[i] if not rows.row_dims[i] else 1 for i, r in enumerate(row_dims) if not r
    )


def common_dims(values: Sequence[Lowered], shape: Shape) -> tuple[bool, ...]:
    """Row dimensions of a broadcast result: a row where any operand has a row there."""
    out = []
    for dim, size in enumerate(shape):
        votes = []
        weight = False
        for value in values:
            own = dim - (len(shape) - len(value.shape))
            if own < 0 or (value.shape[own] == 1 and size != 1):
                continue
            if isinstance(value, Weight):
                weight = weight or value.shape[own] != 1
            else:
                votes.append(value.row_dims[own])
        out.append(any(votes) if votes else weight)
    return tuple(out)
