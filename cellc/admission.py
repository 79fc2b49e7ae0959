"""Admission: the requests that wait, and who may run.

Duty: hold the queue of one engine; refuse what is past its limits, admit the others in order while
there is room for their rows, forget those that are cancelled or too late. Used by `cellc.engine`;
hands tickets to `cellc.flight`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from cellc import log
from cellc.deadlines import Deadlines
from cellc.errors import Overloaded, RequestTimeout, twin
from cellc.flight import Flight
from cellc.legs import Entry
from cellc.limits import Limits
from cellc.pacing import MAX_LIVE
from cellc.state import Arenas
from cellc.ticket import Ticket
from cellc.waiting import Condition


class Admission:
    """`guard` is held while the inbox changes."""

    def __init__(
        self,
        flight: Flight,
        arenas: Arenas,
        limits: Limits,
        max_queue: int | None,
        guard: Condition,
    ) -> None:
        self._flight, self._arenas, self._limits = flight, arenas, limits
        self._counters = flight.counters
        self._max_queue, self._guard = max_queue, guard
        self.inbox: deque[Ticket] = deque()
        self.deadlines: Deadlines | None = None  # where the policy knows them
        self._entering: Sequence[Ticket] = ()  # that may have left the inbox, and are not live yet

    # -- the queue --

    def enqueue(self, tickets: Sequence[Ticket], *, limited: bool = True) -> None:
        """Queue requests; raises Overloaded past `max_queue`. Those past limits of their own fail
        now (`limited`), or when they would run. The caller holds the guard.
        """
        now = time.perf_counter()
        if self._max_queue is not None:
            self._check_room(sum(not t.trial for t in tickets), self._max_queue)
        for ticket in tickets:
            ticket.arrived = ticket.arrived or now
        if limited:
            tickets = self.within_limits(tickets)
        if self._counters.timeline is not None:
            self._counters.timeline.submitted(tickets)
        self.inbox.extend(tickets)

    def _check_room(self, asked: int, limit: int) -> None:
        if asked and len(self.inbox) + asked > limit:
            self._forget_cancelled()
            if len(self.inbox) + asked > limit:
                self._counters.refused += asked
                raise Overloaded(waiting=len(self.inbox), limit=limit)

    def within_limits(self, tickets: Sequence[Ticket]) -> Sequence[Ticket]:
        """Those that may run; the others fail."""
        if len(tickets) == 1 and self._limits.refusal(tickets[0].entry) is None:
            return tickets
        refusals = {e: self._limits.refusal(e) for e in {t.entry for t in tickets}}
        if any(refusals.values()):
            refused = [(t, error) for t in tickets if (error := refusals[t.entry])]
            if self._counters.timeline is not None:
                self._counters.timeline.submitted([ticket for ticket, _ in refused])
            self._flight.finish_failed(refused)
            tickets = [t for t in tickets if not t.done]
        return tickets

    def queue_first(self, tickets: Sequence[Ticket]) -> None:
        """These begin again, before all that wait."""
        if self._counters.timeline is not None:
            self._counters.timeline.requeued(tickets)
        with self._guard:
            self.inbox.extendleft(reversed(tickets))

    def take_back(self, tickets: Sequence[Ticket]) -> None:
        """These wait no more."""
        gone = {id(t) for t in tickets}
        with self._guard:
            self.inbox = deque(t for t in self.inbox if id(t) not in gone)

    def _forget_cancelled(self) -> None:
        """Requests whose futures were cancelled wait no more."""
        gone = [t for t in self.inbox if t.future is not None and t.future.cancelled()]
        if gone:
            self.take_back(gone)
        for ticket in gone:
            assert ticket.future is not None
            ticket.future.set_running_or_notify_cancel()
            self._flight.abandon(ticket)

    def overdue(self, since: float) -> bool:
        """Has who is next waited since before then?"""
        with self._guard:
            return bool(self.inbox) and self.inbox[0].arrived < since

    def expire(self, now: float, seconds: float) -> None:
        """End requests that have taken too long."""
        since, error = now - seconds, RequestTimeout(seconds=seconds)
        flight = self._flight
        flight.fail([(t, error) for t in flight.live.values() if t.arrived < since])
        with self._guard:
            late = [t for t in self.inbox if t.arrived < since]
            if late:
                self.inbox = deque(t for t in self.inbox if t.arrived >= since)
        flight.fail_waiting([(ticket, twin(error)) for ticket in late])

    # -- into flight --

    def admit(self, now: float, most: int = MAX_LIVE) -> None:
        """Give waiting requests, so many at most, regions, copy their data in, tell the scheduler
        of their calls.
        """
        if self.deadlines is not None:
            self._triage(self.deadlines, now)
        if not self.inbox:
            return
        tickets: list[Ticket] = []
        self._entering = tickets
        with self._guard:
            broken = self._take(tickets, most)
        self._flight.fail_waiting(broken)
        self.note_begun(tickets)
        if log.enabled("schedule", more=True) and (tickets or broken):
            waiting, running = len(self.inbox), len(self._flight.live)
            log.more("schedule", f"{len(tickets)} begin, {waiting} wait, {running} run")
        try:
            if tickets:
                begin = time.perf_counter()
                self._flight.begin(tickets)
                if self.deadlines is not None:
                    self.deadlines.admitted(len(tickets), time.perf_counter() - begin)
        except Exception as error:  # ours; where this thread is interrupted, the engine restarts
            lost = [t for t in tickets if t.number not in self._flight.live and not t.done]
            self._flight.live_bytes -= sum(t.nbytes for t in lost)
            self._flight.finish_failed([(ticket, twin(error)) for ticket in lost])
            raise
        self._entering = ()

    def _triage(self, deadlines: Deadlines, now: float) -> None:
        """Shed who cannot end in time; who is next stands first."""
        deadlines.shed(now)
        with self._guard:
            self.inbox, late = deadlines.triage(self.inbox, MAX_LIVE - len(self._flight.live))
        self._flight.fail_waiting(late)

    def _take(self, tickets: list[Ticket], most: int) -> list[tuple[Ticket, Exception]]:
        """Move requests that there is room for from the inbox to `tickets`; those that can never
        run, with why.
        """
        prepared: dict[Entry, int] = {}  # bytes of each
        broken: list[tuple[Ticket, Exception]] = []
        flight, inbox, limit = self._flight, self.inbox, self._limits.memory
        room = min(most, MAX_LIVE - len(flight.live))
        if self.deadlines is not None:
            room = min(room, self.deadlines.following)
        while inbox and len(tickets) < room:
            ticket = inbox[0]
            needed = prepared.get(ticket.entry)
            if needed is None:
                try:
                    if not self._arenas.prepare(ticket.entry.plan):
                        break
                    if (refusal := self._limits.refusal(ticket.entry)) is not None:
                        raise refusal
                except Exception as error:
                    broken.append((inbox.popleft(), error))
                    continue
                needed = prepared[ticket.entry] = self._arenas.bytes_of(ticket.entry.plan)
            ticket.nbytes = needed
            if flight.live_bytes + needed > limit:
                break
            tickets.append(ticket)
            inbox.popleft()
            if ticket.future is not None and not ticket.started:
                # it runs already where an interruption came between this and the next line
                if not (ticket.future.running() or ticket.future.set_running_or_notify_cancel()):
                    tickets.pop()
                    flight.abandon(ticket)
                    continue
                ticket.started = True
                flight.futures += 1
            flight.live_bytes += needed
        return broken

    def note_begun(self, tickets: Sequence[Ticket]) -> None:
        """They have left the inbox to run."""
        now = time.perf_counter()
        self._counters.waits.extend([now - t.arrived for t in tickets if not t.trial])
        if self._counters.timeline is not None:
            self._counters.timeline.admitted(tickets)

    def forget_entering(self) -> None:
        """Whoever was being admitted waits again, or has ended."""
        self._entering = ()

    def in_flight(self) -> list[Ticket]:
        """Requests that have begun and have not ended, whatever was left midway."""
        waiting = set(map(id, self.inbox))
        flying = [*self._flight.live.values(), *self._flight.leaving, *self._entering]
        found = {id(t): t for t in flying}
        return [t for t in found.values() if not t.done and id(t) not in waiting]
