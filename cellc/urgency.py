"""Urgency: until when a call can wait, so that its request ends in time, and who cannot make it.

Duty: for every call of a plan, its *way*: the seconds from it to the end of its request, if that
runs alone: the longest way through the calls that follow, each at what its cell costs at one row.
From that and a request's deadline the latest start of a call; and, from what steps cost at the rows
that there are now (curves of `cellc.costs`, or the engine's own measurements), how many times as
long ways take. Pure; used by `cellc.scheduler` under policies with deadlines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from cellc.plan import CELL, CHAIN, EDGES, MISSING, NUM_SUCCESSORS, SUCCESSOR, Plan

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

HEAD_START = 1e6  # seconds that a step of priority is worth: more than any deadline
DISTANT = 1e5  # seconds from now: when requests without a deadline are due, in order of arrival
MARGIN = 1.5  # of the time that others take: docs/policies.md has what others gave
KNOWN = 0.8  # of a cost: one below that is worth looking at plans again
SMOOTH = 16  # launches that weigh in what ways are made of

Seconds = Callable[[int, int], float]  # of one step of a cell at a number of rows


class Wish(NamedTuple):
    """When a request is due, by the scheduler's clock (infinite: whenever), and its priority."""

    due: float = math.inf
    priority: int = 0


NO_WISH = Wish()


class Waiting(NamedTuple):
    """Requests that wait to be admitted: what they need alone, and when they came."""

    due: F64
    priority: I64
    needs: F64
    arrived: F64


class Urgency:
    """See the module; `now` is the time of the turn."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds, self.now = seconds, 0.0
        self.rank: F64 = np.zeros(0)  # by row of the scheduler's table: less is more urgent
        self._due: F64 = np.zeros(0)  # by row
        self._ways_of: F64 = np.zeros(0)  # by row
        self._ways: WeakKeyDictionary[Plan, F64] = WeakKeyDictionary()
        self._least: dict[int, float] = {}  # seconds of a step of one row, by cell
        self._mix: dict[int, float] = {}  # what ways are made of, by cell: as launches were

    def place(self, plans: Sequence[Plan], firsts: Iterable[int], wishes: Sequence[Wish]) -> None:
        """Note calls that are placed in rows of the table, from its plan's first row on each."""
        for plan, first, (due, priority) in zip(plans, firsts, wishes, strict=True):
            end = first + plan.num_calls
            self._reserve(end)
            ways = self.ways(plan)
            self._due[first:end], self._ways_of[first:end] = due, ways
            start = min(due, self.now + DISTANT) - ways
            self.rank[first:end] = start - priority * HEAD_START

    def _reserve(self, size: int) -> None:
        if size > len(self.rank):
            room = np.zeros(max(8192, size, len(self.rank)))
            self.rank, self._due = np.append(self.rank, room), np.append(self._due, room)
            self._ways_of = np.append(self._ways_of, room)

    def late(self, ready: Sequence[tuple[int, I64]]) -> I64:
        """Of ready calls, by cell, those that cannot end in time: as few as need be so that the
        others can.
        """
        calls = np.concatenate([some for _, some in ready])
        spare = (self._due[calls] - self.now) / self._ways_of[calls]
        least = float(spare.min())
        none: I64 = calls[:0]
        if least == math.inf:
            return none
        sizes: dict[int, int] = {}
        for cell, some in ready:
            sizes[cell] = sizes.get(cell, 0) + len(some)
        if self.stretch(sizes, 1.0) <= least:
            return none
        order = np.argsort(-spare, kind="stable")
        make_it, too_many = 0, len(calls)
        while too_many - make_it > 1:
            kept = (make_it + too_many) // 2
            if self.stretch(sizes, kept / len(calls)) <= spare[order[kept - 1]]:
                make_it = kept
            else:
                too_many = kept
        late: I64 = calls[order[make_it:]]
        return late

    def stretch(self, sizes: Mapping[int, int], share: float) -> float:
        """How many times as long as alone a way takes beside a share of what is ready now, with a
        MARGIN for those that come later.
        """
        total = stretched = 0.0
        for cell, weight in self._mix.items():
            total += weight
            rows = max(1, round(sizes.get(cell, 0) * share))
            stretched += weight * self.seconds(cell, rows) / self.least(cell)
        return 1.0 + MARGIN * max(0.0, stretched / total - 1.0) if total else 1.0

    def ran(self, cell: int, steps: int) -> None:
        """A launch took so many steps; what a step of one row costs may be better known by now."""
        if self.seconds(cell, 1) < KNOWN * self.least(cell):
            self._least.clear()
            self._ways.clear()
        for other in self._mix:
            self._mix[other] *= 1 - 1 / SMOOTH
        self._mix[cell] = self._mix.get(cell, 0.0) + steps * self.least(cell)

    def triage(self, waiting: Waiting, stretch: float, room: int) -> tuple[I64, I64]:
        """(which of the requests that wait to be admitted are next, which cannot end in time).

        Where there is no room for all: the oldest, so that none waits for ever; those of higher
        priority; of the others those with the most time to spare, since who is admitted with none
        is soon shed; then, in order of arrival, those without a deadline.
        """
        left, needs = waiting.due - self.now, waiting.needs
        late = left < needs * stretch
        fit = np.flatnonzero(~late)
        if len(fit) > room:
            left, spare = left[fit], left[fit] - needs[fit]
            timed = np.isfinite(left)
            arrived, priority = waiting.arrived[fit], waiting.priority[fit]
            order = np.lexsort((arrived, np.where(timed, -spare, 0.0), ~timed, -priority))
            oldest = int(arrived.argmin())
            fit = fit[[oldest, *order[order != oldest][: room - 1]]]
        return fit, np.flatnonzero(late)

    def needs(self, plan: Plan) -> float:
        """Seconds from the start of a request to its end, alone."""
        ways = self.ways(plan)
        return float(ways.max()) if len(ways) else 0.0

    def least(self, cell: int) -> float:
        known = self._least.get(cell)
        if known is None:
            known = self._least[cell] = self.seconds(cell, 1)
        return known

    def ways(self, plan: Plan) -> F64:
        """Seconds from the start of each call to the end of what follows it, alone."""
        known = self._ways.get(plan)
        if known is None:
            known = self._ways[plan] = longest_ways(plan, self.least)
        return known


def longest_ways(plan: Plan, seconds: Callable[[int], float]) -> F64:
    """For every call: the most seconds that calls one after the other take, from it on."""
    rows, successors = plan.calls.tolist(), plan.successors.tolist()
    costs = {cell: seconds(cell) for cell in plan.cells}
    missing = [row[MISSING] for row in rows]
    order = plan.ready.tolist()
    followers: list[list[int]] = []
    for call in order:  # grows
        row = rows[call]
        after = successors[row[SUCCESSOR] : row[SUCCESSOR] + row[NUM_SUCCESSORS]]
        for other in after:
            missing[other] -= 1
            if not missing[other]:
                order.append(other)
        if row[CHAIN] > 1:
            after.append(call + 1)
            missing[call + 1] -= rows[call + 1][EDGES]
            if not missing[call + 1]:
                order.append(call + 1)
        followers.append(after)
    ways = [0.0] * len(rows)
    for call, after in zip(reversed(order), reversed(followers), strict=True):
        ways[call] = costs[rows[call][CELL]] + max([ways[other] for other in after], default=0.0)
    return np.array(ways)
