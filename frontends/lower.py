"""Lowering: a traced graph as operations on rows.

Duty: walk a `Graph` once; indexing along position dimensions (time, nodes, batch) becomes index
algebra on references, operations that work row by row are applied to every position, what depends
on weights alone becomes a named weight expression. Comes in from `frontends.tracing`; goes to
`cellc.extract` as a `RowGraph`. An operation without a rule runs through torch on whole tensors:
always right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from cellc.dtypes import TORCH_DTYPES
from cellc.frontends import lower_conv, lower_math, lower_views
from cellc.frontends.arguments import argument, base_name, constant
from cellc.frontends.context import Lowered, Lowering
from cellc.frontends.dims import POINTWISE_OPS
from cellc.frontends.lower_pointwise import number, pointwise
from cellc.frontends.values import Rows, Weight
from cellc.graph import Graph, Node, Template
from cellc.ops import RowType, Shape
from cellc.params import Params
from cellc.rows import ParamRef, RowGraph, RowOperand, RowOutput, ScalarRef


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
        return [lw.emitter.full(shape, dtype, number(value, dtype), row_dims)]
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
    **dict.fromkeys(
        "sum mean amax amin prod any all argmax argmin max min".split(), lower_math.reduce
    ),
    **dict.fromkeys("mm bmm mv".split(), lower_math.matrix),
    **dict.fromkeys("embedding index_select".split(), _embedding),
    "index": _index,
    "convolution": lower_conv.convolution,
}


def _view_rule(name: str) -> _Rule:
    rule = lower_views.RULES[name]

    def apply(lw: Lowering, node: Node) -> list[Lowered] | None:
        return rule(lw.emitter, lw.dims, node, [lw.values[o] for o in node.operands])

    return apply


_RULES.update({name: _view_rule(name) for name in lower_views.RULES})


def _lower_op(lw: Lowering, node: Node) -> None:
    lw.emitter.at(node.point, node.origin)
    if node.id in lw.of_weights:
        lw.weight(node)
        return
    if node.id in lw.pieces:
        piece = lw.pieces[node.id]
        if base_name(node.op) == "unfold":  # its windows' elements come last
            rank = len(piece.shape)
            piece = lower_views.permute(lw.emitter, piece, [0, *range(2, rank), 1])
        lw.values[node.id, 0] = piece
        return
    name = base_name(node.op)
    rule = _RULES.get(name) or (pointwise if name in POINTWISE_OPS else None)
    results = rule(lw, node) if rule is not None else None
    if results is None:
        results = _generic(lw, node)
    for port, result in enumerate(results):
        lw.values[node.id, port] = result


def _is_stack(rows: Rows, fewest: int) -> bool:
    dims = rows.row_dims
    return len(dims) > 0 and not dims[0] and all(dims[1:]) and rows.shape[0] >= fewest


def lower(
    graph: Graph,
    params: Params,
    data_points: set[Hashable],
    *,
    whole: bool = False,
    stacks: Sequence[bool] | int = 2,
) -> RowGraph:
    """Lower one traced request.

    `params` receives expressions of weights; `data_points` is kept by the model. `whole`: every
    input is one row, and so is every output, but for those that are stacks: rows along their first
    dimension. `stacks` says of each output whether it is one, or the fewest rows that make one.
    """
    lw = Lowering(graph, params, data_points, whole=whole)
    leaf = 0
    for node in graph:
        if node.kind == "input":
            lw.input(node, leaf)
            leaf += 1
        elif node.kind == "op":
            _lower_op(lw, node)
        else:
            lw.values[node.id, 0] = Weight(node.name, *node.outputs[0])
    for i, value in enumerate(graph.outputs):
        rows = lw.rows_of(lw.values[value])
        if whole:
            stack = _is_stack(rows, stacks) if isinstance(stacks, int) else stacks[i]
            rows = lw.rows_of(rows, (not stack, *[True] * len(rows.shape[1:]))[: len(rows.shape)])
        lw.rows.outputs.append(RowOutput(rows.refs, rows.type, rows.shape, rows.row_dims))
    return lw.rows
