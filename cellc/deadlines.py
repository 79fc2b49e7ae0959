"""Deadlines: who is admitted next, and who is shed.

Duty: between the engine's queue and `cellc.urgency`, which knows what plans need. Requests that
cannot end in time fail, whether they wait or run. Used by `cellc.engine` under policies with
deadlines, from whichever thread runs the loop.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from cellc import pacing
from cellc.errors import DeadlineError
from cellc.flight import Flight
from cellc.launcher import Launcher
from cellc.scheduler import Scheduler
from cellc.ticket import Ticket
from cellc.urgency import Waiting

Shed = list[tuple[Ticket, BaseException]]


class Deadlines:
    """Of one engine; `following`: how many that wait may be admitted now."""

    def __init__(self, scheduler: Scheduler, launcher: Launcher, flight: Flight) -> None:
        assert scheduler.urgency is not None
        self._scheduler, self._flight, self._urgency = scheduler, flight, scheduler.urgency
        self._urgency.seconds = launcher.pace
        self._request_seconds = 0.0  # what admitting one costs, averaged
        self.following = 0

    def admitted(self, count: int, seconds: float) -> None:
        """So many were, in this time."""
        each = min(seconds, pacing.SHARED) / count
        self._request_seconds += (each - self._request_seconds) / pacing.SMOOTH

    def triage(self, inbox: deque[Ticket], room: int) -> tuple[deque[Ticket], Shed]:
        """(the inbox, with those first that are next; those that cannot end in time)."""
        self.following = 0
        if not inbox:
            return inbox, []
        tickets, needs = list(inbox), self._urgency.needs
        wishes = np.array([t.wish for t in tickets])
        waiting = Waiting(
            wishes[:, 0],
            wishes[:, 1].astype(np.int64),
            np.array([needs(t.entry.plan) for t in tickets]),
            np.array([t.arrived for t in tickets]),
        )
        room = min(room, pacing.admissions(self._request_seconds))
        first, late = self._urgency.triage(waiting, self._scheduler.stretch(), max(room, 1))
        self.following = len(first) if room > 0 else 0
        if not len(late) and len(first) == len(tickets):
            return inbox, []
        chosen = first.tolist()
        rest = np.delete(np.arange(len(tickets)), np.append(first, late)).tolist()
        left = deque(tickets[i] for i in [*chosen, *rest])
        return left, [self._shed(tickets[i]) for i in late.tolist()]

    def shed(self, now: float) -> None:
        """End requests in flight that cannot end in time."""
        self._urgency.now = now
        live = self._flight.live
        late = [live[number] for number in self._scheduler.late() if number in live]
        if late:
            self._flight.fail([self._shed(ticket) for ticket in late])

    def _shed(self, ticket: Ticket) -> tuple[Ticket, BaseException]:
        self._flight.counters.shed += 1
        return ticket, DeadlineError(left=(ticket.wish.due - self._urgency.now) * 1e3)
