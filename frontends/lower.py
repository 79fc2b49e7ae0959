"""Lowering: a traced graph as operations on rows.

Duty: walk a `Graph` once; indexing along position dimensions (time, nodes, batch) becomes index
algebra on references, operations that work row by row are applied to every position, what depends
on weights alone becomes a named weight expression. Comes in from `frontends.tracer`; goes to
`cellc.extract` as a `RowGraph`. An operation without a rule runs through torch on whole tensors:
always right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from cellc.dtypes import DTYPE_NAMES, TORCH_DTYPES
from cellc.frontends import lower_views
from cellc.frontends.dims import (
    POINTWISE_OPS,
    Dims,
    argument,
    base_name,
    constant,
)
from cellc.frontends.values import Emitter, Rows, Weight
from cellc.graph import Graph, Node, Ref, Template
from cellc.ops import COMPARE, RowType, Shape
from cellc.params import Params
from cellc.rows import DataSource, ParamRef, RaggedRefs, RowGraph, RowOperand, RowOutput, ScalarRef

Lowered: TypeAlias = "Rows | Weight"
SMALL_ROWS = 1 << 16  # a weight's positions that may become constant rows


class Lowering:
    """One graph's lowering. `data_points` collects, over all traces of a model, program points that
    met data.
    """

    def __init__(self, graph: Graph, params: Params, data_points: set[Hashable]) -> None:
        self.graph, self.params = graph, params
        self.rows = RowGraph()
        self.emitter = Emitter(self.rows, params)
        self.dims = Dims(graph)
        self.values: dict[Ref, Lowered] = {}
        self._expanded: dict[str, Lowered] = {}  # an expanded weight: what it repeats
        self._of_weights = self._fold(data_points)

    def run(self) -> RowGraph:
        leaf = 0
        for node in self.graph:
            if node.kind == "input":
                self._input(node, leaf)
                leaf += 1
            elif node.kind in ("param", "const"):
                shape, dtype = node.outputs[0]
                self.values[node.id, 0] = Weight(node.name, shape, dtype)
            else:
                self._op(node)
        for node_id, port in self.graph.outputs:
            value = self.values[node_id, port]
            rows = (
                value
                if isinstance(value, Rows)
                else self.emitter.convert(value, (True,) * len(value.shape))
            )
            self.rows.outputs.append(RowOutput(rows.refs, rows.type, rows.shape, rows.row_dims))
        return self.rows

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

    def _input(self, node: Node, leaf: int) -> None:
        shape, dtype = node.outputs[0]
        row_dims = self.dims.row_dims(node.id)
        positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
        type = RowType(tuple(s for s, r in zip(shape, row_dims, strict=True) if r), dtype)
        count = int(np.prod(positions, dtype=np.int64))
        base = self.rows.allocate(count, type)
        self.rows.data.append(DataSource(leaf, node.name, base, count, type, row_dims))
        refs = np.arange(base, base + count, dtype=np.int64).reshape(positions)
        self.values[node.id, 0] = Rows(refs, row_dims, type, shape)

    def _op(self, node: Node) -> None:
        self.emitter.at(node.point, node.origin)
        if node.id in self._of_weights:
            self._weight(node)
            return
        name = base_name(node.op)
        rule = _RULES.get(name) or (_pointwise if name in POINTWISE_OPS else None)
        results = rule(self, node) if rule is not None else None
        if results is None:
            results = _generic(self, node)
        for port, result in enumerate(results):
            self.values[node.id, port] = result

    def _weight(self, node: Node) -> None:
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


def _common_dims(values: Sequence[Lowered], shape: Shape) -> tuple[bool, ...]:
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


# -- pointwise
# -----------------------------------------------------------------------------------------------

_NAMES = {"_to_copy": "cast", "clone": "cast", "sgn": "sign", "floor_divide": "floor_div"}
_TRUTH = frozenset(["logical_and", "logical_or", "logical_xor", "logical_not"])


def _pointwise(lw: Lowering, node: Node) -> list[Lowered]:
    name = _NAMES.get(base_name(node.op), base_name(node.op))
    shape, dtype = node.outputs[0]
    operands: list[Any] = []
    for template in node.args[: 3 if name == "where" else 1 if name == "cast" else 2]:
        kind, value = template
        if kind == "t":
            operands.append(lw.values[node.operands[value]])
        elif value is not None and kind == "v" and not isinstance(value, str):
            operands.append(value)
    if name == "cast" and isinstance(operands[0], Rows) and operands[0].type.dtype == dtype:
        return [operands[0]]
    if name in ("clamp_min", "clamp_max"):
        name = "maximum" if name == "clamp_min" else "minimum"
    tensors = [o for o in operands if isinstance(o, (Rows, Weight))]
    row_dims = _common_dims(tensors, shape)
    positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
    compute = _compute_dtype(lw, node, name, dtype)
    made: list[RowOperand] = []
    for i, operand in enumerate(operands):
        wanted = "bool" if name == "where" and i == 0 else compute
        made.append(_operand(lw, operand, wanted, shape, row_dims, positions, name == "cast"))
    return [_finish(lw, node, name, made, shape, dtype, row_dims, positions)]


def _operand(
    lw: Lowering,
    value: Any,
    dtype: str,
    shape: Shape,
    row_dims: tuple[bool, ...],
    positions: Shape,
    raw: bool,
) -> RowOperand:
    if not isinstance(value, (Rows, Weight)):
        return ScalarRef(_number(value, dtype), dtype)
    if isinstance(value, Weight):
        value = lw.emitter.cast_weight(value, dtype)
    operand = lw.align(value, shape, row_dims)
    if (
        raw
        or isinstance(operand, ParamRef)
        or not isinstance(operand, np.ndarray)
        or operand.size == 0
    ):
        return operand
    if lw.rows.type_of(int(operand[0])).dtype == dtype:
        return operand
    refs, _ = lw.emitter.emit("cast", [operand], (), dtype, positions)
    return refs.reshape(-1)


def _number(value: Any, dtype: str) -> bool | int | float:
    if dtype == "bool":
        return bool(value)
    return float(value) if dtype in ("f16", "bf16", "f32", "f64") else int(value)


def _compute_dtype(lw: Lowering, node: Node, name: str, dtype: str) -> str:
    """Dtype in which operands meet: the result's, or what comparisons promote to."""
    if name in _TRUTH:
        return "bool"
    if name == "isnan":
        return lw.graph.node(node.operands[0][0]).outputs[node.operands[0][1]][1]
    if name not in COMPARE:
        return dtype
    kinds = []
    for template in node.args[:2]:
        if template[0] == "t":
            shape, own = lw.graph.node(node.operands[template[1]][0]).outputs[
                node.operands[template[1]][1]
            ]
            kinds.append(torch.empty(shape, dtype=TORCH_DTYPES[own], device="meta"))
        else:
            kinds.append(template[1])
    return DTYPE_NAMES[torch.result_type(*kinds)]


def _finish(
    lw: Lowering,
    node: Node,
    name: str,
    made: list[RowOperand],
    shape: Shape,
    dtype: str,
    row_dims: tuple[bool, ...],
    positions: Shape,
) -> Lowered:
    emit = lw.emitter.emit
    if name == "rsub":  # b - alpha * a
        name, made = "sub", made[::-1]
    if any(isinstance(m, np.ndarray) and m.size == 0 for m in made):
        row = tuple(s for s, r in zip(shape, row_dims, strict=True) if r)
        return Rows(np.zeros(positions, np.int64), row_dims, RowType(row, dtype), shape)
    alpha = argument(node, 2, "alpha", 1) if name in ("add", "sub") else 1
    if alpha != 1:
        scaled, _ = emit(
            "mul", [made[1], ScalarRef(_number(alpha, dtype), dtype)], (), dtype, positions
        )
        made[1] = scaled.reshape(-1)
    rounding = next((v[1] for k, v in node.kwargs if k == "rounding_mode"), None)
    if name == "div" and rounding == "floor":
        name = "floor_div"
    if (
        name == "gelu"
        and next((v[1] for k, v in node.kwargs if k == "approximate"), "none") == "tanh"
    ):
        name = "gelu_tanh"
    refs, type = emit(name, made, (), dtype, positions)
    if name == "div" and rounding == "trunc":
        refs, type = emit("trunc", [refs.reshape(-1)], (), dtype, positions)
    wanted = tuple(s for s, r in zip(shape, row_dims, strict=True) if r)
    rows = Rows(refs, row_dims, type, shape)
    if type.shape != wanted:
        attrs = (("shape", wanted),)
        rows = lw.emitter.reshape_rows(rows, (1,) * (len(wanted) - len(type.shape)) + type.shape)
        if rows.type.shape != wanted:
            rows = lw.emitter.row_op(rows, "expand", attrs, shape, row_dims)
    return rows


# -- reductions
# ----------------------------------------------------------------------------------------------


def _reduce(lw: Lowering, node: Node) -> list[Lowered] | None:
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
    if not axes or length == 1:
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


# -- products
# ------------------------------------------------------------------------------------------------


def _matrix(lw: Lowering, node: Node) -> list[Lowered] | None:
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
    row_dims = _common_dims([left, right], wide)
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


# -- look-ups, constants and the rest
# ------------------------------------------------------------------------


def _embedding(lw: Lowering, node: Node) -> list[Lowered] | None:
    name = base_name(node.op)
    table = lw.arg(node, 0)
    if name == "index_select":
        if argument(node, 1, "dim") != 0:
            return None
        index = lw.arg(node, 2)
    else:
        index = lw.arg(node, 1)
    return _look_up(lw, table, index, node.outputs[0][0], negative=False)


def _index(lw: Lowering, node: Node) -> list[Lowered] | None:
    """`table[index]` with one index tensor."""
    kind, items = node.args[1]
    if kind != "l" or len(items) != 1 or items[0][0] != "t":
        return None
    index = lw.values[node.operands[items[0][1]]]
    return _look_up(lw, lw.arg(node, 0), index, node.outputs[0][0], negative=True)


def _look_up(
    lw: Lowering, table: Lowered, index: Lowered, shape: Shape, *, negative: bool
) -> list[Lowered] | None:
    if not isinstance(table, Weight):
        return None
    rows = lw.rows_of(index)
    if rows.type.dtype not in ("i64", "i32"):
        return None
    row_dims = (*rows.row_dims, *[True] * (len(table.shape) - 1))
    dtype = table.dtype
    if rows.refs.size == 0:
        return [
            Rows(rows.refs, row_dims, RowType((*rows.type.shape, *table.shape[1:]), dtype), shape)
        ]
    positions, flat = rows.refs.shape, rows.refs.reshape(-1)
    if negative:
        zero, size = ScalarRef(0, rows.type.dtype), ScalarRef(table.shape[0], rows.type.dtype)
        below, _ = lw.emitter.emit("lt", [flat, zero], (), "bool", positions)
        wrapped, _ = lw.emitter.emit("add", [flat, size], (), rows.type.dtype, positions)
        picked, _ = lw.emitter.emit(
            "where", [below.reshape(-1), wrapped.reshape(-1), flat], (), rows.type.dtype, positions
        )
        flat = picked.reshape(-1)
    param = ParamRef(table.name, RowType(table.shape, dtype))
    refs, type = lw.emitter.emit("embedding", [param, flat], (), dtype, positions)
    return [Rows(refs, row_dims, type, shape)]


def _factory(lw: Lowering, node: Node) -> list[Lowered]:
    """A tensor made from nothing: constant rows."""
    shape, dtype = node.outputs[0]
    row_dims = lw.dims.row_dims(node.id)
    if base_name(node.op) in ("full", "scalar_tensor"):
        value = constant(node.args[1 if base_name(node.op) == "full" else 0])
        return [lw.emitter.full(shape, dtype, _number(value, dtype), row_dims)]
    _, base, overload = node.op.split(".")
    args = [_python(a) for a in node.args]
    kwargs = {
        k: _python(v) for k, v in node.kwargs if v[1] is not None and k not in ("device", "layout")
    }
    made = getattr(getattr(torch.ops.aten, base), overload)(*args, **kwargs)
    made = made.to(TORCH_DTYPES[dtype])
    order = [i for i, r in enumerate(row_dims) if not r] + [i for i, r in enumerate(row_dims) if r]
    positions = tuple(s for s, r in zip(shape, row_dims, strict=True) if not r)
    type = RowType(tuple(s for s, r in zip(shape, row_dims, strict=True) if r), dtype)
    flat = made.permute(order).reshape(int(np.prod(positions, dtype=np.int64)), type.numel)
    refs = np.zeros(positions, np.int64)
    for i, row in enumerate(flat.tolist()):
        refs.flat[i] = lw.rows.constant(("rows", type.shape, dtype, tuple(row)), type)
    return [Rows(refs, row_dims, type, shape)]


def _python(template: Template) -> Any:
    kind, value = template
    if kind == "l":
        return [_python(x) for x in value]
    return TORCH_DTYPES[value] if kind == "d" else value


def _generic(lw: Lowering, node: Node) -> list[Lowered]:
    """Any other operation: through torch, on whole tensors."""
    if not node.operands:
        return _factory(lw, node)
    operands: list[RowOperand] = []
    for operand in node.operands:
        value = lw.values[operand]
        if isinstance(value, Weight):
            operands.append(ParamRef(value.name, RowType(value.shape, value.dtype)))
        else:
            rows = lw.rows_of(value, (True,) * len(value.shape))
            operands.append(rows.refs.reshape(-1))
    attrs = (("args", ("l", node.args)), ("kwargs", node.kwargs))
    types = [RowType(shape, dtype) for shape, dtype in node.outputs]
    refs = lw.emitter.emit_typed(
        f"aten:{node.op.removeprefix('aten.')}", operands, attrs, types, ()
    )
    return [Rows(r, (True,) * len(t.shape), t, t.shape) for r, t in zip(refs, types, strict=True)]


_Rule: TypeAlias = Callable[[Lowering, Node], "list[Lowered] | None"]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys("sum mean amax amin prod any all argmax argmin max min".split(), _reduce),
    **dict.fromkeys("mm bmm mv".split(), _matrix),
    **dict.fromkeys("embedding index_select".split(), _embedding),
    "index": _index,
}


def _view_rule(name: str) -> _Rule:
    rule = lower_views.RULES[name]

    def apply(lw: Lowering, node: Node) -> list[Lowered] | None:
        return rule(lw.emitter, lw.dims, node, [lw.values[o] for o in node.operands])

    return apply


_RULES.update({name: _view_rule(name) for name in lower_views.RULES})


def lower(graph: Graph, params: Params, data_points: set[Hashable]) -> RowGraph:
    """Lower one traced request. `params` receives expressions of weights; `data_points` is kept by
    the model.
    """
    return Lowering(graph, params, data_points).run()
