"""Plans: one structure's cell calls as arrays.

Duty: turn a `CallGraph` into flat int32 arrays that the scheduler copies with a few vectorised
operations, whatever the request holds. A plan is immutable and shared by all requests of one
structure. No torch here.

Slots are given out here, not at run time: a request owns one contiguous region in each arena, and
every value has a fixed place in it. A value of a chain that only the next call reads alternates
between two places, so that a long chain needs two rows, not one a position.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell
from cellc.errors import VerifyError
from cellc.ops import RowType
from cellc.rows import RaggedRefs

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Columns of a plan's call table.
CELL, MISSING, CHAIN, EDGES, RECORD, SUCCESSOR, NUM_SUCCESSORS, REQUEST = range(8)
NUM_COLUMNS = 8
# What is added to an entry of a plan's block where it is placed.
NOTHING, FIRST_ENTRY, FIRST_CALL, NUMBER, REGION = range(5)


@dataclass(frozen=True)
class DataRows:
    """A request tensor that calls read: `count` rows from slot `start` of the request's region of
    `type`.
    """

    leaf: int
    name: str
    start: int
    count: int
    type: int
    row_dims: tuple[bool, ...]
    bound: int | None  # every element must be an index in [0, bound)


@dataclass(frozen=True)
class OutputRows:
    """A returned tensor: rows at `slots` (+ the region's base where `owned`), in position order."""

    slots: I32
    owned: I32  # 1 in the request's region, 0 a constant's own slot
    type: int
    positions: tuple[int, ...]
    order: tuple[int, ...] | None  # permutation of (positions, row) to the tensor's dimensions
    contiguous: bool

    @cached_property
    def kind(self) -> Hashable:
        """Equal for tensors that are gathered and arranged alike."""
        return self.type, self.positions, self.order


@dataclass(frozen=True)
class Plan:
    """Arrays over calls, in cell order: see the column names above.

    The successors of a call are told when it is scheduled; the next call of its chain is not among
    them, since whoever schedules a chain goes on to it by number. `records` holds, for each call,
    its inputs' and outputs' slots side by side (a ragged input holds where its vector starts in
    `records` and how long it is); `record_base[i]` says what to add to entry i: the base of row
    type t, of the records themselves (num types), or nothing (num types + 1).
    """

    calls: I32  # [C, NUM_COLUMNS]
    records: I32
    record_base: I32
    successors: I32  # local call numbers
    ready: I32  # calls that wait for nothing
    num_slots: tuple[int, ...]  # a row type
    data: tuple[DataRows, ...]
    outputs: tuple[OutputRows, ...]
    cells: tuple[int, ...]
    priority: tuple[int, ...]  # a cell's depth: later cells first

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @cached_property
    def block(self) -> tuple[I32, I32]:
        """Calls, records and successors in one array of whole table rows, and what to add to each
        entry: NOTHING, the block's FIRST_ENTRY or FIRST_CALL, the request's NUMBER, or the base of
        row type t (REGION + t).
        """
        types, num_calls = len(self.num_slots), self.num_calls
        records_at = num_calls * NUM_COLUMNS
        successors_at = records_at + len(self.records)
        calls = self.calls.copy()
        calls[:, RECORD] += records_at
        calls[:, SUCCESSOR] += successors_at
        columns = np.full(NUM_COLUMNS, NOTHING)
        columns[[RECORD, SUCCESSOR, REQUEST]] = FIRST_ENTRY, FIRST_ENTRY, NUMBER
        meaning = np.array([*(REGION + np.arange(types)), FIRST_ENTRY, NOTHING])
        records = self.records + np.where(self.record_base == types, records_at, 0)
        filler = np.zeros(-(successors_at + len(self.successors)) % NUM_COLUMNS, np.int32)
        entries = (calls.reshape(-1), records, self.successors, filler)
        added = (
            np.tile(columns, num_calls),
            meaning[self.record_base],
            np.full(len(self.successors), FIRST_CALL),
            filler + NOTHING,
        )
        return np.concatenate(entries).astype(np.int32), np.concatenate(added).astype(np.int32)

    @cached_property
    def num_rows(self) -> int:
        """Table rows that the block takes."""
        return len(self.block[0]) // NUM_COLUMNS

    def __str__(self) -> str:
        lines = [f"# plan: {self.num_calls} calls, {len(self.ready)} ready at once"]
        for j, row in enumerate(self.calls[:200]):
            woken = self.successors[row[SUCCESSOR] : row[SUCCESSOR] + row[NUM_SUCCESSORS]]
            lines.append(
                f"call {j}: cell {row[CELL]}, waits for {row[MISSING]}, chain {row[CHAIN]}, "
                f"wakes {woken.tolist()}"
            )
        if self.num_calls > 200:
            lines.append(f".. {self.num_calls - 200} more")
        return "\n".join(lines)


class Tables:
    """Numbers that all plans of a model share: cells, row types and constant rows."""

    def __init__(self) -> None:
        self.cells: dict[str, int] = {}
        self.types: dict[RowType, int] = {}
        self.constants: dict[tuple[RowType, Hashable], int] = {}
        self.constant_counts: dict[int, int] = {}

    def cell(self, cell: Cell) -> int:
        return self.cells.setdefault(cell.key, len(self.cells))

    def type(self, type: RowType) -> int:
        return self.types.setdefault(type, len(self.types))

    def constant(self, type: RowType, key: Hashable) -> int:
        """Slot of a constant row: constants fill each arena from its start."""
        if (type, key) not in self.constants:
            number = self.type(type)
            slot = self.constant_counts.get(number, 0)
            self.constant_counts[number] = slot + 1  # first: others read constants, then counts
            self.constants[type, key] = slot
        return self.constants[type, key]


class _Planner:
    def __init__(self, graph: CallGraph, tables: Tables) -> None:
        self.graph, self.tables = graph, tables
        self.starts = np.cumsum([0, *(g.num_calls for g in graph.groups)])
        self.producer = np.full(graph.num_values, -1, np.int64)
        self.type_of = np.full(graph.num_values, -1, np.int64)
        for start, group in zip(self.starts, graph.groups, strict=False):
            for type, made in zip(group.cell.output_types, group.outputs, strict=True):
                self.producer[made] = start + np.arange(len(made))
                self.type_of[made] = tables.type(type)
        self.slot = np.full(graph.num_values, -1, np.int64)
        self.owned = np.ones(graph.num_values, np.int64)
        self.num_slots: dict[int, int] = {}

    def plan(self) -> Plan:
        chain, edges = self._chains()
        self._place_constants()
        data = self._place_data()
        self._place_made(chain)
        records, base, record_at = self._records()
        successors, first, counts, missing = self._successors()
        ids = [self.tables.cell(g.cell) for g in self.graph.groups]
        table = np.zeros((int(self.starts[-1]), NUM_COLUMNS), np.int32)
        table[:, CELL] = np.repeat(ids, np.diff(self.starts))
        table[:, MISSING], table[:, CHAIN], table[:, EDGES] = missing, chain, edges
        table[:, RECORD], table[:, SUCCESSOR], table[:, NUM_SUCCESSORS] = record_at, first, counts
        num_types = len(self.tables.types)
        return Plan(
            table,
            records,
            base,
            successors,
            np.flatnonzero(missing == 0).astype(np.int32),
            tuple(self.num_slots.get(t, 0) for t in range(num_types)),
            data,
            self._outputs(),
            tuple(ids),
            tuple(self._depths(missing)),
        )

    # -- dependencies --

    def _edges(self) -> tuple[I64, I64]:
        """(producing call, reading call) for every read of a made value."""
        sources, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, group in zip(self.starts, self.graph.groups, strict=False):
            for column in group.inputs:
                calls = start + np.arange(group.num_calls)
                if isinstance(column, RaggedRefs):
                    calls = np.repeat(calls, np.diff(column.offsets))
                    column = column.refs
                made = self.producer[column]
                sources.append(made[made >= 0])
                targets.append(calls[made >= 0])
        return np.concatenate(sources), np.concatenate(targets)

    def _chains(self) -> tuple[I64, I64]:
        """For every call: length of the chain from it on, and how many reads link it to the call
        before.
        """
        total = int(self.starts[-1])
        sources, targets = self._edges()
        linked = sources == targets - 1
        same = np.searchsorted(self.starts, sources, "right") == np.searchsorted(
            self.starts, targets, "right"
        )
        self.chained = linked & same
        edges = np.bincount(targets[self.chained], minlength=total)
        ends = np.flatnonzero(np.append(edges[1:] == 0, True)) if total else np.zeros(0, np.int64)
        chain = ends[np.searchsorted(ends, np.arange(total))] - np.arange(total) + 1
        self.sources, self.targets = sources, targets
        return chain, edges

    def _successors(self) -> tuple[I32, I64, I64, I64]:
        """(successors but for chains, where each call's begin, how many, what a call waits for)."""
        total = int(self.starts[-1])
        others = ~self.chained
        successors, first, counts = _by_source(self.sources[others], self.targets[others], total)
        missing = np.bincount(self.targets, minlength=total)
        return successors.astype(np.int32), first, counts, missing

    def _depths(self, missing: I64) -> list[int]:
        """A depth a cell; raises VerifyError where calls wait for each other in a circle."""
        left, total = missing.copy(), int(self.starts[-1])
        successors, first, counts = _by_source(self.sources, self.targets, total)
        ready = np.flatnonzero(left == 0)
        seen, level = 0, 0
        cell_of = np.searchsorted(self.starts, np.arange(total), "right") - 1
        depth = np.zeros(len(self.graph.groups), np.int64)
        while len(ready):
            seen += len(ready)
            depth[np.unique(cell_of[ready])] = level
            index = ragged_range(first[ready], counts[ready])
            woken = successors[index]
            np.subtract.at(left, woken, 1)
            ready = np.unique(woken[left[woken] == 0])
            level += 1
        if seen != total:
            raise VerifyError(stage="plan", message=f"{total - seen} calls wait for each other")
        return depth.tolist()

    # -- slots --

    def _take(self, type: int, count: int) -> int:
        start = self.num_slots.get(type, 0)
        self.num_slots[type] = start + count
        return start

    def _place_constants(self) -> None:
        used = self.graph.used()
        for key, value in self.graph.constants.items():
            type = self.graph_type(value) if used[value] else None
            if type is not None:
                self.type_of[value] = self.tables.type(type)
                self.slot[value] = self.tables.constant(type, key)
                self.owned[value] = 0

    def graph_type(self, value: int) -> RowType | None:
        """Row type of a constant, from whoever reads it."""
        for group in self.graph.groups:
            for i, spec in enumerate(group.cell.inputs):
                if (group.input_values(i) == value).any():
                    return spec.type
        for output in self.graph.outputs:
            if (output.refs == value).any():
                return output.type
        return None

    def _place_data(self) -> tuple[DataRows, ...]:
        used = self.graph.used()
        bounds = self._bounds()
        placed = []
        for source in self.graph.data:
            if not used[source.base : source.base + source.count].any():
                continue
            type = self.tables.type(source.type)
            start = self._take(type, source.count)
            values = slice(source.base, source.base + source.count)
            self.slot[values] = start + np.arange(source.count)
            self.type_of[values] = type
            inside = bounds[values]
            bound = (
                int(inside.min()) if len(inside) and inside.min() < np.iinfo(np.int64).max else None
            )
            placed.append(
                DataRows(
                    source.leaf, source.name, start, source.count, type, source.row_dims, bound
                )
            )
        return tuple(placed)

    def _bounds(self) -> I64:
        """For every value: the smallest table that it indexes as it is."""
        bounds = np.full(self.graph.num_values, np.iinfo(np.int64).max, np.int64)
        for group in self.graph.groups:
            for op in group.cell.ops:
                if op.op != "embedding":
                    continue
                table, index = op.operands
                while index.kind == "op" and group.cell.ops[index.index].op in ("cast", "reshape"):
                    index = group.cell.ops[index.index].operands[0]
                if index.kind == "input" and not group.cell.inputs[index.index].ragged:
                    values = group.input_values(index.index)
                    size = group.cell.params[table.index].type.shape[0]
                    bounds[values] = np.minimum(bounds[values], size)
        return bounds

    def _place_made(self, chain: I64) -> None:
        reads = np.bincount(self._read_values(), minlength=self.graph.num_values)
        for output in self.graph.outputs:
            reads[output.refs.reshape(-1)] += 1 << 30
        for start, group in zip(self.starts, self.graph.groups, strict=False):
            n = group.num_calls
            lengths = chain[start : start + n]
            chain_start = np.append(True, lengths[1:] != lengths[:-1] - 1)[:n]
            number = np.cumsum(chain_start) - 1
            passing = self._passing(group)
            for o, made in enumerate(group.outputs):
                type = self.tables.type(group.cell.output_types[o])
                last = lengths == 1
                transient = (passing[o] == reads[made]) & ~(last & (reads[made] > 0))
                pairs = self._take(type, 2 * int(number[-1] + 1)) if transient.any() else 0
                place = pairs + 2 * number + np.arange(n) % 2
                own = np.flatnonzero(~transient)
                place[own] = self._take(type, len(own)) + np.arange(len(own))
                self.slot[made] = place

    def _read_values(self) -> I64:
        parts = [np.zeros(0, np.int64)]
        for group in self.graph.groups:
            parts += [group.input_values(i) for i in range(len(group.inputs))]
        return np.concatenate(parts)

    def _passing(self, group: CallGroup) -> list[I64]:
        """For each output, how often the next call of the group reads call j's."""
        n = group.num_calls
        out = []
        for made in group.outputs:
            count = np.zeros(n, np.int64)
            for column in group.inputs:
                if isinstance(column, np.ndarray):
                    count[:-1] += made[:-1] == column[1:]
            out.append(count)
        return out

    # -- records --

    def _records(self) -> tuple[I32, I32, I64]:
        num_types = len(self.tables.types)
        here, nothing = num_types, num_types + 1
        slots: list[I64] = []
        bases: list[I64] = []
        tail: list[tuple[I64, I64]] = []
        record_at = np.zeros(int(self.starts[-1]), np.int64)
        size = sum(g.num_calls * record_length(g.cell) for g in self.graph.groups)
        at = 0
        for start, group in zip(self.starts, self.graph.groups, strict=False):
            n, length = group.num_calls, record_length(group.cell)
            record_at[start : start + n] = at + length * np.arange(n)
            at += length * n
            block, base = np.zeros((n, length), np.int64), np.full((n, length), nothing, np.int64)
            k = 0
            for column in group.inputs:
                if isinstance(column, RaggedRefs):
                    block[:, k] = size + column.offsets[:-1]
                    base[:, k] = here
                    block[:, k + 1] = np.diff(column.offsets)
                    tail.append(self._entries(column.refs, nothing))
                    size += len(column.refs)
                    k += 2
                else:
                    block[:, k], base[:, k] = self._entries(column, nothing)
                    k += 1
            for made in group.outputs:
                block[:, k], base[:, k] = self._entries(made, nothing)
                k += 1
            slots.append(block.reshape(-1))
            bases.append(base.reshape(-1))
        slots += [t[0] for t in tail]
        bases += [t[1] for t in tail]
        empty = [np.zeros(0, np.int64)]
        return (
            np.concatenate(empty + slots).astype(np.int32),
            np.concatenate(empty + bases).astype(np.int32),
            record_at,
        )

    def _entries(self, values: I64, nothing: int) -> tuple[I64, I64]:
        base = np.where(self.owned[values] == 1, self.type_of[values], nothing)
        return self.slot[values], base

    def _outputs(self) -> tuple[OutputRows, ...]:
        out = []
        for output in self.graph.outputs:
            values = output.refs.reshape(-1)
            slots = self.slot[values].astype(np.int32)
            owned = self.owned[values].astype(np.int32)
            contiguous = len(slots) > 0 and bool(owned.all() and (np.diff(slots) == 1).all())
            type = self.tables.type(output.type)
            order = _order(output.row_dims)
            out.append(OutputRows(slots, owned, type, output.refs.shape, order, contiguous))
        return tuple(out)


def _order(row_dims: tuple[bool, ...]) -> tuple[int, ...] | None:
    """Where each dimension of a tensor is in (positions, row); None where it is in place."""
    position, row = (
        iter(range(len(row_dims))),
        iter(range(len(row_dims) - sum(row_dims), len(row_dims))),
    )
    order = tuple(next(row) if r else next(position) for r in row_dims)
    return None if order == tuple(range(len(order))) else order


def _by_source(sources: I64, targets: I64, total: int) -> tuple[I64, I64, I64]:
    """Edges by source: (targets, where each source's begin, how many it has)."""
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(sources, minlength=total)
    return targets[order], np.cumsum(counts) - counts, counts


def record_length(cell: Cell) -> int:
    """Entries of one call's record: a slot an input (two numbers if ragged), a slot an output."""
    return sum(2 if i.ragged else 1 for i in cell.inputs) + len(cell.outputs)


def ragged_range(starts: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> I64:
    """starts[0], starts[0] + 1, .. (counts[0] of them), starts[1], ..

    >>> ragged_range(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    total = int(counts.sum())
    offsets = np.cumsum(counts) - counts
    return np.repeat(starts - offsets, counts) + np.arange(total)


def make_plan(graph: CallGraph, tables: Tables) -> Plan:
    """Arrange a request's calls; `tables` is kept by the model."""
    return _Planner(graph, tables).plan()


def priorities(plans: Mapping[object, Plan]) -> dict[int, int]:
    """Deepest place of every cell over some plans."""
    out: dict[int, int] = {}
    for plan in plans.values():
        for cell, depth in zip(plan.cells, plan.priority, strict=True):
            out[cell] = max(out.get(cell, 0), depth)
    return out
