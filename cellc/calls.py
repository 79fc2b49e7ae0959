"""Calls: a request as calls of cells.

Duty: the IR between extraction and planning: for every cell, which values each call reads and
makes. Comes in from `cellc.extract`, is rewritten by `cellc.passes`, goes to `cellc.plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cellc.cells import Cell
from cellc.ops import RowType
from cellc.rows import DataSource, RaggedRefs, Refs, RowOutput, Windows


@dataclass
class CallGroup:
    """All calls of one cell: call j reads inputs[i][j] and makes outputs[o][j] (value ids)."""

    cell: Cell
    inputs: list[Refs | RaggedRefs]
    outputs: list[Refs]

    @property
    def num_calls(self) -> int:
        return len(self.outputs[0])

    def input_values(self, index: int) -> Refs:
        """Every value that input `index` reads, over all calls."""
        column = self.inputs[index]
        return column.refs if isinstance(column, RaggedRefs) else column


@dataclass
class CallGraph:
    """A request's call groups; values as in the `RowGraph` it came from."""

    groups: list[CallGroup]
    data: list[DataSource]
    constants: dict[object, int]
    outputs: list[RowOutput]
    num_values: int
    stages: list[tuple[str, str]] = field(default_factory=list)

    def used(self) -> np.ndarray:
        """For every value: is it read by a call or returned?"""
        used = np.zeros(self.num_values, bool)
        for group in self.groups:
            for i in range(len(group.inputs)):
                used[group.input_values(i)] = True
        for output in self.outputs:
            used[output.refs.reshape(-1)] = True
        return used

    def __str__(self) -> str:
        lines = [f"# calls: {sum(g.num_calls for g in self.groups)} of {len(self.groups)} cells"]
        for group in self.groups:
            recurrent = " recurrent" if group.cell.recurrent else ""
            lines.append(f"{group.num_calls} x {group.cell.name}{recurrent}")
            for spec, column in zip(group.cell.inputs, group.inputs, strict=True):
                values = column.refs if isinstance(column, RaggedRefs) else column
                kind = "ragged " if spec.ragged else ""
                lines.append(f"    {kind}{spec.name}: {spec.type} <- {_list(values)}")
            for o, (type, column) in enumerate(
                zip(group.cell.output_types, group.outputs, strict=True)
            ):
                lines.append(f"    -> out{o}: {type} = {_list(column)}")
        return "\n".join(lines)


@dataclass
class DataColumn:
    """One tensor of several requests: of request `owners[j]`, rows bases[j]..bases[j] + counts[j] -
    1. See `DataSource`.
    """

    leaf: int
    name: str
    type: RowType
    row_dims: tuple[bool, ...]
    bases: Refs
    counts: Refs
    owners: Refs
    windows: Windows | None = None


@dataclass
class OutputColumn:
    """One tensor that several requests return: of request `owners[j]`, refs[j]. See `RowOutput`."""

    refs: Refs  # [requests, *positions]
    type: RowType
    shape: tuple[int, ...]
    row_dims: tuple[bool, ...]
    owners: Refs


@dataclass
class Forest:
    """Call graphs of several requests side by side in one, each call the request it belongs to.

    `owners[g]` has the request of every call of group g, ascending. What requests are given and
    return is in columns, and not in the graph; a request has one tensor at most in each. Constants
    belong to all. Where values are read, `when` has for every call of a group the first row of what
    it is part of, `answered` for every request the first row that is made after a question which is
    still open.
    """

    graph: CallGraph
    num_requests: int
    owners: list[Refs]
    data: list[DataColumn]
    outputs: list[OutputColumn]
    rows: list[Refs] | None = None  # where values are read: for every request's rows their values
    when: list[Refs] | None = None
    answered: Refs | None = None

    @classmethod
    def of(cls, graph: CallGraph) -> Forest:
        """One request."""
        owners = [np.zeros(g.num_calls, np.int64) for g in graph.groups]
        only = np.zeros(1, np.int64)
        data = [
            DataColumn(
                *(s.leaf, s.name, s.type, s.row_dims, np.array([s.base]), np.array([s.count])),
                only,
                s.windows,
            )
            for s in graph.data
        ]
        outputs = [
            OutputColumn(o.refs[None], o.type, o.shape, o.row_dims, only) for o in graph.outputs
        ]
        return cls(graph, 1, owners, data, outputs)

    def whole(self) -> CallGraph:
        """The graph with what all requests are given and return, request by request."""
        data = [
            (owner, DataSource(c.leaf, c.name, base, count, c.type, c.row_dims, c.windows))
            for c in self.data
            for owner, base, count in zip(
                c.owners.tolist(), c.bases.tolist(), c.counts.tolist(), strict=True
            )
        ]
        outputs = [
            (owner, RowOutput(refs, c.type, c.shape, c.row_dims))
            for c in self.outputs
            for owner, refs in zip(c.owners.tolist(), c.refs, strict=True)
        ]
        return replace(
            self.graph,
            data=[s for _, s in sorted(data, key=lambda one: one[0])],
            outputs=[o for _, o in sorted(outputs, key=lambda one: one[0])],
        )


def _list(values: Sequence[int] | Refs) -> str:
    head = ", ".join(f"%{v}" for v in values[:6])
    return f"[{head}, .. {len(values)}]" if len(values) > 6 else f"[{head}]"


def merge(groups: Sequence[CallGroup]) -> list[CallGroup]:
    """One group a cell: groups of equal cells are joined, in order."""
    merged: dict[str, CallGroup] = {}
    for group in groups:
        key = group.cell.key
        if key not in merged:
            merged[key] = CallGroup(group.cell, list(group.inputs), list(group.outputs))
            continue
        first = merged[key]
        if group.cell.recurrent and not first.cell.recurrent:
            first.cell = replace(first.cell, recurrent=True)
        first.inputs = [join(a, b) for a, b in zip(first.inputs, group.inputs, strict=True)]
        first.outputs = [
            np.concatenate([a, b]) for a, b in zip(first.outputs, group.outputs, strict=True)
        ]
    return list(merged.values())


def join(a: Refs | RaggedRefs, b: Refs | RaggedRefs) -> Refs | RaggedRefs:
    """Concatenate two columns of calls."""
    if isinstance(a, RaggedRefs):
        assert isinstance(b, RaggedRefs)
        offsets = np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]])
        return RaggedRefs(offsets, np.concatenate([a.refs, b.refs]))
    assert not isinstance(b, RaggedRefs)
    return np.concatenate([a, b])


def take(column: Refs | RaggedRefs, order: Refs) -> Refs | RaggedRefs:
    """Calls of a column in another order."""
    if not isinstance(column, RaggedRefs):
        return column[order]
    counts = np.diff(column.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    starts = column.offsets[:-1][order]
    index = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return RaggedRefs(offsets, column.refs[index])
