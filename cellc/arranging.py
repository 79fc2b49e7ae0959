"""Arranging: the numbers, places and records of calls, and who waits for whom.

Duty: what of planning is over all calls of many requests: give every call its number, every value
that a call makes its slot; chains of calls that follow each other, whom a call tells, how deep each
cell lies. By numpy; `kernels.native` has the same in C++, array by array. Used by `cellc.planner`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellc.calls import CallGroup
from cellc.plan import (
    CHAIN,
    EDGES,
    I32,
    I64,
    MISSING,
    NUM_COLUMNS,
    NUM_SUCCESSORS,
    RECORD,
    SUCCESSOR,
    ragged_range,
    record_length,
)
from cellc.rows import RaggedRefs


@dataclass
class Wiring:
    """Calls of several requests: groups, and the request of each call, ascending. Of every value:
    how often it is read (RETURNED: and by nobody knows whom), and, but of those that calls make,
    its row type, slot, and whether it is the request's own (constants are not).

    taken: slots that each request's data takes, [row types, requests].
    """

    groups: list[CallGroup]
    owners: list[I64]
    output_types: list[list[int]]  # of each group
    reads: I64
    types: I64
    slots: I64
    owned: I64
    taken: I64
    keeps: bool  # all rows, each in a slot of its own


RETURNED = 1 << 30


@dataclass
class Arranged:
    """Request by request, and within a request group by group. Those of `Wiring` that are of
    values are complete now, and so is `taken`.

    table: columns of `Plan.calls`, but for CELL. records, bases: `Plan.records` and `record_base`.
    successors, ready: numbers within the request. Of each request where its part of these begins,
    and the end. depths: of groups; seen: calls that wait for others in no circle.
    """

    table: I32
    records: I32
    bases: I32
    successors: I32
    ready: I32
    call_starts: I64
    record_starts: I64
    successor_starts: I64
    ready_starts: I64
    producer: I64  # the call that makes a value; -1: none
    depths: I64
    seen: int


def arrange(wiring: Wiring) -> Arranged:
    """By numpy. Writes the wiring's `types`, `slots` and `taken`."""
    return _Arranger(wiring).arranged()


class _Arranger:
    def __init__(self, wiring: Wiring) -> None:
        self.wiring, self.groups, self.owners = wiring, wiring.groups, wiring.owners
        self.requests = wiring.taken.shape[1]
        self.counts = np.array(
            [np.bincount(o, minlength=self.requests) for o in self.owners], np.int64
        ).reshape(len(self.groups), self.requests)
        flat = self.counts.T.reshape(-1)
        first_call = (np.cumsum(flat) - flat).reshape(self.requests, -1).T
        self.call_starts = _starts(self.counts.sum(0))
        self.total = int(self.call_starts[-1])
        self.ranks = [_ranks(o, c) for o, c in zip(self.owners, self.counts, strict=True)]
        self.calls_of = [
            first[o] + rank
            for first, o, rank in zip(first_call, self.owners, self.ranks, strict=True)
        ]
        self.group_of = np.zeros(self.total, np.int64)
        self.owner_of = np.repeat(np.arange(self.requests), np.diff(self.call_starts))
        self.producer = np.full(len(wiring.reads), -1, np.int64)
        for g, (group, calls) in enumerate(zip(self.groups, self.calls_of, strict=True)):
            self.group_of[calls] = g
            for type, made in zip(wiring.output_types[g], group.outputs, strict=True):
                self.producer[made] = calls
                wiring.types[made] = type

    def arranged(self) -> Arranged:
        sources, targets = self._edges()
        same = self.group_of[sources] == self.group_of[targets]
        chained = (sources == targets - 1) & same
        chain, edges = self._chains(targets[chained])
        self._place(chain)
        records, bases, record_at, record_starts = self._records()
        told, first, counts = by_source(sources[~chained], targets[~chained], self.total)
        missing = np.bincount(targets, minlength=self.total)
        successor_starts = np.append(first, len(told))[self.call_starts]
        table = np.zeros((self.total, NUM_COLUMNS), np.int32)
        table[:, MISSING], table[:, CHAIN], table[:, EDGES] = missing, chain, edges
        table[:, RECORD] = record_at
        table[:, SUCCESSOR] = first - successor_starts[self.owner_of]
        table[:, NUM_SUCCESSORS] = counts
        ready = np.flatnonzero(missing == 0)
        depths, seen = levels(sources, targets, self.group_of, len(self.groups))
        return Arranged(
            table,
            records,
            bases,
            (told - self.call_starts[self.owner_of[told]]).astype(np.int32),
            (ready - self.call_starts[self.owner_of[ready]]).astype(np.int32),
            self.call_starts,
            record_starts,
            successor_starts,
            np.searchsorted(ready, self.call_starts),
            self.producer,
            depths,
            seen,
        )

    def _edges(self) -> tuple[I64, I64]:
        """(producing call, reading call) for every read of a made value."""
        sources, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for calls, group in zip(self.calls_of, self.groups, strict=True):
            for column in group.inputs:
                readers = calls
                if isinstance(column, RaggedRefs):
                    readers = np.repeat(calls, np.diff(column.offsets))
                    column = column.refs
                made = self.producer[column]
                sources.append(made[made >= 0])
                targets.append(readers[made >= 0])
        return np.concatenate(sources), np.concatenate(targets)

    def _chains(self, targets: I64) -> tuple[I64, I64]:
        """For every call: length of the chain from it on, and how many reads link it to the call
        before.
        """
        total = self.total
        edges = np.bincount(targets, minlength=total)
        ends = np.flatnonzero(np.append(edges[1:] == 0, True)) if total else np.zeros(0, np.int64)
        chain = ends[np.searchsorted(ends, np.arange(total))] - np.arange(total) + 1
        return chain, edges

    # -- slots --

    def _take(self, type: int, counts: I64) -> I64:
        """First slot of as many as each request wants."""
        start: I64 = self.wiring.taken[type].copy()
        self.wiring.taken[type] += counts
        return start

    def _place(self, chain: I64) -> None:
        reads, requests = self.wiring.reads, self.requests
        for g, group in enumerate(self.groups):
            n, owner, rank = group.num_calls, self.owners[g], self.ranks[g]
            lengths = chain[self.calls_of[g]]
            chain_start = np.append(True, lengths[1:] != lengths[:-1] - 1)[:n]
            chains = np.bincount(owner[chain_start], minlength=requests)
            number = np.cumsum(chain_start) - 1 - (np.cumsum(chains) - chains)[owner]
            passing = _passing(group)
            for o, made in enumerate(group.outputs):
                type = self.wiring.output_types[g][o]
                transient = (passing[o] == reads[made]) & ~((lengths == 1) & (reads[made] > 0))
                if self.wiring.keeps:
                    transient[:] = False
                place = np.zeros(n, np.int64)
                if transient.any():
                    some = np.bincount(owner[transient], minlength=requests) > 0
                    pairs = self._take(type, 2 * chains * some)
                    place = pairs[owner] + 2 * number + rank % 2
                own = np.flatnonzero(~transient)
                counts = np.bincount(owner[own], minlength=requests)
                place[own] = self._take(type, counts)[owner[own]] + _ranks(owner[own], counts)
                self.wiring.slots[made] = place

    # -- records --

    def _records(self) -> tuple[I32, I32, I64, I64]:
        """(slots, what to add, where each call's begin in its request's, where each request's do).

        A request's records lie group by group, then the vectors of ragged inputs.
        """
        here, nothing = len(self.wiring.taken), len(self.wiring.taken) + 1
        groups, requests = self.groups, self.requests
        lengths = np.array([record_length(g.cell) for g in groups], np.int64).reshape(-1, 1)
        vectors = np.zeros(requests, np.int64)
        for g, group in enumerate(groups):
            for column in group.inputs:
                if isinstance(column, RaggedRefs):
                    vectors += sums(np.diff(column.offsets), self.owners[g], requests)
        sizes = self.counts * lengths
        starts = _starts(sizes.sum(0) + vectors)
        inner = np.cumsum(sizes, 0) - sizes
        tail = sizes.sum(0)
        records = np.zeros(int(starts[-1]), np.int32)
        bases = np.full(int(starts[-1]), nothing, np.int32)
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
                    tail = tail + sums(sizes_of, owner, requests)
                    k += 2
                else:
                    block[:, k], base[:, k] = self._entries(column, nothing)
                    k += 1
            for made in group.outputs:
                block[:, k], base[:, k] = self._entries(made, nothing)
                k += 1
            where = (starts[owner] + local)[:, None] + np.arange(length)
            records[where], bases[where] = block, base
        return records, bases, record_at, starts

    def _entries(self, values: I64, nothing: int) -> tuple[I64, I64]:
        wiring = self.wiring
        base = np.where(wiring.owned[values] == 1, wiring.types[values], nothing)
        return wiring.slots[values], base


def levels(sources: I64, targets: I64, group_of: I64, groups: int) -> tuple[I64, int]:
    """(the deepest level of each group's calls, how many calls have a level), where call
    `targets[i]` waits for call `sources[i]`. Levels end where calls wait in a circle.
    """
    total = len(group_of)
    left = np.bincount(targets, minlength=total)
    successors, first, counts = by_source(sources, targets, total)
    ready = np.flatnonzero(left == 0)
    seen, level = 0, 0
    depth = np.zeros(groups, np.int64)
    while len(ready):
        seen += len(ready)
        depth[group_of[ready]] = level
        woken = successors[ragged_range(first[ready], counts[ready])]
        np.subtract.at(left, woken, 1)
        ready = np.unique(woken[left[woken] == 0])
        level += 1
    return depth, seen


def by_source(sources: I64, targets: I64, total: int) -> tuple[I64, I64, I64]:
    """Edges by source: (targets, where each source's begin, how many it has)."""
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(sources, minlength=total)
    return targets[order], np.cumsum(counts) - counts, counts


def sums(values: I64, owners: I64, requests: int) -> I64:
    """Of each request's values."""
    return np.bincount(owners, values, minlength=requests).astype(np.int64)


def _passing(group: CallGroup) -> list[I64]:
    """For each output, how often the next call of the group reads call j's."""
    out = []
    for made in group.outputs:
        count = np.zeros(group.num_calls, np.int64)
        for column in group.inputs:
            if isinstance(column, np.ndarray):
                count[:-1] += made[:-1] == column[1:]
        out.append(count)
    return out


def _starts(sizes: I64) -> I64:
    """Where parts of these sizes begin, and the end."""
    return np.append(0, np.cumsum(sizes)).astype(np.int64)


def _ranks(owners: I64, counts: I64) -> I64:
    """Place of each call among those of its owner; owners ascend."""
    return np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def _first_of(values: I64, owners: I64, requests: int) -> I64:
    """The value of the first call of each call's owner; owners ascend."""
    first = np.searchsorted(owners, np.arange(requests))
    return values[np.minimum(first, max(len(values) - 1, 0))][owners]
