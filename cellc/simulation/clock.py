"""The virtual clock: arrivals, servers, and who takes a turn when.

Duty: give each request at its arrival to the least loaded of the servers, let them take turns in
order of time, note when each request is answered. Comes in: arrivals, servers; goes out: latencies.
Nothing here reads a real clock, so that the same arrivals give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Turn:
    """What a server does next: until when, and the requests that it answers then, or sheds. One
    that does nothing is `idle`, until a time or, if that is infinite, until a request comes.
    """

    until: float
    finished: Sequence[int] = ()
    idle: bool = False
    shed: Sequence[int] = ()


REST = Turn(math.inf, idle=True)


@dataclass
class Counts:
    """Of one server; where batches are padded, they count in place of steps, requests as rows."""

    launches: int = 0
    steps: int = 0
    rows: int = 0
    largest: int = 0  # rows of a step
    busy: float = 0.0  # seconds

    def add(self, other: Counts) -> None:
        self.launches += other.launches
        self.steps += other.steps
        self.rows += other.rows
        self.largest = max(self.largest, other.largest)
        self.busy += other.busy


class Server(Protocol):
    """One device with its batching; `add` and `turn` are called in order of time."""

    counts: Counts

    def add(self, requests: I64) -> None: ...

    def turn(self, now: float) -> Turn: ...


@dataclass
class Clock:
    """One run: `weights` is the work of each request, which loads are compared by."""

    arrivals: F64
    weights: I64
    servers: Sequence[Server]
    tell: Callable[[int], None] = lambda answered: None
    answered: F64 = field(init=False)

    def __post_init__(self) -> None:
        self.answered = np.full(len(self.arrivals), np.nan)
        self._wake = [math.inf] * len(self.servers)  # when each takes its next turn
        self._turns = [REST] * len(self.servers)  # what each is doing
        self._loads = [0] * len(self.servers)
        self._placed = 0

    def run(self) -> F64:
        """Until every request is answered or shed; latencies in seconds, NaN of those shed."""
        total, done = len(self.arrivals), 0
        while done < total:
            nearest = min(self._wake)
            if self._placed < total and self.arrivals[self._placed] <= nearest:
                self._place(nearest)
                continue
            assert nearest < math.inf, "no server will answer what is left"
            number = self._wake.index(nearest)
            count = self._deliver(number, nearest)
            turn = self._turns[number] = self.servers[number].turn(nearest)
            self._wake[number] = turn.until
            if count:
                done += count
                self.tell(done)
        return self.answered - self.arrivals

    def _deliver(self, number: int, now: float) -> int:
        finished, shed = self._turns[number].finished, self._turns[number].shed
        if len(finished):
            self.answered[finished] = now
        if len(self.servers) == 1:
            return len(finished) + len(shed)
        if len(finished):
            self._loads[number] -= int(self.weights[finished].sum())
        if len(shed):
            self._loads[number] -= int(self.weights[shed].sum())
        return len(finished) + len(shed)

    def _place(self, until: float) -> None:
        """Give away requests that arrive up to `until`, or up to when one wakes a server."""
        if len(self.servers) == 1:
            start = self._placed
            if self._turns[0].idle:
                until = self.arrivals[start]
                self._wake[0] = float(until)
            self._placed = int(self.arrivals.searchsorted(until, "right"))
            self.servers[0].add(np.arange(start, self._placed))
            return
        while self._placed < len(self.arrivals) and self.arrivals[self._placed] <= until:
            request, at = self._placed, float(self.arrivals[self._placed])
            number = self._loads.index(min(self._loads))
            self.servers[number].add(np.array([request]))
            self._loads[number] += int(self.weights[request])
            self._placed += 1
            if self._turns[number].idle:
                self._wake[number] = min(self._wake[number], at)
                until = min(until, at)
