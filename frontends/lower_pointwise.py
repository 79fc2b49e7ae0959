"""Lowering of pointwise operations: broadcast, cast, applied at every position.

Duty: the rule for `dims.POINTWISE_OPS`, used by `frontends.lower`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cellc.dtypes import DTYPE_NAMES, TORCH_DTYPES
from cellc.frontends.arguments import argument, base_name
from cellc.frontends.context import Lowered, Lowering, common_dims
from cellc.frontends.values import Rows, Weight
from cellc.graph import Node
from cellc.ops import COMPARE, RowType, Shape
from cellc.rows import ParamRef, RowOperand, ScalarRef

_NAMES = {"_to_copy": "cast", "clone": "cast", "sgn": "sign", "floor_divide": "floor_div"}
_TRUTH = frozenset(["logical_and", "logical_or", "logical_xor", "logical_not"])


def pointwise(lw: Lowering, node: Node) -> list[Lowered]:
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
    row_dims = common_dims(tensors, shape)
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
        return ScalarRef(number(value, dtype), dtype)
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


def number(value: Any, dtype: str) -> bool | int | float:
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
            "mul", [made[1], ScalarRef(number(alpha, dtype), dtype)], (), dtype, positions
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
