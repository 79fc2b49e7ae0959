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

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cellc import background
from cellc.errors import ClosedError, Overloaded, RequestTimeout, UnsupportedError, twin
from cellc.flight import Flight
from cellc.kernels.native import find_arithmetic
from cellc.launch import EVERYBODY, Crew
from cellc.launcher import Launcher
from cellc.legs import Leg
from cellc.moves import Moves
from cellc.onward import Onward
from cellc.pacing import MAX_LIVE
from cellc.replay import Replays
from cellc.replica import Learned
from cellc.scheduler import Batch, Policy, Scheduler
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
        policy: Policy,
        memory_limit: int,
        max_steps: int | None = None,
        timeout: float | None = None,
        crew: Crew = EVERYBODY,
    ) -> None:
        self.compiler = compiler
        self.counters = Counters()
        self._scheduler = Scheduler(policy=policy, arithmetic=find_arithmetic())
        self._scheduler.record_lengths = compiler.record_lengths
        self._scheduler.priority = compiler.priority
        self._arenas = Arenas(compiler.tables, compiler.params, compiler.device)
        self._onward = Onward(compiler, self._scheduler, self._arenas, max_steps)
        what = compiler, self._scheduler, self._arenas
        self.launcher = Launcher(*what, self._onward, self.counters, max_batch, crew)
        self.flight = Flight(*what[1:], self._onward, self.counters, self._told)
        self._moves = Moves(*what, self._onward, self.flight, memory_limit, self._queue_first)
        self._replays = Replays(*what, self.launcher, self.flight)
        self._timeout, self._looked, self._crew = timeout, 0.0, crew
        self._max_queue, self._memory_limit = max_queue, memory_limit
        self._inbox: deque[Ticket] = deque()
        self._loop = threading.Lock()  # held by whoever runs the loop
        self._stepping = 0  # the thread that is in a turn of it
        # Guards the inbox; told when the loop is free or results are there.
        self._turn = threading.Condition()
        self._waiting = 0  # blocking calls whose requests somebody else runs
        self._background: threading.Thread | None = None
        self._closing = False
        self._dropped: deque[Ticket] = deque()  # to be cancelled

    # -- what callers use --

    def enqueue(self, tickets: Sequence[Ticket]) -> None:
        """Queue requests; raises Overloaded past `max_queue`, ClosedError after close."""
        now = time.perf_counter()
        with self._turn:
            if self._closing:
                raise ClosedError(what="this compiled model")
            limit, asked = self._max_queue, sum(not t.trial for t in tickets)
            if limit is not None and asked and len(self._inbox) + asked > limit:
                self._forget_cancelled()
            if limit is not None and asked and len(self._inbox) + asked > limit:
                raise Overloaded(waiting=len(self._inbox), limit=limit)
            for ticket in tickets:
                ticket.arrived = ticket.arrived or now
            self._inbox.extend(tickets)

    def _forget_cancelled(self) -> None:
        """Requests whose futures were cancelled wait no more; the caller holds the inbox."""
        gone = [t for t in self._inbox if t.future is not None and t.future.cancelled()]
        if gone:
            ids = set(map(id, gone))
            self._inbox = deque(t for t in self._inbox if id(t) not in ids)
        for ticket in gone:
            assert ticket.future is not None
            ticket.future.set_running_or_notify_cancel()
            ticket.abandon()

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Block until these queued requests are done, running the loop here if nobody does."""
        self.run_until(lambda: all(t.done for t in tickets), lambda: self._drive(tickets))

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
                    self._loop.release()
                    self._hand_over()
            else:
                with self._turn:
                    self._waiting += 1
                    try:
                        if self._loop.locked() and not done():
                            self._turn.wait(0.05)
                    finally:
                        self._waiting -= 1

    def check_outside(self) -> None:
        """Raises where a turn of the loop called back, and would wait for itself."""
        if self._stepping == threading.get_ident():
            raise UnsupportedError(
                what="waiting for a request, or close(), in a callback of a future",
                remedy="use submit() there, or another thread",
            )

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
        if self._stepping == threading.get_ident():
            self._dropped.extend(tickets)  # in a callback: at the next turn
            return
        with self._loop:
            self._forget(tickets)

    def _forget(self, tickets: Sequence[Ticket]) -> None:
        gone = {id(t) for t in tickets}
        with self._turn:
            self._inbox = deque(t for t in self._inbox if id(t) not in gone)
        running = [t for t in tickets if not t.done and self.flight.live.get(t.number) is t]
        self._scheduler.cancel([t.number for t in running])
        self.flight.retire(running)
        for ticket in tickets:
            if ticket.started and not ticket.done:
                self.flight.futures -= 1
            ticket.abandon()
        self.flight.leaving = ()

    def drop(self, ticket: Ticket) -> None:
        """Cancel a request now, or, where another thread runs the loop, at its next turn."""
        self._dropped.append(ticket)
        self._forget_dropped()

    def _forget_dropped(self) -> None:
        """Cancel what was dropped, unless a thread runs the loop: it does that."""
        while self._dropped and self._loop.acquire(blocking=False):
            try:
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
        with self._turn:
            if self._background is None or not self._background.is_alive():
                self._background = background.start(self, self._turn)
            self._turn.notify_all()

    def close(self) -> None:
        """Finish what was queued, then leave nothing behind."""
        self.check_outside()
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        with self._loop:
            while self._inbox or self.flight.live:
                self.step()
        thread = self._background
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._background = None

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
        """One turn of the loop in this thread, once it is free."""
        with self._loop:
            self.step()
        self._hand_over()

    @property
    def closed(self) -> bool:
        return self._closing

    @property
    def arena_bytes(self) -> int:
        return self._arenas.nbytes

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
        with self._turn:
            if not (self._inbox or self.flight.live) or self._loop.locked():
                return not self._closing
        if self._loop.acquire(blocking=False):
            try:
                while self._inbox or self.flight.live:
                    self.step()
            finally:
                self._loop.release()
                self._hand_over()
        return True

    @property
    def idle(self) -> bool:
        """Nothing for a background thread to do now."""
        return not (self._inbox or self.flight.live) or self._loop.locked()

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
        if isinstance(ticket.entry, Leg):
            return False
        with self._turn:
            if len(self._inbox) != 1 or self._inbox[0] is not ticket or not self._arenas.idle():
                return False
            try:
                if not self._arenas.prepare(ticket.entry.plan):
                    return False
            except Exception:
                return False  # `_admit` meets it again, and answers the ticket
            self._inbox.popleft()
        try:
            self._replays.run(ticket)
        except BaseException:  # this thread is interrupted
            self._restart()
            raise
        return True

    # -- the loop --

    def step(self) -> None:
        """One turn of the loop; the caller holds the loop."""
        start, kernels = time.perf_counter(), self.counters.seconds
        self._stepping = threading.get_ident()
        try:
            if self._dropped:
                self._forget(self._take_dropped())
            self._admit()
            if self._timeout is not None and start - self._looked > 0.01:
                self._expire(start)
            following = self.launcher.next(
                joined=bool(self.flight.futures), waited=bool(self._waiting)
            )
            if following is None:
                return
            batch, launch = following
            failed = self.launcher.run(batch, launch)
            finished = self._complete(batch, failed)
            self.flight.deliver(finished)
            self.launcher.note_host(time.perf_counter() - start - (self.counters.seconds - kernels))
        except Exception as error:  # ours: what is in flight fails with it, the engine goes on
            self._fail_all(error)
        except BaseException:  # this thread is interrupted
            self._restart()
            raise
        finally:
            self.flight.leaving, self._stepping = (), 0

    def _restart(self) -> None:
        """A turn was left midway: requests in flight begin again, from their data."""
        with self._turn:
            waiting = set(map(id, self._inbox))
            flying = {id(t): t for t in [*self.flight.live.values(), *self.flight.leaving]}
            again = [t for t in flying.values() if not t.done and id(t) not in waiting]
            for known in (self.flight, self._onward, self._scheduler, self._arenas):
                known.clear()
            for ticket in again:
                ticket.entry, ticket.first, ticket.number = ticket.first or ticket.entry, None, -1
                ticket.held = ticket.branch = ticket.failure = None
            self._inbox.extendleft(reversed(again))
        for ticket in self.flight.leaving:
            if ticket.done:
                self.flight.answer(ticket)

    def _expire(self, now: float) -> None:
        """End requests that have taken too long."""
        assert self._timeout is not None
        self._looked, since = now, now - self._timeout
        error = RequestTimeout(seconds=self._timeout)
        self.flight.fail([(t, error) for t in self.flight.live.values() if t.arrived < since])
        with self._turn:
            late = [t for t in self._inbox if t.arrived < since]
            self._inbox = deque(t for t in self._inbox if t.arrived >= since)
        self.flight.finish_failed([(ticket, twin(error)) for ticket in late])

    def _fail_all(self, error: Exception) -> None:
        self.flight.fail([(ticket, error) for ticket in self.flight.live.values()])

    def _admit(self) -> None:
        """Give waiting requests regions, copy their data in, tell the scheduler of their calls."""
        if not self._inbox:
            return
        tickets: list[Ticket] = []
        prepared: set[int] = set()
        broken: list[tuple[Ticket, Exception]] = []
        with self._turn:
            room = MAX_LIVE - len(self.flight.live)
            while self._inbox and len(tickets) < room:
                ticket = self._inbox[0]
                plan = ticket.entry.plan
                try:
                    if id(plan) not in prepared and not self._arenas.prepare(plan):
                        break
                except Exception as error:
                    broken.append((self._inbox.popleft(), error))
                    continue
                prepared.add(id(plan))
                needed = ticket.nbytes = self._arenas.bytes_of(plan)
                if self.flight.live_bytes + needed > self._memory_limit and (
                    self.flight.live or tickets
                ):
                    break
                self._inbox.popleft()
                if ticket.future is not None and not ticket.started:
                    ticket.started = True
                    if not ticket.future.set_running_or_notify_cancel():
                        ticket.started = False
                        ticket.abandon()
                        continue
                    self.flight.futures += 1
                self.flight.live_bytes += needed
                tickets.append(ticket)
        self.flight.finish_failed(broken)
        try:
            if tickets:
                self.flight.begin(tickets)
        except BaseException as error:  # nobody waits for ever
            lost = [t for t in tickets if t.number not in self.flight.live and not t.done]
            self.flight.live_bytes -= sum(t.nbytes for t in lost)
            if isinstance(error, Exception):  # ours
                self.flight.finish_failed([(ticket, twin(error)) for ticket in lost])
            else:  # this thread is interrupted, others go on
                with self._turn:
                    self._inbox.extendleft(reversed(lost))
            raise

    def _complete(self, batch: Batch, failed: dict[int, BaseException]) -> list[Ticket]:
        if failed:
            known = [(self.flight.live.get(number), error) for number, error in failed.items()]
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
            with self._turn:
                self._turn.notify_all()

    def _queue_first(self, tickets: Sequence[Ticket]) -> None:
        """These begin again, before all that wait."""
        with self._turn:
            self._inbox.extendleft(reversed(tickets))
