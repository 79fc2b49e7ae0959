"""The scheduler's arithmetic in C++.

Duty: `cellc.arithmetic.Arithmetic` by a library that is compiled once a machine (`native.cpp`);
where there is no compiler, numpy does the same. Used by the engine.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cellc.arithmetic import I32, I64, Advanced, Arithmetic, Numpy
from cellc.arranging import Arranged, Wiring
from cellc.errors import BackendError
from cellc.kernels import cpp_build
from cellc.kernels.address import address, brief
from cellc.plan import NUM_COLUMNS, Plan, record_length
from cellc.rows import RaggedRefs

_NO_LIMIT = 1 << 40
USUAL_NODES = 1 << 10  # of a tree, or fewer
_pack = struct.Struct("11q").pack


@lru_cache
def find_arithmetic() -> Arithmetic:
    """The fastest that this machine has."""
    if cpp_build.find_compiler() is None:
        return Numpy()
    try:
        return Native()
    except (BackendError, OSError):
        return Numpy()


def found_arithmetic() -> Arithmetic:
    """The same where somebody asked for it already, numpy before that."""
    return find_arithmetic() if find_arithmetic.cache_info().currsize else _numpy


_numpy = Numpy()


class Native:
    """See the module."""

    def __init__(self) -> None:
        library = cpp_build.load_own("native")
        pointer, number, given = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
        of = partial(brief, library)
        self._expand = of("cellc_expand", None, pointer, pointer, number, number, pointer)
        self._advance = of("cellc_advance", None, given, pointer)
        self._look = of("cellc_look", None, given)
        self._place = of("cellc_place", None, pointer, number, pointer, given, pointer, number)
        self._unlike = of("cellc_unlike", number, pointer, pointer, number, pointer, pointer)
        self._tree = of("cellc_tree", number, given, number, number, pointer)
        self._arrange, self._copy = library.cellc_arrange, library.cellc_copy
        self._arrange.argtypes, self._arrange.restype = [pointer, pointer], number
        self._copy.argtypes, self._copy.restype = [pointer, number], None
        self._room = threading.local()  # for what `tree` finds

    def place(self, table: I32, plans: Sequence[Plan], first_calls: I64, added: I32) -> None:
        firsts = np.ascontiguousarray(first_calls, np.int64)
        addresses = b"".join([plan.addresses for plan in plans])
        where = address(table), len(plans), address(firsts), addresses, address(added)
        self._place(*where, added.shape[1])

    def advance(
        self, table: I32, left: I64, heads: I64, max_steps: int | None, length: int
    ) -> Advanced:
        found = (ctypes.c_int64 * 4)()
        heads = np.ascontiguousarray(heads, np.int64)
        place = address(table)
        limit = _NO_LIMIT if max_steps is None else max_steps
        self._expand(place, address(heads), len(heads), limit, found)
        rows, num_steps, woken, _ = found
        longs = np.empty(2 * rows + woken, np.int64)
        ints = np.empty((length + 2) * rows + num_steps + 1, np.int32)
        calls, finished, ready = longs[:rows], longs[rows : 2 * rows], longs[2 * rows :]
        slots = ints[: length * rows].reshape(length, rows)
        events = ints[length * rows : (length + 1) * rows]
        answering = ints[(length + 1) * rows : (length + 2) * rows]
        steps = ints[(length + 2) * rows :]
        long, int_ = address(longs), address(ints)
        self._advance(
            _pack(
                place,
                address(left),
                length,
                rows,
                long,
                int_ + 4 * (length + 2) * rows,
                int_,
                long + 16 * rows,
                long + 8 * rows,
                int_ + 4 * length * rows,
                int_ + 4 * (length + 1) * rows,
            ),
            found,
        )
        num_ready, num_finished, num_events, cell = found
        return Advanced(
            calls,
            steps,
            slots,
            ready[:num_ready],
            cell,
            finished[:num_finished].tolist(),
            events[:num_events],
            answering[:num_events],
        )

    def look(
        self, table: I32, heads: I64, max_steps: int | None, length: int
    ) -> tuple[I64, I32, I32]:
        found = (ctypes.c_int64 * 3)()
        heads = np.ascontiguousarray(heads, np.int64)
        place, limit = address(table), _NO_LIMIT if max_steps is None else max_steps
        self._expand(place, address(heads), len(heads), limit, found)
        rows, num_steps, _ = found
        calls, steps = np.empty(rows, np.int64), np.empty(num_steps + 1, np.int32)
        slots = np.empty((length, rows), np.int32)
        made = address(calls), address(steps), address(slots)
        self._look(_pack(place, 0, length, rows, *made, 0, 0, 0, 0))
        return calls, steps, slots

    def unlike(self, table: I32, events: I32, places: I64) -> I64:
        count = len(events)
        found = np.empty(count, np.int64)
        where = address(table), address(events), count, address(places), address(found)
        return found[: self._unlike(*where)]

    def copy(self, pieces: I64) -> None:
        self._copy(np.ascontiguousarray(pieces).ctypes.data, len(pieces))

    def arrange(self, wiring: Wiring) -> Arranged:
        requests, total = wiring.taken.shape[1], sum(g.num_calls for g in wiring.groups)
        groups, kept, entries, edges = _groups(wiring)
        ints = np.empty(2 * entries + edges + total, np.int32)
        longs = np.empty(4 * (requests + 1), np.int64)
        table = np.zeros((total, NUM_COLUMNS), np.int32)
        producer = np.empty(len(wiring.reads), np.int64)
        depths = np.zeros(len(wiring.groups), np.int64)
        records, bases, told, ready = np.split(ints, [entries, 2 * entries, 2 * entries + edges])
        starts = longs.reshape(4, requests + 1)
        given = np.array(
            [
                *(len(wiring.groups), requests, len(wiring.reads), len(wiring.taken), wiring.keeps),
                groups.ctypes.data,
                *_addresses([wiring.reads, wiring.types, wiring.slots, wiring.owned, wiring.taken]),
            ],
            np.int64,
        )
        arrays = [table, records, bases, told, ready, *starts, producer, depths]
        out = np.array(_addresses(arrays), np.int64)
        seen = self._arrange(given.ctypes.data, out.ctypes.data)
        del kept
        told, ready = told[: starts[2, -1]], ready[: starts[3, -1]]
        calls_at, records_at, told_at, ready_at = starts
        return Arranged(
            *(table, records, bases, told, ready),
            *(calls_at, records_at, told_at, ready_at),
            *(producer, depths, seen),
        )

    def tree(self, children: I64) -> tuple[I64, I64, I64, int] | None:
        n, width = children.shape
        if n == 0:
            return None
        if n > USUAL_NODES:
            out = np.empty(3 * n - 1, np.int64)
            root = self._tree(children.tobytes(), n, width, out.ctypes.data)
        else:  # looking up an address takes as long as a usual tree
            room = self._room.__dict__
            if not room:
                room["array"] = array = np.empty(3 * USUAL_NODES, np.int64)
                room["address"] = array.ctypes.data
            root = self._tree(children.tobytes(), n, width, room["address"])
            out = room["array"][: 3 * n - 1].copy()
        return None if root < 0 else (out[:n], out[n : 2 * n], out[2 * n :], root)


def _groups(wiring: Wiring) -> tuple[I64, list[I64], int, int]:
    """(the groups as `struct Group`, arrays that have to live meanwhile, entries of all records,
    reads of all calls).
    """
    kept: list[I64] = []
    entries = edges = 0
    rows: list[int] = []

    def address(array: I64) -> int:
        kept.append(np.ascontiguousarray(array, np.int64))
        return kept[-1].ctypes.data

    for group, owners, types in zip(wiring.groups, wiring.owners, wiring.output_types, strict=True):
        columns: list[int] = []
        for column in group.inputs:
            if isinstance(column, RaggedRefs):
                columns += address(column.refs), address(column.offsets)
                entries += len(column.refs)
            else:
                columns += address(column), 0
            edges += len(kept[-2].reshape(-1) if columns[-1] else kept[-1])
        made = [address(values) for values in group.outputs]
        length = record_length(group.cell)
        entries += length * group.num_calls
        rows += group.num_calls, len(group.inputs), len(group.outputs), length, address(owners)
        rows += [address(np.array(numbers, np.int64)) for numbers in (columns, made, types)]
    return np.array(rows, np.int64), kept, entries, edges


def _addresses(arrays: Sequence[npt.NDArray[Any]]) -> list[int]:
    assert all(array.flags.c_contiguous for array in arrays)
    return [array.ctypes.data for array in arrays]
