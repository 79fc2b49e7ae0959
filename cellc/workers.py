"""Workers: several engines of one model, one a device, or one a group of cores.

Duty: place requests. Each worker is an engine with arenas, a scheduler and a thread of its own;
plans and cells are shared, kernels too on CPUs. A request waits here, in the queue of the worker
with the fewest cell calls to run (of those on the device where its data is, and where its session
is, if it has one), until that worker's next turn; a worker that has nothing to do takes whole
requests that wait for others. From then on a request stays: its rows are there. Looks like an
`cellc.engine.Engine` to `cellc.compiled`, which has one of either.

Threads: launches run side by side, since kernels do without Python's lock; what the host does takes
turns. A blocking call on an idle worker runs its loop in its own thread, as with one engine.
"""

from __future__ import annotations

import operator
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from cellc import background, log
from cellc.engine import Engine
from cellc.errors import ClosedError, Overloaded
from cellc.launch import Crew
from cellc.machines import num_threads
from cellc.ticket import Counters, Ticket, together

ROOM = 2048  # requests that a worker has admitted, or is about to: more wait where others see them
WORTH = 3e-4  # seconds of work that are worth waking a worker for
CALL = 1e-6  # seconds of a cell call, at least
SOON = 0.05  # seconds between looks for what nobody tells of


class Worker:
    """An engine, the requests that wait for it, and its thread. The pool's lock guards all."""

    def __init__(self, number: int, engine: Engine, lock: threading.RLock) -> None:
        self.number, self.engine = number, engine
        self.work = threading.Condition(lock)  # told when there may be some
        self.thread: threading.Thread | None = None
        self.taken = 0  # requests that waited for others
        self.leaving = False
        self._waiting: deque[Ticket] = deque()
        self._calls = 0  # of those

    def __len__(self) -> int:
        return len(self._waiting)

    def holds(self, tickets: Sequence[Ticket]) -> bool:
        """Do just these wait?"""
        there = self._waiting
        return len(there) == len(tickets) and all(map(operator.is_, there, tickets))

    @property
    def load(self) -> int:
        """Cell calls to run until it is idle."""
        return self._calls + self.engine.load

    @property
    def busy(self) -> bool:
        """Has it admitted requests?"""
        return bool(self.engine.num_running or self.engine.num_waiting)

    @property
    def occupied(self) -> bool:
        """Would a request have to wait for others?"""
        return self.busy or self.engine.running

    @property
    def room(self) -> int:
        return ROOM - self.engine.num_running - self.engine.num_waiting

    def leave(self) -> None:
        """The interpreter ends: what waits is not run any more."""
        with self.work:
            self.leaving = True
            self.work.notify_all()

    def put(self, ticket: Ticket, calls: int) -> None:
        ticket.worker = self.number
        self._waiting.append(ticket)
        self._calls += calls

    def pop(self, count: int) -> list[Ticket]:
        """Up to so many of those that wait, the oldest first."""
        if count >= len(self._waiting):
            all_, self._waiting, self._calls = list(self._waiting), deque(), 0
            return all_
        popped = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self._calls -= sum(map(_calls, popped))
        return popped

    def take_back(self, wanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Those that wait and are wanted wait no more."""
        taken = [t for t in self._waiting if wanted(t)]
        if taken:
            gone = set(map(id, taken))
            self._waiting = deque(t for t in self._waiting if id(t) not in gone)
            self._calls -= sum(map(_calls, taken))
        return taken

    def share(self) -> list[Ticket]:
        """What an idle worker takes: half of the work, the youngest requests first."""
        wanted, calls = self.load / 2, 0
        found: list[Ticket] = []
        for ticket in reversed(self._waiting):
            if calls >= wanted or len(found) >= ROOM:
                break
            if not ticket.stays:
                found.append(ticket)
                calls += _calls(ticket)
        gone = set(map(id, found))
        return self.take_back(lambda t: id(t) in gone)


class Pool:
    """The workers, and which of them gets what. Threads hold on to it, callers to `Workers`."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.lock = threading.RLock()
        self.workers = [Worker(i, engine, self.lock) for i, engine in enumerate(engines)]
        devices = [engine.compiler.device for engine in engines]
        self._devices = devices if len(set(devices)) > 1 else None
        self.closing = self.paused = False

    # -- placing; the caller holds the lock --

    def place(self, tickets: Sequence[Ticket]) -> None:
        """Give requests to workers."""
        loads = [w.load + w.occupied for w in self.workers]
        sizes = [_calls(ticket) for ticket in tickets]
        apart, best = self._devices is not None or self._apart(sizes), -1
        for ticket, calls in zip(tickets, sizes, strict=True):
            if ticket.stays:
                chosen = ticket.worker
            elif apart or best < 0:
                chosen = best = self._least(loads, ticket)
            else:
                chosen = best
            loads[chosen] += calls
            self.workers[chosen].put(ticket, calls)

    def _least(self, loads: list[int], ticket: Ticket) -> int:
        """The worker with the least to do, of those on the device where a request's data is."""
        if self._devices is not None:
            for tensor in ticket.tensors:
                near = [i for i, device in enumerate(self._devices) if device == tensor.device]
                if near:
                    ticket.stays = True  # so do its results
                    return min(near, key=loads.__getitem__)
        return loads.index(min(loads))

    def _apart(self, sizes: Sequence[int]) -> bool:
        """Are requests that come together worth several workers?"""
        if len(sizes) < 2:
            return False
        counters = [w.engine.counters for w in self.workers]
        rows = sum(c.rows for c in counters)
        if not rows:
            return True
        each = max(sum(c.seconds for c in counters) / rows, CALL)
        return sum(sizes) * each > 2 * WORTH

    def directly(self, tickets: Sequence[Ticket]) -> tuple[Worker, list[Ticket]] | None:
        """A worker that is idle but for some of these, which it gets: whoever waits for them may
        run them.
        """
        worker = self.workers[tickets[0].worker]
        mine = [t for t in tickets if t.worker == worker.number]
        if self.paused or worker.occupied or len(mine) > ROOM or not worker.holds(mine):
            return None
        worker.engine.enqueue(worker.pop(len(mine)))
        return worker, mine

    def start(self) -> None:
        """Wake the workers that requests wait for."""
        for worker in self.workers:
            if len(worker):
                self._wake(worker)

    def _wake(self, worker: Worker) -> None:
        if worker.thread is None or not worker.thread.is_alive():
            name = f"cellc-worker-{worker.number}"
            worker.thread = threading.Thread(
                target=_serve, args=(self, worker), name=name, daemon=True
            )
            background.start_of(worker, worker.thread)
        worker.work.notify_all()

    def free(self, worker: Worker) -> None:
        """A worker that somebody ran directly: it may take what waits for others."""
        with self.lock:
            if any(len(w) for w in self.workers):
                self._wake(worker)

    # -- what a worker's thread does --

    def await_work(self, worker: Worker) -> bool:
        """Give a worker what it runs next, once there is something. False when it should end."""
        with self.lock:
            while True:
                if worker.leaving:
                    return False
                if not self.paused:
                    tickets = worker.pop(worker.room) or self._elsewhere(worker)
                    if tickets:  # no callback of a future runs here, while the lock is held
                        worker.engine.enqueue(tickets, limited=False)
                    if worker.busy:
                        return True
                    if self.closing:
                        return False
                others = any(len(w) for w in self.workers)  # they may be taken soon
                worker.work.wait(SOON if others else None)

    def _elsewhere(self, worker: Worker) -> list[Ticket]:
        """Whole requests that wait for another, for a worker that has nothing to do."""
        others = [w for w in self.workers if len(w) and w is not worker and w.occupied]
        if worker.busy or not others:
            return []
        tickets = max(others, key=lambda w: w.load).share()
        for ticket in tickets:
            ticket.worker = worker.number
        worker.taken += len(tickets)
        return tickets


def _serve(pool: Pool, worker: Worker) -> None:
    while True:
        try:
            if not pool.await_work(worker):
                return
            worker.engine.turn()
        except BaseException as error:  # of a callback, as SystemExit: the others go on
            log.info("schedule", f"a turn of worker {worker.number} ended in {error!r}")
            worker.engine.recover(error)


def _end(pool: Pool, process: int) -> None:
    """Threads end once nothing waits."""
    if os.getpid() != process:
        return  # a fork has none of the threads, but may have their lock
    with pool.lock:
        pool.closing = True
        for worker in pool.workers:
            worker.work.notify_all()


class Workers:
    """See the module."""

    def __init__(self, engines: Sequence[Engine], max_queue: int | None) -> None:
        self._pool, self._max_queue = Pool(engines), max_queue
        self._engines = list(engines)
        self._roomiest = max(engines, key=lambda engine: engine.memory_limit)
        self._news = threading.RLock()
        self._results = threading.Condition(self._news)  # told of pieces
        self._refreshing = threading.Lock()
        self._pid = os.getpid()
        weakref.finalize(self, _end, self._pool, os.getpid()).atexit = False

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
                self._results.wait(SOON)

    def _tell(self, _: Ticket) -> None:
        with self._news:
            self._results.notify_all()

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
            _end(self._pool, os.getpid())
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
        self._done = threading.Event()
        if not tickets:
            self._done.set()
        for ticket in tickets:
            ticket.told = self
            if ticket.done:  # before it could tell
                self(ticket)

    def __call__(self, ticket: Ticket) -> None:
        if ticket.done:
            self._open.discard(id(ticket))
            if not self._open:
                self._done.set()

    def wait(self) -> None:
        while not self._done.wait(SOON):
            if all(t.done for t in self._tickets):  # some were cancelled
                return


def _calls(ticket: Ticket) -> int:
    return ticket.entry.plan.num_calls + 1


def _cancelled(ticket: Ticket) -> bool:
    return ticket.future is not None and ticket.future.cancelled()


def crews(devices: Sequence[torch.device]) -> list[Crew]:
    """Threads of each worker: CPU workers share those that there are in equal parts."""
    if len(devices) == 1 or devices[0].type != "cpu":
        return [Crew(team) for team in range(len(devices))]
    threads = max(1, num_threads() // len(devices))
    return [Crew(team, threads) for team in range(len(devices))]
