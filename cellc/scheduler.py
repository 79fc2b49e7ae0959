"""The scheduler: which cell runs next, on which calls, for how many steps.

Duty: hold every live request's calls as flat arrays, and decide launches. Pure: no torch, no
threads, no clock of its own; numpy in, numpy out. The engine admits requests with `add`, asks
`next` for launches and runs them in order. What that means for the arrays is `cellc.arithmetic`.

A call's successors are told at once when it is scheduled, before its kernel has run: one worker
runs launches first in, first out.

Policy `cellular` (BatchMaker, EuroSys 2018; ARCHITECTURE.md says what is ours): a cell whose ready
calls fill its largest batch first; else what such a launch left behind, so that requests that came
together stay together; else the deepest cell with ready calls, since it brings requests nearer to
their end, but for a while a cell with many times as many: more may join the few. `fifo`: the cell
whose oldest ready call has waited longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from cellc.arithmetic import SCHEDULED, Arithmetic, Numpy
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
from cellc.regions import Flat

I32 = npt.NDArray[np.int32]
ADDED_TOGETHER = 256  # requests: bounds the memory that admission takes for itself
FEW = 4  # times as many ready calls elsewhere make those of a cell few

Policy = Literal["cellular", "fifo"]


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


@dataclass
class _Queue:
    """Ready calls of one cell, oldest first, in chunks."""

    chunks: deque[npt.NDArray[np.int64]] = field(default_factory=deque)
    size: int = 0
    since: deque[int] = field(default_factory=deque)  # arrival tick of each chunk

    def push(self, calls: npt.NDArray[np.int64], tick: int) -> None:
        self.chunks.append(calls)
        self.since.append(tick)
        self.size += len(calls)

    def pop(self, count: int) -> npt.NDArray[np.int64]:
        taken = []
        while count and self.chunks:
            chunk = self.chunks[0]
            if len(chunk) <= count:
                self.chunks.popleft()
                self.since.popleft()
                part = chunk
            else:
                part, self.chunks[0] = chunk[:count], chunk[count:]
            taken.append(part)
            count -= len(part)
            self.size -= len(part)
        return taken[0] if len(taken) == 1 else np.concatenate(taken)


class Scheduler:
    """See the module. `record_lengths` and `priority` are looked up by cell number and may grow."""

    def __init__(
        self,
        *,
        max_batch: int = 512,
        policy: Policy = "cellular",
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self.max_batch, self.policy, self._arithmetic = max_batch, policy, arithmetic or Numpy()
        self.record_lengths: dict[int, int] = {}
        self.priority: dict[int, int] = {}
        self._table = Flat(np.zeros((8192, NUM_COLUMNS), np.int32))  # blocks of plans
        self._queues: dict[int, _Queue] = {}
        self._requests: dict[int, tuple[Plan, int]] = {}  # plan, first call
        self._left = np.zeros(64, np.int64)
        self._tick = 0
        self.patience = 64  # launches that few calls of a deep cell wait for more
        self._cut = -1  # the cell of a full launch that left ready calls behind

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
        self, plans: Sequence[Plan], requests: Sequence[int], bases: npt.NDArray[np.int64]
    ) -> None:
        """Admit requests, one a plan; `bases` [m, row types]: first slots of their regions."""
        self._tick += 1
        firsts = self._table.allocate([plan.num_rows for plan in plans])
        self._reserve(max(requests))
        for request, plan, first in zip(requests, plans, firsts, strict=True):
            self._requests[request] = (plan, first)
        numbers, first_calls = np.asarray(requests), np.asarray(firsts)
        self._left[numbers] = [plan.num_calls for plan in plans]
        for start in range(0, len(plans), ADDED_TOGETHER):
            part = slice(start, start + ADDED_TOGETHER)
            self._place(plans[part], numbers[part], first_calls[part], bases[part])

    def _place(
        self,
        plans: Sequence[Plan],
        numbers: npt.NDArray[np.int64],
        first_calls: npt.NDArray[np.int64],
        bases: npt.NDArray[np.int64],
    ) -> None:
        """Copy the blocks of plans into the table, and queue the calls that are ready."""
        added = np.zeros((len(plans), REGION + bases.shape[1]), np.int32)
        added[:, FIRST_ENTRY], added[:, FIRST_CALL] = first_calls * NUM_COLUMNS, first_calls
        added[:, NUMBER], added[:, REGION:] = numbers, bases
        self._arithmetic.place(self._table.data, plans, first_calls, added)
        ready = np.concatenate([plan.ready for plan in plans])
        self._push(ready + np.repeat(first_calls, [len(plan.ready) for plan in plans]))

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
            if not queue.size:
                continue
            stays = [~gone[owners[chunk]] for chunk in queue.chunks]
            kept = [
                (chunk[stay], tick)
                for chunk, stay, tick in zip(queue.chunks, stays, queue.since, strict=True)
                if stay.any()
            ]
            queue.chunks = deque(chunk for chunk, _ in kept)
            queue.since = deque(tick for _, tick in kept)
            queue.size = sum(len(chunk) for chunk in queue.chunks)
        self.release(known)

    def ran(self, request: int, calls: npt.NDArray[np.int64]) -> bool:
        """Are these calls of a request, numbered in its plan, in launches already?"""
        _, first = self._requests[request]
        return bool((self._table.data[first + calls, MISSING] == SCHEDULED).all())

    def release(self, requests: Sequence[int]) -> None:
        """Free finished requests' places in the arrays."""
        ended = [self._requests.pop(request) for request in requests]
        self._table.free([first for _, first in ended], [plan.num_rows for plan, _ in ended])

    def clear(self) -> None:
        """Forget all requests."""
        self._left[:] = 0
        self._requests.clear()
        self._queues.clear()
        self._table.clear()

    # -- launches --

    def next(self, max_steps: int | None = None) -> Batch | None:
        """The next launch, or None when nothing is ready. `max_steps` bounds its steps."""
        cell = self._pick()
        if cell is None:
            return None
        self._tick += 1
        heads = self._queues[cell].pop(self.max_batch)
        if self._queues[cell].size:
            self._cut = cell
        elif cell == self._cut:
            self._cut = -1
        done = self._arithmetic.advance(
            self._table.data, self._left, heads, max_steps, self.record_lengths[cell]
        )
        self._push(done.ready)
        return Batch(
            cell, done.calls, done.steps, done.slots, done.finished, done.events, done.answering
        )

    def requests_of(self, calls: npt.NDArray[np.int64]) -> I32:
        """The request of each call."""
        requests: I32 = self._table.data[calls, REQUEST]
        return requests

    def peek(self) -> tuple[int, int] | None:
        """(cell, rows) of what `next` would launch."""
        cell = self._pick()
        return None if cell is None else (cell, min(self._queues[cell].size, self.max_batch))

    def _pick(self) -> int | None:
        ready = [(c, q) for c, q in self._queues.items() if q.size]
        if len(ready) <= 1:
            return ready[0][0] if ready else None
        if self.policy == "fifo":
            return min(ready, key=lambda item: (item[1].since[0], item[0]))[0]
        full = [c for c, q in ready if q.size >= self.max_batch]
        candidates = full or [c for c, _ in ready]
        if not full and self._cut in candidates:
            return self._cut
        deepest = max(candidates, key=lambda c: (self.priority.get(c, 0), -c))
        if not full:
            largest, queue = max(ready, key=lambda item: (item[1].size, -item[0]))
            few = self._queues[deepest]
            if queue.size >= FEW * few.size and self._tick - few.since[0] < self.patience:
                return largest
        return deepest

    def _push(self, calls: npt.NDArray[np.int64]) -> None:
        if len(calls) == 0:
            return
        cells = self._table.data[calls, CELL]
        first = int(cells[0])
        if (cells == first).all():
            self._queue(first).push(calls, self._tick)
            return
        for cell in np.unique(cells).tolist():
            self._queue(cell).push(calls[cells == cell], self._tick)

    def _queue(self, cell: int) -> _Queue:
        if cell not in self._queues:
            self._queues[cell] = _Queue()
        return self._queues[cell]
