"""Fusion: maps over memory positions done inside the cells that reduce over them.

Duty: the pass over a whole `CallGraph` that does away with cells of which every call makes one
element of a vector (a score, its exponential, a weighted row) that only reductions read: those
cells then read the vectors that the maps read, and compute the elements themselves. What follows in
pairs (the maximum, the sum and the weighted sum of one softmax, and the step around them) is joined
by `cellc.joining`. One of `cellc.passes`.

No product with a weight moves: it is computed once a row where it is, and once a reader in a
vector. So keys stay where they are projected, and queries, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cellc import ops
from cellc.calls import CallGraph, CallGroup, take
from cellc.cell_editor import CellEditor
from cellc.cell_passes import share
from cellc.cells import Cell, CellInput, CellOp, Operand
from cellc.rows import RaggedRefs, Refs
from cellc.units import refs_of, same_columns

NARROW = 4  # columns of a product with a weight that is computed along a vector
_MOVED = ops.POINTWISE | ops.VIEWS | ops.REDUCE - {"argmax", "argmin"}


@dataclass
class Facts:
    """What all call graphs of a model have shown, so that they end with the same cells."""

    known: set[tuple[str, object]] = field(default_factory=set)
    missed: set[tuple[str, object]] = field(default_factory=set)  # asked for before they were known
    version: int = 0  # of what was known when cells were made that would be others now

    def learn(self, kind: str, key: object) -> None:
        """`varying` and `uniform` are inputs of maps, `distinct` pairs of inputs that read other
        rows, `needed` outputs that others read.
        """
        fact = (kind, key)
        if fact not in self.known:
            self.known.add(fact)
            self.version += fact in self.missed

    def has(self, kind: str, key: object) -> bool:
        """Is it known? Cells are made as if it were not so, where it is not."""
        fact = (kind, key)
        if fact not in self.known:
            self.missed.add(fact)
        return fact in self.known

    def add_input(
        self,
        specs: list[CellInput],
        columns: list[Refs | RaggedRefs],
        spec: CellInput,
        column: Refs | RaggedRefs,
        key: object,
    ) -> int:
        """The input that reads a column: one that always read the same, or a new one. `key` tells
        what is added to what.
        """
        for i, (known, other) in enumerate(zip(specs, columns, strict=True)):
            if (known.type, known.ragged) != (spec.type, spec.ragged):
                continue
            if not same_columns(column, other):
                self.learn("distinct", (key, i))
            elif not self.has("distinct", (key, i)):
                return i
        names, number = {s.name for s in specs}, len(specs)
        while f"x{number}" in names:
            number += 1
        specs.append(replace(spec, name=f"x{number}"))
        columns.append(column)
        return len(specs) - 1


def fuse_maps(graph: CallGraph, facts: Facts) -> list[CallGroup]:
    """Inline maps into the reductions that read them, the last ones first; returns the reductions.

    Groups that are left without readers are dropped.
    """
    fused: list[CallGroup] = []
    while True:
        found = next(
            (f for g in graph.groups if (f := _readers(graph, g, facts)) is not None), None
        )
        if found is None:
            return fused
        source, readers = found
        for group in dict.fromkeys(map(id, (r.group for r in readers))):
            mine = [r for r in readers if id(r.group) == group]
            _inline(mine, facts)
            if all(mine[0].group is not f for f in fused):
                fused.append(mine[0].group)
        graph.groups = [g for g in graph.groups if g is not source]
        fused = [f for f in fused if f is not source]


@dataclass
class _Reader:
    """Input `input` of a group, whose vectors lie in output `port` of the group `source`."""

    group: CallGroup
    input: int
    source: CallGroup
    port: int
    offsets: Refs
    calls: Refs  # of the source, in place of the vectors' values
    uniform: list[bool] = field(default_factory=list)  # of the source's inputs


def _readers(
    graph: CallGraph, source: CallGroup, facts: Facts
) -> tuple[CallGroup, list[_Reader]] | None:
    """Who reads a group, where all are reductions that can do its work."""
    if not _is_map(source.cell):
        return None
    call_of = np.full(graph.num_values, -1, np.int64)
    port_of = np.full(graph.num_values, -1, np.int64)
    for port, made in enumerate(source.outputs):
        call_of[made], port_of[made] = np.arange(len(made)), port
    if any((call_of[o.refs.reshape(-1)] >= 0).any() for o in graph.outputs):
        return None
    readers: list[_Reader] = []
    for group in graph.groups:
        for i, column in enumerate(group.inputs):
            calls = call_of[refs_of(column)]
            if not (calls >= 0).any():
                continue
            if group is source or not isinstance(column, RaggedRefs) or (calls < 0).any():
                return None
            ports = np.unique(port_of[column.refs])
            if len(ports) > 1 or (len(calls) > source.num_calls and not _is_view(source.cell)):
                return None
            reader = _Reader(group, i, source, int(ports[0]), column.offsets, calls)
            if not _settle(reader, facts):
                return None
            readers.append(reader)
    return (source, readers) if readers else None


def _is_map(cell: Cell) -> bool:
    """One row after another, without a product that is worth computing for many at once."""
    return not any(i.ragged for i in cell.inputs) and all(_moves(cell, op) for op in cell.ops)


def _moves(cell: Cell, op: CellOp) -> bool:
    if len(op.types) != 1:
        return False
    shapes = [cell.shape_of(x) for x in op.operands]
    if op.op == "matmul":
        work = ops.flops(op.op, shapes, op.type.shape)
        return work <= 4 * sum(cell.type_of(x).numel for x in op.operands if x.kind != "scalar")
    if op.op == "linear":
        return op.operands[1].kind == "param" and shapes[1][1] <= NARROW
    if op.op == "embedding":
        return op.operands[0].kind == "param"
    return op.op in _MOVED


def _is_view(cell: Cell) -> bool:
    """It only moves elements, or looks rows up: that may be done again at every reading."""
    return all(op.op in ops.VIEWS | {"embedding"} for op in cell.ops)


def _settle(reader: _Reader, facts: Facts) -> bool:
    """Tell which inputs of the map are the same along every vector; False where that is not known,
    or where the map's result would be.
    """
    lengths = np.diff(reader.offsets)
    first = np.repeat(reader.offsets[:-1], lengths)
    reader.uniform = []
    for k in range(len(reader.source.inputs)):
        key = (reader.source.cell.key, reader.group.cell.key, reader.input, k)
        values = reader.source.input_values(k)[reader.calls]
        if (values != values[first]).any():
            facts.learn("varying", key)
        elif (lengths > 1).any():
            facts.learn("uniform", key)
        varying = facts.has("varying", key)
        uniform = not varying and facts.has("uniform", key)
        if not varying and not uniform:
            return False
        reader.uniform.append(uniform)
    if any(reader.uniform) and (lengths == 0).any():
        return False  # which row would an empty vector read?
    varies = {k for k, same in enumerate(reader.uniform) if not same}
    return _depends(reader.source.cell, reader.source.cell.outputs[reader.port], varies)


def _depends(cell: Cell, operand: Operand, inputs: set[int]) -> bool:
    if operand.kind == "input":
        return operand.index in inputs
    return operand.kind == "op" and any(
        _depends(cell, x, inputs) for x in cell.ops[operand.index].operands
    )


def _inline(readers: list[_Reader], facts: Facts) -> None:
    """Do what a map does inside a group that reads it, at one or several inputs."""
    group, columns = readers[0].group, list(readers[0].group.inputs)
    editor = CellEditor(group.cell)
    for reader in readers:
        source = reader.source.cell
        operands = []
        for k, uniform in enumerate(reader.uniform):
            spec, column = source.inputs[k], take(reader.source.inputs[k], reader.calls)
            assert isinstance(column, np.ndarray)
            new: Refs | RaggedRefs = RaggedRefs(reader.offsets, column)
            if uniform:
                new = column[reader.offsets[:-1]]
            spec = CellInput("", spec.type, not uniform)
            index = facts.add_input(
                editor.inputs, columns, spec, new, (group.cell.key, source.key, k)
            )
            operands.append(Operand("input", index))
        made = inlined(editor, source, operands)
        editor.mapped[Operand("input", reader.input)] = made[reader.port]
    for i, op in enumerate(group.cell.ops):
        editor.copy(op, i)
    group.cell, group.inputs = without_unread(share(editor.done()), columns)


def inlined(editor: CellEditor, cell: Cell, operands: list[Operand]) -> list[Operand]:
    """Add a cell's operations to one being rewritten; returns its outputs there."""
    made: list[Operand] = []

    def see(x: Operand) -> Operand:
        if x.kind == "param":
            return editor.param(cell.params[x.index].name, cell.params[x.index].type)
        if x.kind == "input":
            return operands[x.index]
        return replace(made[x.index], port=x.port) if x.kind == "op" else x

    for op in cell.ops:
        made.append(editor.add(replace(op, operands=tuple(map(see, op.operands)))))
    return [see(x) for x in cell.outputs]


def without_unread(
    cell: Cell, columns: list[Refs | RaggedRefs]
) -> tuple[Cell, list[Refs | RaggedRefs]]:
    """A cell, and its columns, without the inputs that no operation reads any more; they are named
    anew.
    """
    read = {x.index for _, x in cell.uses() if x.kind == "input"}
    kept = [i for i in range(len(cell.inputs)) if i in read]
    where = {old: new for new, old in enumerate(kept)}

    def move(x: Operand) -> Operand:
        return replace(x, index=where[x.index]) if x.kind == "input" else x

    made = tuple(replace(op, operands=tuple(map(move, op.operands))) for op in cell.ops)
    inputs = tuple(replace(cell.inputs[old], name=f"x{new}") for new, old in enumerate(kept))
    cell = replace(cell, inputs=inputs, ops=made, outputs=tuple(map(move, cell.outputs)))
    return cell, [columns[i] for i in kept]
