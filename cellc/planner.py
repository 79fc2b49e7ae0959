"""Planning: calls of requests arranged into plans.

Duty: give every call its number, its successors and its record, and every value its slot, for one
request or for all of a forest at once, by numpy alone. Comes in from `cellc.compiler`: a
`CallGraph` or a `Forest`; goes out: `Plan`s. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat

import numpy as np

from cellc.arithmetic import Arithmetic, Numpy
from cellc.arranging import RETURNED, Arranged, Wiring
from cellc.calls import CallGraph, Forest
from cellc.errors import VerifyError
from cellc.ops import RowType
from cellc.plan import (
    CELL,
    I32,
    I64,
    DataRows,
    OutputRows,
    Places,
    Plan,
    Tables,
    ragged_range,
    table_bytes,
)
from cellc.regions import size_classes

_NONE = np.zeros(0, np.int64)


class _Planner:
    """Plans all requests of a forest at once: every array is over the calls of all of them, request
    by request, and within a request group by group.
    """

    def __init__(self, forest: Forest, tables: Tables, arithmetic: Arithmetic) -> None:
        graph = forest.graph
        self.forest, self.graph, self.tables = forest, graph, tables
        self.arithmetic = arithmetic
        self.num_requests = forest.num_requests
        self.returned = np.concatenate([_NONE, *[o.refs.reshape(-1) for o in forest.outputs]])
        reads = np.bincount(
            np.concatenate([_NONE, *_read_values(graph)]), minlength=graph.num_values
        )
        reads[self.returned] = RETURNED
        output_types = [[tables.type(t) for t in g.cell.output_types] for g in graph.groups]
        self.wiring = Wiring(
            graph.groups,
            forest.owners,
            output_types,
            reads,
            np.full(graph.num_values, -1, np.int64),
            np.full(graph.num_values, -1, np.int64),
            np.ones(graph.num_values, np.int64),
            _NONE.reshape(0, 0),
            forest.rows is not None,  # the forward may go on from any of them
        )

    def plans(self) -> list[Plan]:
        wiring = self.wiring
        self._place_constants()
        types = {type: self.tables.type(type) for type in {c.type for c in self.forest.data}}
        wiring.taken = np.zeros((len(self.tables.types), self.num_requests), np.int64)
        data = self._place_data(types)
        made = self.arithmetic.arrange(wiring)
        circular = len(made.table) - made.seen
        if circular:
            raise VerifyError(stage="plan", message=f"{circular} calls wait for each other")
        ids = [self.tables.cell(g.cell) for g in self.graph.groups]
        outputs = self._outputs()
        cells = self._cells(ids, made)
        places = self._places(made)
        table, starts = made.table, (made.call_starts, made.record_starts, made.successor_starts)
        calls_at, records_at, successors_at, ready_at = (
            s.tolist() for s in (*starts, made.ready_starts)
        )
        num_slots = list(map(tuple, wiring.taken.T.tolist()))
        plans = []
        for r in range(self.num_requests):
            plans.append(
                Plan(
                    table[calls_at[r] : calls_at[r + 1]],
                    made.records[records_at[r] : records_at[r + 1]],
                    made.bases[records_at[r] : records_at[r + 1]],
                    made.successors[successors_at[r] : successors_at[r + 1]],
                    made.ready[ready_at[r] : ready_at[r + 1]],
                    num_slots[r],
                    data[r],
                    outputs[r],
                    *cells[r],
                    places[r] if places else None,
                )
            )
        if not places:
            arrays = table, made.records, made.bases, made.successors
            self._note_sizes(plans, arrays, (starts[0], starts[1], *starts[1:]), wiring.taken)
        return plans

    def _cells(
        self, ids: list[int], made: Arranged
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(cells, their depths) of each request: those that it calls; of one alone, all. Writes
        them into the table.
        """
        numbers = np.array(ids, np.int32)
        requests = self.num_requests
        if not ids:
            return [((), ())] * requests
        counts = [np.bincount(o, minlength=requests) for o in self.forest.owners]
        sizes = np.stack(counts, 1)  # [requests, groups]
        made.table[:, CELL] = np.repeat(np.tile(numbers, requests), sizes.reshape(-1))
        present = list(map(tuple, ((sizes > 0) | (requests == 1)).tolist()))
        depths = made.depths.tolist()
        known = {
            there: (
                tuple([i for i, yes in zip(ids, there, strict=True) if yes]),
                tuple([d for d, yes in zip(depths, there, strict=True) if yes]),
            )
            for there in set(present)
        }
        return [known[there] for there in present]

    def _note_sizes(
        self, plans: list[Plan], arrays: Sequence[I32], starts: Sequence[I64], slots: I64
    ) -> None:
        """What each plan would find out of itself when it is first admitted, for all at once."""
        at = [a.ctypes.data + a.strides[0] * s[:-1] for a, s in zip(arrays, starts, strict=True)]
        calls, records, _, successors = [np.diff(s) for s in starts]
        types = np.full(len(plans), len(slots))
        columns = (at[0], calls, at[1], records, at[2], at[3], successors, types)
        rooms = size_classes(slots).T
        row_bytes = [type.nbytes for type in list(self.tables.types)[: len(slots)]]
        nbytes = rooms @ np.array(row_bytes, np.int64)
        nbytes += table_bytes(calls, records, successors)
        packed = np.stack(columns, 1).astype(np.int64).tobytes()
        width = len(packed) // len(plans)
        for i, (plan, room, size) in enumerate(zip(plans, rooms, nbytes.tolist(), strict=True)):
            known = plan.__dict__
            known["addresses"], known["rooms"] = packed[i * width : (i + 1) * width], room
            plan.nbytes = size

    # -- slots --

    def _place_constants(self) -> None:
        for key, value in self.graph.constants.items():
            type = self.graph_type(value) if self.wiring.reads[value] else None
            if type is not None:
                self.wiring.types[value] = self.tables.type(type)
                self.wiring.slots[value] = self.tables.constant(type, key)
                self.wiring.owned[value] = 0

    def graph_type(self, value: int) -> RowType | None:
        """Row type of a constant, from whoever reads it."""
        for group in self.graph.groups:
            for i, spec in enumerate(group.cell.inputs):
                if (group.input_values(i) == value).any():
                    return spec.type
        for output in self.forest.outputs:
            if (output.refs == value).any():
                return output.type
        return None

    def _place_data(self, numbers: Mapping[RowType, int]) -> list[tuple[DataRows, ...]]:
        """Data of each request, type by type side by side, in the order of the columns."""
        columns = self.forest.data
        if not columns:
            return [()] * self.num_requests
        bases, counts, owners = (
            np.concatenate([getattr(c, name) for c in columns])
            for name in ("bases", "counts", "owners")
        )
        column = np.repeat(np.arange(len(columns)), [len(c.bases) for c in columns])
        types = np.array([numbers[c.type] for c in columns])[column]
        rows = ragged_range(bases, counts)
        offsets = np.cumsum(counts) - counts
        filled = np.flatnonzero(counts)  # reduceat knows no empty parts
        used = np.zeros(len(bases), bool)
        limits: list[tuple[int | None, int | None]] = [(None, None)] * len(bases)
        if len(filled):
            used[filled] = np.logical_or.reduceat(self.wiring.reads[rows] > 0, offsets[filled])
            for i, limit in zip(filled.tolist(), self._limits(rows, offsets[filled]), strict=False):
                limits[i] = limit
        used |= np.array([c.leaf < 0 for c in columns])[column]  # later legs may read it
        kept = np.flatnonzero(used)
        bases, counts, owners, types = bases[kept], counts[kept], owners[kept], types[kept]
        firsts = self._side_by_side(types, owners, counts)
        values = ragged_range(bases, counts)
        self.wiring.slots[values] = ragged_range(firsts, counts)
        self.wiring.types[values] = np.repeat(types, counts)
        known: dict[tuple[int, int, int, tuple[int | None, int | None]], int] = {}
        shared: list[DataRows] = []
        if len(kept) < len(limits):
            limits = [limits[i] for i in kept.tolist()]
        keys = zip(*[a.tolist() for a in (column[kept], firsts, counts)], limits, strict=True)
        placed: list[list[int]] = [[] for _ in range(self.num_requests)]
        for owner, key in zip(owners.tolist(), keys, strict=True):
            number = known.setdefault(key, len(known))
            if number == len(shared):
                where, start, count, (bound, ahead) = key
                c = columns[where]
                shared.append(
                    DataRows(
                        *(c.leaf, c.name, start, count, numbers[c.type], c.row_dims),
                        *(bound, ahead, c.windows),
                    )
                )
            placed[owner].append(number)
        which = [*map(tuple, placed)]
        alike = {some: tuple([shared[n] for n in some]) for some in set(which)}
        return [alike[some] for some in which]

    def _side_by_side(self, types: I64, owners: I64, counts: I64) -> I64:
        """First slots of pieces of the requests' regions."""
        group = types * self.num_requests + owners
        order = np.argsort(group, kind="stable")
        sizes = counts[order]
        before = np.cumsum(sizes) - sizes
        first = np.searchsorted(group[order], group[order])  # of the same type and request
        starts = np.empty_like(counts)
        starts[order] = before - before[first]
        np.add.at(self.wiring.taken, (types, owners), counts)
        return starts

    def _limits(self, rows: I64, starts: I64) -> Iterable[tuple[int | None, int | None]]:
        """`bound` and `ahead` of data whose values begin at these of `rows`."""
        found = self._bounds()
        if found is None:
            return repeat((None, None))
        sure, most = found
        bounds = np.minimum.reduceat(most[rows], starts)
        least = np.maximum.reduceat(sure[rows], starts)
        largest = np.maximum.reduceat(np.where(most < _NO_BOUND, most, 0)[rows], starts)

        def limit(bound: int, all_: int, highest: int) -> tuple[int | None, int | None]:
            if bound == _NO_BOUND:
                return None, None
            if all_ == bound:  # whatever is outside is an error
                return bound, None
            return None, bound if highest == bound else None

        return map(limit, bounds.tolist(), least.tolist(), largest.tolist())

    def _bounds(self) -> tuple[I64, I64] | None:
        """For every value the smallest table that it indexes as it is: in calls that do not run
        ahead of answers, and in all. None where there is none.
        """
        when, answered = self.forest.when, self.forest.answered
        sure = bounds = None
        for g, group in enumerate(self.graph.groups):
            for op in group.cell.ops:
                if op.op != "embedding":
                    continue
                table, index = op.operands
                while index.kind == "op" and group.cell.ops[index.index].op in ("cast", "reshape"):
                    index = group.cell.ops[index.index].operands[0]
                if index.kind == "input" and not group.cell.inputs[index.index].ragged:
                    if bounds is None or sure is None:
                        bounds = np.full(self.graph.num_values, _NO_BOUND, np.int64)
                        sure = bounds if when is None else bounds.copy()
                    values = group.input_values(index.index)
                    size = group.cell.params[table.index].type.shape[0]
                    bounds[values] = np.minimum(bounds[values], size)
                    if when is not None and answered is not None:
                        values = values[when[g] < answered[self.forest.owners[g]]]
                        sure[values] = np.minimum(sure[values], size)
        return None if bounds is None or sure is None else (sure, bounds)

    def _places(self, made: Arranged) -> list[Places]:
        """Where the rows of each request are, where its forward reads values."""
        if self.forest.rows is None:
            return []
        out, wiring, starts = [], self.wiring, made.call_starts.tolist()
        when = np.zeros(len(made.table), np.int64)
        for group, first in zip(self.graph.groups, self.forest.when or [], strict=True):
            when[made.producer[group.outputs[0]]] = first
        for r, values in enumerate(self.forest.rows):
            known = values >= 0
            at = np.where(known, values, 0)
            maker = np.where(known, made.producer[at], -1)
            out.append(
                Places(
                    wiring.types[at],
                    np.where(known, wiring.slots[at], -1),
                    wiring.owned[at],
                    np.where(maker >= 0, maker - starts[r], -1),
                    when[starts[r] : starts[r + 1]],
                )
            )
        return out

    def _outputs(self) -> list[tuple[OutputRows, ...]]:
        """Of each request, in the order of the columns."""
        out: list[list[OutputRows]] = [[] for _ in range(self.num_requests)]
        values = self.returned
        slots = self.wiring.slots[values].astype(np.int32)
        owned = self.wiring.owned[values].astype(np.int32)
        at = 0
        for column in self.forest.outputs:
            end = at + column.refs.size
            some, own = slots[at:end], owned[at:end]
            type, positions = self.tables.type(column.type), column.refs.shape[1:]
            order = _order(column.row_dims)
            made: Iterable[OutputRows]
            if len(some) == len(column.refs):
                made = [
                    _one_row(slot, mine, type, positions, order)
                    for slot, mine in zip(some.tolist(), own.tolist(), strict=True)
                ]
            else:
                shape = len(column.refs), math.prod(positions)
                some, own = some.reshape(shape), own.reshape(shape)
                there = shape[1] > 0
                follows = own.all(1) & (np.diff(some) == 1).all(1) & there
                alike = repeat(type), repeat(positions), repeat(order)
                made = map(OutputRows, some, own, *alike, follows.tolist())
            for owner, rows in zip(column.owners.tolist(), made, strict=False):
                out[owner].append(rows)
            at = end
        return [*map(tuple, out)]


@lru_cache(maxsize=1 << 12)
def _one_row(
    slot: int, owned: int, type: int, positions: tuple[int, ...], order: tuple[int, ...] | None
) -> OutputRows:
    """One for all requests that return a single row at a place: those are read together."""
    where, mine = np.array([slot], np.int32), np.array([owned], np.int32)
    return OutputRows(where, mine, type, positions, order, owned == 1)


_NO_BOUND = np.iinfo(np.int64).max


def _read_values(graph: CallGraph) -> list[I64]:
    return [g.input_values(i) for g in graph.groups for i in range(len(g.inputs))]


@lru_cache(maxsize=1024)
def _order(row_dims: tuple[bool, ...]) -> tuple[int, ...] | None:
    """Where each dimension of a tensor is in (positions, row); None where it is in place."""
    position, row = (
        iter(range(len(row_dims))),
        iter(range(len(row_dims) - sum(row_dims), len(row_dims))),
    )
    order = tuple(next(row) if r else next(position) for r in row_dims)
    return None if order == tuple(range(len(order))) else order


def make_plan(graph: CallGraph, tables: Tables) -> Plan:
    """Arrange a request's calls; `tables` is kept by the model."""
    return make_plans(Forest.of(graph), tables)[0]


def make_plans(forest: Forest, tables: Tables, arithmetic: Arithmetic | None = None) -> list[Plan]:
    """Arrange the calls of several requests at once, one plan each."""
    return _Planner(forest, tables, arithmetic or Numpy()).plans()
