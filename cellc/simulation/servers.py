"""Servers of a simulation: one device each, with cellc's batching or what others would do.

Duty: answer `turn`: what runs now, and until when. `Cellular` asks the real scheduler, and sizes
launches by the engine's own rule (where they run beside the host's work: `beside.py`);
`WholeRequests` merges requests into one graph and runs it to its
end (Fold, DyNet); `Padded` runs the rule of `cellc.bench.batch_server`. All run the same cells at
the same costs. No torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellc import pacing
from cellc.arithmetic import Arithmetic
from cellc.bench.batch_server import Batcher
from cellc.bench.batch_server import Policy as BatchPolicy
from cellc.plan import Plan
from cellc.policies import Policy
from cellc.scheduler import Batch, Scheduler
from cellc.simulation.clock import F64, I64, REST, Counts, Turn
from cellc.simulation.curves import SPANS, CostTable
from cellc.simulation.tape import Player
from cellc.urgency import Waiting, Wish

SWITCH = 5e-3  # seconds that one thread keeps Python's lock from another (sys.setswitchinterval)


@dataclass(frozen=True)
class Work:
    """Requests of a run: number i has structure `chosen[i]`, comes at `arrivals[i]`, and is due
    `deadline` seconds later.
    """

    plans: Sequence[Plan]  # by structure, without slots
    lengths: I64  # by structure
    priority: dict[int, int]
    arrivals: F64
    chosen: I64
    deadline: float = math.inf


class _Scheduled:
    """A scheduler, and what its launches cost."""

    def __init__(
        self,
        work: Work,
        costs: CostTable,
        max_batch: int,
        arithmetic: Arithmetic,
        policy: str | Policy,
    ) -> None:
        self._work, self._costs, self.counts = work, costs, Counts()
        self._scheduler = Scheduler(
            max_batch=max_batch,
            policy=policy,
            arithmetic=arithmetic,
            seconds=self._seconds,
        )
        self._scheduler.record_lengths = dict.fromkeys(costs.curves, 0)  # no kernel reads slots
        self._scheduler.priority = work.priority
        self._pacer = pacing.Pacer(self._scheduler, self._step, max_batch)
        self._pacer.host_seconds = costs.host.turn
        self._waiting: deque[I64] = deque()
        self._num_waiting = 0

    def _step(self, cell: int, num_rows: int) -> float:
        """What a step is expected to take."""
        return self._costs.step(cell, num_rows)

    def _seconds(self, cell: int, num_rows: int) -> float:
        """Of a step, with its share of the host's part."""
        most, host = self._scheduler.max_batch, self._pacer.host_seconds
        launches = num_rows / most if num_rows > most else 1.0
        step = self._costs.step(cell, min(num_rows, most))
        steps = pacing.num_steps(step, host, shared=True)
        return launches * (step + host / steps)

    def add(self, requests: I64) -> None:
        self._waiting.append(requests)
        self._num_waiting += len(requests)

    def _admit(self, most: int) -> I64:
        """Give up to so many waiting requests to the scheduler."""
        parts: list[I64] = []
        left = most
        while left > 0 and self._waiting:
            part = self._waiting.popleft()
            if len(part) > left:
                self._waiting.appendleft(part[left:])
                part = part[:left]
            left -= len(part)
            parts.append(part)
        if not parts:
            return _NOBODY
        taken = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._num_waiting -= len(taken)
        every = self._work.plans
        plans = [every[i] for i in self._work.chosen[taken].tolist()]
        wishes: list[Wish] = []
        if self._scheduler.urgency is not None:
            due = self._work.arrivals[taken] + self._work.deadline
            wishes = [Wish(at) for at in due.tolist()]
        self._scheduler.add(plans, taken.tolist(), np.zeros((len(taken), 0), np.int64), wishes)
        return taken

    def _run(self, batch: Batch) -> float:
        """Count a launch; its seconds."""
        counts, num_rows, num_steps = self.counts, len(batch.calls), len(batch.steps) - 1
        counts.launches += 1
        counts.steps += num_steps
        counts.rows += num_rows
        if num_steps == 1:
            counts.largest = max(counts.largest, num_rows)
            return self._costs.curves[batch.cell].launch + self._costs.step(batch.cell, num_rows)
        sizes = batch.steps[1:] - batch.steps[:-1]
        counts.largest = max(counts.largest, int(sizes[0]))
        return self._costs.launch(batch.cell, sizes)


class Cellular(_Scheduled):
    """What the engine does with requests that come one by one; `policy` as of the scheduler."""

    def __init__(
        self,
        work: Work,
        costs: CostTable,
        max_batch: int,
        arithmetic: Arithmetic,
        policy: str | Policy = "cellular",
        seed: int = 0,
    ) -> None:
        super().__init__(work, costs, max_batch, arithmetic, policy)
        self._rested = True
        self._sent = -math.inf  # requests that came until then are there
        self._player = Player(costs.host.tape, seed)

    def _slower(self, took: float) -> tuple[float, float]:
        """How many times as long as it should a turn takes, on the host and in kernels."""
        host, kernels = self._costs.host.slower[bisect_right(SPANS, took)]
        slower = self._player.next(took) / took if took > 0 else 1.0
        return host * slower, kernels * slower

    def _num_sent(self, now: float) -> int:
        """How many of those that wait are there. Who sends them needs Python's lock, which this
        server leaves to others while a kernel runs, and while it rests.
        """
        if not self._costs.host.sending:
            return self._num_waiting
        if self._rested:
            self._sent = now
        came = (self._work.arrivals[part] for part in self._waiting)
        return sum(int(np.searchsorted(times, self._sent, "right")) for times in came)

    def _sending(self, until: float) -> int:
        """How many are sent in a turn whose kernel would end then: those that came since the kernel
        before, and those that come while it ends later for them.
        """
        each = self._costs.host.sending
        if not each:
            return 0
        arrivals = self._work.arrivals
        first = last = int(np.searchsorted(arrivals, self._sent, "right"))
        end = until
        while last < len(arrivals) and arrivals[last] <= end:
            last += 1
            end = until + min((last - first) * each, SWITCH)
        self._sent = max(self._sent, end)
        return last - first

    def _triage(self, room: int) -> tuple[int, list[int]]:
        """(how many that wait are next, and stand first now; those that cannot end in time)."""
        urgency, work = self._scheduler.urgency, self._work
        assert urgency is not None
        waiting = np.concatenate(self._waiting)
        needs = np.array([urgency.needs(work.plans[i]) for i in work.chosen[waiting].tolist()])
        arrived, nobody_first = work.arrivals[waiting], np.zeros(len(waiting), np.int64)
        rows = Waiting(arrived + work.deadline, nobody_first, needs, arrived)
        following, late = urgency.triage(rows, self._scheduler.stretch(), room)
        rest = np.delete(waiting, np.append(following, late))
        self._waiting = deque(part for part in (waiting[following], rest) if len(part))
        self._num_waiting = len(following) + len(rest)
        return len(following), waiting[late].tolist()

    def turn(self, now: float) -> Turn:
        scheduler, host, urgency = self._scheduler, self._costs.host, self._scheduler.urgency
        admitted = 0
        shed: list[int] = []
        if urgency is not None:
            urgency.now = now
        room = pacing.MAX_LIVE - scheduler.num_requests
        if urgency is not None and self._num_waiting:
            room = min(room, pacing.admissions(host.request))
            room, shed = self._triage(room)
        elif self._num_waiting:
            room = min(room, self._num_sent(now))
        if self._num_waiting:
            admitted = len(self._admit(room))
        if urgency is not None:
            shed += scheduler.late()
            scheduler.cancel(shed)  # of those that wait it knows nothing
        batch = self._pacer.schedule(joined=True, waited=False)
        if batch is None:
            rested, self._rested = self._rested, True
            if shed:
                return Turn(now, shed=shed)
            return REST if rested or not self._num_waiting else self.turn(now)
        took = self._seconds_of(batch, now, admitted)
        self.counts.busy += took
        if urgency is not None:
            urgency.ran(batch.cell, len(batch.steps) - 1)
        if len(batch.finished):
            scheduler.release(batch.finished)
        return Turn(now + took, batch.finished, shed=shed)

    def _seconds_of(self, batch: Batch, now: float, admitted: int) -> float:
        """Of a turn."""
        host = self._costs.host
        on_host = host.turn + host.to_admit(admitted) + host.to_answer(len(batch.finished))
        work = self._run(batch)
        more, longer = self._slower(on_host + work)
        on_host *= more
        took = on_host + work * longer
        if self._rested:
            took += host.wake + min(admitted * host.sending, SWITCH)
            self._rested = False
        num_sent = self._sending(now + took - on_host * host.after)
        locked = num_sent * host.locked * more
        self._pacer.note_host(on_host + locked)
        return took + num_sent * host.beside * longer + locked


class WholeRequests(_Scheduled):
    """Up to `max_batch` requests that wait become one graph, whose cells are batched; all are
    answered when its last cell has run.
    """

    def __init__(
        self, work: Work, costs: CostTable, max_batch: int, arithmetic: Arithmetic
    ) -> None:
        super().__init__(work, costs, max_batch, arithmetic, "cellular")
        self._scheduler.turn.patience = pacing.patience(joined=False)
        self._max_batch = max_batch

    def turn(self, now: float) -> Turn:
        taken = self._admit(self._max_batch).tolist()
        if not taken:
            return REST
        host = self._costs.host
        took = len(taken) * host.request
        while (batch := self._scheduler.next()) is not None:
            took += host.turn + self._run(batch)
        self._scheduler.release(taken)
        self.counts.busy += took
        return Turn(now + took, taken)


class Padded:
    """Batches of requests in queues of about one length, each as long as its longest: every cell
    runs as often as in the member that calls it most, with a row for each member.
    """

    def __init__(self, work: Work, costs: CostTable, profiles: Profiles, how: BatchPolicy) -> None:
        self._work, self._costs, self.counts = work, costs, Counts()
        self._profiles, self._batcher = profiles, Batcher[int](how)

    def add(self, requests: I64) -> None:
        work = self._work
        lengths = work.lengths[work.chosen[requests]]
        arrivals = work.arrivals[requests]
        for item in zip(requests.tolist(), lengths.tolist(), arrivals.tolist(), strict=True):
            self._batcher.add(*item)

    def turn(self, now: float) -> Turn:
        batch, left = self._batcher.take(now)
        if not batch:
            return REST if left is None else Turn(np.nextafter(now + left, np.inf), idle=True)
        host = self._costs.host
        took = host.turn + len(batch) * host.request
        longest = self._profiles.steps[self._work.chosen[batch]].max(0)
        widest = self._profiles.rows[self._work.chosen[batch]].max(0)
        for cell, curve in self._costs.curves.items():
            if longest[cell]:
                rows = int(widest[cell]) * len(batch)
                took += curve.of_launch(rows, int(longest[cell]))
        self.counts.add(Counts(1, 1, len(batch), len(batch), took))
        return Turn(now + took, batch)


@dataclass(frozen=True)
class Profiles:
    """How each structure runs alone: steps of each cell, and the most rows of one."""

    steps: Any  # [structures, cells]
    rows: Any

    @classmethod
    def of(cls, work: Work, num_cells: int, max_batch: int, arithmetic: Arithmetic) -> Profiles:
        shape = len(work.plans), num_cells
        steps, rows = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        known: dict[int, int] = {}
        for number, plan in enumerate(work.plans):
            first = known.setdefault(id(plan), number)
            if first < number:
                steps[number], rows[number] = steps[first], rows[first]
                continue
            for batch in alone(work, plan, num_cells, max_batch, arithmetic):
                steps[number, batch.cell] += len(batch.steps) - 1
                rows[number, batch.cell] = max(rows[number, batch.cell], int(batch.steps[1]))
        return cls(steps, rows)


def alone(
    work: Work, plan: Plan, num_cells: int, max_batch: int, arithmetic: Arithmetic
) -> Sequence[Batch]:
    """Launches of a request that runs by itself."""
    scheduler = Scheduler(max_batch=max_batch, arithmetic=arithmetic)
    scheduler.record_lengths = dict.fromkeys(range(num_cells), 0)
    scheduler.priority = work.priority
    scheduler.add([plan], [0], np.zeros((1, 0), np.int64))
    batches = []
    while (batch := scheduler.next()) is not None:
        batches.append(batch)
    return batches


_NOBODY = np.zeros(0, np.int64)
