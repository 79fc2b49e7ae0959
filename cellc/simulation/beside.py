"""The engine where launches run beside the host's work, as on processors with several threads.

Duty: turns as `cellc.turns` takes them, by the same rules (`cellc.pacing`): a launch that takes
long enough is only begun; other threads run it while the host answers who ended in the launch
before, admits and schedules the next one, then the host joins in. No torch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from cellc import pacing
from cellc.arithmetic import Arithmetic
from cellc.policies import Policy
from cellc.scheduler import Batch
from cellc.simulation.clock import REST, Turn
from cellc.simulation.curves import AWAKE, CostTable
from cellc.simulation.servers import SWITCH, Cellular, Work

MOST_LOST = 6 * SWITCH  # in a part of a turn, which gives Python's lock away now and then


@dataclass
class _Begun:
    """A launch that other threads run: since when, and its seconds if all did."""

    batch: Batch
    since: float
    work: float


class Beside(Cellular):
    """See the module."""

    def __init__(
        self,
        work: Work,
        costs: CostTable,
        max_batch: int,
        arithmetic: Arithmetic,
        policy: str | Policy = "cellular",
        seed: int = 0,
    ) -> None:
        super().__init__(work, costs, max_batch, arithmetic, policy, seed)
        self._pace = 1.0, 1.0  # how many times as long the host and kernels take in this turn
        self._known: dict[tuple[int, int], float] = {}  # seconds of a step, as launches took
        self._num_told = 0  # requests, of all servers, that were sent
        self._free = 0.0  # from when on their thread is
        self._draw = random.Random(seed)
        self._begun: _Begun | None = None
        self._midway = False  # a turn has landed a launch, and goes on
        self._spent = 0.0  # by the host in this turn

    def _step(self, cell: int, num_rows: int) -> float:
        return self._known.get((cell, num_rows.bit_length())) or self._costs.step(cell, num_rows)

    def _num_sent(self, now: float) -> int:
        """How many of those that wait are there: sending takes time, too."""
        return sum(int(np.searchsorted(part, self._num_told)) for part in self._waiting)

    def turn(self, now: float) -> Turn:
        host, at, admitted = self._costs.host, now, 0
        if self._rested and self._num_waiting:
            at, self._rested = self._woken(now), False
        if not self._midway and self._num_waiting:
            room = pacing.MAX_LIVE - self._scheduler.num_requests
            admitted = len(self._admit(min(room, pacing.ADMITTED, self._num_sent(now))))
        self._midway = False
        admission = host.to_admit(admitted)
        if self._begun is not None and not self._pacer.worth_beside():
            at, finished = self._answered(*self._settled(self._on_host(at, admission)))
            self._midway = True
            return self._turned(now, at, finished)
        batch = self._pacer.schedule(
            joined=True, waited=False, beside=True, busy=self._begun is not None
        )
        if batch is None:
            self._note_host()
            return self._rest(now)
        own, work = admission + host.turn, self._run(batch)
        self._pace = self._slower(own + host.to_answer(len(batch.finished)) + work)
        at = self._on_host(at, own)
        at, before = self._settled(at)
        begun = _Begun(batch, at, work * self._pace[1])
        if self._pacer.expected(batch) > pacing.BESIDE:
            begun.work += host.starting
            at, finished = self._answered(at, before)
            self._begun = begun
        else:
            at = self._waited(at, begun.work)
            self._learn(begun, at)
            at, finished = self._answered(at, before)
            at, ended = self._answered(at, begun)
            finished += ended
        self._note_host()
        return self._turned(now, at, finished)

    def _rest(self, now: float) -> Turn:
        self._rested = self._num_sent(now) == 0
        return self.turn(now) if self._num_waiting else REST

    def _woken(self, now: float) -> float:
        """When the host begins: the first that waits was sent, and others meanwhile."""
        host = self._costs.host
        self._num_told = max(self._num_told, int(self._waiting[0][0]))
        at = max(now, self._free)
        return self._send(at, at + host.wake, 0.0)

    def _turned(self, now: float, at: float, finished: list[int]) -> Turn:
        self.counts.busy += at - now
        return Turn(at, finished)

    def _settled(self, at: float) -> tuple[float, _Begun | None]:
        """The host joins in a launch until it has run."""
        begun, self._begun = self._begun, None
        if begun is None:
            return at, None
        apart = self._costs.host.apart
        left = begun.work - (at - begun.since) * apart
        if left > 0:
            ended = at = self._waited(at, left)
        else:
            ended = begun.since + begun.work / apart
        self._learn(begun, ended)
        return at, begun

    def _learn(self, begun: _Begun, ended: float) -> None:
        self._scheduler.note_ran(begun.batch)
        size, steps = pacing.size_of(begun.batch), len(begun.batch.steps) - 1
        self._known[size] = pacing.learned(self._known.get(size), (ended - begun.since) / steps)

    def _answered(self, at: float, begun: _Begun | None) -> tuple[float, list[int]]:
        finished = list(begun.batch.finished) if begun is not None else []
        if not finished:
            return at, finished
        self._scheduler.release(finished)
        return self._on_host(at, self._costs.host.to_answer(len(finished))), finished

    def _note_host(self) -> None:
        self._pacer.note_host(self._spent)
        self._spent = 0.0

    def _on_host(self, start: float, seconds: float) -> float:
        """When the host has worked for so long. Who is due meanwhile is sent, which takes Python's
        lock from it.
        """
        host, more = self._costs.host, self._pace[0]
        end = self._send(
            start, start + seconds * more, host.locked * more, host.waking * more, host.waits
        )
        self._spent += end - start
        return end

    def _waited(self, start: float, seconds: float) -> float:
        """When a kernel that all threads run has run. Who is due meanwhile is sent, which takes a
        processor from it.
        """
        host, longer = self._costs.host, self._pace[1]
        waking = host.waking_beside * longer
        return self._send(start, start + seconds, host.beside * longer, waking, host.waits_beside)

    def _send(
        self, since: float, until: float, each: float, waking: float = 0.0, waits: float = 0.0
    ) -> float:
        """When what would end then has ended, if each that is sent meanwhile makes it longer, and
        those by `waking` more that the thread slept before, and then it `waits`. One is sent after
        the other.
        """
        arrivals, locked, lost = self._work.arrivals, self._costs.host.locked, 0.0
        number, end = self._num_told, until
        while number < len(arrivals) and lost <= MOST_LOST:
            due = float(arrivals[number])
            slept = due > self._free + AWAKE
            start = max(due, self._free)
            if slept and waits:
                start = max(due, since) + self._draw.expovariate(1 / waits)
            if start > end:
                break
            lost += each + (waking if slept else 0.0)
            self._free = start + locked
            end = until + lost
            number += 1
        self._num_told = number
        return end
