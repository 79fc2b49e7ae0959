"""Repeats: calls whose doing is known, copied instead of run.

Duty: parts of a request's structure that are alike (`frontends.memo`), and the nodes of trees and
DAGs given as arrays (`frontends.fold`). Both are learned by observing one run, and written by numpy
when a batch of requests is through. Stands between `frontends.writer` and `frontends.asking`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from cellc.frontends import fold as folds
from cellc.frontends.callees import Callee
from cellc.frontends.memo import (
    MAX_INSTANCES,
    MAX_MEMOS,
    Bases,
    Instance,
    Memo,
    Outside,
    Relative,
)
from cellc.frontends.segments import SPARE
from cellc.frontends.stub import FloatNumber, IntNumber, Stub
from cellc.frontends.stubbing import Part
from cellc.frontends.writer import Writer

COMPARED = 24  # repetitions of a method that run all the same
LOOKED_INTO = 256  # calls of a method looked into for rows that leave it unseen
MAX_LEAVES = 8  # of a part that is kept: larger ones seldom repeat


class Repeats(Writer):
    """A writer that copies what repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.writing = False  # was a write in place ever seen: then memory is looked after
        self.relearn = False  # something was learned that earlier runs did not know
        self.parts: dict[int, Part] = {}  # what the request is made of, by id
        self.data: tuple[int, int, int, int] = (0, 0, 0, 0)  # first int, float, tensor row; end
        self.memos: dict[Any, Memo] = {}
        self.repeating = True  # a request's parts do not change while it runs
        self.spans: list[tuple[Callee, int, int, list[int]]] = []  # calls to look into
        self.sites: dict[Hashable, folds.Site] = {}
        self.folding: set[Hashable] = set()  # sites with calls that are not written yet
        self.take_apart: set[int] = set()  # rows of tensors that are needed as lists of rows
        self._spare = SPARE
        self._thread = 0

    def num_decided(self) -> int:
        """How often the run asked for a value, drew or yielded so far."""
        return 0

    def reset(self) -> None:
        super().reset()
        for memo in self.memos.values():
            memo.replays.clear()
        for site in self.sites.values():
            site.folds = []
        self.folding.clear()
        self.spans = []
        self._spare = SPARE

    def _body(self, callee: Callee, args: Any, kwargs: Any) -> Any:
        """Run a call's body, or copy what it did on a part of the same shape."""
        if kwargs or not callee.repeats or not self.repeating:
            return callee.run(*args, **kwargs)
        key: list[Any] = [callee]
        bases: tuple[int, ...] | None = None
        for x in args:
            kind = type(x)
            part = self.parts.get(id(x))
            if part is not None:
                if (
                    part[0] < 0
                    or bases is not None
                    or part[4] - part[1] + part[6] - part[3] > MAX_LEAVES
                ):
                    return callee.run(*args)
                bases = part[1:]
                key.append(part[0])
            elif kind is IntNumber and bases is None:
                bases = (x.row, 0, 0, x.row + 1, 0, 0)
                key.append(IntNumber)
            elif kind is FloatNumber and bases is None:
                bases = (0, x.row, 0, 0, x.row + 1, 0)
                key.append(FloatNumber)
            elif kind is Stub and bases is None and self.data[2] <= x.id < self.data[3]:
                bases = (0, 0, x.id, 0, 0, x.id + 1)
                key.append(x.type)
            elif kind in (int, bool, str, type(None)):
                key.append((kind, x))
            else:
                return callee.run(*args)
        if bases is None:
            return callee.run(*args)
        name = tuple(key)
        memo = self.memos.get(name)
        if memo is None or (memo.repeated == 0 and callee.compared < COMPARED):
            return self._observed(callee, args, name, memo, bases)
        self._cut()
        at = self.next_row
        self.next_row = at + memo.rows
        ints, floats, tensors = bases[0], bases[1], bases[2]
        memo.replays += (at, ints, floats, tensors)
        self._events.append((memo, at, ints, floats, tensors))
        return memo.build((0, at, ints, floats, tensors))

    def _observed(
        self, callee: Callee, args: Any, name: Any, known: Memo | None, bases: tuple[int, ...]
    ) -> Any:
        """Run a call's body, and keep what it did."""
        self._cut()
        first_event, start = len(self._events), self.next_row
        before = self.num_decided()
        result = callee.run(*args)
        self._cut()
        if self.num_decided() != before:  # another time it may go elsewhere
            self.distrust(callee)
            return result
        if self._events and len(self._events) - first_event > MAX_INSTANCES:
            return result
        relative = Relative(Bases(*bases), self.data, start)
        instances: list[Instance] = []
        try:
            for event in self._events[first_event:]:
                if type(event[0]) is Memo:
                    instances += [relative.moved(i, *event[1:]) for i in event[0].instances]
                else:
                    segment, index = event
                    width = segment.num_external
                    rows = segment.reads[index * width : (index + 1) * width]
                    reads = tuple([relative.row(r) for r in rows])
                    instances.append(Instance(segment, reads, segment.made[index] - start))
            memo = Memo(instances, self.next_row - start, relative.result(result))
        except Outside:
            return result
        if len(instances) > MAX_INSTANCES:
            return result
        if known is None:
            if len(self.memos) >= MAX_MEMOS:
                self.memos.clear()
            self.memos[name] = memo
            if callee.looked_into < LOOKED_INTO:
                callee.looked_into += 1
                leaves = [x.id for x in pytree.tree_leaves(result) if type(x) is Stub]
                self.spans.append((callee, start, self.next_row, leaves))
        elif known.same(memo):
            known.repeated += 1
            callee.compared += 1
        else:
            self.distrust(callee)
        return result

    # -- folds over arrays --

    def fold(self, structure: Any, node: Any, leaf: Any, nodes: Any, leaves: Any) -> Any:
        """[states of the results] of `cellc.Dag.fold`; None where its calls have to be run."""
        if not self.on or self.writing or self._thread != threading.get_ident():
            return None
        states = folds.fold(self, self.sites, structure, node, leaf, nodes, leaves)
        return None if states is None else [states]

    def spare_row(self) -> int:
        """A row that stands for an argument while a function is observed."""
        self._spare += 1
        return self._spare

    def observe(self, run: Callable[[], Any]) -> Any:
        """([(segment, reads, first row)], first row made, rows made, result) of a call that leaves
        no trace; None where it cannot be alone.
        """
        self._cut()
        first_event, start = len(self._events), self.next_row
        try:
            result = run()
        finally:
            self._cut()
            events = self._taken_back(first_event)
            rows, self.next_row = self.next_row - start, start
        return None if events is None else (events, start, rows, result)

    def _taken_back(self, first_event: int) -> list[Any] | None:
        """Forget what was written since an event; None where that copied a memo."""
        events = []
        plain = True
        for event in reversed(self._events[first_event:]):
            if type(event[0]) is Memo:
                del event[0].replays[-4:]
                plain = False
                continue
            segment, _ = event
            width = segment.num_external
            reads = segment.reads[len(segment.reads) - width :]
            del segment.reads[len(segment.reads) - width :]
            events.append((segment, reads, segment.made.pop()))
            if not (segment.made or segment.more_made):
                self.used.remove(segment)
        del self._events[first_event:]
        return events[::-1] if plain else None

    def distrust(self, callee: Callee) -> None:
        """A method whose calls do not depend on their arguments alone: its body always runs."""
        callee.repeats = False
        self.relearn = True
        self.memos = {k: m for k, m in self.memos.items() if k[0] is not callee}

    def expand(self) -> None:
        """Write what was replayed."""
        for memo in self.memos.values():
            if memo.replays:
                memo.expand()
        for key in self.folding:
            self.sites[key].expand()
        self.folding.clear()

    def leaks(self) -> bool:
        """Do rows leave a call by another way than its result? Then its body always runs."""
        if not self.spans:
            return False
        until = np.full(self.next_row, self.next_row + 1, np.int64)
        whose = np.full(self.next_row, -1, np.int64)
        for k, (_, start, end, results) in enumerate(self.spans):
            results = [row for row in results if row >= start]
            kept = until[results], whose[results]
            rows = np.arange(start, end)[until[start:end] > end]
            until[rows], whose[rows] = end, k
            until[results], whose[results] = kept
        found = set()
        for segment in self.used:
            reads, made = segment.instances()
            late = (reads >= 0) & (until[np.maximum(reads, 0)] <= made[:, None])
            found.update(whose[reads[late]].tolist())
        for k in found:
            self.distrust(self.spans[k][0])
        return bool(found)
