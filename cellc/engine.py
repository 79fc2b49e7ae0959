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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cellc import background, log
from cellc.admission import Admission
from cellc.deadlines import Deadlines
from cellc.errors import FORKED, CallbackWait, ClosedError
from cellc.flight import Flight
from cellc.kernels.native import find_arithmetic
from cellc.launch import EVERYBODY, Crew
from cellc.launcher import Launcher
from cellc.legs import Leg
from cellc.limits import Limits
from cellc.loading import Loader
from cellc.loop import SOON, Loop
from cellc.moves import Moves
from cellc.onward import Onward
from cellc.policies import Policy
from cellc.replay import Replays
from cellc.replica import Learned
from cellc.scheduler import Scheduler
from cellc.state import Arenas
from cellc.ticket import Counters, Ticket
from cellc.turns import Turns
from cellc.waiting import Condition


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
        arithmetic = find_arithmetic()
        self._scheduler = Scheduler(policy=policy, arithmetic=arithmetic, max_age=max_age)
        self._scheduler.record_lengths = compiler.record_lengths
        self._scheduler.priority = compiler.priority
        self._arenas = Arenas(compiler.tables, compiler.params, compiler.device)
        self._onward = Onward(compiler, self._scheduler, self._arenas, max_steps)
        what = compiler, self._scheduler, self._arenas
        self.launcher = Launcher(*what, self._onward, self.counters, max_batch, crew)
        loader = Loader(self._arenas, arithmetic)
        self.flight = Flight(*what[1:], self._onward, self.counters, self.told, loader)
        # guards the inbox; told when the loop is free or results are there
        self._turn = Condition()
        self.memory_limit = memory_limit
        limits = Limits(self._arenas, memory_limit, max_calls)
        self._admission = Admission(self.flight, self._arenas, limits, max_queue, self._turn)
        moves = Moves(*what, self._onward, self.flight, limits, self._admission.queue_first)
        self._turns = Turns(
            self._scheduler,
            self._arenas,
            self._onward,
            self.launcher,
            self.flight,
            self._admission,
            moves,
            self._turn,
            timeout,
            self,
        )
        self._replays = Replays(*what, self.launcher, self.flight)
        if self._scheduler.urgency is not None:
            self._admission.deadlines = Deadlines(self._scheduler, self.launcher, self.flight)
        self._crew = crew
        self._pid = os.getpid()
        self._loop = Loop(self._turn)
        self._waiting = 0  # blocking calls whose requests somebody else runs
        self._background: threading.Thread | None = None
        self._closing = self._leaving = False

    # -- what callers use --

    def enqueue(self, tickets: Sequence[Ticket], *, limited: bool = True) -> None:
        """Queue requests; raises Overloaded past `max_queue`, ClosedError after close. Those past
        limits of their own fail now (`limited`), or when they would run.
        """
        self._check_process()
        with self._turn:
            if self._closing:
                raise ClosedError(what="this compiled model")
            self._admission.enqueue(tickets, limited=limited)

    def within_limits(self, tickets: Sequence[Ticket]) -> Sequence[Ticket]:
        """Those that may run; the others fail now."""
        return self._admission.within_limits(tickets)

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Block until these queued requests are done, running the loop here if nobody does."""
        self.run_until(lambda: all(t.done for t in tickets), lambda: self._drive(tickets))

    def nudge(self, seconds: float) -> None:
        """More requests are being made, for so long: run beside that what is worth it by now, if
        nobody does.
        """
        if self._turns.beside:
            try:  # what was begun goes on
                self._loop.run(lambda: self._turns.nudge(seconds), wait=False)
            finally:
                self._hand_over()

    def run_until(self, done: Callable[[], bool], drive: Callable[[], None] | None = None) -> None:
        """Block until something is so, running the loop here (by `drive`) if nobody does."""

        def work() -> None:
            if drive is not None:
                drive()
            while not done():
                self.step()

        while not done():
            self.check_outside()
            if not self._take_turns(work):
                with self._turn:
                    self._waiting += 1
                    try:
                        if self._loop.held and not done():
                            self._turn.wait(SOON)
                    finally:
                        self._waiting -= 1

    def check_outside(self) -> None:
        """Raises where a turn of the loop called back, and would wait for itself, and in a fork."""
        self._check_process()
        if self._loop.mine:
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
        if self._loop.mine:
            self._turns.dropped.extend(tickets)  # in a callback: at the next turn
            return
        self._loop.run(lambda: self._turns.forget(tickets), wait=True)

    def drop(self, ticket: Ticket) -> None:
        """Cancel a request now, or, where another thread runs the loop, at its next turn."""
        if os.getpid() != self._pid:
            return  # it is the parent's
        self._turns.dropped.append(ticket)
        self._forget_dropped()

    def _forget_dropped(self) -> None:
        """Cancel what was dropped, unless a thread runs the loop: it does that."""

        def work() -> None:
            self._turns.forget(self._turns.take_dropped())

        while self._turns.dropped and self._loop.run(work, wait=False):
            self._tell()

    def start(self) -> None:
        """Make sure that queued requests are run though nobody blocks on them."""
        with self._turn:
            if self._background is None or not self._background.is_alive():
                self._background = background.start(self, self._turn)
            self._turn.notify_all()

    def close(self) -> None:
        """Finish what was queued, then leave nothing behind."""
        if os.getpid() != self._pid:  # a fork has no part in what its parent runs
            self._closing = True
            return
        self.check_outside()
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        self._loop.run(self._finish, wait=True)
        thread = self._background
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._background = None

    def leave(self) -> None:
        """The interpreter ends: what is queued is not run any more."""
        with self._turn:
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
        with self._loop.holding():
            self._finish()
            yield
        self._hand_over()

    def _finish(self) -> None:
        """Run what is queued to its end."""
        while self._inbox or self.flight.live:
            self.step()

    def forget_weights(self) -> None:
        """The weights changed, and nothing runs."""
        self._arenas.refresh()
        self._replays.clear()

    def turn(self) -> None:
        """One turn of the loop in this thread, which is the background's, once it is free."""

        def work() -> None:
            self._background = threading.current_thread()
            self.step()
            self._turns.land()

        self._loop.run(work, wait=True)
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
        return self._loop.held

    @property
    def load(self) -> int:
        """Cell calls that its requests still have to run."""
        return self._scheduler.outstanding + sum(t.entry.plan.num_calls for t in list(self._inbox))

    # -- threads --

    def serve_once(self) -> bool:
        """One round of the background thread: run while there is work. False when it should end."""
        with self._turn:
            if not (self._inbox or self.flight.live) or self._loop.held:
                return not self._closing

        def work() -> None:
            while (self._inbox or self.flight.live) and not self._leaving:
                self.step()

        self._take_turns(work)
        return not self._leaving

    @property
    def idle(self) -> bool:
        """Nothing for a background thread to do now."""
        return not (self._inbox or self.flight.live) or self._loop.held

    @property
    def working(self) -> bool:
        """Are there requests that are not done?"""
        return bool(self._inbox or self.flight.live)

    def _take_turns(self, work: Callable[[], None]) -> bool:
        """Run the loop here, unless another thread does (False)."""

        def to_the_end() -> None:
            try:
                work()
            finally:
                self._turns.land()

        try:
            taken = self._loop.run(to_the_end, wait=False)
        except BaseException:
            self._hand_over()
            raise
        if taken:
            self._hand_over()
        return taken

    def _hand_over(self) -> None:
        """The loop is free: wake whoever waits for it or for results."""
        self._tell()
        self._forget_dropped()

    def _tell(self) -> None:
        if self._waiting or self._background is not None:
            with self._turn:
                self._turn.notify_all()

    def _alone(self, ticket: Ticket) -> bool:
        """Run the only request there is by itself. False where the loop has to do it."""
        if isinstance(ticket.entry, Leg) or ticket.wish.due < math.inf or ticket.trial:
            return False
        with self._turn:
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
            self._turns.restart()
            raise
        return True

    def step(self) -> None:
        """One turn of the loop; the caller holds it."""
        self._turns.step()

    def recover(self, error: BaseException) -> None:
        """The background thread met what it should not: requests in flight fail with that."""

        def work() -> None:
            try:
                self._turns.restart(error)
            except BaseException as another:  # of a callback that is told of the first
                log.info("schedule", f"telling of {error!r} ended in {another!r}")

        self._loop.run(work, wait=True)
        self._tell()

    @property
    def waited(self) -> bool:
        """Does a thread wait while another runs the loop?"""
        return bool(self._waiting)

    @property
    def in_background(self) -> bool:
        return threading.current_thread() is self._background

    def told(self) -> None:
        """There may be results that somebody waits for."""
        if self._waiting:
            with self._turn:
                self._turn.notify_all()
