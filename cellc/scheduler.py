"""The scheduler: which cell runs next, on which calls, for how many steps.

Duty: hold every live request's calls as flat arrays, and decide launches. Pure: no torch, no
threads, no clock of its own; numpy in, numpy out. The engine admits requests with `add`, asks
`next` for launches and runs them in order. What that means for the arrays is `cellc.arithmetic`.

A call's successors are told at once when it is scheduled, before its kernel has run: one worker
runs launches first in, first out. But where requests are answered by what a launch computes, and it
runs beside the host's work (`note_running`), what follows waits for `note_ran`: it may be in vain.
Requests of a launch go nowhere else before it is read (`note_read`): it is known by the table.

Which cell goes first is a policy's choice (`cellc.policies`), which calls of it a queue's
(`cellc.queues`). Under any policy a call that has been ready for `max_age` turns (admissions and
launches) goes first, the oldest of those before the others: nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellc.arithmetic import SCHEDULED, Arithmetic, Numpy
from cellc.errors import PolicyError
from cellc.plan import (
    CELL,
    FIRST_CALL,
    FIRST_ENTRY,
    MISSING,
    NUM_COLUMNS,
    NUMBER,
    REGION,
    REQUEST,
    Plan,
)
from cellc.policies import MAX_AGE, Policy, Turn, make_policy, takes_deadlines
from cellc.queues import Queue, UrgentQueue
from cellc.regions import FEW, Flat
from cellc.urgency import NO_WISH, Seconds, Urgency, Wish

I32 = npt.NDArray[np.int32]
ADDED_TOGETHER = 256  # requests: bounds the memory that admission takes for itself
GUESS = 1e-4  # seconds of a step, where nobody knows
_NO_CALLS, _NO_EVENTS = np.zeros(0, np.int64), np.zeros(0, np.int32)


@dataclass(frozen=True)
class Batch:
    """One launch: calls of one cell in steps, and the requests that it ends."""

    cell: int
    calls: npt.NDArray[np.int64]  # global call numbers, step by step
    steps: I32  # [K + 1] offsets into calls
    table: I32  # [record length, N] slots: inputs, then outputs
    finished: Sequence[int]  # requests whose last call is in this launch
    events: I32  # entries where events of its calls begin
    answering: I32  # the request of each of these calls
    held: npt.NDArray[np.int64]  # calls made ready, which wait for `note_ran`
    held_cell: int = -1  # theirs, where they are of one


class Scheduler:
    """See the module. `record_lengths` and `priority` are looked up by cell number and may grow.
    `seconds(cell, num_rows)`: of a step, for policies with deadlines.
    """

    def __init__(
        self,
        *,
        max_batch: int = 512,
        policy: str | Policy = "cellular",
        arithmetic: Arithmetic | None = None,
        max_age: int = MAX_AGE,
        seconds: Seconds = lambda cell, num_rows: GUESS,
    ) -> None:
        self.max_age, self._arithmetic = max_age, arithmetic or Numpy()
        self.policy = make_policy(policy)
        self.urgency = Urgency(seconds) if takes_deadlines(policy) else None
        self.record_lengths: dict[int, int] = {}
        self.priority: dict[int, int] = {}
        self._table = Flat(np.zeros((8192, NUM_COLUMNS), np.int32))  # blocks of plans
        self._queues: dict[int, Queue] = {}
        self._requests: dict[int, tuple[Plan, int]] = {}  # plan, first call
        self._left = np.zeros(64, np.int64)
        self._turns = 0
        self.turn = Turn(max_batch)
        self._begun: Batch | None = None  # see `note_begun`
        self._beside: Batch | None = None  # the same, for as long as it runs beside the host's work
        self._owners: frozenset[int] | None = None  # of its calls
        self._picked: Queue | None = None  # what `next` takes, until something changes

    @property
    def max_batch(self) -> int:
        return self.turn.max_batch

    @max_batch.setter
    def max_batch(self, most: int) -> None:
        self.turn.max_batch = most

    @property
    def num_ready(self) -> int:
        return sum(q.size for q in self._queues.values())

    @property
    def outstanding(self) -> int:
        """Calls of all requests that are in no launch yet."""
        return int(self._left.sum())

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def entries(self) -> I32:
        """The table as one array, for ragged inputs: a record's start and length point into it."""
        return self._table.data.reshape(-1)

    # -- requests --

    def add(
        self,
        plans: Sequence[Plan],
        requests: Sequence[int],
        bases: npt.NDArray[np.int64],
        wishes: Sequence[Wish] = (),
    ) -> None:
        """Admit requests, one a plan; `bases` [m, row types]: first slots of their regions;
        `wishes`: one each, or none at all.
        """
        self._turns += 1
        self._picked = None
        firsts = self._table.allocate_rooms([plan.table_room for plan in plans])
        self._reserve(max(requests))
        self._requests.update(zip(requests, zip(plans, firsts, strict=True), strict=True))
        left = self._left
        for request, plan in zip(requests, plans, strict=True):
            left[request] = plan.num_calls
        if self.urgency is not None:
            self.urgency.place(plans, firsts, wishes or [NO_WISH] * len(plans))
        for start in range(0, len(plans), ADDED_TOGETHER):
            part = slice(start, start + ADDED_TOGETHER)
            self._place(plans[part], requests[part], firsts[part], bases[part])

    def _place(
        self,
        plans: Sequence[Plan],
        numbers: Sequence[int],
        firsts: Sequence[int],
        bases: npt.NDArray[np.int64],
    ) -> None:
        """Copy the blocks of plans into the table, and queue the calls that are ready."""
        first_calls = np.array(firsts, np.int64)
        if len(plans) <= FEW:
            lists = zip(firsts, numbers, bases.tolist(), strict=True)
            added = np.array([(0, f * NUM_COLUMNS, f, n, *base) for f, n, base in lists], np.int32)
        else:
            added = np.zeros((len(plans), REGION + bases.shape[1]), np.int32)
            added[:, FIRST_ENTRY], added[:, FIRST_CALL] = first_calls * NUM_COLUMNS, first_calls
            added[:, NUMBER], added[:, REGION:] = numbers, bases
        self._arithmetic.place(self._table.data, plans, first_calls, added)
        begin = [plan.first_calls for plan in plans]
        ready = [
            first + call for first, (calls, _) in zip(firsts, begin, strict=True) for call in calls
        ]
        cells = {cell for _, cell in begin}
        self._push(np.array(ready, np.int64), cells.pop() if len(cells) == 1 else -1)

    def _reserve(self, request: int) -> None:
        if request >= len(self._left):
            self._left = np.concatenate([self._left, np.zeros(request + 1, np.int64)])

    def cancel(self, requests: Sequence[int]) -> None:
        """Forget requests: none of their calls runs any more."""
        known = [request for request in requests if request in self._requests]
        if not known:
            return
        gone = np.zeros(len(self._left), bool)
        gone[known] = True
        self._left[known] = 0
        owners = self._table.data[:, REQUEST]
        for queue in self._queues.values():
            queue.keep(lambda calls: ~gone[owners[calls]])
        self._picked = None
        self.release(known)

    def ran(self, request: int, calls: npt.NDArray[np.int64]) -> bool:
        """Have these calls of a request, numbered in its plan, run, or will they before any launch
        from now on?
        """
        _, first = self._requests[request]
        if not (self._table.data[first + calls, MISSING] == SCHEDULED).all():
            return False
        running = self._beside
        return (
            running is None
            or not self.runs(request)
            or not bool(np.isin(first + calls, running.calls).any())
        )

    def note_begun(self, batch: Batch) -> None:
        """The last batch: what it gave is not read yet."""
        self._begun, self._owners = batch, None

    def note_running(self, batch: Batch) -> None:
        """It runs beside the host's work; it has begun."""
        self._beside = batch

    def note_ran(self, batch: Batch) -> None:
        """It has run; none of its requests was released meanwhile."""
        self._beside = None
        if len(batch.held):
            self._push(batch.held, batch.held_cell)
            self._picked = None

    def note_read(self, batch: Batch | None) -> None:
        """What it gave is known: its requests may go elsewhere. None: nobody will read it."""
        if batch is None or self._begun is batch:
            self._begun = None

    def runs(self, request: int) -> bool:
        """Is a call of it in a batch that was begun, and that nobody has read?"""
        if self._begun is None:
            return False
        if self._owners is None:
            self._owners = frozenset(self.requests_of(self._begun.calls).tolist())
        return request in self._owners

    def release(self, requests: Sequence[int]) -> None:
        """Free finished requests' places in the arrays."""
        ended = [self._requests.pop(request) for request in requests]
        firsts, rooms = [first for _, first in ended], [plan.table_room for plan, _ in ended]
        self._table.free_rooms(firsts, rooms)

    def clear(self) -> None:
        """Forget all requests."""
        self._left[:] = 0
        self._begun = self._beside = None
        self._requests.clear()
        self._queues.clear()
        self._table.clear()
        self._picked = None

    # -- launches --

    def next(self, max_steps: int | None = None, *, hold: bool = False) -> Batch | None:
        """The next launch, or None when nothing is ready. `max_steps` bounds its steps; `hold`:
        what follows on answers that it gives is ready once it has run.
        """
        queue = self._pick()
        if queue is None:
            return None
        self._turns += 1
        self._picked = None
        cell, turn = queue.cell, self.turn
        heads = queue.pop(turn.max_batch, self._turns - self.max_age)
        if queue.size:
            turn.cut = cell
        elif cell == turn.cut:
            turn.cut = -1
        done = self._arithmetic.advance(
            self._table.data, self._left, heads, max_steps, self.record_lengths[cell]
        )
        hold = hold and len(done.events) > 0
        if not hold:
            self._push(done.ready, done.cell)
        return Batch(
            cell,
            done.calls,
            done.steps,
            done.slots,
            done.finished,
            done.events,
            done.answering,
            done.ready if hold else _NO_CALLS,
            done.cell,
        )

    def unlike(self, batch: Batch, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions of its events that may be anything but expected answers; `places` says where
        rows are (`Arithmetic.unlike`).
        """
        return self._arithmetic.unlike(self._table.data, batch.events, places)

    def look(self, batch: Batch, max_steps: int | None = None) -> Batch | None:
        """What `next` would give once a batch that holds calls has run, if nothing else comes;
        changes nothing, and knows no more of it than its rows. None where other calls are ready.
        """
        cell, heads = batch.held_cell, batch.held
        if cell < 0 or not 0 < len(heads) <= self.turn.max_batch or self.num_ready:
            return None
        length = self.record_lengths[cell]
        calls, steps, slots = self._arithmetic.look(self._table.data, heads, max_steps, length)
        return Batch(cell, calls, steps, slots, (), _NO_EVENTS, _NO_EVENTS, _NO_CALLS)

    def first_call(self, request: int) -> int:
        """Number of the first call of its plan."""
        return self._requests[request][1]

    def requests_of(self, calls: npt.NDArray[np.int64]) -> I32:
        """The request of each call."""
        requests: I32 = self._table.data[calls, REQUEST]
        return requests

    def peek(self) -> tuple[int, int] | None:
        """(cell, rows) of what `next` will launch."""
        queue = self._pick()
        return None if queue is None else (queue.cell, min(queue.size, self.turn.max_batch))

    def late(self) -> list[int]:
        """Requests that cannot end in time any more."""
        assert self.urgency is not None
        ready = [(q.cell, chunk) for q in self._queues.values() for chunk in q.chunks]
        calls = self.urgency.late(ready) if ready else _NO_CALLS
        return np.unique(self.requests_of(calls)).tolist() if len(calls) else []

    def stretch(self) -> float:
        """How many times as long as alone a request takes, as things are."""
        assert self.urgency is not None
        return self.urgency.stretch({q.cell: q.size for q in self._queues.values()}, 1.0)

    def _pick(self) -> Queue | None:
        if self._picked is None:
            ready = [q for q in self._queues.values() if q.size]
            if len(ready) > 1:
                self._picked = self._choose(ready)
            elif ready:
                self._picked = ready[0]
        return self._picked

    def _choose(self, ready: list[Queue]) -> Queue:
        turns, depths, oldest = self._turns, self.priority, ready[0]
        for queue in ready:
            queue.age = turns - queue.since[0]
            queue.depth = depths.get(queue.cell, 0)
            if queue.age > oldest.age:
                oldest = queue
        if oldest.age >= self.max_age:
            return oldest
        chosen = self.policy.pick(ready, self.turn)
        if chosen not in ready:
            raise PolicyError(policy=type(self.policy).__name__, got=repr(chosen))
        return chosen

    def _push(self, calls: npt.NDArray[np.int64], cell: int = -1) -> None:
        """`cell`: that of all of them, if it is known."""
        if len(calls) == 0:
            return
        if cell >= 0:
            return self._queue(cell).push(calls, self._turns)
        cells = self._table.data[calls, CELL]
        while len(calls):
            first = cells[0]
            mine = cells == first
            whole = mine.all()
            self._queue(int(first)).push(calls if whole else calls[mine], self._turns)
            if whole:
                return
            calls, cells = calls[~mine], cells[~mine]

    def _queue(self, cell: int) -> Queue:
        queue = self._queues.get(cell)
        if queue is None:
            urgency = self.urgency
            queue = Queue(cell) if urgency is None else UrgentQueue(cell, urgency)
            self._queues[cell] = queue
        return queue
