"""Flight: the requests that have rows now.

Duty: give tickets regions and copy their data in, tell the scheduler of their calls; gather what
they return, free their rows, answer. Used by `cellc.engine` and `cellc.moves`, from whichever
thread runs the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cellc.carry import Carry
from cellc.errors import distinct, twin
from cellc.gathering import gather
from cellc.legs import Branch, Entry, Leg
from cellc.loading import Loader
from cellc.onward import Onward
from cellc.plan import OutputRows
from cellc.scheduler import Scheduler
from cellc.state import Arenas
from cellc.ticket import Counters, Ticket

T = TypeVar("T")
FEW = 64  # requests that end in one launch and came one by one: so are their results copied
KEPT = 1 << 16  # bytes of what sessions keep, in one piece of memory


def each(work: Callable[[T], object], items: Iterable[T]) -> None:
    """Work on all. What ends a thread (`sys.exit()` in a callback of a future) does so at last."""
    ends: BaseException | None = None
    for item in items:
        try:
            work(item)
        except BaseException as error:
            ends = ends or error
    if ends is not None:
        raise ends


def by_bases(
    tickets: Sequence[Ticket],
) -> Iterator[tuple[Sequence[Ticket], npt.NDArray[np.int64]]]:
    """Tickets with the first slots of their regions, side by side: those that began before there
    were as many row types apart.
    """
    sizes = {len(t.bases) for t in tickets}
    for size in sizes:
        alike = tickets if len(sizes) == 1 else [t for t in tickets if len(t.bases) == size]
        yield alike, np.concatenate([t.bases for t in alike]).reshape(len(alike), size)


def side_by_side(tickets: Sequence[Ticket]) -> npt.NDArray[np.int64]:
    """First slots of the regions of tickets; 0 of row types that were unknown when one began."""
    bases = [t.bases for t in tickets]
    types = max(map(len, bases))
    joined = np.concatenate(bases)
    if len(joined) < types * len(bases):
        joined = np.concatenate([np.pad(b, (0, types - len(b))) for b in bases])
    return joined.reshape(len(bases), types)


class Flight:
    """Live tickets by number. `tell` is called when results may be there that somebody awaits."""

    def __init__(
        self,
        scheduler: Scheduler,
        arenas: Arenas,
        onward: Onward,
        counters: Counters,
        tell: Callable[[], None],
        loader: Loader,
    ) -> None:
        self._scheduler, self._arenas, self._onward = scheduler, arenas, onward
        self.loader, self.copy_in = loader, loader.load
        self.counters, self._tell = counters, tell
        self.live: dict[int, Ticket] = {}
        self.live_bytes = 0  # of regions given out
        self.futures = 0  # admitted requests that nobody blocks on: others like them may come
        self.leaving: Sequence[Ticket] = ()  # that were live until now
        self._numbers: list[int] = []
        self._next_number = 0

    def clear(self) -> None:
        """Forget all tickets, unanswered."""
        self.live.clear()
        self.live_bytes = 0
        self._numbers, self._next_number = [], 0

    # -- in --

    def number(self) -> int:
        """A number that no live ticket has."""
        return self._numbers.pop() if self._numbers else self._new_number()

    def give_back(self, number: int) -> None:
        self._numbers.append(number)

    def _new_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def begin(self, tickets: list[Ticket]) -> None:
        plans = [t.entry.plan for t in tickets]
        bases = self._arenas.allocate(plans)
        try:
            errors = self.copy_in(tickets, bases)
        except BaseException:
            self._arenas.free(plans, bases)
            raise
        if errors:
            wrong = sorted(errors)
            self.live_bytes -= sum(tickets[i].nbytes for i in wrong)
            self._arenas.free([plans[i] for i in wrong], bases[wrong])
            for i in wrong:
                self.finish(tickets[i], error=errors[i])
            good = [i for i in range(len(tickets)) if i not in errors]
            tickets, plans, bases = (
                [tickets[i] for i in good],
                [plans[i] for i in good],
                bases[good],
            )
        if not tickets:
            return
        spare, live = self._numbers, self.live
        for ticket, base in zip(tickets, bases, strict=True):
            ticket.bases = base
            ticket.number = number = spare.pop() if spare else self._new_number()
            live[number] = ticket
        self.add(tickets, bases)

    def add(self, tickets: Sequence[Ticket], bases: npt.NDArray[np.int64] | None = None) -> None:
        """Tell the scheduler of requests' calls; deliver those that have none. `bases`: those of
        the tickets, side by side, where the caller has them so.
        """
        entries = {t.entry for t in tickets}
        idle = {e for e in entries if not e.plan.num_calls}
        calling = [t for t in tickets if t.entry not in idle] if idle else tickets
        whole = [(calling, bases)] if bases is not None and not idle else by_bases(calling)
        for alike, bases in whole:
            wishes = () if self._scheduler.urgency is None else [t.wish for t in alike]
            numbers = [t.number for t in alike]
            self._scheduler.add([t.entry.plan for t in alike], numbers, bases, wishes)
        if any(isinstance(entry, Leg) for entry in entries):
            for ticket in tickets:
                if isinstance(ticket.entry, Leg):
                    self._onward.enter(ticket)
        if idle:
            self.deliver([t for t in tickets if t.entry in idle], scheduled=False)

    # -- out --

    def deliver(
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
                if ticket.streams:
                    self._onward.finish(ticket)
        made = self._read(tickets, outputs)
        if ends is None:
            self._keep(tickets)
        numbers = [t.number for t in tickets]
        if ends is not None:
            self._scheduler.cancel(numbers)
        elif scheduled:
            self._scheduler.release(numbers)
        self.retire(tickets)
        self._finish_all(tickets, entries, made)
        self._tell()

    def _finish_all(
        self,
        tickets: Sequence[Ticket],
        entries: Sequence[Entry],
        made: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        """Answer those that ran to their ends. Where this is interrupted in what is asked for by
        the call that runs the loop, the others begin again (`Turns.restart`).
        """
        now, counters = time.perf_counter(), self.counters
        watched: list[tuple[Ticket, Entry, Sequence[torch.Tensor]]] = []  # by more than that
        latencies: list[float] = []
        sent: list[Ticket] = []
        for ticket, entry, tensors in zip(tickets, entries, made, strict=True):
            ends = isinstance(entry, Leg) and (entry.error or ticket.draws)
            if ends or not ticket.plain or counters.timeline is not None:
                watched.append((ticket, entry, tensors))
                continue
            try:
                ticket.result = entry.result.rebuild(tensors)
            except Exception as error:
                ticket.error = error
                counters.failed += 1
            ticket.done = True
            ticket.tensors = ()
            latencies.append(now - ticket.arrived)
            if ticket.future is not None:
                self.futures -= ticket.started
                sent.append(ticket)
        counters.requests += len(latencies)
        counters.latencies.extend(latencies)
        each(self.answer, sent)
        each(lambda ended: self.finish(ended[0], *self._end(*ended), now), watched)

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
        together = [t.together for t in tickets]
        few = len(tickets) <= FEW and self._arenas.in_numpy and not any(together)
        if few or len(tickets) == 1:
            read = self._arenas.read
            bases = [ticket.bases.tolist() for ticket in tickets]
            return [
                read([(rows, base[rows.type]) for rows in given])
                for given, base in zip(outputs, bases, strict=True)
            ]
        return gather(self._arenas, outputs, side_by_side(tickets), together)

    def _keep(self, tickets: Sequence[Ticket]) -> None:
        """Copy what sessions keep of their results: those of one plan and carry together, few
        enough that a session which does not step for long holds little of others'.
        """
        alike: dict[tuple[Entry, Carry], list[Ticket]] = {}
        for ticket in tickets:
            if ticket.carry is not None and not ticket.streams:
                alike.setdefault((ticket.entry, ticket.carry), []).append(ticket)
        for (entry, carry), members in alike.items():
            kept = carry.kept(entry) if len(members) > 1 else None
            if kept is None:
                continue
            rows = [entry.outputs[number] for number in kept.outputs]
            together = self._arenas.num_alike(rows, KEPT)
            for those, bases in by_bases(members):
                for at in range(0, len(those), together):
                    part = slice(at, at + together)
                    blocks = tuple([self._arenas.block(r, bases[part, r.type]) for r in rows])
                    for row, ticket in enumerate(those[part]):
                        ticket.kept = kept, blocks, row

    def retire(self, tickets: Sequence[Ticket]) -> None:
        """Free the regions of requests that have ended."""
        self.leaving = tickets
        if self._onward.watches:
            for ticket in tickets:
                self._onward.release(ticket)
        numbers = [t.number for t in tickets]
        for number in numbers:
            del self.live[number]
        self._numbers += numbers
        self.live_bytes -= sum([t.nbytes for t in tickets])
        self.free(tickets)

    def free(self, tickets: Sequence[Ticket]) -> None:
        """Give the regions of requests back."""
        plans = [t.entry.plan for t in tickets]
        if len(tickets) <= FEW:
            self._arenas.free_few(plans, [t.bases.tolist() for t in tickets])
        else:
            self._arenas.free(plans, side_by_side(tickets))

    def fail(self, failed: Sequence[tuple[Ticket, BaseException]]) -> None:
        """End requests in flight with errors."""
        tickets = [ticket for ticket, _ in failed]
        self._scheduler.cancel([t.number for t in tickets])
        self.retire(tickets)
        self.finish_failed(failed)

    def finish_failed(self, failed: Sequence[tuple[Ticket, BaseException]]) -> None:
        errors = distinct([error for _, error in failed])
        tickets = [ticket for ticket, _ in failed]
        each(lambda one: self.finish(one[0], error=one[1]), zip(tickets, errors, strict=True))

    def fail_waiting(self, failed: Sequence[tuple[Ticket, BaseException]]) -> None:
        """End requests that were to run, in a turn of the loop."""
        self.leaving = [ticket for ticket, _ in failed]
        self.finish_failed(failed)

    def finish(
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
        ticket.done = True
        ticket.tensors = ()
        if ticket.told is not None:
            ticket.told(ticket)
        if not ticket.trial:
            counters = self.counters
            counters.requests += 1
            counters.failed += ticket.error is not None
            now = now or time.perf_counter()
            counters.latencies.append(now - ticket.arrived)
            counters.late += now > ticket.wish.due and ticket.error is None
            if counters.timeline is not None:
                counters.timeline.ended([ticket])
        if ticket.future is not None:
            self.futures -= ticket.started
            self.answer(ticket)

    def abandon(self, ticket: Ticket) -> None:
        """Nobody wants it any more."""
        self.counters.cancelled += not (ticket.done or ticket.trial)
        ticket.abandon()
        if self.counters.timeline is not None:
            self.counters.timeline.ended([ticket])

    @staticmethod
    def answer(ticket: Ticket) -> None:
        """Tell the future of a request that has ended."""
        if ticket.future is None:
            return
        try:
            if ticket.error is None:
                ticket.future.set_result(ticket.result)
            else:
                ticket.future.set_exception(ticket.error)
        except InvalidStateError:  # it was cancelled, or telling it was interrupted
            ticket.future.tell()
