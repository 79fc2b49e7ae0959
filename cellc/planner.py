"""Planning: calls of requests arranged into plans.

Duty: give every call its number, its successors and its record, and every value its slot, for one
request or for all of a forest at once, by numpy alone. Comes in from `cellc.compiler`: a
`CallGraph` or a `Forest`; goes out: `Plan`s. No torch here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cellc.arithmetic import Arithmetic, Numpy
from cellc.calls import CallGraph, CallGroup, Forest
from cellc.dependencies import Dependencies
from cellc.ops import RowType
from cellc.plan import (
    CELL,
    CHAIN,
    EDGES,
    I32,
    I64,
    MISSING,
    NUM_COLUMNS,
    NUM_SUCCESSORS,
    RECORD,
    SUCCESSOR,
    DataRows,
    OutputRows,
    Places,
    Plan,
    Tables,
    ragged_range,
    record_length,
    table_bytes,
)
from cellc.regions import size_classes
from cellc.rows import RaggedRefs


class _Planner:
    """Plans all requests of a forest at once: every array is over the calls of all of them, request
    by request, and within a request group by group.
    """

    def __init__(self, forest: Forest, tables: Tables, arithmetic: Arithmetic) -> None:
        graph = forest.graph
        self.forest, self.graph, self.tables = forest, graph, tables
        self.arithmetic = arithmetic
        self.num_requests = forest.num_requests
        self.owners = forest.owners
        self.counts = np.array(
            [np.bincount(o, minlength=self.num_requests) for o in self.owners], np.int64
        ).reshape(len(graph.groups), self.num_requests)
        self.first_call, self.call_starts = self._layout(self.counts)
        self.total = int(self.call_starts[-1])
        self.ranks = [_ranks(o, c) for o, c in zip(self.owners, self.counts, strict=True)]
        self.calls_of = [
            first[o] + rank
            for first, o, rank in zip(self.first_call, self.owners, self.ranks, strict=True)
        ]
        self.group_of = np.zeros(self.total, np.int64)
        self.owner_of = np.repeat(np.arange(self.num_requests), np.diff(self.call_starts))
        self.producer = np.full(graph.num_values, -1, np.int64)
        self.type_of = np.full(graph.num_values, -1, np.int64)
        for g, (group, calls) in enumerate(zip(graph.groups, self.calls_of, strict=True)):
            self.group_of[calls] = g
            for type, made in zip(group.cell.output_types, group.outputs, strict=True):
                self.producer[made] = calls
                self.type_of[made] = tables.type(type)
        self.ahead: list[npt.NDArray[np.bool_]] | None = None  # calls that may run in vain
        if forest.when is not None and forest.answered is not None:
            answered, self.when = forest.answered, np.zeros(self.total, np.int64)
            self.ahead = [w >= answered[o] for w, o in zip(forest.when, self.owners, strict=True)]
            for calls, when in zip(self.calls_of, forest.when, strict=True):
                self.when[calls] = when
        self.slot = np.full(graph.num_values, -1, np.int64)
        self.owned = np.ones(graph.num_values, np.int64)
        self.num_slots: dict[int, I64] = {}

    @staticmethod
    def _layout(sizes: I64) -> tuple[I64, I64]:
        """Sizes [groups, requests], laid out request by request: (first of each, of requests)."""
        flat = sizes.T.reshape(-1)
        ends = np.cumsum(flat)
        first = (ends - flat).reshape(sizes.shape[::-1]).T
        return first, np.concatenate([[0], np.cumsum(sizes.sum(0))]).astype(np.int64)

    def plans(self) -> list[Plan]:
        depend = Dependencies(self.graph, self.calls_of, self.group_of, self.producer)
        chain, edges = depend.chains()
        self.used = self.graph.used()
        self._place_constants()
        data = self._place_data()
        self._place_made(chain)
        records, base, record_at, record_starts = self._records()
        told, first, counts, missing = depend.successors()
        successors = (told - self.call_starts[self.owner_of[told]]).astype(np.int32)
        successor_starts = np.append(first, len(successors))[self.call_starts]
        ids = [self.tables.cell(g.cell) for g in self.graph.groups]
        table = np.zeros((self.total, NUM_COLUMNS), np.int32)
        table[:, CELL] = np.array(ids, np.int32)[self.group_of] if ids else 0
        table[:, MISSING], table[:, CHAIN], table[:, EDGES] = missing, chain, edges
        table[:, RECORD] = record_at
        table[:, SUCCESSOR] = first - successor_starts[self.owner_of]
        table[:, NUM_SUCCESSORS] = counts
        ready = np.flatnonzero(missing == 0)
        ready_starts = np.searchsorted(ready, self.call_starts).tolist()
        local_ready = (ready - self.call_starts[self.owner_of[ready]]).astype(np.int32)
        num_types = len(self.tables.types)
        slots = np.zeros((num_types, self.num_requests), np.int64)
        for type, taken in self.num_slots.items():
            slots[type] = taken
        num_slots = slots.T.tolist()
        outputs = self._outputs()
        depths = depend.depths(self.arithmetic)
        present = list(map(tuple, (self.counts > 0).T.tolist()))
        alone = self.num_requests == 1
        if alone:
            present = [(True,) * len(ids)]
        cells = {
            there: (
                tuple([i for i, yes in zip(ids, there, strict=True) if yes]),
                tuple([d for d, yes in zip(depths, there, strict=True) if yes]),
            )
            for there in set(present)
        }
        plans = []
        places = self._places()
        calls_at, records_at = self.call_starts.tolist(), record_starts.tolist()
        successors_at = successor_starts.tolist()
        for r in range(self.num_requests):
            plans.append(
                Plan(
                    table[calls_at[r] : calls_at[r + 1]],
                    records[records_at[r] : records_at[r + 1]],
                    base[records_at[r] : records_at[r + 1]],
                    successors[successors_at[r] : successors_at[r + 1]],
                    local_ready[ready_starts[r] : ready_starts[r + 1]],
                    tuple(num_slots[r]),
                    tuple(data[r]),
                    tuple(outputs[r]),
                    *cells[present[r]],
                    places[r] if places else None,
                )
            )
        if not places:
            arrays = table, records, base, successors
            starts = self.call_starts, record_starts, record_starts, successor_starts
            self._note_sizes(plans, arrays, starts, slots)
        return plans

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
        for plan, addresses, room, size in zip(
            plans, np.stack(columns, 1).tolist(), rooms, nbytes.tolist(), strict=True
        ):
            plan.__dict__["addresses"], plan.__dict__["rooms"] = addresses, room
            plan.nbytes = size

    # -- slots --

    def _take(self, type: int, counts: I64) -> I64:
        """First slot of as many as each request wants."""
        start = self.num_slots.get(type)
        if start is None:
            start = np.zeros(self.num_requests, np.int64)
        self.num_slots[type] = start + counts
        return start

    def _place_constants(self) -> None:
        for key, value in self.graph.constants.items():
            type = self.graph_type(value) if self.used[value] else None
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

    def _place_data(self) -> list[list[DataRows]]:
        placed: list[list[DataRows]] = [[] for _ in range(self.num_requests)]
        sources = self.graph.data
        if not sources:
            return placed
        bases = np.array([s.base for s in sources])
        counts = np.array([s.count for s in sources])
        rows = ragged_range(bases, counts)
        offsets = np.cumsum(counts) - counts
        filled = np.flatnonzero(counts)  # reduceat knows no empty parts
        used = np.zeros(len(sources), bool)
        limits: list[tuple[int | None, int | None]] = [(None, None)] * len(sources)
        if len(filled):
            used[filled] = np.logical_or.reduceat(self.used[rows], offsets[filled])
            for i, limit in zip(filled.tolist(), self._limits(rows, offsets[filled]), strict=True):
                limits[i] = limit
        used |= np.array([s.leaf < 0 for s in sources])  # later legs may read what is carried
        kept = np.flatnonzero(used).tolist()
        owners = self.forest.data_owners
        starts: dict[tuple[int, int], int] = {}
        types = [self.tables.type(sources[i].type) for i in kept]
        firsts = []
        known: dict[Hashable, DataRows] = {}
        for i, type in zip(kept, types, strict=True):
            source, owner = sources[i], owners[i]
            start = starts.get((type, owner), 0)
            starts[type, owner] = start + source.count
            firsts.append(start)
            place = source.leaf, source.name, start, source.count, type, source.row_dims
            key = (*place, *limits[i], source.windows)
            rows_of = known.get(key)
            if rows_of is None:
                rows_of = known[key] = DataRows(*key)
            placed[owner].append(rows_of)
        for type in {type for type, _ in starts}:
            self.num_slots.setdefault(type, np.zeros(self.num_requests, np.int64))
        for (type, owner), taken in starts.items():
            self.num_slots[type][owner] = taken
        chosen = np.flatnonzero(used)
        values = ragged_range(bases[chosen], counts[chosen])
        self.slot[values] = ragged_range(np.array(firsts, np.int64), counts[chosen])
        self.type_of[values] = np.repeat(np.array(types, np.int64), counts[chosen])
        return placed

    def _limits(self, rows: I64, starts: I64) -> Iterator[tuple[int | None, int | None]]:
        """`bound` and `ahead` of sources whose values begin at these of `rows`."""
        sure, most = self._bounds()
        bounds = np.minimum.reduceat(most[rows], starts)
        least = np.maximum.reduceat(sure[rows], starts)
        largest = np.maximum.reduceat(np.where(most < _NO_BOUND, most, 0)[rows], starts)
        for bound, all_, highest in np.stack([bounds, least, largest], 1).tolist():
            if bound == _NO_BOUND:
                yield None, None
            elif all_ == bound:  # whatever is outside is an error
                yield bound, None
            else:
                yield None, bound if highest == bound else None

    def _bounds(self) -> tuple[I64, I64]:
        """For every value the smallest table that it indexes as it is: in calls that do not run
        ahead of answers, and in all.
        """
        bounds = np.full(self.graph.num_values, _NO_BOUND, np.int64)
        sure = bounds if self.ahead is None else bounds.copy()
        for g, group in enumerate(self.graph.groups):
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
                    if self.ahead is not None:
                        values = values[~self.ahead[g]]
                        sure[values] = np.minimum(sure[values], size)
        return sure, bounds

    def _place_made(self, chain: I64) -> None:
        reads = np.bincount(self._read_values(), minlength=self.graph.num_values)
        if self.graph.outputs:
            reads[np.concatenate([o.refs.reshape(-1) for o in self.graph.outputs])] = 1 << 30
        requests = self.num_requests
        for g, group in enumerate(self.graph.groups):
            n, owner, rank = group.num_calls, self.owners[g], self.ranks[g]
            lengths = chain[self.calls_of[g]]
            chain_start = np.append(True, lengths[1:] != lengths[:-1] - 1)[:n]
            chains = np.bincount(owner[chain_start], minlength=requests)
            number = np.cumsum(chain_start) - 1 - (np.cumsum(chains) - chains)[owner]
            passing = self._passing(group)
            for o, made in enumerate(group.outputs):
                type = self.tables.type(group.cell.output_types[o])
                transient = (passing[o] == reads[made]) & ~((lengths == 1) & (reads[made] > 0))
                if self.forest.rows is not None:  # the forward may go on from any of them
                    transient[:] = False
                place = np.zeros(n, np.int64)
                if transient.any():
                    some = np.bincount(owner[transient], minlength=requests) > 0
                    pairs = self._take(type, 2 * chains * some)
                    place = pairs[owner] + 2 * number + rank % 2
                own = np.flatnonzero(~transient)
                counts = np.bincount(owner[own], minlength=requests)
                place[own] = self._take(type, counts)[owner[own]] + _ranks(owner[own], counts)
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

    def _places(self) -> list[Places]:
        """Where the rows of each request are, where its forward reads values."""
        out = []
        starts = self.call_starts.tolist()
        for r, values in enumerate(self.forest.rows or []):
            known = values >= 0
            at = np.where(known, values, 0)
            maker = np.where(known, self.producer[at], -1)
            out.append(
                Places(
                    self.type_of[at],
                    np.where(known, self.slot[at], -1),
                    self.owned[at],
                    np.where(maker >= 0, maker - starts[r], -1),
                    self.when[starts[r] : starts[r + 1]],
                )
            )
        return out

    # -- records --

    def _records(self) -> tuple[I32, I32, I64, I64]:
        """(slots, what to add, where each call's begin in its request's, where each request's do).

        A request's records lie group by group, then the vectors of ragged inputs.
        """
        num_types = len(self.tables.types)
        here, nothing = num_types, num_types + 1
        groups, requests = self.graph.groups, self.num_requests
        lengths = np.array([record_length(g.cell) for g in groups], np.int64).reshape(-1, 1)
        vectors = np.zeros(requests, np.int64)
        for g, group in enumerate(groups):
            for column in group.inputs:
                if isinstance(column, RaggedRefs):
                    vectors += _sums(np.diff(column.offsets), self.owners[g], requests)
        sizes = self.counts * lengths
        starts = np.concatenate([[0], np.cumsum(sizes.sum(0) + vectors)]).astype(np.int64)
        inner = np.cumsum(sizes, 0) - sizes
        tail = sizes.sum(0)
        records = np.zeros(int(starts[-1]), np.int64)
        bases = np.full(int(starts[-1]), nothing, np.int64)
        record_at = np.zeros(self.total, np.int64)
        for g, group in enumerate(groups):
            n, owner, length = group.num_calls, self.owners[g], int(lengths[g, 0])
            local = inner[g][owner] + length * self.ranks[g]
            record_at[self.calls_of[g]] = local
            block, base = np.zeros((n, length), np.int64), np.full((n, length), nothing, np.int64)
            k = 0
            for column in group.inputs:
                if isinstance(column, RaggedRefs):
                    sizes_of = np.diff(column.offsets)
                    before = column.offsets[:-1] - _first_of(column.offsets[:-1], owner, requests)
                    block[:, k] = tail[owner] + before
                    base[:, k] = here
                    block[:, k + 1] = sizes_of
                    at = ragged_range(starts[owner] + block[:, k], sizes_of)
                    records[at], bases[at] = self._entries(column.refs, nothing)
                    tail = tail + _sums(sizes_of, owner, requests)
                    k += 2
                else:
                    block[:, k], base[:, k] = self._entries(column, nothing)
                    k += 1
            for made in group.outputs:
                block[:, k], base[:, k] = self._entries(made, nothing)
                k += 1
            where = (starts[owner] + local)[:, None] + np.arange(length)
            records[where], bases[where] = block, base
        return records.astype(np.int32), bases.astype(np.int32), record_at, starts

    def _entries(self, values: I64, nothing: int) -> tuple[I64, I64]:
        base = np.where(self.owned[values] == 1, self.type_of[values], nothing)
        return self.slot[values], base

    def _outputs(self) -> list[list[OutputRows]]:
        out: list[list[OutputRows]] = [[] for _ in range(self.num_requests)]
        outputs = self.graph.outputs
        if not outputs:
            return out
        values = np.concatenate([o.refs.reshape(-1) for o in outputs])
        slots, owned = self.slot[values].astype(np.int32), self.owned[values].astype(np.int32)
        in_order = np.append(np.diff(slots) == 1, False)
        own = owned.tolist()
        numbers = self.tables.types
        at = 0
        for output, owner in zip(outputs, self.forest.output_owners, strict=True):
            end = at + output.refs.size
            if end - at == 1:
                contiguous = own[at] == 1
            else:
                contiguous = end > at and bool(owned[at:end].all() and in_order[at : end - 1].all())
            out[owner].append(
                OutputRows(
                    slots[at:end],
                    owned[at:end],
                    numbers.get(output.type) or self.tables.type(output.type),
                    output.refs.shape,
                    _order(output.row_dims),
                    contiguous,
                )
            )
            at = end
        return out


_NO_BOUND = np.iinfo(np.int64).max


def _ranks(owners: I64, counts: I64) -> I64:
    """Place of each call among those of its owner; owners ascend."""
    return np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def _sums(values: I64, owners: I64, requests: int) -> I64:
    return np.bincount(owners, values, minlength=requests).astype(np.int64)


def _first_of(values: I64, owners: I64, requests: int) -> I64:
    """The value of the first call of each call's owner; owners ascend."""
    first = np.searchsorted(owners, np.arange(requests))
    return values[np.minimum(first, max(len(values) - 1, 0))][owners]


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
