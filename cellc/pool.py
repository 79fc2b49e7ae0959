"""The pool: which worker gets what, and the workers' threads.

Duty: place requests. A request waits in the queue of the worker with the fewest cell calls to run
(of those on the device where its data is, and where its session is, if it has one), until that
worker's next turn; a worker that has nothing to do takes whole requests that wait for others. From
then on a request stays: its rows are there. Used by `cellc.workers`.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from cellc import background, log
from cellc.engine import Engine
from cellc.ticket import Ticket

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


def end(pool: Pool, process: int) -> None:
    """Threads end once nothing waits."""
    if os.getpid() != process:
        return  # a fork has none of the threads, but may have their lock
    with pool.lock:
        pool.closing = True
        for worker in pool.workers:
            worker.work.notify_all()


def _calls(ticket: Ticket) -> int:
    return ticket.entry.plan.num_calls + 1
