"""The scheduler: which cell runs next, on which calls, for how many steps.

Duty: hold every live request's calls as flat arrays, and decide launches. Pure: no torch, no
threads, no clock of its own; numpy in, numpy out. The engine admits requests with `add`, asks
`next` for launches and runs them in order.

A call's successors are told at once when it is scheduled, before its kernel has run: one worker
runs launches first in, first out.

Policy `cellular` (BatchMaker, EuroSys 2018; ARCHITECTURE.md says what is ours): a cell whose ready
calls fill its largest batch first; else the deepest cell with ready calls, since it brings requests
nearer to their end. `fifo`: the cell whose oldest ready call has waited longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from cellc.plan import (
    CELL,
    CHAIN,
    EDGES,
    MISSING,
    NUM_COLUMNS,
    NUM_SUCCESSORS,
    RECORD,
    REQUEST,
    SUCCESSOR,
    Plan,
    ragged_range,
)
from cellc.regions import Flat

I32 = npt.NDArray[np.int32]
SCHEDULED = 1 << 30  # in MISSING: the call is in a launch already

Policy = Literal["cellular", "fifo"]


@dataclass(frozen=True)
class Batch:
    """One launch: calls of one cell in steps, and the requests that it ends."""

    cell: int
    calls: npt.NDArray[np.int64]  # global call numbers, step by step
    steps: I32  # [K + 1] offsets into calls
    table: I32  # [record length, N] slots: inputs, then outputs
    finished: Sequence[int]  # requests whose last call is in this launch


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

    def __init__(self, *, max_batch: int = 512, policy: Policy = "cellular") -> None:
        self.max_batch, self.policy = max_batch, policy
        self.record_lengths: dict[int, int] = {}
        self.priority: dict[int, int] = {}
        self._calls = Flat(np.zeros((1024, NUM_COLUMNS), np.int32))
        self._records = Flat(np.zeros(4096, np.int32))
        self._successors = Flat(np.zeros(4096, np.int32))
        self._queues: dict[int, _Queue] = {}
        self._requests: dict[int, tuple[Plan, int, int, int]] = {}
        self._left = np.zeros(64, np.int64)
        self._tick = 0

    @property
    def num_ready(self) -> int:
        return sum(q.size for q in self._queues.values())

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def records(self) -> I32:
        """The flat records, for ragged inputs: a record's start and length point into it."""
        return self._records.data

    # -- requests --

    def add(self, plan: Plan, requests: Sequence[int], bases: npt.NDArray[np.int64]) -> None:
        """Admit requests of one plan; `bases` [m, row types]: first slots of their regions."""
        self._tick += 1
        m, n = len(requests), plan.num_calls
        calls = self._calls.allocate(n, m)
        records = self._records.allocate(len(plan.records), m)
        successors = self._successors.allocate(len(plan.successors), m)
        self._reserve(max(requests))
        held = zip(requests, calls.tolist(), records.tolist(), successors.tolist(), strict=True)
        for request, *places in held:
            self._requests[request] = (plan, *places)
        self._left[np.asarray(requests)] = n
        offset = np.zeros((m, 1, NUM_COLUMNS), np.int32)
        offset[:, 0, RECORD], offset[:, 0, SUCCESSOR] = records, successors
        offset[:, 0, REQUEST] = requests
        self._calls.data[calls[:, None] + np.arange(n)] = plan.calls + offset
        full = np.concatenate([bases, records[:, None], np.zeros((m, 1), np.int64)], 1)
        self._records.data[records[:, None] + np.arange(len(plan.records))] = (
            plan.records + full[:, plan.record_base]
        )
        self._successors.data[successors[:, None] + np.arange(len(plan.successors))] = (
            plan.successors + calls[:, None]
        )
        self._push((calls[:, None] + plan.ready).reshape(-1))

    def _reserve(self, request: int) -> None:
        if request >= len(self._left):
            self._left = np.concatenate([self._left, np.zeros(request + 1, np.int64)])

    def cancel(self, request: int) -> None:
        """Forget a request: none of its calls runs any more."""
        if request not in self._requests:
            return
        _, first, _, _ = self._requests[request]
        last = first + self._requests[request][0].num_calls
        for queue in self._queues.values():
            kept = [
                (c[(c < first) | (c >= last)], t)
                for c, t in zip(queue.chunks, queue.since, strict=True)
            ]
            kept = [(c, t) for c, t in kept if len(c)]
            queue.chunks = deque(c for c, _ in kept)
            queue.since = deque(t for _, t in kept)
            queue.size = sum(len(c) for c in queue.chunks)
        self.release([request])

    def release(self, requests: Sequence[int]) -> None:
        """Free finished requests' places in the arrays."""
        by_plan: dict[int, list[tuple[Plan, int, int, int]]] = {}
        for request in requests:
            held = self._requests.pop(request)
            by_plan.setdefault(id(held[0]), []).append(held)
        for group in by_plan.values():
            plan = group[0][0]
            self._calls.free([h[1] for h in group], plan.num_calls)
            self._records.free([h[2] for h in group], len(plan.records))
            self._successors.free([h[3] for h in group], len(plan.successors))

    # -- launches --

    def next(self, max_steps: int | None = None) -> Batch | None:
        """The next launch, or None when nothing is ready. `max_steps` bounds its steps."""
        cell = self._pick()
        if cell is None:
            return None
        self._tick += 1
        heads = self._queues[cell].pop(self.max_batch)
        calls, steps = self._expand(heads, max_steps)
        table = self._calls.data
        rows = table[calls]
        record = rows[:, RECORD].astype(np.int64)
        slots = self._records.data[record[None, :] + self._span(cell)]
        self._wake(calls, rows)
        return Batch(cell, calls, steps, slots, self._finish(rows[:, REQUEST]))

    def requests_of(self, calls: npt.NDArray[np.int64]) -> I32:
        """The request of each call."""
        requests: I32 = self._calls.data[calls, REQUEST]
        return requests

    def _span(self, cell: int) -> npt.NDArray[np.int64]:
        return np.arange(self.record_lengths[cell])[:, None]

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
        return max(candidates, key=lambda c: (self.priority.get(c, 0), -c))

    def _expand(
        self, heads: npt.NDArray[np.int64], max_steps: int | None
    ) -> tuple[npt.NDArray[np.int64], I32]:
        """Follow chains from their ready heads: (calls step by step, offsets of the steps)."""
        lengths = self._calls.data[heads, CHAIN]
        longest = int(lengths.max())
        if max_steps is not None:
            longest = min(longest, max_steps)
        if longest <= 1:
            return heads, np.array([0, len(heads)], np.int32)
        calls = heads + np.arange(longest)[:, None]  # [K, B]
        valid = np.arange(longest)[:, None] < lengths
        inside = self._calls.data[np.where(valid, calls, heads)]
        follows = inside[1:, :, MISSING] == inside[1:, :, EDGES]
        valid[1:] &= np.logical_and.accumulate(follows, 0)
        counts = valid.sum(0)
        order = np.argsort(-counts, kind="stable")
        valid, calls = valid[:, order], calls[:, order]
        sizes = valid.sum(1)
        sizes = sizes[sizes > 0]
        steps = np.zeros(len(sizes) + 1, np.int32)
        np.cumsum(sizes, out=steps[1:])
        return calls[valid], steps

    def _wake(self, calls: npt.NDArray[np.int64], rows: I32) -> None:
        """Tell successors; those that wait for nothing more are ready."""
        missing = self._calls.data[:, MISSING]
        missing[calls] = SCHEDULED
        counts = rows[:, NUM_SUCCESSORS].astype(np.int64)
        index = ragged_range(rows[:, SUCCESSOR].astype(np.int64), counts)
        woken = self._successors.data[index].astype(np.int64)
        np.subtract.at(missing, woken, 1)
        ready = woken[missing[woken] == 0]
        if len(ready):
            self._push(_unique(ready))

    def _push(self, calls: npt.NDArray[np.int64]) -> None:
        if len(calls) == 0:
            return
        cells = self._calls.data[calls, CELL]
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

    def _finish(self, requests: I32) -> list[int]:
        np.subtract.at(self._left, requests, 1)
        done = requests[self._left[requests] == 0]
        return np.unique(done).tolist() if len(done) else []


def _unique(calls: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each call once, in order of first appearance."""
    if len(calls) == 1:
        return calls
    values, first = np.unique(calls, return_index=True)
    return calls[np.sort(first)] if len(values) < len(calls) else calls
