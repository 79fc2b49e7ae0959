"""Onward: requests whose forwards read values or yield, from one leg to the next.

Duty: after a launch, see which requests were answered otherwise than their legs expect, find where
they go on once all they need has run, and hand on what is yielded. The engine moves them. A request
of which a call failed fails once all that its forward asked before that call was answered as
expected; else the call was run in vain. Stands between `cellc.answers` and `cellc.engine`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from cellc.answers import Events, read_events
from cellc.errors import StepsError
from cellc.faults import Failure, fault_of
from cellc.legs import Branch, Leg
from cellc.paths import Ask
from cellc.plan import I64
from cellc.replica import Learned
from cellc.scheduler import Batch, Scheduler
from cellc.state import Arenas
from cellc.ticket import NOTHING, Ticket, error_of

Going: TypeAlias = list[tuple[Ticket, Branch]]
Failed: TypeAlias = list[tuple[Ticket, Exception]]
_NOTHING = Events({}, [])


class Onward:
    """See the module."""

    def __init__(
        self, compiler: Learned, scheduler: Scheduler, arenas: Arenas, max_steps: int | None
    ) -> None:
        self._compiler, self._scheduler, self._arenas = compiler, scheduler, arenas
        self._max_steps = max_steps
        self._streaming: set[int] = set()  # numbers of requests whose forwards yield
        self.held: dict[int, Ticket] = {}  # whose answers were unexpected, or whose calls failed
        self.stopping = 0.0  # share of answers that are unexpected, averaged

    def enter(self, ticket: Ticket) -> None:
        """A ticket begins a leg."""
        leg = ticket.entry
        if isinstance(leg, Leg) and leg.generates:
            ticket.streams = True
            if ticket.pieces is NOTHING:
                ticket.pieces = deque()
            self._streaming.add(ticket.number)
            ticket.unmade = {n: len(y.makers) for n, y in leg.yields.items()}
            self._flush(ticket)

    def after(self, batch: Batch, live: Mapping[int, Ticket]) -> tuple[Going, Failed]:
        """Read a launch's events; (requests that go on, and where; requests that failed)."""
        unlike = self._scheduler.unlike(batch, self._arenas.places)
        events = _NOTHING
        if len(unlike):
            begin, requests = batch.events[unlike], batch.answering[unlike]
            entries = self._scheduler.entries
            events = read_events(begin, requests, entries, self._arenas.scalars)
        share = len(events.unexpected) / len(batch.events)
        self.stopping += (share - self.stopping) / 16
        for number, (question, value) in events.unexpected.items():
            ticket = live.get(number)
            if ticket is None:
                continue
            if ticket.held is None or question < ticket.held[0]:
                ticket.held = (question, value)
                ticket.branch = ticket.failure = None
                self.held[number] = ticket
        for number, piece in events.yielded:
            if number in live:
                live[number].unmade[piece] -= 1
        if self._streaming:
            for number in self._streaming.intersection(batch.answering.tolist()):
                self._flush(live[number])
        return self.settle() if self.held else ([], [])

    def note(self, failures: Mapping[int, Failure], live: Mapping[int, Ticket]) -> None:
        """Calls of a launch failed, whose events are not read yet."""
        for number, failure in failures.items():
            ticket = live.get(number)
            if ticket is None:
                continue
            first = self._scheduler.first_call(number)
            failed = {call - first: error for call, error in failure.items()}
            fault, known = fault_of(ticket.entry, failed), ticket.fault
            if known is None or fault[:2] < known[:2]:
                ticket.fault = fault
            self.held[number] = ticket

    def settle(self) -> tuple[Going, Failed]:
        """Held requests that can go on now, and those that failed: what they yielded before that is
        handed on first.
        """
        for ticket in self.held.values():
            fault, held = ticket.fault, ticket.held
            if fault is not None and held is not None and held[0] < fault.questions:
                ticket.fault = None  # the forward does not come there
        self._find()
        going: Going = []
        failed: Failed = []
        for number, ticket in self.held.items():
            if self._scheduler.runs(number):
                continue  # its rows are in use, or its answers not read
            if ticket.fault is not None:
                if self._ran(number, ticket.fault.needs):
                    failed.append((ticket, error_of(ticket, ticket.fault.error, ticket.fault.call)))
            elif ticket.branch is not None:
                if self._ran(number, ticket.branch.needs):
                    going.append((ticket, ticket.branch))
            elif ticket.failure is not None and self._ran(number, self._before(ticket)):
                failed.append((ticket, ticket.failure))
        for ticket, _ in [*going, *failed]:
            if ticket.streams:
                self._flush(ticket)
            self.release(ticket)
        return going, failed

    @staticmethod
    def _before(ticket: Ticket) -> I64:
        assert ticket.held is not None and isinstance(ticket.entry, Leg)
        return ticket.entry.before(ticket.held[0])

    def _ran(self, number: int, calls: I64) -> bool:
        return not len(calls) or self._scheduler.ran(number, calls)

    @property
    def watches(self) -> bool:
        """Is there a request that yields, or is held?"""
        return bool(self.held or self._streaming)

    def release(self, ticket: Ticket) -> None:
        """It goes on, or ended."""
        if self.held.pop(ticket.number, None) is not None:
            ticket.held = ticket.branch = ticket.failure = ticket.fault = None
        if ticket.streams:
            self._streaming.discard(ticket.number)

    def clear(self) -> None:
        """All requests are forgotten."""
        self.held.clear()
        self._streaming.clear()

    def _find(self) -> None:
        """Find where held requests go."""
        asks: dict[int, Ask] = {}
        for number, ticket in self.held.items():
            if ticket.fault or ticket.branch is not None or ticket.failure is not None:
                continue
            leg = ticket.entry
            assert ticket.held is not None and isinstance(leg, Leg)
            question, value = ticket.held
            if not self._ran(number, leg.earlier(question)):
                continue
            asked = leg.asked[question]
            if self._max_steps is not None and question + 1 > self._max_steps:
                ticket.failure = StepsError(limit=self._max_steps, origin=asked.origin)
                continue
            answer = asked.answer_of(value)
            ask = Ask(leg, question, answer, sign=math.copysign(1, answer))
            ticket.ask = asks[number] = ask
        found = self._compiler.onward(list(asks.values())) if asks else {}
        for number, ask in asks.items():
            branch = found[ask]
            if isinstance(branch, Branch):
                self.held[number].branch = branch
            else:
                self.held[number].failure = branch

    def again(self, tickets: Iterable[Ticket]) -> list[Branch | Exception]:
        """For tickets that have no room for another leg beside theirs: legs from their data."""
        asks = [ticket.ask._replace(again=True) for ticket in tickets]
        found = self._compiler.onward(asks)
        return [found[ask] for ask in asks]

    def finish(self, ticket: Ticket) -> None:
        """All calls of the last leg of a ticket that streams have run."""
        self._flush(ticket)

    def _flush(self, ticket: Ticket) -> None:
        """Hand on pieces that are there, in order, and that no open answer may still undo."""
        leg = ticket.entry
        assert isinstance(leg, Leg)
        told = False
        while True:
            piece = leg.yields.get(ticket.next_piece)
            if piece is None or ticket.unmade[ticket.next_piece] > 0:
                break
            if ticket.held is not None and ticket.held[0] < piece.before:
                break
            if ticket.fault is not None and ticket.fault.row < piece.at:
                break
            earlier = leg.asking[: max(0, piece.before - leg.first)]
            if len(earlier) and not self._scheduler.ran(ticket.number, earlier):
                break
            wanted = [(o, int(ticket.bases[o.type])) for o in leg.plan.outputs[piece.outputs]]
            ticket.pieces.append(piece.result.rebuild(self._arenas.read(wanted)))
            ticket.next_piece += 1
            told = True
        if told and ticket.told is not None:
            ticket.told(ticket)
