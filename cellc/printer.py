"""Printer: the IR as text that reads as Python, one typed node a line, origin last.

Duty: one deterministic text for a graph and for a cell (no ids, addresses or timings), for logs,
dumps, `cellc inspect` and goldens. Comes in from any stage; nothing reads the text back.
"""

from __future__ import annotations

from collections import Counter

from cellc.cells import Cell, CellOp, Operand
from cellc.graph import Graph, Node, Output, Ref, Template
from cellc.ops import RowType

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/",
    "pow": "**", "remainder": "%", "floor_div": "//",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
}  # fmt: skip
_PREFIX = {"neg": "-", "bitwise_not": "~"}
_MAX_WIDTH = 100
_ORIGIN_COLUMN = 80  # a longer line pushes its own origin out, not everyone's


def print_graph(graph: Graph, title: str = "graph") -> str:
    """The graph, one node a line; `@` marks a parameter, `split[1]` is output 1 of `split`."""
    kinds = Counter(node.kind for node in graph)
    counts = ", ".join(
        f"{kinds[kind]} {kind}{'' if kinds[kind] == 1 else 's'}"
        for kind in ("input", "param", "const", "op")
        if kinds[kind]
    )
    num_nodes = f"{len(graph)} node{'' if len(graph) == 1 else 's'}"
    header = f"# {title}: {num_nodes}{f' ({counts})' if counts else ''}"
    lines = _aligned([(_node_text(graph, node), node.origin) for node in graph])
    results = ", ".join(_value_name(graph, value) for value in graph.outputs)
    return "\n".join([header, *lines, f"return {results}".rstrip()])


def print_cell(cell: Cell) -> str:
    """The cell, one operation a line; types are of one row, `@` marks a parameter."""
    names = op_names(cell)
    lines = [
        (f"    {name}: {_types_text(op.types)} = {_op_text(cell, names, op)}", op.origin)
        for name, op in zip(names, cell.ops, strict=True)
    ]
    return "\n".join(_aligned([(_cell_header(cell, names), _cell_note(cell)), *lines]))


def op_names(cell: Cell) -> list[str]:
    """A name for each operation, unique among operations and inputs: its own where it has one."""
    taken = {i.name for i in cell.inputs}
    names = []
    for op in cell.ops:
        base = name = op.name or op.op
        count = 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        names.append(name)
    return names


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    column = max(
        (len(text) for text, origin in lines if origin and len(text) <= _ORIGIN_COLUMN), default=0
    )
    return [f"{text.ljust(column)}  # {origin}" if origin else text for text, origin in lines]


def _node_text(graph: Graph, node: Node) -> str:
    types = [_output_text(output) for output in node.outputs]
    type_text = types[0] if len(types) == 1 else f"({', '.join(types)})"
    name = _value_name(graph, (node.id, 0), whole=True)
    return f"{name}: {type_text} = {_call_text(graph, node) if node.kind == 'op' else node.kind}"


def _call_text(graph: Graph, node: Node) -> str:
    args = [_template_text(graph, node, arg) for arg in node.args]
    args += [f"{key}={_template_text(graph, node, arg)}" for key, arg in node.kwargs]
    return f"{node.op}({', '.join(args)})"


def _template_text(graph: Graph, node: Node, template: Template) -> str:
    tag, content = template
    if tag == "t":
        return _value_name(graph, node.operands[content])
    if tag == "l":
        return f"[{', '.join(_template_text(graph, node, item) for item in content)}]"
    return str(content) if tag == "d" else repr(content)


def _value_name(graph: Graph, value: Ref, whole: bool = False) -> str:
    node = graph.node(value[0])
    name = f"@{node.name}" if node.kind == "param" else node.name
    return name if whole or len(node.outputs) == 1 else f"{name}[{value[1]}]"


def _output_text(output: Output) -> str:
    return str(RowType(*output))


def _cell_header(cell: Cell, names: list[str]) -> str:
    inputs = [f"{i.name}: {'ragged ' if i.ragged else ''}{i.type}" for i in cell.inputs]
    results = f"({', '.join(_operand_text(cell, names, o) for o in cell.outputs)})"
    line = f"cell {cell.name}({', '.join(inputs)}) -> {results}:"
    if len(line) <= _MAX_WIDTH:
        return line
    return "\n".join([f"cell {cell.name}(", *(f"    {i}," for i in inputs), f") -> {results}:"])


def _cell_note(cell: Cell) -> str:
    weights = f"{len(cell.params)} weight{'' if len(cell.params) == 1 else 's'}"
    return f"{weights}, recurrent" if cell.recurrent else weights


def _types_text(types: tuple[RowType, ...]) -> str:
    return str(types[0]) if len(types) == 1 else f"({', '.join(map(str, types))})"


def _op_text(cell: Cell, names: list[str], op: CellOp) -> str:
    operands = [_operand_text(cell, names, operand) for operand in op.operands]
    if op.op in _INFIX and len(operands) == 2:
        return f"{operands[0]} {_INFIX[op.op]} {operands[1]}"
    if op.op in _PREFIX:
        return f"{_PREFIX[op.op]}{operands[0]}"
    if op.op == "slice":
        return f"{operands[0]}[{_slice_text(op)}]"
    if op.op == "cat":
        operands = [f"[{', '.join(operands)}]"]
    attrs = [f"{key}={value!r}" for key, value in op.attrs]
    return f"{op.op}({', '.join([*operands, *attrs])})"


def _slice_text(op: CellOp) -> str:
    dim, start, stop, step = (op.attributes[key] for key in ("dim", "start", "stop", "step"))
    assert isinstance(dim, int)
    return ":, " * dim + f"{start}:{stop}" + (f":{step}" if step != 1 else "")


def _operand_text(cell: Cell, names: list[str], operand: Operand) -> str:
    if operand.kind == "scalar":
        return repr(operand.value)
    if operand.kind == "input":
        return cell.inputs[operand.index].name
    if operand.kind == "param":
        return f"@{cell.params[operand.index].name}"
    name = names[operand.index]
    return name if len(cell.ops[operand.index].types) == 1 else f"{name}[{operand.port}]"
