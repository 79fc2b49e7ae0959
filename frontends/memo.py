"""Memo: what a recursion does on a part of a request, kept for other parts of that shape.

Duty: when a method of the model is called with one part of a request's structure and nothing else
of the request, what it records depends on that part's shape alone: the same segments, reading the
part's own rows and rows made inside. The second part of that shape is a copy with other rows,
written by numpy after the run; its Python does not run. Comes in from `frontends.unfold`.

What a method does besides returning (an attribute it sets, a list it appends to) would be missed.
So the first repetitions run all the same and are compared, and a row that leaves a call by another
way than its result ends the use of the memo for that method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils import _pytree as pytree

from cellc.frontends.segments import Segment
from cellc.frontends.stub import Stub

MAX_INSTANCES = 48  # of segments in one memo; larger parts seldom repeat
MAX_MEMOS = 1 << 16
CONSTANT, MADE, INTS, FLOATS, TENSORS = range(5)  # what a row is counted from

Row = tuple[int, int]  # (what it is counted from, offset)
I64 = npt.NDArray[np.int64]


class Bases(NamedTuple):
    """Where a part's rows begin, and the end of each kind."""

    ints: int
    floats: int
    tensors: int
    ints_end: int
    floats_end: int
    tensors_end: int


class Outside(Exception):
    """A row that belongs neither to the part nor to what was made in the call."""


class Instance(NamedTuple):
    """One instance of a segment, rows relative to the call's part and first made row."""

    segment: Segment
    reads: tuple[Row, ...]
    first: int


class Memo:
    """What one method does on parts of one shape."""

    __slots__ = ("arrays", "build", "instances", "repeated", "replays", "result", "rows")

    def __init__(self, instances: list[Instance], rows: int, result: Any) -> None:
        self.instances, self.rows, self.result = instances, rows, result
        self.repeated = 0  # how often a repetition was run and found the same
        self.replays: list[int] = []  # (made, ints, floats, tensors) bases of each
        self.arrays: list[tuple[Segment, I64, I64, I64]] | None = None
        self.build = builder(result)

    def same(self, other: Memo) -> bool:
        return (
            self.rows == other.rows
            and self.instances == other.instances
            and self.result == other.result
        )

    def expand(self) -> None:
        """Write its replays into the segments, and forget them."""
        count = len(self.replays) // 4
        if count * len(self.instances) <= 24:
            for k in range(count):
                bases = (0, *self.replays[4 * k : 4 * k + 4])
                for segment, reads, first in self.instances:
                    segment.use()
                    segment.reads += [bases[base] + offset for base, offset in reads]
                    segment.made.append(bases[MADE] + first)
        else:
            table = np.zeros((count, 5), np.int64)
            table[:, 1:] = np.array(self.replays).reshape(count, 4)
            for segment, kinds, offsets, firsts in self._arrays():
                segment.use()
                segment.more_reads.append((table[:, kinds] + offsets).reshape(-1))
                segment.more_made.append((table[:, MADE, None] + firsts).reshape(-1))
        self.replays = []

    def _arrays(self) -> list[tuple[Segment, I64, I64, I64]]:
        if self.arrays is None:
            by_segment: dict[Segment, list[Instance]] = {}
            for one in self.instances:
                by_segment.setdefault(one.segment, []).append(one)
            self.arrays = []
            for segment, members in by_segment.items():
                rows = [r for one in members for r in one.reads]
                both = np.array(rows, np.int64).reshape(-1, 2)
                firsts = np.array([one.first for one in members], np.int64)
                self.arrays.append((segment, both[:, 0], both[:, 1], firsts))
        return self.arrays


class Relative:
    """Rows of one call, as seen from its part and from its first made row."""

    def __init__(self, bases: Bases, data: tuple[int, int, int, int], start: int) -> None:
        self.bases, self.start = bases, start
        self.floats_from, self.tensors_from, self.data_end = data[1:]

    def row(self, row: int) -> Row:
        """Raises Outside."""
        if row >= self.start:
            return MADE, row - self.start
        if row < 0:
            return CONSTANT, row
        b = self.bases
        if row < self.data_end:
            if row >= self.tensors_from:
                if b.tensors <= row < b.tensors_end:
                    return TENSORS, row - b.tensors
            elif row >= self.floats_from:
                if b.floats <= row < b.floats_end:
                    return FLOATS, row - b.floats
            elif b.ints <= row < b.ints_end:
                return INTS, row - b.ints
        raise Outside

    def moved(
        self, instance: Instance, made: int, ints: int, floats: int, tensors: int
    ) -> Instance:
        """An instance of a memo replayed inside this call."""
        b = self.bases
        shift = (0, made - self.start, ints - b.ints, floats - b.floats, tensors - b.tensors)
        reads = tuple([(k, offset + shift[k]) for k, offset in instance.reads])
        return Instance(instance.segment, reads, instance.first + shift[MADE])

    def result(self, result: Any) -> Any:
        """A call's result with its stubs as (type, row)s."""
        leaves, spec = pytree.tree_flatten(result)
        out: list[tuple[Any, Any]] = []
        for leaf in leaves:
            if type(leaf) is Stub:
                out.append((leaf.type, self.row(leaf.id)))
            elif isinstance(leaf, (int, float, bool, str, type(None))) and type(leaf) in _PLAIN:
                out.append((None, leaf))
            else:
                raise Outside
        return spec, tuple(out)


_PLAIN = (int, float, bool, str, type(None))
_LEAF = pytree.tree_structure(0)
_PAIR = pytree.tree_structure((0, 0))


def builder(result: Any) -> Callable[[Sequence[int]], Any]:
    """What makes a replay's result from its (0, made, ints, floats, tensors) bases."""
    spec, leaves = result
    made = all(kind is not None and row[0] == MADE for kind, row in leaves)
    if made and spec == _LEAF:
        ((kind, (_, offset)),) = leaves
        return lambda bases: Stub(bases[1] + offset, kind)
    if made and spec == _PAIR:
        (first, (_, a)), (second, (_, b)) = leaves
        return lambda bases: (Stub(bases[1] + a, first), Stub(bases[1] + b, second))

    def build(bases: Sequence[int]) -> Any:
        items = [
            row if kind is None else Stub(bases[row[0]] + row[1], kind) for kind, row in leaves
        ]
        return items[0] if spec == _LEAF else pytree.tree_unflatten(items, spec)

    return build
