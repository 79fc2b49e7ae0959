"""Plans: one structure's cell calls as arrays.

Duty: what a plan is: flat int32 arrays, made by `cellc.planner`, that the scheduler copies with a
few vectorised operations, whatever the request holds. A plan is immutable and shared by all
requests of one structure. No torch here.

Slots are given out when a plan is made, not at run time: a request owns one contiguous region in
each arena, and every value has a fixed place in it. A value of a chain that only the next call
reads alternates between two places, so that a long chain needs two rows, not one a position.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cellc.cells import Cell
from cellc.ops import RowType
from cellc.regions import size_class
from cellc.rows import Windows

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Columns of a plan's call table.
CELL, MISSING, CHAIN, EDGES, RECORD, SUCCESSOR, NUM_SUCCESSORS, REQUEST, EVENT = range(9)
NUM_COLUMNS = 9
# An event is (call, type, slot, owned, expected, number): a call answers a question (whose row has
# a type, a slot and an owner), or makes rows that are yielded (its type is YIELDED); the expected
# answer; the question's or yield's number.
YIELDED, UNEXPECTED = -1, np.iinfo(np.int32).min
EVENT_ENTRIES = 4  # in the scheduler's table: type, slot, expected, number

# What is added to an entry of a plan's block where it is placed.
NOTHING, FIRST_ENTRY, FIRST_CALL, NUMBER, REGION = range(5)

_pack = struct.Struct("8q").pack


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
    ahead: int | None = None  # as must those be that are read, which is known when they were
    windows: Windows | None = None  # of which each is a row

    @cached_property
    def kind(self) -> tuple[Hashable, ...]:
        """Equal for tensors that are copied alike, in one go."""
        form = self.row_dims, self.windows
        return self.leaf, self.type, form, self.bound, self.name, self.count == 1


@dataclass(eq=False)  # not frozen: a new structure makes many, and a frozen one takes longer
class OutputRows:
    """A returned tensor: rows at `slots` (+ the region's base where `owned`), in position order."""

    slots: I32
    owned: I32  # 1 in the request's region, 0 a constant's own slot
    type: int
    positions: tuple[int, ...]
    order: tuple[int, ...] | None  # permutation of (positions, row) to the tensor's dimensions
    contiguous: bool

    @cached_property
    def kind(self) -> tuple[int, tuple[int, ...] | None, tuple[int, ...] | None]:
        """Equal for tensors that are gathered and arranged alike; those of rows side by side may be
        of any length.
        """
        plain = self.order is None and len(self.positions) == 1
        return _kind(self.type, None if plain else self.positions, self.order)

    @cached_property
    def first(self) -> int:
        """Where the rows begin in the request's region, side by side; -1 where they are not so."""
        return int(self.slots[0]) if self.contiguous else -1


@lru_cache(maxsize=1 << 12)
def _kind(
    *form: int | tuple[int, ...] | None,
) -> tuple[int, tuple[int, ...] | None, tuple[int, ...] | None]:
    """Mostly one object for equal ones: many are compared."""
    return form  # type: ignore[return-value]


@dataclass(frozen=True)
class Places:
    """Where the rows of a forward that reads values are: arrays over its rows, in order."""

    types: I64
    slots: I64  # -1: nowhere
    owned: I64  # 1 in the request's region, 0 a constant's own slot
    calls: I64  # local numbers of the calls that make them; -1: none does
    when: I64  # by local call: first row of what it is part of


@dataclass(eq=False)  # nobody writes to it: see `OutputRows`
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
    places: Places | None = None
    events: I32 | None = None  # [E, 6], by call: see above
    nbytes: int = 0  # of a request's rows and block, once somebody asked

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @cached_property
    def rooms(self) -> I64:
        """Slots of each row type, as size classes (`cellc.regions`)."""
        return np.array([size_class(n) for n in self.num_slots], np.int64)

    @cached_property
    def pieces(self) -> Sequence[tuple[int, int]]:
        """Row types of which it has slots, and how many of each, as a size class."""
        return [(type, room) for type, room in enumerate(self.rooms.tolist()) if room]

    @cached_property
    def first_calls(self) -> tuple[Sequence[int], int]:
        """(`ready` as a list, the cell of all of those calls, or -1)."""
        cells = set(self.calls[self.ready, CELL].tolist())
        return self.ready.tolist(), cells.pop() if len(cells) == 1 else -1

    @property
    def block(self) -> tuple[I32, I32]:
        """Calls, records and successors (and events) as one array, and what to add to each entry:
        `_made_block`, made once: of two threads that make it, both keep the first one's, whose
        addresses were told.
        """
        known: tuple[I32, I32] | None = self.__dict__.get("_block")
        return known or self.__dict__.setdefault("_block", self._made_block())

    def _made_block(self) -> tuple[I32, I32]:
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
        events_at = successors_at + len(self.successors)
        events, events_added, first = self._event_entries(events_at)
        if len(first):
            calls[first[:, 0], EVENT] = first[:, 1]
            columns = np.tile(columns, (num_calls, 1))
            columns[first[:, 0], EVENT] = FIRST_ENTRY
        else:
            columns = np.tile(columns, num_calls)
        filler = np.zeros(-(events_at + len(events)) % NUM_COLUMNS, np.int32)
        entries = (calls.reshape(-1), records, self.successors, events, filler)
        added = (
            columns.reshape(-1),
            meaning[self.record_base],
            np.full(len(self.successors), FIRST_CALL),
            events_added,
            filler + NOTHING,
        )
        return np.concatenate(entries).astype(np.int32), np.concatenate(added).astype(np.int32)

    def _event_entries(self, at: int) -> tuple[I64, I64, I64]:
        """(entries, what to add to each, [call, where its entries begin]): for every call with
        events, how many, then EVENT_ENTRIES of each.
        """
        if self.events is None or not len(self.events):
            none = np.zeros(0, np.int64)
            return none, none, none.reshape(0, 2)
        entries: list[int] = []
        added: list[int] = []
        first: list[tuple[int, int]] = []
        for call, type, slot, owned, expected, number in self.events.tolist():
            if not first or first[-1][0] != call:
                first.append((call, at + len(entries)))
                entries.append(0)
                added.append(NOTHING)
            entries[first[-1][1] - at] += 1
            entries += [type, slot, expected, number]
            added += [NOTHING, REGION + type if owned else NOTHING, NOTHING, NOTHING]
        return np.array(entries), np.array(added), np.array(first)

    @cached_property
    def addresses(self) -> bytes:
        """Where its arrays begin, and how long they are, as int64: (calls, number, records, number,
        their bases, successors, number, row types); of a plan with events, which only its block
        has, (block, length, what to add, -1, ..).
        """
        if self.events is not None and len(self.events):
            block, added = self.block
            return _pack(block.ctypes.data, len(block), added.ctypes.data, -1, 0, 0, 0, 0)
        arrays = (self.calls, self.records, self.record_base, self.successors)
        calls, records, bases, successors = [a.ctypes.data for a in arrays]
        lengths = self.num_calls, len(self.records), len(self.successors), len(self.num_slots)
        return _pack(calls, lengths[0], records, lengths[1], bases, successors, *lengths[2:])

    @cached_property
    def num_rows(self) -> int:
        """Table rows that the block takes."""
        if self.events is not None and len(self.events):
            return len(self.block[0]) // NUM_COLUMNS
        return self.num_calls - (-(len(self.records) + len(self.successors)) // NUM_COLUMNS)

    @cached_property
    def table_room(self) -> int:
        """`num_rows` as a size class."""
        return size_class(self.num_rows)

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


def table_bytes(calls: Any, records: Any, successors: Any) -> Any:
    """Of so many calls, entries of records and successors: plans hold int32."""
    return 4 * (NUM_COLUMNS * calls + records + successors)


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
