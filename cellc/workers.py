"""Workers: several engines of one model, one a device, or one a group of cores.

Duty: look like an `cellc.engine.Engine` to `cellc.compiled`, which has one of either. Each worker
is an engine with arenas, a scheduler and a thread of its own; plans and cells are shared, kernels
too on CPUs. Which worker a request goes to, `cellc.pool` decides.

Threads: launches run side by side, since kernels do without Python's lock; what the host does takes
turns. A blocking call on an idle worker runs its loop in its own thread, as with one engine.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from cellc.compiler import Compiler
from cellc.engine import Engine
from cellc.errors import ClosedError, Overloaded
from cellc.launch import Backend, Crew
from cellc.limits import usual_memory
from cellc.machines import num_threads
from cellc.options import Options
from cellc.pool import SOON, Pool, end
from cellc.replica import replicas
from cellc.ticket import Counters, Ticket, together
from cellc.waiting import Condition


class Workers:
    """See the module."""

    def __init__(self, engines: Sequence[Engine], max_queue: int | None) -> None:
        self._pool, self._max_queue = Pool(engines), max_queue
        self._engines = list(engines)
        firsts: dict[int, Engine] = {}
        for engine in engines:
            first = firsts.setdefault(id(engine.compiler), engine)
            engine.launcher.measure_with(first.launcher)
        self._roomiest = max(engines, key=lambda engine: engine.memory_limit)
        self._news = Condition()  # told of pieces
        self._refreshing = threading.Lock()
        self._pid = os.getpid()
        weakref.finalize(self, end, self._pool, os.getpid()).atexit = False

    # -- what callers use, as of an engine --

    def enqueue(self, tickets: Sequence[Ticket]) -> None:
        """Queue requests; raises Overloaded past `max_queue`, ClosedError after close."""
        now = time.perf_counter()
        with self._pool.lock:
            if self._pool.closing:
                raise ClosedError(what="this compiled model")
            self._check_room(sum(not t.trial for t in tickets))
            for ticket in tickets:
                ticket.arrived = now
                if ticket.told is None and not ticket.collects:
                    ticket.told = self._tell
            self._pool.place(self._roomiest.within_limits(tickets))

    def _check_room(self, asked: int) -> None:
        limit = self._max_queue
        if limit is None or not asked:
            return
        if self.num_waiting + asked > limit:
            for worker in self._pool.workers:
                for ticket in worker.take_back(_cancelled):
                    assert ticket.future is not None
                    ticket.future.set_running_or_notify_cancel()
                    worker.engine.flight.abandon(ticket)
        if self.num_waiting + asked > limit:
            self._engines[0].counters.refused += asked
            raise Overloaded(waiting=self.num_waiting, limit=limit)

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Block until these queued requests are done, running a worker's loop here if it is
        idle.
        """
        tickets = [t for t in tickets if not t.done]
        if not tickets:
            return
        self._check_outside()
        with self._pool.lock:
            worker, mine = self._pool.directly(tickets) or (None, [])
            latch = Latch([t for t in tickets if worker is None or t.worker != worker.number])
            self._pool.start()
        if worker is not None:
            worker.engine.run(mine)
            self._pool.free(worker)
        latch.wait()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Block until something is so that streams are told of."""
        self._check_outside()
        self.start()
        with self._news:
            while not done():
                self._news.wait(SOON)

    def _tell(self, _: Ticket) -> None:
        with self._news:
            self._news.notify_all()

    def _check_outside(self) -> None:
        for engine in self._engines:
            engine.check_outside()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Forget requests that nobody waits for any more: now, or at their workers' next turns."""
        if os.getpid() != self._pid:
            return  # they are the parent's
        with self._pool.lock:
            gone = set(map(id, tickets))
            for worker in self._pool.workers:
                for ticket in worker.take_back(lambda t: id(t) in gone):
                    worker.engine.flight.abandon(ticket)
        for ticket in tickets:
            if not ticket.done and ticket.worker >= 0:
                self._engines[ticket.worker].drop(ticket)

    def nudge(self, seconds: float) -> None:
        """More requests are on their way: they are run together."""

    def drop(self, ticket: Ticket) -> None:
        """Cancel a request."""
        self.cancel([ticket])

    def start(self) -> None:
        """Make sure that queued requests are run though nobody blocks on them."""
        with self._pool.lock:
            self._pool.start()

    def close(self) -> None:
        """Finish what was queued, then leave nothing behind."""
        if os.getpid() != self._pid:  # a fork has no part in what its parent runs
            self._pool.closing = True
            return
        self._check_outside()
        with self._pool.lock:
            self._pool.start()
            end(self._pool, os.getpid())
        for worker in self._pool.workers:
            thread = worker.thread
            if thread is not None:
                thread.join()
            worker.thread = None
        for engine in self._engines:
            engine.close()

    def refresh(self) -> None:
        """The weights changed: requests in flight end with the old ones, later ones see the new."""
        self._check_outside()
        pool = self._pool
        with self._refreshing:
            try:
                with pool.lock:
                    pool.paused = True
                    for worker in pool.workers:
                        worker.engine.enqueue(worker.pop(len(worker)), limited=False)
                with ExitStack() as stack:
                    for engine in self._engines:
                        stack.enter_context(engine.drained())
                    for learned in {id(e.compiler): e.compiler for e in self._engines}.values():
                        learned.refresh()
                    for engine in self._engines:
                        engine.forget_weights()
            finally:
                with pool.lock:
                    pool.paused = False
                    for worker in pool.workers:
                        worker.work.notify_all()

    # -- figures --

    @property
    def closed(self) -> bool:
        return self._pool.closing

    @property
    def counters(self) -> Counters:
        """Of all workers together, now."""
        return together(self.all_counters)

    @property
    def all_counters(self) -> list[Counters]:
        return [engine.counters for engine in self._engines]

    @property
    def arena_bytes(self) -> int:
        return sum(engine.arena_bytes for engine in self._engines)

    @property
    def live_bytes(self) -> int:
        return sum(engine.live_bytes for engine in self._engines)

    @property
    def num_waiting(self) -> int:
        return sum(len(w) + w.engine.num_waiting for w in self._pool.workers)

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines)

    def figures(self) -> list[dict[str, Any]]:
        """Of each worker."""
        return [
            {**engine.figures()[0], "taken": worker.taken, "waiting": len(worker)}
            for worker, engine in zip(self._pool.workers, self._engines, strict=True)
        ]


class Latch:
    """Waits until all of some requests are done; a ticket tells it."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets, self._open = tickets, set(map(id, tickets))
        self._done = Condition()
        for ticket in tickets:
            ticket.told = self
            if ticket.done:  # before it could tell
                self(ticket)

    def __call__(self, ticket: Ticket) -> None:
        if ticket.done:
            self._open.discard(id(ticket))
            if not self._open:
                with self._done:
                    self._done.notify_all()

    def wait(self) -> None:
        with self._done:
            while self._open and not all(t.done for t in self._tickets):  # some were cancelled
                self._done.wait(SOON)


def _cancelled(ticket: Ticket) -> bool:
    return ticket.future is not None and ticket.future.cancelled()


def make_engines(
    compiler: Compiler,
    backends: Sequence[Backend],
    devices: Sequence[torch.device],
    options: Options,
    max_batch: int | None,
    max_queue: int | None,
) -> list[Engine]:
    """One a device; several share its memory, and count what waits together."""
    return [
        Engine(
            learned,
            max_batch=max_batch,
            max_queue=max_queue if len(devices) == 1 else None,
            policy=options.policy,
            max_age=options.max_age,
            memory_limit=(options.memory_limit or usual_memory(learned.device))
            // devices.count(learned.device),
            max_calls=options.max_calls,
            max_steps=options.max_steps,
            timeout=options.timeout,
            crew=crew,
        )
        for learned, crew in zip(
            replicas(compiler, backends, devices), _crews(devices), strict=True
        )
    ]


def _crews(devices: Sequence[torch.device]) -> list[Crew]:
    """Threads of each worker: CPU workers share those that there are in equal parts."""
    if len(devices) == 1 or devices[0].type != "cpu":
        return [Crew(team) for team in range(len(devices))]
    threads = max(1, num_threads() // len(devices))
    return [Crew(team, threads) for team in range(len(devices))]
