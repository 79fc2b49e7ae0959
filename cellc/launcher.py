"""Launcher: the next launch, its size, and running it.

Duty: ask the scheduler for a launch of as many steps as its measured cost allows, make its index
tables, run its kernel, measure that. Used by `cellc.engine` and `cellc.replay`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cellc import log, pacing
from cellc.costs import GUESS, Costs
from cellc.device_clock import Clock, DeviceClock
from cellc.faults import Failure
from cellc.launch import EVERYBODY, Crew, Kernel, Launch, Prepared, Ragged
from cellc.machines import num_threads, place
from cellc.onward import Onward
from cellc.pacing import SHARED, SMOOTH, Pacer, learned, size_of
from cellc.plan import I64, ragged_range
from cellc.replica import Learned
from cellc.scheduler import Batch, Scheduler
from cellc.state import Arenas
from cellc.ticket import Counters, invalid_error

MAX_MEASURED = 1 << 14
UNTIMED = 2  # launches of a size: kernels are compiled, and graphs captured, meanwhile
TIMED = 6  # more, which are waited for where a device runs them by itself
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # that may be run ahead


@dataclass
class Running:
    """A launch that runs, or ran."""

    batch: Batch
    launch: Launch
    expected: float  # seconds
    start: float
    prepared: Prepared | None = None  # while it runs beside the caller
    invalid: Sequence[int] = ()
    seconds: float = 0.0
    error: Exception | None = None


@dataclass
class Foreseen:
    """A launch that may follow another, made while that runs: good for as long as arenas stay where
    they are.
    """

    running: Running  # which has not begun
    steps: int  # at most, as the scheduler was asked for it
    generation: int  # of the arenas


class Launcher:
    """See the module. `running`: the last launch. `blocked`: seconds that callers waited for
    kernels.
    """

    def __init__(
        self,
        compiler: Learned,
        scheduler: Scheduler,
        arenas: Arenas,
        onward: Onward,
        counters: Counters,
        max_batch: int | None,
        crew: Crew = EVERYBODY,
    ) -> None:
        self._compiler, self._scheduler, self._arenas = compiler, scheduler, arenas
        self._onward, self._counters, self._crew = onward, counters, crew
        self.blocked = 0.0
        self.running: Running | None = None
        self._seconds: dict[tuple[int, int], float] = {}  # (cell, log2 rows): measured, a step
        self._clock: Clock | None = None  # of a device that runs launches by itself
        if compiler.device.type == "cuda":
            self._clock = DeviceClock(compiler.device)
        self._timed: Counter[tuple[int, int]] = Counter()
        where = place(compiler.backend.name, compiler.device, crew.threads)
        self._costs = Costs(where)  # before that
        self._pacer = Pacer(scheduler, self.step_seconds, max_batch, self._ahead)
        self._turn_seconds = 0.0  # of it, what every turn takes: to make a launch
        self._submitting = 0.0  # what a launch takes that a device then runs by itself

    def next(
        self, *, joined: bool, waited: bool, beside: bool = False
    ) -> tuple[Batch, Launch] | None:
        """The next launch; None when nothing is ready. `joined`: requests may come that nobody
        blocks on; `waited`: somebody waits for the loop; `beside`: it may run beside the host.
        """
        begin = time.perf_counter()
        batch = self.schedule(joined=joined, waited=waited, beside=beside)
        if batch is None:
            return None
        launch = self.tables(batch)
        self._note_turn(time.perf_counter() - begin)
        return batch, launch

    def _note_turn(self, took: float) -> None:
        self._turn_seconds += (min(took, SHARED) - self._turn_seconds) / SMOOTH

    def measure_with(self, other: Launcher) -> None:
        """Both know what either measures: their cells, device and threads are the same."""
        self._seconds = other._seconds

    def note_host(self, seconds: float) -> None:
        """What a turn cost, kernels aside."""
        self._pacer.note_host(seconds)

    def schedule(self, *, joined: bool, waited: bool, beside: bool = False) -> Batch | None:
        busy = self.busy
        return self._pacer.schedule(joined=joined, waited=waited, beside=beside, busy=busy)

    def worth_beside(self) -> bool:
        """Would the next launch keep the machine busy while the host does its part?"""
        return self._pacer.worth_beside()

    def next_rows(self) -> int:
        """Rows of a step of the next launch; 0 where nothing is ready."""
        chosen = self._scheduler.peek()
        return 0 if chosen is None else chosen[1]

    def step_seconds(self, cell: int, rows: int) -> float:
        """Of a step: measured, before the first launch by a curve or a guess."""
        measured = self._seconds.get((cell, rows.bit_length()))
        return measured or self._costs.seconds(self._compiler.by_number[cell], rows)

    def pace(self, cell: int, rows: int) -> float:
        """Seconds that a step of so many ready calls takes, with its share of the host's part; of
        rows that no launch had, what is known of fewer, or else a share of more: nobody is shed
        for a guess that is too high.
        """
        most = self._scheduler.max_batch
        size = min(rows, most)
        step = self._seconds.get((cell, size.bit_length()))
        curve = self._costs.curve(self._compiler.by_number[cell]) if step is None else None
        if curve is not None:
            step = curve(size)
        if step is None:
            measured = list(self._seconds.items())  # at once: other workers may add to it
            known = sorted((bits, s) for (c, bits), s in measured if c == cell)
            fewer = [s for bits, s in known if bits < size.bit_length()]
            more = known[0][1] * size / (1 << known[0][0]) if known else GUESS
            step = fewer[-1] if fewer else more
        host = self._pacer.host_seconds
        each = step + host / pacing.num_steps(step, host, shared=True)
        return max(each * max(1.0, rows / most), 1e-7)

    def _ahead(self, seconds: float) -> int | None:
        return self.ahead(seconds) if self._compiler.paths.on else None

    def ahead(self, seconds: float) -> int:
        """How many steps a launch may run beyond questions that are not answered: most useful steps
        a second, if a step takes `seconds` and requests stop as often as they did.
        """
        stopping = min(max(self._onward.stopping, 1e-3), 1.0)
        making = max(self._turn_seconds + self._submitting, 1e-5)
        turn = 2 * making  # to make a launch, and to read its answers

        def useful(steps: int) -> float:
            return (1 - (1 - stopping) ** steps) / (turn + steps * seconds)

        return max(_STEPS, key=useful)

    def foresee(self, running: Running, *, shared: bool) -> Foreseen | None:
        """While a launch runs, the one that follows where its answers are as expected; None where
        nothing does, or that is not known. `shared`: somebody could join.
        """
        batch, rows = running.batch, len(running.batch.held)
        if batch.held_cell < 0 or not 0 < rows < 2 * pacing.ROWS_BESIDE:  # more run half by half
            return None
        steps = self._pacer.steps(batch.held_cell, rows, shared=shared)
        following = self._scheduler.look(batch, steps)
        if following is None or self._pacer.expected(following) <= pacing.BESIDE:
            return None
        launch, generation = self.tables(following), self._arenas.generation
        try:
            prepare = getattr(self._compiler.kernel(following.cell), "prepare", None)
            made = None if prepare is None else prepare(launch, self._arenas)
        except Exception:  # again where it is begun, of whose requests it is known then
            return None
        if made is None:
            return None
        return Foreseen(Running(following, launch, 0.0, 0.0, made), steps, generation)

    def follow(self, before: Running, foreseen: Foreseen) -> Running | None:
        """Begin with what was foreseen, if what ran before it gave what it was to give."""
        start = time.perf_counter()
        batch, running = before.batch, foreseen.running
        if before.error is not None or len(before.invalid):
            return None
        if foreseen.generation != self._arenas.generation:
            return None
        if len(self._scheduler.unlike(batch, self._arenas.places)):
            return None
        running.expected, running.start = self._pacer.expected(running.batch), start
        self.running = running  # before it begins: it is waited for then, whatever comes between
        assert running.prepared is not None
        running.prepared.begin()
        self._note_turn(time.perf_counter() - start)
        following = self._scheduler.next(foreseen.steps, hold=True)
        assert following is not None and np.array_equal(following.calls, running.batch.calls)
        running.batch = following
        self._scheduler.note_begun(following)
        self._scheduler.note_running(following)
        return running

    def run(self, batch: Batch, launch: Launch) -> dict[int, Failure]:
        """Run a batch; returns the requests of which calls failed."""
        return self.end(self.begin(batch, launch, beside=False))

    def begin(self, batch: Batch, launch: Launch, *, beside: bool = True) -> Running:
        """Run a batch, or, where that is worth it, let it run beside the caller (`beside`)."""
        expected = self._pacer.expected(batch)
        running = self.running = Running(batch, launch, expected, time.perf_counter())
        self._scheduler.note_begun(batch)
        try:
            kernel = self._compiler.kernel(batch.cell)
            running.start = time.perf_counter()  # it may have been made just now
            beside = beside and expected > pacing.BESIDE
            prepare = getattr(kernel, "prepare", None) if beside else None
            if prepare is not None:
                prepared = prepare(launch, self._arenas)
                self._scheduler.note_running(batch)
                running.prepared = prepared
                prepared.begin()
            else:
                self._run_now(kernel, running)
        except Exception as error:
            running.error = error
            running.seconds = time.perf_counter() - running.start
            self._scheduler.note_ran(batch)
        return running

    def _run_now(self, kernel: Kernel, running: Running) -> None:
        """To its end; or submit it."""
        if self._clock is not None:
            return self._submit(kernel, running, self._clock)
        running.start = time.perf_counter()
        running.invalid = kernel(running.launch, self._arenas)
        running.seconds = time.perf_counter() - running.start
        self.blocked += running.seconds
        self._scheduler.note_ran(running.batch)

    def _submit(self, kernel: Kernel, running: Running, clock: Clock) -> None:
        """To a device that runs it by itself; waits for some, to know what a size takes."""
        timed = UNTIMED <= self._timed[size_of(running.batch)] < UNTIMED + TIMED
        running.start = time.perf_counter()
        bind = getattr(kernel, "bind", None)
        submit: Callable[[], Sequence[int]] = partial(kernel, running.launch, self._arenas)
        if bind is not None:
            submit = bind(running.launch, self._arenas)
        making = time.perf_counter() - running.start
        if timed:
            clock.start()
        running.start = time.perf_counter()
        running.invalid = submit()
        running.seconds = time.perf_counter() - running.start
        self._submitting += (min(making + running.seconds, SHARED) - self._submitting) / SMOOTH
        if timed:
            running.seconds = clock.seconds()
            self.blocked += time.perf_counter() - running.start
        self._scheduler.note_ran(running.batch)

    @property
    def concurrent(self) -> bool:
        """Can launches run beside the host's work?"""
        if self._compiler.backend.name != "cpp":
            return False
        return num_threads(self._crew.threads) > 1

    @property
    def busy(self) -> bool:
        """Does the last launch run beside the caller?"""
        return self.running is not None and self.running.prepared is not None

    def busy_for(self, seconds: float) -> bool:
        """And that as long as the host is away, or else longer than the next launch would be."""
        running, chosen = self.running, self._scheduler.peek()
        if running is None or not self.busy or running.expected <= pacing.LONG:
            return False
        following = self.step_seconds(*chosen) if chosen is not None else 0.0
        return running.expected >= min(seconds, following)

    def settle(self) -> None:
        """Wait until the last launch has run. Its rows are there then, and arenas may grow."""
        running = self.running
        if running is None or running.prepared is None:
            return
        start = time.perf_counter()
        running.invalid, running.seconds = running.prepared.end()
        running.prepared = None
        self.blocked += time.perf_counter() - start
        self._scheduler.note_ran(running.batch)

    def end(self, running: Running) -> dict[int, Failure]:
        """After it has run: the requests of which calls failed."""
        batch = running.batch
        self._scheduler.note_read(batch)
        if running.error is not None:
            self._note(batch, running.start, running.seconds, repr(running.error))
            return self._failures(batch.calls, [running.error] * len(batch.calls))
        self._measure(batch, running.seconds)
        if self._counters.timeline is not None:
            self._note(batch, running.start, running.seconds)
        if self._scheduler.urgency is not None:
            self._scheduler.urgency.ran(batch.cell, running.launch.num_steps)
        if log.enabled("schedule"):
            name = self._compiler.by_number[batch.cell].name
            rows, steps = len(batch.calls), running.launch.num_steps
            took = f"{running.seconds * 1e6:.0f} us"
            log.info("schedule", f"{name}: {rows} rows in {steps} steps, {took}")
        if not len(running.invalid):
            return {}
        invalid, cell = running.invalid, self._compiler.by_number[batch.cell]
        errors = [invalid_error(cell, invalid, i) for i in range(len(invalid))]
        return self._failures(batch.calls[np.asarray(invalid)], errors)

    def _failures(self, calls: I64, errors: Sequence[Exception]) -> dict[int, Failure]:
        """By request."""
        made: dict[int, Failure] = {}
        requests = self._scheduler.requests_of(calls).tolist()
        for request, call, error in zip(requests, calls.tolist(), errors, strict=True):
            made.setdefault(request, {})[call] = error
        return made

    def _note(self, batch: Batch, start: float, took: float, failed: str | None = None) -> None:
        """On the timeline, where there is one."""
        timeline = self._counters.timeline
        if timeline is not None:
            name, steps = self._compiler.by_number[batch.cell].name, len(batch.steps) - 1
            timeline.launch(name, len(batch.calls), steps, start, took, failed)

    def tables(self, batch: Batch) -> Launch:
        cell = self._compiler.by_number[batch.cell]
        table = batch.table
        if not cell.has_ragged:
            count = len(cell.inputs)
            return Launch(batch.steps, list(table[:count]), table[count:], self._crew, table)
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
        return Launch(batch.steps, inputs, table[k:], self._crew)

    def _measure(self, batch: Batch, took: float) -> None:
        counters = self._counters
        counters.launches += 1
        counters.rows += len(batch.calls)
        counters.steps += len(batch.steps) - 1
        counters.seconds += took
        key = size_of(batch)
        if self._clock is not None:
            known = self._timed[key] = min(self._timed[key] + 1, UNTIMED + TIMED + 1)
            if not UNTIMED < known <= UNTIMED + TIMED:
                return
        if len(self._seconds) > MAX_MEASURED:
            self._seconds.clear()
            self._timed.clear()
        self._seconds[key] = learned(self._seconds.get(key), took / (len(batch.steps) - 1))
