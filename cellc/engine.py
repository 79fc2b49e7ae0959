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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import InvalidStateError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc import background, log
from cellc.compiler import Compiler
from cellc.costs import Costs
from cellc.errors import ClosedError, Overloaded, RequestTimeout, UnsupportedError, distinct, twin
from cellc.launch import Launch, Ragged
from cellc.legs import Branch, Entry, Leg
from cellc.machines import place
from cellc.onward import Onward
from cellc.paths import Replan
from cellc.plan import DataRows, OutputRows, ragged_range
from cellc.replay import Bound, Replays
from cellc.scheduler import Batch, Policy, Scheduler
from cellc.state import Arenas
from cellc.ticket import Counters, Ticket, bad_index, out_of_range

_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # that may be run ahead
MAX_LIVE = 4096  # requests admitted at a time; more wait without rows
ALONE, SHARED = 8e-3, 1e-3  # seconds a launch may take when nobody, or somebody, could join
PATIENT_ALONE, PATIENT = 64, 2  # launches that few calls of a deep cell wait for more, likewise
HOST_SHARE = 3  # but a shared launch may take this many times what a turn costs the host


class Engine:
    """See the module."""

    def __init__(
        self,
        compiler: Compiler,
        *,
        max_batch: int | None,
        max_queue: int | None,
        policy: Policy,
        memory_limit: int,
        max_steps: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self.compiler = compiler
        self.counters = Counters()
        self._scheduler = Scheduler(max_batch=max_batch or 512, policy=policy)
        self._scheduler.record_lengths = compiler.record_lengths
        self._scheduler.priority = compiler.priority
        self._arenas = Arenas(compiler.tables, compiler.params, compiler.device)
        self._onward = Onward(compiler, self._scheduler, self._arenas, max_steps)
        self._timeout, self._looked = timeout, 0.0
        self._max_queue, self._memory_limit = max_queue, memory_limit
        self._live_bytes = 0  # of regions given out
        self._inbox: deque[Ticket] = deque()
        self._live: dict[int, Ticket] = {}
        self._leaving: Sequence[Ticket] = ()  # that were live until now
        self._numbers: list[int] = []
        self._next_number = 0
        self._seconds: dict[tuple[int, int], float] = {}  # (cell, log2 rows): measured, a step
        self._costs = Costs(place(compiler.backend.name, compiler.device))  # before that
        self._host_seconds = 0.0  # of a turn of the loop, kernels aside, averaged
        self._turn_seconds = 0.0  # of it, what every turn takes: to make a launch
        self._loop = threading.Lock()  # held by whoever runs the loop
        self._stepping = 0  # the thread that is in a turn of it
        self._turn = (
            threading.Condition()
        )  # guards the inbox; told when the loop is free or results are there
        self._waiting = 0  # blocking calls whose requests somebody else runs
        self._futures = 0  # admitted requests that nobody blocks on: others like them may come
        self._background: threading.Thread | None = None
        self._closing = False
        self._dropped: deque[Ticket] = deque()  # to be cancelled
        self._replays = Replays()

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
                ticket.arrived = now
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
            self._check_outside()
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

    def _check_outside(self) -> None:
        """Raises where a turn of the loop called back, and would wait for itself."""
        if self._stepping == threading.get_ident():
            raise UnsupportedError(
                what="waiting for a request, or close(), in a callback of a future",
                remedy="use submit() there, or another thread",
            )

    def _drive(self, tickets: Sequence[Ticket]) -> None:
        if len(tickets) == 1 and not self._live and self._alone(tickets[0]):
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
        running = [t for t in tickets if not t.done and self._live.get(t.number) is t]
        self._scheduler.cancel([t.number for t in running])
        self._retire(running)
        for ticket in tickets:
            if ticket.started and not ticket.done:
                self._futures -= 1
            ticket.abandon()
        self._leaving = ()

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
        self._check_outside()
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        with self._loop:
            while self._inbox or self._live:
                self.step()
        thread = self._background
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._background = None

    def refresh(self) -> None:
        """The weights changed: requests in flight end with the old ones, later ones see the new."""
        self._check_outside()
        with self._loop:
            while self._inbox or self._live:
                self.step()
            self.compiler.refresh()
            self._arenas.refresh()
            self._replays.clear()

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
        return len(self._live)

    # -- threads --

    def serve_once(self) -> bool:
        """One round of the background thread: run while there is work. False when it should end."""
        with self._turn:
            if not (self._inbox or self._live) or self._loop.locked():
                return not self._closing
        if self._loop.acquire(blocking=False):
            try:
                while self._inbox or self._live:
                    self.step()
            finally:
                self._loop.release()
                self._hand_over()
        return True

    @property
    def idle(self) -> bool:
        """Nothing for a background thread to do now."""
        return not (self._inbox or self._live) or self._loop.locked()

    def _hand_over(self) -> None:
        """The loop is free: wake whoever waits for it or for results."""
        self._tell()
        self._forget_dropped()

    def _tell(self) -> None:
        if self._waiting or self._background is not None:
            with self._turn:
                self._turn.notify_all()

    # -- a request alone --

    def _alone(self, ticket: Ticket) -> bool:
        """Run the only request there is from the launches recorded when its plan last ran alone.

        False where there is no such record: then the loop runs it, and records.
        """
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
        plan = ticket.entry.plan
        bases = self._arenas.allocate([plan])
        replay = self._replays.get(ticket.entry, self._arenas.generation)
        try:
            errors = self._copy_in([ticket], bases)
            if errors:
                error: BaseException | None = errors[0]
            elif replay is None:
                error = self._record(ticket, bases)
            else:
                error = self._replay(replay)
            made = (
                []
                if error
                else self._arenas.read([(o, int(bases[0, o.type])) for o in plan.outputs])
            )
        except Exception as raised:
            error, made = raised, []
        finally:
            self._arenas.free([plan], bases)
        self._finish(ticket, None if error else ticket.entry.rebuild(made), error)
        return True

    def _record(self, ticket: Ticket, bases: npt.NDArray[np.int64]) -> BaseException | None:
        """Run one admitted request by itself, keeping its launches."""
        scheduler, entry = self._scheduler, ticket.entry
        number = self._new_number()
        self._numbers.append(number)
        start = time.perf_counter()
        launches: list[Bound] = []
        failed: dict[int, BaseException] = {}
        if entry.plan.num_calls:
            scheduler.add([entry.plan], [number], bases)
            try:
                while (batch := self._schedule()) is not None and not failed:
                    launch = self._tables(batch)
                    failed = self._launch(batch, launch)
                    launches.append(
                        Bound.of(self.compiler.kernel(batch.cell), launch, self._arenas)
                    )
            finally:
                scheduler.cancel([number])
        if not failed and time.perf_counter() - start < 2 * ALONE:
            self._replays.put(entry, self._arenas.generation, launches)
        return next(iter(failed.values()), None)

    def _replay(self, launches: Sequence[Bound]) -> BaseException | None:
        start = time.perf_counter()
        for bound in launches:
            if len(bound.run()):
                return bad_index(bound.cell)
        counters = self.counters
        counters.seconds += time.perf_counter() - start
        counters.launches += len(launches)
        counters.rows += sum(b.rows for b in launches)
        counters.steps += sum(b.steps for b in launches)
        return None

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
            begin = time.perf_counter()
            batch = self._schedule()
            if batch is None:
                return
            tables = self._tables(batch)
            self._turn_seconds += (
                min(time.perf_counter() - begin, SHARED) - self._turn_seconds
            ) / 16
            failed = self._launch(batch, tables)
            finished = self._complete(batch, failed)
            self._deliver(finished)
            host = time.perf_counter() - start - (self.counters.seconds - kernels)
            self._host_seconds += (min(host, ALONE) - self._host_seconds) / 16
        except Exception as error:  # ours: what is in flight fails with it, the engine goes on
            self._fail_all(error)
        except BaseException:  # this thread is interrupted
            self._restart()
            raise
        finally:
            self._leaving, self._stepping = (), 0

    def _restart(self) -> None:
        """A turn was left midway: requests in flight begin again, from their data."""
        with self._turn:
            waiting = set(map(id, self._inbox))
            flying = {id(t): t for t in [*self._live.values(), *self._leaving]}
            again = [t for t in flying.values() if not t.done and id(t) not in waiting]
            for known in (self._live, self._onward, self._scheduler, self._arenas):
                known.clear()
            self._live_bytes = 0
            self._numbers, self._next_number = [], 0
            for ticket in again:
                ticket.entry, ticket.first, ticket.number = ticket.first or ticket.entry, None, -1
                ticket.held = ticket.branch = ticket.failure = None
            self._inbox.extendleft(reversed(again))
        for ticket in self._leaving:
            if ticket.done:
                self._answer(ticket)

    def _expire(self, now: float) -> None:
        """End requests that have taken too long."""
        assert self._timeout is not None
        self._looked, since = now, now - self._timeout
        error = RequestTimeout(seconds=self._timeout)
        self._fail([(t, error) for t in self._live.values() if t.arrived < since])
        with self._turn:
            late = [t for t in self._inbox if t.arrived < since]
            self._inbox = deque(t for t in self._inbox if t.arrived >= since)
        self._finish_failed([(ticket, twin(error)) for ticket in late])

    def _fail_all(self, error: Exception) -> None:
        self._fail([(ticket, error) for ticket in self._live.values()])

    def _fail(self, failed: Sequence[tuple[Ticket, BaseException]]) -> None:
        """End requests in flight with errors."""
        tickets = [ticket for ticket, _ in failed]
        self._scheduler.cancel([t.number for t in tickets])
        self._retire(tickets)
        self._finish_failed(failed)

    def _finish_failed(self, failed: Sequence[tuple[Ticket, BaseException]]) -> None:
        errors = distinct([error for _, error in failed])
        for (ticket, _), error in zip(failed, errors, strict=True):
            self._finish(ticket, error=error)

    def _admit(self) -> None:
        """Give waiting requests regions, copy their data in, tell the scheduler of their calls."""
        if not self._inbox:
            return
        tickets: list[Ticket] = []
        prepared: set[int] = set()
        broken: list[tuple[Ticket, Exception]] = []
        with self._turn:
            room = MAX_LIVE - len(self._live)
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
                if self._live_bytes + needed > self._memory_limit and (self._live or tickets):
                    break
                self._inbox.popleft()
                if ticket.future is not None and not ticket.started:
                    ticket.started = True
                    if not ticket.future.set_running_or_notify_cancel():
                        ticket.started = False
                        ticket.abandon()
                        continue
                    self._futures += 1
                self._live_bytes += needed
                tickets.append(ticket)
        self._finish_failed(broken)
        try:
            if tickets:
                self._begin(tickets)
        except BaseException as error:  # nobody waits for ever
            lost = [t for t in tickets if t.number not in self._live and not t.done]
            self._live_bytes -= sum(t.nbytes for t in lost)
            if isinstance(error, Exception):  # ours
                self._finish_failed([(ticket, twin(error)) for ticket in lost])
            else:  # this thread is interrupted, others go on
                with self._turn:
                    self._inbox.extendleft(reversed(lost))
            raise

    def _begin(self, tickets: list[Ticket]) -> None:
        plans = [t.entry.plan for t in tickets]
        bases = self._arenas.allocate(plans)
        try:
            errors = self._copy_in(tickets, bases)
        except BaseException:
            self._arenas.free(plans, bases)
            raise
        if errors:
            wrong = sorted(errors)
            self._live_bytes -= sum(tickets[i].nbytes for i in wrong)
            self._arenas.free([plans[i] for i in wrong], bases[wrong])
            for i in wrong:
                self._finish(tickets[i], error=errors[i])
            good = [i for i in range(len(tickets)) if i not in errors]
            tickets, plans, bases = (
                [tickets[i] for i in good],
                [plans[i] for i in good],
                bases[good],
            )
        if not tickets:
            return
        for ticket, base in zip(tickets, bases, strict=True):
            ticket.bases = base
            ticket.number = self._numbers.pop() if self._numbers else self._new_number()
            self._live[ticket.number] = ticket
        self._add(tickets)

    def _add(self, tickets: Sequence[Ticket]) -> None:
        """Tell the scheduler of requests' calls; deliver those that have none."""
        calling = [t for t in tickets if t.entry.plan.num_calls]
        for size in {len(t.bases) for t in calling}:
            alike = [t for t in calling if len(t.bases) == size]
            bases = np.concatenate([t.bases for t in alike]).reshape(len(alike), size)
            self._scheduler.add([t.entry.plan for t in alike], [t.number for t in alike], bases)
        for ticket in tickets:
            if isinstance(ticket.entry, Leg):
                self._onward.enter(ticket)
        self._deliver([t for t in tickets if not t.entry.plan.num_calls], scheduled=False)

    def _new_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _copy_in(
        self, tickets: list[Ticket], bases: npt.NDArray[np.int64]
    ) -> dict[int, BaseException]:
        """Copy requests' tensors into their regions; returns those that failed, by position."""
        alike: dict[Any, tuple[DataRows, list[int], list[int], list[torch.Tensor]]] = {}
        plan = tickets[0].entry.plan
        if len(tickets) > 1 and all(t.entry.plan is plan for t in tickets):
            everyone = list(range(len(tickets)))
            for rows in plan.data:
                if rows.leaf >= 0:
                    starts = (bases[:, rows.type] + rows.start).tolist()
                    tensors = [t.tensor(rows.leaf) for t in tickets]
                    alike[rows] = (rows, everyone, starts, tensors)
            return self._write(alike.values())
        first_slots = bases.tolist()
        for i, ticket in enumerate(tickets):
            for rows in ticket.entry.plan.data:
                if rows.leaf < 0:
                    continue  # carried from the leg before
                one = rows.count == 1
                key = (rows.leaf, rows.type, rows.row_dims, rows.bound, rows.name, one)
                if key not in alike:
                    alike[key] = (rows, [], [], [])
                _, members, starts, tensors = alike[key]
                members.append(i)
                starts.append(first_slots[i][rows.type] + rows.start)
                tensors.append(ticket.tensor(rows.leaf))
        return self._write(alike.values())

    def _write(
        self, alike: Iterable[tuple[DataRows, list[int], list[int], list[torch.Tensor]]]
    ) -> dict[int, BaseException]:
        """Copy tensors, each group (rows of one, which tickets, first slots, tensors); those that
        failed, by ticket.
        """
        errors: dict[int, BaseException] = {}
        for rows, members, starts, tensors in alike:
            try:
                wrong = self._arenas.write(rows, starts, tensors)
            except Exception:  # one of them is a kind of tensor that cannot be copied so
                wrong = []
                for k, member in enumerate(members):
                    try:
                        tensors[k] = tensors[k].resolve_conj().resolve_neg()
                        if self._arenas.write(rows, [starts[k]], [tensors[k]]):
                            wrong.append(k)
                    except Exception as error:
                        errors[member] = error
            for k in wrong:
                errors[members[k]] = out_of_range(rows.name, rows.bound, tensors[k])
        return errors

    def _schedule(self) -> Batch | None:
        self._scheduler.patience = PATIENT if self._futures else PATIENT_ALONE
        chosen = self._scheduler.peek()
        if chosen is None:
            return None
        cell, rows = chosen
        measured = self._seconds.get((cell, rows.bit_length()))
        seconds = measured or self._costs.seconds(self.compiler.by_number[cell], rows)
        shared = min(max(SHARED, HOST_SHARE * self._host_seconds), ALONE)
        budget = shared if self._futures or self._waiting else ALONE
        steps = max(1, int(budget / max(seconds, 1e-7)))
        if self.compiler.paths.on:
            steps = min(steps, self._ahead(seconds))
        return self._scheduler.next(steps)

    def _ahead(self, seconds: float) -> int:
        """How many steps a launch may run beyond questions that are not answered: most useful steps
        a second, if a step takes `seconds` and requests stop as often as they did.
        """
        stopping = min(max(self._onward.stopping, 1e-3), 1.0)
        turn = 2 * max(self._turn_seconds, 1e-5)  # to make a launch, and to read its answers

        def useful(steps: int) -> float:
            return (1 - (1 - stopping) ** steps) / (turn + steps * seconds)

        return max(_STEPS, key=useful)

    def _launch(self, batch: Batch, launch: Launch) -> dict[int, BaseException]:
        """Run a batch; returns the requests that failed, with why."""
        start = time.perf_counter()
        try:
            kernel = self.compiler.kernel(batch.cell)
            start = time.perf_counter()  # it may have been made just now
            invalid = kernel(launch, self._arenas)
        except Exception as error:
            requests = self._scheduler.requests_of(batch.calls)
            return dict.fromkeys(np.unique(requests).tolist(), error)
        took = time.perf_counter() - start
        self._measure(batch, took)
        if log.enabled("schedule"):
            name = self.compiler.by_number[batch.cell].name
            log.info(
                "schedule",
                f"{name}: {len(batch.calls)} rows in {launch.num_steps} steps, {took * 1e6:.0f} us",
            )
        if not len(invalid):
            return {}
        requests = self._scheduler.requests_of(batch.calls)
        wrong = bad_index(self.compiler.by_number[batch.cell])
        return dict.fromkeys(np.unique(requests[np.asarray(invalid)]).tolist(), wrong)

    def _tables(self, batch: Batch) -> Launch:
        cell = self.compiler.by_number[batch.cell]
        table = batch.table
        if not any(spec.ragged for spec in cell.inputs):
            count = len(cell.inputs)
            return Launch(batch.steps, [table[i] for i in range(count)], table[count:])
        inputs: list[Any] = []
        k = 0
        for spec in cell.inputs:
            if spec.ragged:
                lengths = table[k + 1]
                index = ragged_range(table[k].astype(np.int64), lengths.astype(np.int64))
                offsets = np.zeros(len(lengths) + 1, np.int32)
                np.cumsum(lengths, out=offsets[1:])
                inputs.append(Ragged(offsets, self._scheduler.entries[index]))
                k += 2
            else:
                inputs.append(table[k])
                k += 1
        return Launch(batch.steps, inputs, table[k:])

    def _measure(self, batch: Batch, took: float) -> None:
        counters = self.counters
        counters.launches += 1
        counters.rows += len(batch.calls)
        counters.steps += len(batch.steps) - 1
        counters.seconds += took
        key = (batch.cell, int(batch.steps[1]).bit_length())
        known = self._seconds.get(key)
        step = took / (len(batch.steps) - 1)
        self._seconds[key] = step if known is None else min(step, 0.8 * known + 0.2 * step)

    def _complete(self, batch: Batch, failed: dict[int, BaseException]) -> list[Ticket]:
        if failed:
            known = [(self._live.get(number), error) for number, error in failed.items()]
            self._fail([(ticket, error) for ticket, error in known if ticket is not None])
        finished = [self._live[n] for n in batch.finished if n in self._live]
        if len(batch.events) or self._onward.held:
            stay = {id(t) for t in [*self._go_on(batch), *self._onward.held.values()]}
            finished = [t for t in finished if id(t) not in stay]
            if self._waiting:
                with self._turn:
                    self._turn.notify_all()
        return finished

    def _go_on(self, batch: Batch) -> list[Ticket]:
        """Move requests whose answers lead elsewhere than their legs; those that were, or ended."""
        onward = self._onward
        if len(batch.events):
            going, failed = onward.after(batch, self._live)
        else:
            going, failed = onward.settle()
        moved = [ticket for ticket, _ in [*going, *failed]]
        anew = [t for t, error in failed if isinstance(error, Replan) and t.call is not None]
        self._fail([(t, error) for t, error in failed if not any(t is other for other in anew)])
        self._plan_anew(anew)
        ending = [(t, b) for t, b in going if b.outputs is not None]
        self._deliver([t for t, _ in ending], [b for _, b in ending])
        self._begin_again([(t, b.leg) for t, b in going if b.again])
        self._move([(t, b) for t, b in going if b.outputs is None and not b.again])
        return moved

    def _plan_anew(self, tickets: Sequence[Ticket]) -> None:
        """Numbers of these requests are no data, after all: they begin again with other plans."""
        for ticket in tickets:
            try:
                entry, tensors = self.compiler.planned_anew(*ticket.call)
            except Exception as error:
                self._fail([(ticket, error)])
                continue
            self._begin_again([(ticket, entry)])
            ticket.tensors = tensors

    def _begin_again(self, going: Sequence[tuple[Ticket, Entry]]) -> None:
        """Run requests from their data again, along answers known by now."""
        tickets = [ticket for ticket, _ in going]
        self._scheduler.cancel([t.number for t in tickets])
        self._retire(tickets)
        for ticket, leg in going:
            ticket.entry, ticket.first, ticket.number = leg, None, -1
        with self._turn:
            self._inbox.extendleft(reversed(tickets))

    def _move(self, going: Sequence[tuple[Ticket, Branch]]) -> None:
        """Give requests the regions of their next legs, with the rows that these need."""
        moving: list[tuple[Ticket, Branch]] = []
        stuck: list[Ticket] = []
        for ticket, branch in going:
            plan = branch.leg.plan
            try:
                fits = self._arenas.prepare(plan)
            except Exception as error:
                self._fail([(ticket, error)])
                continue
            more = self._arenas.bytes_of(plan) - ticket.nbytes if fits else 0
            if not fits or (self._live_bytes + more > self._memory_limit and len(self._live) > 1):
                stuck.append(ticket)
                continue
            self._live_bytes += more
            ticket.nbytes += more
            moving.append((ticket, branch))
        if stuck:
            ways = zip(stuck, self._onward.again(stuck), strict=True)
            found = [(t, w) for t, w in ways]
            self._fail([(t, w) for t, w in found if isinstance(w, Exception)])
            self._begin_again([(t, w.leg) for t, w in found if isinstance(w, Branch)])
        if not moving:
            return
        tickets = [ticket for ticket, _ in moving]
        plans = [branch.leg.plan for _, branch in moving]
        bases = self._arenas.allocate(plans)
        self._carry(moving, bases)
        self._scheduler.cancel([t.number for t in tickets])
        self._free(tickets)
        for (ticket, branch), base in zip(moving, bases, strict=True):
            ticket.first = ticket.first or ticket.entry
            ticket.entry, ticket.bases = branch.leg, base
        errors = self._copy_in(tickets, bases)
        self._fail([(tickets[i], error) for i, error in errors.items()])
        self._add([t for i, t in enumerate(tickets) if i not in errors])

    def _carry(self, moving: Sequence[tuple[Ticket, Branch]], bases: npt.NDArray[np.int64]) -> None:
        """Copy rows from regions that requests leave to those that they get."""
        copies: dict[int, tuple[list[Any], list[Any]]] = {}
        for (ticket, branch), base in zip(moving, bases, strict=True):
            for type, slots, owned, start in branch.moves:
                sources, targets = copies.setdefault(type, ([], []))
                sources.append(slots + owned * ticket.bases[type])
                targets.append(np.arange(start, start + len(slots)) + base[type])
        for type, (sources, targets) in copies.items():
            self._arenas.move(type, np.concatenate(sources), np.concatenate(targets))

    def _deliver(
        self,
        tickets: Sequence[Ticket],
        ends: Sequence[Branch] | None = None,
        *,
        scheduled: bool = True,
    ) -> None:
        """Gather finished requests' outputs, free their rows, answer. `ends`: of requests that end
        before their plans do.
        """
        if not tickets:
            return
        entries: list[Entry] = [t.entry for t in tickets] if ends is None else [b.leg for b in ends]
        outputs = [e.outputs for e in entries] if ends is None else [b.outputs or () for b in ends]
        if ends is None:  # else what was yielded is handed on, and what follows was run in vain
            for ticket in tickets:
                self._onward.finish(ticket)
        made = self._read(tickets, outputs)
        numbers = [t.number for t in tickets]
        if ends is not None:
            self._scheduler.cancel(numbers)
        elif scheduled:
            self._scheduler.release(numbers)
        self._retire(tickets)
        now = time.perf_counter()
        for ticket, entry, tensors in zip(tickets, entries, made, strict=True):
            result, error = self._end(ticket, entry, tensors)
            self._finish(ticket, result, error, now)
        if self._waiting:
            with self._turn:
                self._turn.notify_all()

    @staticmethod
    def _end(
        ticket: Ticket, entry: Entry, tensors: Sequence[torch.Tensor]
    ) -> tuple[Any, BaseException | None]:
        """What a request that ran to its end gives: a result, or the error that it raises."""
        try:
            if isinstance(entry, Leg):
                if ticket.draws is not None:
                    ticket.draws.end(entry.draws)
                if entry.error is not None:
                    return None, twin(entry.error)
            return entry.result.rebuild(tensors), None
        except Exception as error:
            return None, error

    def _read(
        self, tickets: Sequence[Ticket], outputs: Sequence[tuple[OutputRows, ...]]
    ) -> Sequence[Sequence[torch.Tensor]]:
        """Output tensors of each ticket."""
        first = outputs[0]
        if first and len(tickets) > 1 and all(given is first for given in outputs):
            bases = np.stack([t.bases for t in tickets])
            columns = [self._arenas.read_alike(rows, bases[:, rows.type]) for rows in first]
            return list(zip(*columns, strict=True))
        wanted = [
            (rows, int(t.bases[rows.type]))
            for t, given in zip(tickets, outputs, strict=True)
            for rows in given
        ]
        made = iter(self._arenas.read(wanted))
        return [[next(made) for _ in given] for given in outputs]

    def _retire(self, tickets: Sequence[Ticket]) -> None:
        """Free the regions of requests that have ended."""
        self._leaving = tickets
        for ticket in tickets:
            del self._live[ticket.number]
            self._onward.release(ticket)
            self._numbers.append(ticket.number)
        self._live_bytes -= sum(t.nbytes for t in tickets)
        self._free(tickets)

    def _free(self, tickets: Sequence[Ticket]) -> None:
        """Give the regions of requests back."""
        for size in {len(t.bases) for t in tickets}:
            alike = [t for t in tickets if len(t.bases) == size]
            bases = np.concatenate([t.bases for t in alike]).reshape(len(alike), size)
            self._arenas.free([t.entry.plan for t in alike], bases)

    def _finish(
        self,
        ticket: Ticket,
        result: Any = None,
        error: BaseException | None = None,
        now: float | None = None,
    ) -> None:
        if ticket.streams and ticket.collects and error is None:
            result = list(ticket.pieces)
        ticket.result, ticket.error = result, error
        if ticket.before_end is not None:
            ticket.before_end(ticket)
            error = ticket.error
        ticket.done = True
        ticket.tensors = ()
        if ticket.told is not None:
            ticket.told(ticket)
        if not ticket.trial:
            counters = self.counters
            counters.requests += 1
            counters.failed += error is not None
            counters.latencies.append((now or time.perf_counter()) - ticket.arrived)
        if ticket.future is not None:
            self._futures -= ticket.started
            self._answer(ticket)

    @staticmethod
    def _answer(ticket: Ticket) -> None:
        """Tell the future of a request that has ended."""
        if ticket.future is None:
            return
        try:
            if ticket.error is None:
                ticket.future.set_result(ticket.result)
            else:
                ticket.future.set_exception(ticket.error)
        except InvalidStateError:  # it is told, or was cancelled
            pass
