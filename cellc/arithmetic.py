"""Arithmetic on the table of calls: requests come, launches advance them.

Duty: what costs the scheduler and the planner time (`cellc.scheduler` says what the table holds).
`place` copies blocks of plans into it. `advance`, from the calls that a launch begins with, follows
their chains, looks up the slots of all rows, tells successors, counts down requests; `look` says
which rows those would be, and changes nothing; `unlike`, of what they gave, finds what may not be
as expected. `arrange` gives calls of new requests their numbers, places and records
(`cellc.arranging`), `tree` checks arrays of children, `copy` brings large tensors into arenas. Here
by numpy; `kernels.native` has the same in C++ for machines with a compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cellc.arranging import Arranged, Wiring, arrange
from cellc.plan import (
    CELL,
    CHAIN,
    EDGES,
    EVENT,
    MISSING,
    NUM_COLUMNS,
    NUM_SUCCESSORS,
    RECORD,
    REQUEST,
    SUCCESSOR,
    Plan,
    ragged_range,
)

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
SCHEDULED = 1 << 30  # in MISSING: the call is in a launch already
NUMBER_KINDS = {"bool": 1, "i32": 2, "i64": 3, "f32": 4, "f64": 5}  # dtypes as in `native.cpp`

_NONE = np.zeros(0, np.int32)


class Advanced(NamedTuple):
    """What came of a launch's calls."""

    calls: I64  # [N] global call numbers, step by step
    steps: I32  # [K + 1] offsets into calls
    slots: I32  # [record length, N]
    ready: I64  # calls that wait for nothing more, each once
    cell: int  # theirs, where they are of one; -1 else
    finished: Sequence[int]  # requests whose last call is among these, ascending
    events: I32  # entries where events of the calls begin
    answering: I32  # the request of each of these calls


class Arithmetic(Protocol):
    """`table` [calls, columns] is written to."""

    def place(self, table: I32, plans: Sequence[Plan], first_calls: I64, added: I32) -> None:
        """Write each plan's block from its first call's row on, adding to every entry what `added`
        [plans, kinds] has for the entry's kind.
        """
        ...

    def advance(
        self, table: I32, left: I64, heads: I64, max_steps: int | None, length: int
    ) -> Advanced:
        """`heads` are ready calls of one cell, whose records have `length` entries; `left`, calls
        that each request still has, is written to.
        """
        ...

    def look(
        self, table: I32, heads: I64, max_steps: int | None, length: int
    ) -> tuple[I64, I32, I32]:
        """`calls`, `steps` and `slots` of what `advance` would give; changes nothing."""
        ...

    def unlike(self, table: I32, events: I32, places: I64) -> I64:
        """Positions of `events`, entries of the table where those of calls begin, that may hold
        anything but expected answers (`cellc.plan`). `places` [row types, 2]: where the rows of a
        type are, and a NUMBER_KINDS of what they are, or 0.
        """
        ...

    def arrange(self, wiring: Wiring) -> Arranged:
        """See `cellc.arranging`."""
        ...

    def copy(self, pieces: I64) -> None:
        """Copy memory; each of the pieces [n, 3] is (to, from, bytes)."""
        ...

    def tree(self, children: I64) -> tuple[I64, I64, I64, int] | None:
        """Of a tree's children [nodes, width], -1 where there is none: (how many each node has,
        how many nodes read each, all in a row, the root). None where they do not come before
        their parents, or it is no tree.
        """
        ...


class Numpy:
    """By numpy."""

    def place(self, table: I32, plans: Sequence[Plan], first_calls: I64, added: I32) -> None:
        block = np.concatenate([plan.block[0] for plan in plans])
        which = np.concatenate([plan.block[1] for plan in plans])
        sizes = np.array([len(plan.block[0]) for plan in plans])
        which += np.repeat(np.arange(len(plans), dtype=np.int32) * added.shape[1], sizes)
        block += added.reshape(-1)[which]
        entries, first_entries = table.reshape(-1), first_calls * NUM_COLUMNS
        if (first_entries[1:] == first_entries[:-1] + sizes[:-1]).all():
            start = int(first_entries[0])
            entries[start : start + len(block)] = block
        else:
            entries[ragged_range(first_entries, sizes)] = block

    def advance(
        self, table: I32, left: I64, heads: I64, max_steps: int | None, length: int
    ) -> Advanced:
        calls, steps, ends = _expand(table, heads, max_steps)
        rows = table[calls]
        slots = _slots(table, rows, length)
        ready = _wake(table, calls, rows, ends)
        events, requests = rows[:, EVENT], rows[:, REQUEST]
        if events.any():
            having = events > 0
            events, answering = events[having], requests[having]
        else:
            events = answering = _NONE
        cells = table[ready, CELL]
        cell = int(cells[0]) if len(cells) and (cells == cells[0]).all() else -1
        done = _finish(left, requests)
        return Advanced(calls, steps, slots, ready, cell, done, events, answering)

    def look(
        self, table: I32, heads: I64, max_steps: int | None, length: int
    ) -> tuple[I64, I32, I32]:
        calls, steps, _ = _expand(table, heads, max_steps)
        return calls, steps, _slots(table, table[calls], length)

    def unlike(self, table: I32, events: I32, places: I64) -> I64:
        return np.arange(len(events))  # `cellc.answers` looks at all of them itself

    def arrange(self, wiring: Wiring) -> Arranged:
        return arrange(wiring)

    def copy(self, pieces: I64) -> None:
        for piece in pieces.tolist():
            ctypes.memmove(*piece)

    def tree(self, children: I64) -> tuple[I64, I64, I64, int] | None:
        there = children != -1
        flat = children[there]
        n = len(children)
        if n == 0 or len(flat) != n - 1 or (flat < 0).any():
            return None
        readers = np.bincount(flat, minlength=n)
        if len(readers) != n or readers.max() > 1 or not (flat < there.nonzero()[0]).all():
            return None
        return there.sum(1), readers, flat, n - 1


def _expand(table: I32, heads: I64, max_steps: int | None) -> tuple[I64, I32, I64]:
    """Follow chains: (calls step by step, offsets of the steps, the chains' last calls)."""
    lengths = table[heads, CHAIN]
    longest = int(lengths.max())
    if max_steps is not None:
        longest = min(longest, max_steps)
    if longest <= 1:
        return heads, np.array([0, len(heads)], np.int32), heads
    number = np.arange(longest)[:, None]
    valid = number < lengths  # [K, B]
    inside = heads + np.minimum(number[1:], lengths - 1)
    follows = table[inside, MISSING] == table[inside, EDGES]
    valid[1:] &= np.logical_and.accumulate(follows, 0)
    counts = valid.sum(0)
    order = np.argsort(-counts, kind="stable")
    heads, counts = heads[order], counts[order]
    sizes = np.searchsorted(-counts, -np.arange(counts[0]), "left")  # rows of step k
    steps = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=steps[1:])
    calls = (heads + number[: len(sizes)])[number[: len(sizes)] < counts]
    return calls, steps, heads + counts - 1


def _slots(table: I32, rows: I32, length: int) -> I32:
    slots: I32 = table.reshape(-1)[rows[:, RECORD] + np.arange(length)[:, None]]
    return slots


def _wake(table: I32, calls: I64, rows: I32, ends: I64) -> I64:
    """Tell successors; returns those that wait for nothing more."""
    missing = table[:, MISSING]
    missing[calls] = SCHEDULED
    following = ends[table[ends, CHAIN] > 1] + 1
    missing[following] -= table[following, EDGES]
    ready: I64 = following[missing[following] == 0]
    counts = rows[:, NUM_SUCCESSORS]
    if counts.any():
        telling = np.flatnonzero(counts)
        index = ragged_range(rows[telling, SUCCESSOR], counts[telling])
        woken = table.reshape(-1)[index]
        np.subtract.at(missing, woken, 1)
        ready = np.concatenate([ready, _unique(woken[missing[woken] == 0])])
    return ready


def _finish(left: I64, requests: I32) -> list[int]:
    np.subtract.at(left, requests, 1)
    done = requests[left[requests] == 0]
    return np.unique(done).tolist() if len(done) else []


def _unique(calls: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Each call once, in order of first appearance."""
    if len(calls) <= 1:
        return calls
    values, first = np.unique(calls, return_index=True)
    return calls[np.sort(first)] if len(values) < len(calls) else calls
