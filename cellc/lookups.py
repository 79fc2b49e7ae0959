"""Look-ups: rows of tables looked up inside the cells that read them.

Duty: the pass over a whole `CallGraph` that does away with cells that only look rows up. The last
of `cellc.passes`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cellc import calls
from cellc.calls import CallGraph, CallGroup
from cellc.cell_editor import CellEditor
from cellc.cell_passes import share
from cellc.cells import Cell, CellInput, Operand
from cellc.rows import RaggedRefs, Refs


def sink_lookups(graph: CallGraph) -> None:
    """A cell that only looks rows up is done inside the cells that read it: no row is copied."""
    source_of = np.full(graph.num_values, -1, np.int64)
    port_of = np.zeros(graph.num_values, np.int64)
    call_of = np.zeros(graph.num_values, np.int64)
    for g, group in enumerate(graph.groups):
        if _is_lookup(group.cell):
            for port, made in enumerate(group.outputs):
                source_of[made], port_of[made] = g, port
                call_of[made] = np.arange(group.num_calls)
    for group in graph.groups:
        if not _is_lookup(group.cell):
            _sink_into(group, graph, source_of, port_of, call_of)
    used = graph.used()
    graph.groups = [
        g for g in graph.groups if not _is_lookup(g.cell) or any(used[m].any() for m in g.outputs)
    ]


def _is_lookup(cell: Cell) -> bool:
    """One look-up in a weight, and views of it."""
    return (
        [op.op for op in cell.ops if op.op not in ("slice", "reshape")] == ["embedding"]
        and cell.ops[0].op == "embedding"
        and len(cell.inputs) == 1
        and cell.ops[0].operands[0].kind == "param"
        and cell.inputs[0].type.shape == ()
    )


def _sink_into(
    group: CallGroup, graph: CallGraph, source_of: Refs, port_of: Refs, call_of: Refs
) -> None:
    """Do the look-ups that a group's inputs come from inside its cell."""
    found: list[tuple[int, int, int]] = []  # input, source group, port
    for i, column in enumerate(group.inputs):
        if isinstance(column, RaggedRefs) or len(column) == 0:
            continue
        source, port = int(source_of[column[0]]), int(port_of[column[0]])
        if source >= 0 and ((source_of[column] == source) & (port_of[column] == port)).all():
            found.append((i, source, port))
    if not found:
        return
    editor = CellEditor(group.cell)
    kept: dict[int, int] = {}  # source group: the input that holds its index now
    dropped = set()
    for i, source, port in found:
        lookup = graph.groups[source]
        column = group.inputs[i]
        assert isinstance(column, np.ndarray)
        index = calls.take(lookup.inputs[0], call_of[column])
        if source in kept and np.array_equal(_plain(group.inputs[kept[source]]), _plain(index)):
            dropped.add(i)
        else:
            kept[source] = i
            editor.inputs[i] = CellInput(group.cell.inputs[i].name, lookup.cell.inputs[0].type)
            group.inputs[i] = index
        made = _inline(editor, lookup.cell, Operand("input", kept[source]))
        editor.mapped[Operand("input", i)] = made[port]
    for i, op in enumerate(group.cell.ops):
        editor.copy(op, i)
    group.cell = _without(share(editor.done()), dropped)
    group.inputs = [c for i, c in enumerate(group.inputs) if i not in dropped]


def _plain(column: Refs | RaggedRefs) -> Refs:
    assert isinstance(column, np.ndarray)
    return column


def _inline(editor: CellEditor, cell: Cell, index: Operand) -> list[Operand]:
    """Add a look-up cell's operations to a cell being rewritten; returns its outputs there."""
    made: list[Operand] = []
    for op in cell.ops:
        operands = []
        for operand in op.operands:
            if operand.kind == "param":
                param = cell.params[operand.index]
                operands.append(editor.param(param.name, param.type))
            else:
                operands.append(index if operand.kind == "input" else made[operand.index])
        made.append(editor.add(replace(op, operands=tuple(operands))))
    return [made[o.index] for o in cell.outputs]


def _without(cell: Cell, dropped: set[int]) -> Cell:
    """A cell without inputs that nothing reads."""
    kept = [i for i in range(len(cell.inputs)) if i not in dropped]
    where = {old: new for new, old in enumerate(kept)}

    def move(operand: Operand) -> Operand:
        return replace(operand, index=where[operand.index]) if operand.kind == "input" else operand

    made = tuple(replace(op, operands=tuple(map(move, op.operands))) for op in cell.ops)
    inputs = tuple(cell.inputs[i] for i in kept)
    return replace(cell, inputs=inputs, ops=made, outputs=tuple(map(move, cell.outputs)))
