"""Replays: the launches of a request that ran alone, ready to run again.

Duty: a lone request should pay for its kernels, not for scheduling. When the engine has nothing
else, regions always start at the same place, so that launches recorded once for a plan are good for
every lone request of that plan, until an arena grows. Used by the engine, which drops all of them
when weights change.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cellc import log
from cellc.cells import Cell
from cellc.faults import Failure
from cellc.flight import Flight
from cellc.launch import Bindable, Kernel, Launch
from cellc.launcher import Launcher
from cellc.legs import Entry
from cellc.ops import RowType
from cellc.pacing import ALONE
from cellc.replica import Learned
from cellc.scheduler import Scheduler
from cellc.state import Arenas
from cellc.ticket import Counters, Ticket, error_of, invalid_error
from cellc.timeline import Timeline

MAX_REPLAYS = 512
MAX_LAUNCHES = 64


@dataclass(frozen=True)
class Bound:
    """One launch that can run again."""

    run: Callable[[], Sequence[int]]
    cell: Cell
    rows: int
    steps: int

    @classmethod
    def of(
        cls, cell: Cell, kernel: Kernel, launch: Launch, arenas: Mapping[RowType, torch.Tensor]
    ) -> Bound:
        if isinstance(kernel, Bindable):
            run = kernel.bind(launch, arenas)
        else:
            run = _Call(kernel, launch, arenas)
        return cls(run, cell, launch.num_rows, launch.num_steps)


@dataclass(frozen=True)
class _Call:
    kernel: Kernel
    launch: Launch
    arenas: Mapping[RowType, torch.Tensor]

    def __call__(self) -> Sequence[int]:
        return self.kernel(self.launch, self.arenas)


class Recording(NamedTuple):
    """What a plan does alone: where its regions are, and its launches."""

    entry: Entry  # kept, so that no other has its id
    generation: int
    bases: npt.NDArray[np.int64]  # [1, row types]
    launches: Sequence[Bound]


class Replays:
    """Recordings by plan; the least recently used are dropped."""

    def __init__(
        self,
        compiler: Learned,
        scheduler: Scheduler,
        arenas: Arenas,
        launcher: Launcher,
        flight: Flight,
    ) -> None:
        self._compiler, self._scheduler, self._arenas = compiler, scheduler, arenas
        self._launcher, self._flight = launcher, flight
        self._kept: OrderedDict[int, Recording] = OrderedDict()

    def run(self, ticket: Ticket) -> None:
        """Run the only request there is from the launches recorded when its plan last ran alone;
        where there are none, record them.
        """
        known = self._get(ticket.entry)
        try:
            if known is None:
                error, made = self._recorded(ticket)
            else:  # its regions are nobody's: they need not be given out
                error, made = self._through(ticket, known.bases, lambda: self._replay(known))
        except Exception as raised:
            error, made = raised, []
        self._flight.finish(ticket, None if error else ticket.entry.rebuild(made), error)

    def _recorded(self, ticket: Ticket) -> tuple[BaseException | None, Sequence[torch.Tensor]]:
        plan = ticket.entry.plan
        bases = self._arenas.allocate([plan])
        try:
            made = self._through(ticket, bases, lambda: self._record(ticket, bases))
        except Exception as raised:  # after an interruption the engine forgets all
            made = raised, []
        self._arenas.free([plan], bases)
        return made

    def _through(
        self,
        ticket: Ticket,
        bases: npt.NDArray[np.int64],
        run: Callable[[], Exception | None],
    ) -> tuple[BaseException | None, Sequence[torch.Tensor]]:
        """Copy in, run, read."""
        errors = self._flight.copy_in([ticket], bases)
        if errors:
            return errors[0], []
        if (error := run()) is not None:
            return error_of(ticket, error), []
        outputs = ticket.entry.plan.outputs
        return None, self._arenas.read([(o, int(bases[0, o.type])) for o in outputs])

    def _record(self, ticket: Ticket, bases: npt.NDArray[np.int64]) -> Exception | None:
        """Run one admitted request by itself, keeping its launches."""
        scheduler, entry = self._scheduler, ticket.entry
        number = self._flight.number()
        self._flight.give_back(number)
        start = time.perf_counter()
        launches: list[Bound] = []
        failed: Sequence[Failure] = ()
        if entry.plan.num_calls:
            scheduler.add([entry.plan], [number], bases)
            try:
                while not failed:
                    batch = self._launcher.schedule(joined=False, waited=False)
                    if batch is None:
                        break
                    launch = self._launcher.tables(batch)
                    failed = list(self._launcher.run(batch, launch).values())
                    kernel = self._compiler.kernel(batch.cell)
                    cell = self._compiler.by_number[batch.cell]
                    launches.append(Bound.of(cell, kernel, launch, self._arenas))
            except Exception:
                scheduler.cancel([number])
                raise
            scheduler.cancel([number])
        if not failed and time.perf_counter() - start < 2 * ALONE:
            self._put(Recording(entry, self._arenas.generation, bases, launches))
        return next((error for failure in failed for error in failure.values()), None)

    def _replay(self, known: Recording) -> Exception | None:
        counters = self._flight.counters
        if log.enabled("schedule"):
            log.info("schedule", f"alone: {len(known.launches)} launches made before")
        if counters.timeline is not None:
            return self._noted(known, counters, counters.timeline)
        start = time.perf_counter()
        for bound in known.launches:
            if len(invalid := bound.run()):
                return invalid_error(bound.cell, invalid, 0)
            counters.rows += bound.rows
            counters.steps += bound.steps
        counters.seconds += time.perf_counter() - start
        counters.launches += len(known.launches)
        return None

    @staticmethod
    def _noted(known: Recording, counters: Counters, timeline: Timeline) -> Exception | None:
        """`_replay`, each launch on the timeline."""
        for bound in known.launches:
            start = time.perf_counter()
            invalid = bound.run()
            took = time.perf_counter() - start
            timeline.launch(bound.cell.name, bound.rows, bound.steps, start, took)
            counters.launches += 1
            counters.rows += bound.rows
            counters.steps += bound.steps
            counters.seconds += took
            if len(invalid):
                return invalid_error(bound.cell, invalid, 0)
        return None

    def _get(self, entry: Entry) -> Recording | None:
        found = self._kept.get(id(entry))
        if found is None or found.generation != self._arenas.generation:
            return None
        self._kept.move_to_end(id(entry))
        return found

    def _put(self, made: Recording) -> None:
        if len(made.launches) > MAX_LAUNCHES:
            return
        self._kept[id(made.entry)] = made
        if len(self._kept) > MAX_REPLAYS:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()
