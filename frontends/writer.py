"""Writing: what a forward does on stubs, as instances of segments.

Duty: number the rows of requests, cut what is done into segments, and keep the rows of constants.
`Writer` is the lowest layer of `frontends.unfold`: a call is first looked up, then repeated or run,
then written here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.utils import _pytree as pytree

from cellc.frontends.segments import SPARE, Op, Segment
from cellc.frontends.stub import Stack, Stub, StubType


class Writer:
    """Segments and their instances, of the requests that are being unfolded."""

    def __init__(self) -> None:
        self.roots: dict[int, Segment] = {}
        self.used: list[Segment] = []  # segments that have instances
        self.constants: dict[int, Hashable] = {}  # by row number, from -2 down
        self._constant_rows: dict[Hashable, int] = {}
        self._escaping: dict[Hashable, set[int]] = {}
        self.next_row = 0
        self.tracked: list[Stub] | None = None  # stubs made, where somebody wants to know
        self._start()

    def _start(self) -> None:
        self._events: list[Any] = []  # instances and replays of this request
        self._frame: Any = None
        self._segment: Segment | None = None
        self._component = self._loop = -1
        self._external: dict[int, int] = {}  # slots of the segment's inputs, by row
        self._reads: list[int] = []  # and their rows
        self._first = self._offset = 0

    def reset(self) -> None:
        """Forget instances; keep what was learned."""
        for segment in self.used:
            segment.clear()
        self.used.clear()
        self.next_row = 0
        self._start()

    def _record(self, op: Op, rows: list[int], frame: Any) -> Any:
        segment = self._segment
        at = self.next_row
        if (
            segment is None
            or frame is not self._frame
            or (op.component != self._component and op.component and not self._leads(segment))
            or op.loop != self._loop
            or op.offset < self._offset  # a loop went round
            or op in segment.members
            or (op.is_cell and segment.has_cell and op.component)
        ):
            if segment is not None:
                self._cut()
            self._frame, self._component, self._loop = frame, op.component, op.loop
            self._first = at
            external = self._external = dict(zip(rows, range(len(rows))))  # noqa: B905
            if op.alone is not None and (op.is_cell or len(external) == len(rows)):
                self._reads = rows
                following = op.alone
            else:
                external.clear()
                self._reads = []
                root = self.roots.setdefault(op.component, Segment(None, None, ()))
                following = self._following(root, op, self._wire(op, rows))
                if len(self._reads) == len(rows):
                    op.alone = following
        else:
            wiring = self._wire(op, rows)
            following = segment.next.get((op, *wiring)) or self._following(segment, op, wiring)
            self._component = self._component or op.component
        self._segment, self._offset = following, op.offset
        self.next_row = at + op.num_rows
        single = op.single
        made = Stub(at, single) if single is not None else op.build(at)
        if self.tracked is not None:
            self._track(made)
        return made

    def _track(self, made: Any) -> None:
        for x in pytree.tree_leaves(made):
            kind = type(x)
            if kind is Stub or kind is Stack:
                self.tracked += [x] if kind is Stub else x.items  # type: ignore[operator]

    def _leads(self, segment: Segment) -> bool:
        """May a recurrent cell begin with this? Look-ups may: their tables are folded into it."""
        return self._component == 0 and segment.moves

    def _wire(self, op: Op, rows: list[int]) -> list[int]:
        """Where an operation's rows come from: a row of the segment, or ~(input of the segment).

        A constant is an input of its own at each use, and so is every argument of a cell: whether
        two are the same row is chance.
        """
        external, reads, first = self._external, self._reads, self._first
        wiring = []
        for row in rows:
            if first <= row < SPARE:
                wiring.append(row - first)
                continue
            slot = None if op.is_cell or row < 0 else external.get(row)
            if slot is None:
                slot = len(reads)
                reads.append(row)
                external.setdefault(row, slot)
            wiring.append(~slot)
        return wiring

    def _following(self, segment: Segment, op: Op, wiring: list[int]) -> Segment:
        key = (op, *wiring)
        following = segment.next.get(key)
        if following is None:
            following = segment.next[key] = Segment(segment, op, tuple(wiring))
            following.escaping = self._escaping_of(following)
        following.used = self.used
        return following

    def _escaping_of(self, segment: Segment) -> set[int]:
        """Outputs that are read elsewhere, shared by segments at the same places of the code; what
        a cell returns is, as a rule.
        """
        place = (segment.sites, *[len(op.study.outputs) for op in segment.ops])
        known = self._escaping.get(place)
        if known is None:
            known = self._escaping[place] = set()
            at = 0
            for op in segment.ops:
                count = len(op.study.outputs)
                known.update(range(at, at + count) if op.is_cell else ())
                at += count
        return known

    def _cut(self) -> None:
        """End the segment that is being recorded."""
        segment = self._segment
        if segment is not None:
            if not (segment.made or segment.more_made):
                self.used.append(segment)
            self._events.append((segment, len(segment.made)))
            segment.reads += self._reads
            segment.made.append(self._first)
            self._segment = None

    def _constant(self, op: Op) -> Any:
        """The result of an operation that depends on nothing: rows with numbers below zero."""
        made: list[Stub] = []
        keys = iter(op.study.constant or ())
        for type, count in op.study.outputs:
            inner = StubType.of(type.shape[1:], type.dtype, type.device) if count >= 0 else type
            items = [
                Stub(self._constant_row(next(keys), inner), inner) for _ in range(max(1, count))
            ]
            made.append(items[0] if count < 0 else Stack(items))
        return op.filled(made)

    def _constant_row(self, key: Hashable, type: StubType) -> int:
        row = self._constant_rows.get((key, type))
        if row is None:
            row = self._constant_rows[key, type] = -2 - len(self._constant_rows)
            self.constants[row] = key
        return row
