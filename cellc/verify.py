"""Verify: the rules of the IR, checked between passes.

Duty: raise VerifyError where a graph or a cell breaks a rule that later stages rely on. Called
after tracing and after every pass where CELLC_VERIFY=1 (always in tests). What passes here can be
printed, planned and turned into a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cellc import ops
from cellc.calls import CallGraph
from cellc.cells import Cell, CellOp, Operand
from cellc.errors import VerifyError
from cellc.graph import Graph, Node, Ref, Template
from cellc.ops import RowType

_COPIES = ops.VIEWS | {"cat"}
_KNOWN = ops.POINTWISE | ops.REDUCE | ops.RAGGED | _COPIES | {"linear", "matmul", "embedding"}
_LOGICAL = frozenset(["logical_and", "logical_or", "logical_xor", "logical_not"])
_TO_BOOL = ops.COMPARE | _LOGICAL | {"isnan", "any", "all", "ragged_any", "ragged_all"}
_TO_INDEX = frozenset(["argmax", "argmin"])
_EXTREMES = frozenset(["amax", "amin", "ragged_amax", "ragged_amin"])
_SAME_DTYPE = (
    ((ops.UNARY | ops.BINARY) - _TO_BOOL - {"cast"}) | _COPIES | _EXTREMES | {"linear", "matmul"}
)


def verify_graph(graph: Graph, stage: str = "tracing") -> None:
    """Check numbering, names, operands, argument templates and outputs; raises VerifyError."""
    names: set[tuple[bool, str]] = set()  # parameters have names of their own
    for number, node in enumerate(graph):
        for problem in _node_problems(graph, number, node):
            raise VerifyError(
                f"node {node.name}: {problem}", stage=stage, origin=node.origin or None
            )
        name = node.kind == "param", node.name
        if name in names:
            raise VerifyError(f"two nodes are named {node.name}", stage=stage)
        names.add(name)
    for value in graph.outputs:
        if problem := _value_problem(graph, value, len(graph)):
            raise VerifyError(f"graph output: {problem}", stage=stage)


def verify_cell(cell: Cell, stage: str = "extraction") -> None:
    """Check names, operands, shapes, dtypes and raggedness; raises VerifyError."""
    for what, names in (
        ("inputs", [i.name for i in cell.inputs]),
        ("parameters", [p.name for p in cell.params]),
    ):
        if len(set(names)) != len(names):
            raise VerifyError(f"cell {cell.name}: two {what} share a name in {names}", stage=stage)
    ragged: list[bool] = []  # for each operation, whether its result is a ragged vector
    for number, op in enumerate(cell.ops):
        for problem in _op_problems(cell, ragged, op):
            where = f"cell {cell.name}, operation {number} ({op.op})"
            raise VerifyError(f"{where}: {problem}", stage=stage, origin=op.origin or None)
        reads_ragged = any(_is_ragged(cell, ragged, x) for x in op.operands)
        ragged.append(reads_ragged and op.op not in ops.RAGGED)
    for operand in cell.outputs:
        if problem := _cell_output_problem(cell, ragged, operand):
            raise VerifyError(f"cell {cell.name}, output: {problem}", stage=stage)


def verify_reads(calls: CallGraph, type_of: Callable[[int], RowType]) -> None:
    """Check that every row a call reads has the type that its cell expects; raises VerifyError."""
    for group in calls.groups:
        for number, spec in enumerate(group.cell.inputs):
            for value in np.unique(group.input_values(number)).tolist():
                if type_of(value) != spec.type:
                    raise VerifyError(
                        f"cell {group.cell.name}, input {spec.name}: a call reads a row of "
                        f"{type_of(value)}, expected {spec.type}",
                        stage="extraction",
                    )


def _node_problems(graph: Graph, number: int, node: Node) -> Iterator[str]:
    if node.id != number:
        yield f"has id {node.id} at place {number}"
    if (node.kind == "op") != bool(node.op):
        yield f"is of kind {node.kind} with op {node.op!r}"
    if node.kind != "op" and (node.operands or len(node.outputs) != 1):
        yield f"is of kind {node.kind}, with operands or without one output"
    for value in node.operands:
        if problem := _value_problem(graph, value, number):
            yield problem
    for _, dtype in node.outputs:
        if dtype not in ops.DTYPES:
            yield f"has dtype {dtype}, expected one of {', '.join(ops.DTYPES)}"
    used = {i for arg in (*node.args, *dict(node.kwargs).values()) for i in _operand_numbers(arg)}
    if used != set(range(len(node.operands))):
        yield f"its arguments use operands {sorted(used)} of {len(node.operands)}"


def _operand_numbers(template: Template) -> Iterator[int]:
    tag, content = template
    if tag == "t":
        yield content
    elif tag == "l":
        for item in content:
            yield from _operand_numbers(item)


def _value_problem(graph: Graph, value: Ref, limit: int) -> str:
    source, port = value
    if not 0 <= source < limit:
        return f"reads node {source}, expected one before {limit}"
    node = graph.node(source)
    if not 0 <= port < len(node.outputs):
        return f"reads output {port} of {node.name}, which has {len(node.outputs)}"
    return ""


def _op_problems(cell: Cell, ragged: list[bool], op: CellOp) -> Iterator[str]:
    operand_problems = [p for x in op.operands if (p := _operand_problem(cell, x, len(ragged)))]
    yield from operand_problems
    if not op.types:
        yield "has no result"
    yield from (f"has dtype {t.dtype}" for t in op.types if t.dtype not in ops.DTYPES)
    if op.op not in _KNOWN or operand_problems:
        return
    if len(op.types) != 1:
        yield f"has {len(op.types)} results, expected 1"
    yield from _shape_problems(cell, op)
    types = [None if x.kind == "scalar" else cell.type_of(x) for x in op.operands]
    yield from _dtype_problems(op, types)
    if op.op in ops.RAGGED and not _is_ragged(cell, ragged, op.operands[0]):
        yield "reduces a row, expected a ragged vector"


def _cell_output_problem(cell: Cell, ragged: list[bool], operand: Operand) -> str:
    if operand.kind not in ("input", "op"):
        return f"is a {operand.kind}, expected a row"
    if problem := _operand_problem(cell, operand, len(cell.ops)):
        return problem
    return "is ragged, expected a row" if _is_ragged(cell, ragged, operand) else ""


def _operand_problem(cell: Cell, operand: Operand, limit: int) -> str:
    if operand.kind == "scalar":
        return ""
    count = {"input": len(cell.inputs), "param": len(cell.params), "op": limit}[operand.kind]
    if not 0 <= operand.index < count:
        return f"reads {operand.kind} {operand.index}, expected one before {count}"
    num_ports = len(cell.ops[operand.index].types) if operand.kind == "op" else 1
    return "" if 0 <= operand.port < num_ports else f"reads result {operand.port} of {num_ports}"


def _shape_problems(cell: Cell, op: CellOp) -> Iterator[str]:
    shapes = [cell.shape_of(x) for x in op.operands]
    try:
        expected = ops.result_shape(op.op, shapes, op.attributes)
    except (ValueError, KeyError, IndexError, AssertionError) as error:
        yield f"operands {shapes} with {op.attributes} do not fit: {error!r}"
        return
    if expected != op.type.shape:
        yield f"has shape {op.type.shape}, expected {expected}"
    if op.op == "linear" and (
        shapes[0][-1] != shapes[1][0] or (len(shapes) > 2 and shapes[2] != expected[-1:])
    ):
        yield f"x, weight and bias {shapes} do not fit"
    if op.op == "matmul" and shapes[0][-1] != shapes[1][-2]:
        yield f"operands {shapes} do not fit"


def _dtype_problems(op: CellOp, types: list[RowType | None]) -> Iterator[str]:
    """`types` holds None for a scalar, which takes any dtype."""
    dtypes = [t.dtype if t else None for t in types]
    result = op.type.dtype
    expected: list[str | None] = dtypes
    if op.op in _TO_BOOL and result != "bool":
        yield f"has dtype {result}, expected bool"
    if op.op in _TO_INDEX and result != "i64":
        yield f"has dtype {result}, expected i64"
    if op.op in ops.COMPARE and len(set(dtypes) - {None}) > 1:
        yield f"compares {' with '.join(map(str, dtypes))}"
    if op.op in _SAME_DTYPE:
        expected = [result] * len(dtypes)
    elif op.op == "where":
        expected = ["bool", result, result]
    elif op.op == "embedding":
        expected = [result, dtypes[1] if dtypes[1] in ops.INT_DTYPES else "i64"]
    if any(d not in (None, e) for d, e in zip(dtypes, expected, strict=False)):
        got, wanted = (", ".join(d or "scalar" for d in group) for group in (dtypes, expected))
        yield f"operands are {got}, expected {wanted}"


def _is_ragged(cell: Cell, ragged: list[bool], operand: Operand) -> bool:
    if operand.kind == "input":
        return cell.inputs[operand.index].ragged
    return operand.kind == "op" and ragged[operand.index]
