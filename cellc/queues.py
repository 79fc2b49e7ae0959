"""Queues: calls that are ready to run, a queue a cell.

Duty: hold ready calls, give out those that a launch takes. `Queue`: oldest first. `UrgentQueue`:
the most urgent first, after those that have waited for too long. Used by `cellc.scheduler`, and
seen by policies (`cellc.policies`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cellc.urgency import Urgency

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Queue:
    """Ready calls of one cell, in chunks. What a policy may read:

    cell: its number. size: calls. age: admissions and launches since the oldest became ready.
    depth: how deep the cell lies in its requests: deeper ones are nearer to their ends.
    """

    __slots__ = ("age", "cell", "chunks", "depth", "since", "size")

    def __init__(self, cell: int) -> None:
        self.cell, self.size, self.age, self.depth = cell, 0, 0, 0
        self.chunks: deque[I64] = deque()
        self.since: deque[int] = deque()  # the turn that each chunk came in, ascending

    @property
    def slack(self) -> float:
        """Seconds that the most urgent call can still wait; infinite where nobody is in a hurry."""
        return np.inf

    def push(self, calls: I64, turn: int) -> None:
        self.chunks.append(calls)
        self.since.append(turn)
        self.size += len(calls)

    def pop(self, count: int, waited: int) -> I64:
        """Take `count` calls; those that came up to turn `waited` go before all others."""
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

    def keep(self, stays: Callable[[I64], Bools]) -> None:
        """Forget the others."""
        if not self.size:
            return
        masks = [stays(chunk) for chunk in self.chunks]
        kept = [
            (chunk[mask], turn)
            for chunk, mask, turn in zip(self.chunks, masks, self.since, strict=True)
            if mask.any()
        ]
        self.chunks = deque(chunk for chunk, _ in kept)
        self.since = deque(turn for _, turn in kept)
        self.size = sum(len(chunk) for chunk in self.chunks)


class UrgentQueue(Queue):
    """The same, by urgency."""

    __slots__ = ("_urgency",)

    def __init__(self, cell: int, urgency: Urgency) -> None:
        super().__init__(cell)
        self._urgency = urgency

    @property
    def slack(self) -> float:
        rank = self._urgency.rank
        return float(min(rank[chunk].min() for chunk in self.chunks)) - self._urgency.now

    def pop(self, count: int, waited: int) -> I64:
        if self.size <= count:
            return super().pop(count, waited)
        calls = np.concatenate(list(self.chunks))
        old = sum(len(c) for c, t in zip(self.chunks, self.since, strict=True) if t <= waited)
        taken = np.zeros(len(calls), bool)
        taken[: min(old, count)] = True
        if old < count:
            order = np.argsort(self._urgency.rank[calls[old:]], kind="stable")
            taken[old + order[: count - old]] = True
        left = iter(np.split(~taken, np.cumsum([len(c) for c in self.chunks])[:-1]))
        self.keep(lambda _: next(left))
        return calls[taken]
