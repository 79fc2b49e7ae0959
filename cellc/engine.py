"""The engine: requests in, results out, cells batched across all that are in flight.

Duty: own the arenas and the scheduler of one compiled model and run the loop. `step` is the
architecture: admit, schedule, launch, complete, deliver. Comes in: tickets (a request with its
plan); goes out: their results.

Threads: a blocking call on an idle engine runs the loop in its own thread, so that a lone request
pays for no hand-over; where the loop runs already, it waits its turn. Requests that nobody blocks
on are run by a background thread, which exists only while there are such requests and sleeps when
it has nothing to do.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cellc import background, log, pacing
from cellc.admission import Admission
from cellc.deadlines import Deadlines
from cellc.errors import FORKED, CallbackWait, ClosedError, WorkerError
from cellc.flight import Flight, each
from cellc.kernels.native import find_arithmetic
from cellc.launch import EVERYBODY, Crew
from cellc.launcher import Launcher, Running
from cellc.legs import Leg
from cellc.limits import Limits
from cellc.moves import Moves
from cellc.onward import Onward
from cellc.pacing import ADMITTED, MAX_LIVE
from cellc.policies import Policy
from cellc.replay import Replays
from cellc.replica import Learned
from cellc.scheduler import Batch, Scheduler
from cellc.state import Arenas
from cellc.ticket import Counters, Ticket


class Engine:
    """See the module."""

    def __init__(
        self,
        compiler: Learned,
        *,
        max_batch: int | None,
        max_queue: int | None,
        policy: str | Policy,
        max_age: int,
        memory_limit: int,
        max_steps: int | None = None,
        max_calls: int | None = None,
        timeout: float | None = None,
        crew: Crew = EVERYBODY,
    ) -> None:
        self.compiler = compiler
        self.counters = Counters()
        self._scheduler = Scheduler(policy=policy, arithmetic=find_arithmetic(), max_age=max_age)
        self._scheduler.record_lengths = compiler.record_lengths
        self._scheduler.priority = compiler.priority
        self._arenas = Arenas(compiler.tables, compiler.params, compiler.device)
        self._onward = Onward(compiler, self._scheduler, self._arenas, max_steps)
        what = compiler, self._scheduler, self._arenas
        self.launcher = Launcher(*what, self._onward, self.counters, max_batch, crew)
        self.flight = Flight(*what[1:], self._onward, self.counters, self._told)
        # Guards the inbox; told when the loop is free or results are there. Entered by the lock
        # itself: an interruption inside `Condition.__enter__` would leave it locked.
        self._guard = threading.RLock()
        self._turn = threading.Condition(self._guard)
        self.memory_limit = memory_limit
        limits = Limits(self._arenas, memory_limit, max_calls)
        self._admission = Admission(self.flight, self._arenas, limits, max_queue, self._guard)
        self._moves = Moves(*what, self._onward, self.flight, limits, self._admission.queue_first)
        self._replays = Replays(*what, self.launcher, self.flight)
        if self._scheduler.urgency is not None:
            self._admission.deadlines = Deadlines(self._scheduler, self.launcher, self.flight)
        self._timeout, self._looked, self._crew = timeout, 0.0, crew
        self._pid = os.getpid()
        self._loop = threading.Lock()  # held by whoever runs the loop
        self._stepping = 0  # the thread that is in a turn of it
        self._waiting = 0  # blocking calls whose requests somebody else runs
        self._background: threading.Thread | None = None
        self._closing = self._leaving = False
        self._dropped: deque[Ticket] = deque()  # to be cancelled
        self._running: Running | None = None  # the launch that has not been completed
        self._arenas.settle = self.launcher.settle

    # -- what callers use --

    def enqueue(self, tickets: Sequence[Ticket], *, limited: bool = True) -> None:
        """Queue requests; raises Overloaded past `max_queue`, ClosedError after close. Those past
        limits of their own fail now (`limited`), or when they would run.
        """
        self._check_process()
        with self._guard:
            if self._closing:
                raise ClosedError(what="this compiled model")
            self._admission.enqueue(tickets, limited=limited)

    def within_limits(self, tickets: Sequence[Ticket]) -> Sequence[Ticket]:
        """Those that may run; the others fail now."""
        return self._admission.within_limits(tickets)

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Block until these queued requests are done, running the loop here if nobody does."""
        self.run_until(lambda: all(t.done for t in tickets), lambda: self._drive(tickets))

    def nudge(self) -> None:
        """More requests are being made: run beside that what is worth it by now, if nobody does."""
        if not self._beside or not self._loop.acquire(blocking=False):
            return
        try:
            self._guarded(self._nudged)
        finally:
            self._loop.release()  # what was begun goes on
            self._hand_over()

    def _nudged(self) -> None:
        self._admission.admit(time.perf_counter())
        while self.launcher.next_rows() >= pacing.ROWS_BESIDE:
            self._step()
            if self.launcher.busy_for_long:
                break

    def run_until(self, done: Callable[[], bool], drive: Callable[[], None] | None = None) -> None:
        """Block until something is so, running the loop here (by `drive`) if nobody does."""
        while not done():
            self.check_outside()
            if self._loop.acquire(blocking=False):
                try:
                    if drive is not None:
                        drive()
                    while not done():
                        self.step()
                finally:
                    self._leave_loop()
                    self._hand_over()
            else:
                with self._guard:
                    self._waiting += 1
                    try:
                        if self._loop.locked() and not done():
                            self._turn.wait(0.05)
                    finally:
                        self._waiting -= 1

    def check_outside(self) -> None:
        """Raises where a turn of the loop called back, and would wait for itself, and in a fork."""
        self._check_process()
        if self._stepping == threading.get_ident():
            raise CallbackWait(
                what="waiting for a request, or close(), in a callback of a future",
                remedy="use submit() there, or another thread",
            )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise FORKED

    def _drive(self, tickets: Sequence[Ticket]) -> None:
        if len(tickets) == 1 and not self.flight.live and self._alone(tickets[0]):
            return
        position, total = 0, len(tickets)
        while True:
            while position < total and tickets[position].done:
                position += 1
            if position == total:
                return
            self.step()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Forget requests that nobody waits for any more (a blocking call was interrupted)."""
        if os.getpid() != self._pid:
            return  # they are the parent's
        if self._stepping == threading.get_ident():
            self._dropped.extend(tickets)  # in a callback: at the next turn
            return
        with self._loop:
            self._guarded(self._land)
            self._forget(tickets)

    def _forget(self, tickets: Sequence[Ticket]) -> None:
        self._admission.take_back(tickets)
        running = [t for t in tickets if not t.done and self.flight.live.get(t.number) is t]
        self._scheduler.cancel([t.number for t in running])
        self.flight.retire(running)
        for ticket in tickets:
            if ticket.started and not ticket.done:
                self.flight.futures -= 1
            self.flight.abandon(ticket)
        self.flight.leaving = ()

    def drop(self, ticket: Ticket) -> None:
        """Cancel a request now, or, where another thread runs the loop, at its next turn."""
        if os.getpid() != self._pid:
            return  # it is the parent's
        self._dropped.append(ticket)
        self._forget_dropped()

    def _forget_dropped(self) -> None:
        """Cancel what was dropped, unless a thread runs the loop: it does that."""
        while self._dropped and self._loop.acquire(blocking=False):
            try:
                self._guarded(self._land)
                self._forget(self._take_dropped())
            finally:
                self._loop.release()
                self._tell()

    def _take_dropped(self) -> list[Ticket]:
        taken: dict[int, Ticket] = {}  # each once
        while self._dropped:
            ticket = self._dropped.popleft()
            taken[id(ticket)] = ticket
        return list(taken.values())

    def start(self) -> None:
        """Make sure that queued requests are run though nobody blocks on them."""
        with self._guard:
            if self._background is None or not self._background.is_alive():
                self._background = background.start(self, self._turn)
            self._turn.notify_all()

    def close(self) -> None:
        """Finish what was queued, then leave nothing behind."""
        if os.getpid() != self._pid:  # a fork has no part in what its parent runs
            self._closing = True
            return
        self.check_outside()
        with self._guard:
            self._closing = True
            self._turn.notify_all()
        with self._loop:
            while self._inbox or self.flight.live:
                self.step()
        thread = self._background
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._background = None

    def leave(self) -> None:
        """The interpreter ends: what is queued is not run any more."""
        with self._guard:
            self._closing = self._leaving = True
            self._turn.notify_all()

    def refresh(self) -> None:
        """The weights changed: requests in flight end with the old ones, later ones see the new."""
        with self.drained():
            self.compiler.refresh()
            self.forget_weights()

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Finish what is queued; then nothing runs meanwhile."""
        self.check_outside()
        with self._loop:
            while self._inbox or self.flight.live:
                self.step()
            yield
        self._hand_over()

    def forget_weights(self) -> None:
        """The weights changed, and nothing runs."""
        self._arenas.refresh()
        self._replays.clear()

    def turn(self) -> None:
        """One turn of the loop in this thread, which is the background's, once it is free."""
        with self._loop:
            self._background = threading.current_thread()
            self.step()
            self._guarded(self._land)
        self._hand_over()

    @property
    def _inbox(self) -> deque[Ticket]:
        return self._admission.inbox

    @property
    def closed(self) -> bool:
        return self._closing

    @property
    def arena_bytes(self) -> int:
        return self._arenas.nbytes

    @property
    def live_bytes(self) -> int:
        return self.flight.live_bytes

    @property
    def all_counters(self) -> list[Counters]:
        return [self.counters]

    @property
    def num_waiting(self) -> int:
        return len(self._inbox)

    @property
    def num_running(self) -> int:
        return len(self.flight.live)

    def figures(self) -> list[dict[str, Any]]:
        """Of this worker, the only one."""
        counters = self.counters
        return [
            {
                "device": str(self.compiler.device),
                "threads": self._crew.threads,
                "launches": counters.launches,
                "rows": counters.rows,
                "kernel_seconds": counters.seconds,
                "requests": counters.requests,
                "failed": counters.failed,
                "running": self.num_running,
            }
        ]

    @property
    def running(self) -> bool:
        """Is a thread in its loop?"""
        return self._loop.locked()

    @property
    def load(self) -> int:
        """Cell calls that its requests still have to run."""
        return self._scheduler.outstanding + sum(t.entry.plan.num_calls for t in list(self._inbox))

    # -- threads --

    def serve_once(self) -> bool:
        """One round of the background thread: run while there is work. False when it should end."""
        with self._guard:
            if not (self._inbox or self.flight.live) or self._loop.locked():
                return not self._closing
        if self._loop.acquire(blocking=False):
            try:
                while (self._inbox or self.flight.live) and not self._leaving:
                    self.step()
            finally:
                self._leave_loop()
                self._hand_over()
        return not self._leaving

    @property
    def idle(self) -> bool:
        """Nothing for a background thread to do now."""
        return not (self._inbox or self.flight.live) or self._loop.locked()

    @property
    def working(self) -> bool:
        """Are there requests that are not done?"""
        return bool(self._inbox or self.flight.live)

    def _leave_loop(self) -> None:
        try:
            if self._running is not None:
                self._guarded(self._land)
        finally:
            self._loop.release()

    def _hand_over(self) -> None:
        """The loop is free: wake whoever waits for it or for results."""
        self._tell()
        self._forget_dropped()

    def _tell(self) -> None:
        if self._waiting or self._background is not None:
            with self._guard:
                self._turn.notify_all()

    def _alone(self, ticket: Ticket) -> bool:
        """Run the only request there is by itself. False where the loop has to do it."""
        if isinstance(ticket.entry, Leg) or ticket.wish.due < math.inf:
            return False
        with self._guard:
            if len(self._inbox) != 1 or self._inbox[0] is not ticket or not self._arenas.idle():
                return False
            try:
                if not self._arenas.prepare(ticket.entry.plan):
                    return False
            except Exception:
                return False  # admission meets it again, and answers the ticket
            self._inbox.popleft()
            self._admission.note_begun([ticket])
        try:
            self._replays.run(ticket)
        except BaseException:  # this thread is interrupted
            self._restart()
            raise
        return True

    # -- the loop --

    def step(self) -> None:
        """One turn of the loop, after which a launch may still run; the caller holds the loop."""
        self._guarded(self._step)

    def _guarded(self, work: Callable[[], None]) -> None:
        self._stepping = threading.get_ident()
        try:
            work()
        except Exception as error:  # ours: what is in flight fails with it, the engine goes on
            self._fail_all(error)
        except BaseException as error:  # this thread is interrupted, or ends
            self._restart(error if threading.current_thread() is self._background else None)
            raise
        finally:
            self.flight.leaving, self._stepping = (), 0

    def _step(self) -> None:
        launcher = self.launcher
        start, blocked = time.perf_counter(), launcher.blocked
        if self.counters.timeline is not None:
            self.counters.timeline.begin_turn(len(self._inbox), len(self.flight.live))
        if self._dropped:
            self._land()
            self._forget(self._take_dropped())
        beside = self._beside
        self._admission.admit(start, ADMITTED if beside else MAX_LIVE)
        if self._timeout is not None and start - self._looked > 0.01:
            self._looked = start
            self._land()
            self._admission.expire(start, self._timeout)
        self._mark("admit")
        if self._running is not None and not launcher.worth_beside():
            self._land()  # more may be ready then
        following = launcher.next(
            joined=bool(self.flight.futures), waited=bool(self._waiting), beside=beside
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
                self._land()
        launcher.note_host(time.perf_counter() - start - (launcher.blocked - blocked))

    @property
    def _beside(self) -> bool:
        """May launches run beside the host's work?"""
        return self._scheduler.urgency is None and self.launcher.concurrent

    def _land(self) -> None:
        """End the launch that runs, if one does."""
        running, self._running = self._running, None
        if running is not None:
            self.launcher.settle()
            self._mark("launch")
            self._end(running)

    def _end(self, running: Running) -> None:
        """A launch has run: complete what it ends, deliver."""
        finished = self._complete(running.batch, self.launcher.end(running))
        self._mark("complete")
        self.flight.deliver(finished)
        self._mark("deliver")

    def _mark(self, phase: str) -> None:
        if self.counters.timeline is not None:
            self.counters.timeline.phase(phase)

    def recover(self, error: BaseException) -> None:
        """The background thread met what it should not: requests in flight fail with that."""
        with self._loop:
            try:
                self._restart(error)
            except BaseException as another:  # of a callback that is told of the first
                log.info("schedule", f"telling of {error!r} ended in {another!r}")
        self._tell()

    def _restart(self, cause: BaseException | None = None) -> None:
        """A turn was left midway: requests in flight begin again, from their data, or fail with a
        cause.
        """
        self.launcher.settle()
        self._running = None
        with self._guard:
            again = self._admission.in_flight()
            for known in (self.flight, self._onward, self._scheduler, self._arenas):
                known.clear()
            for ticket in again:
                ticket.entry, ticket.first, ticket.number = ticket.first or ticket.entry, None, -1
                ticket.held = ticket.branch = ticket.failure = None
            waiting = list(self._inbox)
            if cause is None:
                self._admission.queue_first(again)
            self.flight.futures = sum(t.started for t in [*waiting, *again] if not t.done)
        try:
            if cause is not None:
                self.counters.recoveries += 1
                error = WorkerError(what=repr(cause))
                error.__cause__ = cause
                self.flight.finish_failed([(ticket, error) for ticket in again])
        finally:
            each(self.flight.answer, [t for t in self.flight.leaving if t.done])

    def _fail_all(self, error: Exception) -> None:
        self.launcher.settle()
        self._running = None
        self._scheduler.note_read(None)
        self._onward.failing.clear()
        try:
            self.flight.fail([(ticket, error) for ticket in self.flight.live.values()])
        except Exception:  # what is known of them is broken, too
            self._restart(error)

    def _complete(self, batch: Batch, failed: dict[int, BaseException]) -> list[Ticket]:
        failing = self._onward.failing
        if failed or failing:
            failed, begun = {**failed, **failing}, self._scheduler.runs  # by the launch after it
            failing.clear()
            failing.update({n: error for n, error in failed.items() if begun(n)})
            ended = [n for n in failed if n not in failing]
            known = [(self.flight.live.get(number), failed[number]) for number in ended]
            self.flight.fail([(ticket, error) for ticket, error in known if ticket is not None])
        finished = [self.flight.live[n] for n in batch.finished if n in self.flight.live]
        if len(batch.events) or self._onward.held:
            stay = {id(t) for t in [*self._moves.go_on(batch), *self._onward.held.values()]}
            finished = [t for t in finished if id(t) not in stay]
            self._told()
        return finished

    def _told(self) -> None:
        """There may be results that somebody waits for."""
        if self._waiting:
            with self._guard:
                self._turn.notify_all()
