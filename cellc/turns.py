"""Turns of the engine's loop.

Duty: one turn: admit, schedule, launch, complete and deliver the launch before; and what is between
turns: forget requests, end the launch that runs; where a turn is left midway, begin its requests
again or fail them. Used by `cellc.engine`, which says who takes turns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from cellc import pacing
from cellc.admission import Admission
from cellc.errors import WorkerError
from cellc.faults import Failure
from cellc.flight import Flight, each
from cellc.launcher import Launcher, Running
from cellc.moves import Moves
from cellc.onward import Onward
from cellc.scheduler import Batch, Scheduler
from cellc.state import Arenas
from cellc.ticket import Ticket
from cellc.waiting import Condition


class Threads(Protocol):
    """Who takes turns, and who waits."""

    @property
    def waited(self) -> bool:
        """Does a thread wait while another takes turns?"""
        ...

    @property
    def in_background(self) -> bool:
        """Is this thread the one in the background?"""
        ...

    def told(self) -> None:
        """There may be results that somebody waits for."""
        ...


class Turns:
    """One thread at a time calls. `dropped`: requests to cancel at the next turn."""

    def __init__(
        self,
        scheduler: Scheduler,
        arenas: Arenas,
        onward: Onward,
        launcher: Launcher,
        flight: Flight,
        admission: Admission,
        moves: Moves,
        guard: Condition,
        timeout: float | None,
        threads: Threads,
    ) -> None:
        self._scheduler, self._arenas, self._onward = scheduler, arenas, onward
        self._launcher, self._flight, self._admission = launcher, flight, admission
        self._moves, self._guard, self._threads = moves, guard, threads
        self._counters = flight.counters
        self._timeout, self._looked = timeout, 0.0
        self._running: Running | None = None  # the launch that has not been completed
        self._midway = False  # something was left so: what comes next begins with a restart
        self.dropped: deque[Ticket] = deque()
        arenas.settle = launcher.settle

    def step(self) -> None:
        """One turn, after which a launch may still run."""
        self._guarded(self._step)

    def nudge(self, seconds: float) -> None:
        """More requests are being made, for so long: run beside that what is worth it by now."""
        self._guarded(lambda: self._nudged(seconds))

    def land(self) -> None:
        """End the launch that runs, if one does."""
        if self._running is not None:
            self._guarded(self._land)

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """Requests that nobody waits for any more."""
        if self._midway:
            self.restart()
        self.land()
        self._forget(tickets)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._midway:  # the restart after an interruption was interrupted, too
            self.restart()
        self._midway = True
        try:
            try:
                work()
            except Exception as error:  # ours: what is in flight fails with it, the engine goes on
                self._fail_all(error)
            self._midway = False
        except BaseException as error:  # this thread is interrupted, or ends
            self.restart(error if self._threads.in_background else None)
            raise
        finally:
            if not self._midway:
                self._flight.leaving = ()

    def _step(self) -> None:
        launcher = self._launcher
        start, blocked = time.perf_counter(), launcher.blocked
        if self._counters.timeline is not None:
            self._counters.timeline.begin_turn(len(self._admission.inbox), len(self._flight.live))
        if self.dropped:
            self._land()
            self._forget(self.take_dropped())
        if self._timeout is not None:
            self._expire(start, self._timeout)
        beside = self.beside
        self._admission.admit(start, pacing.ADMITTED if beside else pacing.MAX_LIVE)
        self._mark("admit")
        if self._running is not None and not launcher.worth_beside():
            if beside and self._follow():
                return
            self._land()  # more may be ready then
        following = launcher.next(
            joined=bool(self._flight.futures), waited=self._threads.waited, beside=beside
        )
        self._mark("schedule")
        before = self._running
        if following is None:
            self._land()
        else:
            launcher.settle()
            self._running = launcher.begin(*following, beside=beside)
            self._mark("launch")
            if before is not None:
                self._end(before)
            if not launcher.busy:
                late = beside and self._running.error is None and launcher.worth_beside()
                if not late:  # else what it ends is delivered while the next one runs
                    self._land()
        launcher.note_host(time.perf_counter() - start - (launcher.blocked - blocked))

    def _expire(self, now: float, seconds: float) -> None:
        """End requests that have taken too long: now and then, and before one of them begins."""
        if now - self._looked > 0.01 or self._admission.overdue(now - seconds):
            self._looked = now
            self._land()
            self._admission.expire(now, seconds)

    def _follow(self) -> bool:
        """Make the launch that follows while one runs, and begin with it as soon as that has ended,
        if it ended as expected; what is left to do for either is done while it runs.
        """
        launcher, before = self._launcher, self._running
        if before is None or not launcher.busy or self._onward.watches:
            return False
        shared = bool(self._flight.futures) or self._threads.waited
        foreseen = launcher.foresee(before, shared=shared)
        if foreseen is None:
            return False
        self._mark("schedule")
        launcher.settle()
        start = time.perf_counter()
        following = launcher.follow(before, foreseen)
        if following is None:
            return False
        self._running = following
        launcher.note_host(time.perf_counter() - start)
        self._mark("launch")
        self._end(before)
        return True

    def _nudged(self, seconds: float) -> None:
        self._admission.admit(time.perf_counter())
        while self._launcher.next_rows() >= pacing.ROWS_BESIDE:
            self._step()
            if self._launcher.busy_for(seconds):
                break

    @property
    def beside(self) -> bool:
        """May launches run beside the host's work?"""
        return self._scheduler.urgency is None and self._launcher.concurrent

    def _land(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            self._launcher.settle()
            self._mark("launch")
            self._end(running)

    def _end(self, running: Running) -> None:
        """A launch has run: complete what it ends, deliver."""
        finished = self._complete(running.batch, self._launcher.end(running))
        self._mark("complete")
        self._flight.deliver(finished)
        self._mark("deliver")

    def _mark(self, phase: str) -> None:
        if self._counters.timeline is not None:
            self._counters.timeline.phase(phase)

    def restart(self, cause: BaseException | None = None) -> None:
        """A turn was left midway: requests in flight begin again, from their data, or fail with a
        cause. Interrupted, it is done again (`_midway`): they wait before anything is forgotten.
        """
        self._midway = True
        self._launcher.settle()
        self._running = None
        with self._guard:
            again = self._admission.in_flight()
            for ticket in again:
                ticket.entry, ticket.first, ticket.number = ticket.first or ticket.entry, None, -1
                ticket.held = ticket.branch = ticket.failure = ticket.fault = None
            waiting = list(self._admission.inbox)
            if cause is None:
                self._admission.queue_first(again)
            for known in (self._flight, self._onward, self._scheduler, self._arenas):
                known.clear()
            self._flight.futures = sum(t.started for t in [*waiting, *again] if not t.done)
            self._admission.forget_entering()
            self._midway = False
        try:
            if cause is not None:
                self._counters.recoveries += 1
                error = WorkerError(what=repr(cause))
                error.__cause__ = cause
                self._flight.finish_failed([(ticket, error) for ticket in again])
        finally:
            each(self._flight.answer, [t for t in self._flight.leaving if t.done])

    def _fail_all(self, error: Exception) -> None:
        self._launcher.settle()
        self._running = None
        self._scheduler.note_read(None)
        try:
            self._flight.fail([(ticket, error) for ticket in self._flight.live.values()])
        except Exception:  # what is known of them is broken, too
            self.restart(error)

    def _complete(self, batch: Batch, failed: dict[int, Failure]) -> list[Ticket]:
        self._onward.note(failed, self._flight.live)
        live = self._flight.live
        finished = [live[n] for n in batch.finished if n in live]
        if len(batch.events) or self._onward.held:
            stay = {id(t) for t in [*self._moves.go_on(batch), *self._onward.held.values()]}
            finished = [t for t in finished if id(t) not in stay]
            self._threads.told()
        return finished

    def _forget(self, tickets: Sequence[Ticket]) -> None:
        self._admission.take_back(tickets)
        running = [t for t in tickets if not t.done and self._flight.live.get(t.number) is t]
        self._scheduler.cancel([t.number for t in running])
        self._flight.retire(running)
        for ticket in tickets:
            if ticket.started and not ticket.done:
                self._flight.futures -= 1
            self._flight.abandon(ticket)
        self._flight.leaving = ()

    def take_dropped(self) -> list[Ticket]:
        taken: dict[int, Ticket] = {}  # each once
        while self.dropped:
            ticket = self.dropped.popleft()
            taken[id(ticket)] = ticket
        return list(taken.values())
