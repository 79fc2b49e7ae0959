"""Moves: requests whose answers lead elsewhere than their legs.

Duty: give them the regions of their next legs with the rows that these need, end them where they
end, or let them begin again. Between `cellc.onward`, which says where they go, and `cellc.flight`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cellc.flight import Flight, side_by_side
from cellc.legs import Branch, Entry
from cellc.limits import Limits
from cellc.onward import Onward
from cellc.paths import Replan
from cellc.plan import I64
from cellc.replica import Learned
from cellc.scheduler import Batch, Scheduler
from cellc.state import Arenas
from cellc.ticket import Ticket


class Moves:
    """See the module. `queue` puts tickets that begin again before all that wait."""

    def __init__(
        self,
        compiler: Learned,
        scheduler: Scheduler,
        arenas: Arenas,
        onward: Onward,
        flight: Flight,
        limits: Limits,
        queue: Callable[[Sequence[Ticket]], None],
    ) -> None:
        self._compiler, self._scheduler, self._arenas = compiler, scheduler, arenas
        self._onward, self._flight = onward, flight
        self._limits, self._queue = limits, queue

    def go_on(self, batch: Batch) -> list[Ticket]:
        """Move requests whose answers lead elsewhere than their legs; those that were, or ended."""
        onward = self._onward
        if len(batch.events):
            going, failed = onward.after(batch, self._flight.live)
        else:
            going, failed = onward.settle()
        if not (going or failed):
            return []
        moved = [ticket for ticket, _ in [*going, *failed]]
        anew = [t for t, error in failed if isinstance(error, Replan) and t.call is not None]
        self._flight.fail(
            [(t, error) for t, error in failed if not any(t is other for other in anew)]
        )
        self._plan_anew(anew)
        ending = [(t, b) for t, b in going if b.outputs is not None]
        self._flight.deliver([t for t, _ in ending], [b for _, b in ending])
        self._begin_again([(t, b.leg) for t, b in going if b.again])
        self._move([(t, b) for t, b in going if b.outputs is None and not b.again])
        return moved

    def _plan_anew(self, tickets: Sequence[Ticket]) -> None:
        """Numbers of these requests are no data, after all: they begin again with other plans."""
        for ticket in tickets:
            try:
                entry, tensors = self._compiler.planned_anew(*ticket.call)
            except Exception as error:
                self._flight.fail([(ticket, error)])
                continue
            self._begin_again([(ticket, entry)])
            ticket.tensors = tensors

    def _begin_again(self, going: Sequence[tuple[Ticket, Entry]]) -> None:
        """Run requests from their data again, along answers known by now."""
        tickets = [ticket for ticket, _ in going]
        self._scheduler.cancel([t.number for t in tickets])
        self._flight.retire(tickets)
        for ticket, leg in going:
            ticket.entry, ticket.first, ticket.number = leg, None, -1
        self._queue(tickets)

    def _move(self, going: Sequence[tuple[Ticket, Branch]]) -> None:
        """Give requests the regions of their next legs, with the rows that these need."""
        moving: list[tuple[Ticket, Branch]] = []
        stuck: list[Ticket] = []
        refused: list[tuple[Ticket, Exception]] = []
        known: dict[Branch, bool | Exception] = {}
        for ticket, branch in going:
            plan = branch.leg.plan
            if branch not in known:
                known[branch] = self._fits(branch)
            fits = known[branch]
            if isinstance(fits, Exception):
                refused.append((ticket, fits))
                continue
            more = self._arenas.bytes_of(plan) - ticket.nbytes if fits else 0
            if not fits or (self._flight.live_bytes + more > self._limits.memory):
                stuck.append(ticket)
                continue
            self._flight.live_bytes += more
            ticket.nbytes += more
            moving.append((ticket, branch))
        self._flight.fail(refused)
        if stuck:
            ways = zip(stuck, self._onward.again(stuck), strict=True)
            found = [(t, w) for t, w in ways]
            self._flight.fail([(t, w) for t, w in found if isinstance(w, Exception)])
            self._begin_again([(t, w.leg) for t, w in found if isinstance(w, Branch)])
        if not moving:
            return
        tickets = [ticket for ticket, _ in moving]
        plans = [branch.leg.plan for _, branch in moving]
        bases = self._arenas.allocate(plans)
        self._carry(moving, bases)
        self._scheduler.cancel([t.number for t in tickets])
        self._flight.free(tickets)
        for (ticket, branch), base in zip(moving, bases, strict=True):
            ticket.first = ticket.first or ticket.entry
            ticket.entry, ticket.bases = branch.leg, base
        errors = self._flight.copy_in(tickets, bases)
        self._flight.fail([(tickets[i], error) for i, error in errors.items()])
        self._flight.add([t for i, t in enumerate(tickets) if i not in errors])

    def _fits(self, branch: Branch) -> bool | Exception:
        """Have the arenas what its leg needs? Or why they never will."""
        try:
            fits = self._arenas.prepare(branch.leg.plan)
            return self._limits.refusal(branch.leg) or fits
        except Exception as error:
            return error

    def _carry(self, moving: Sequence[tuple[Ticket, Branch]], bases: I64) -> None:
        """Copy rows from regions that requests leave to those that they get."""
        copies: dict[int, tuple[list[I64], list[I64]]] = {}
        old = side_by_side([ticket for ticket, _ in moving])
        for branch, members in _alike(moving).items():
            before, after = old[members], bases[members]
            for type, slots, owned, start in branch.moves:
                sources, targets = copies.setdefault(type, ([], []))
                sources.append((slots + owned * before[:, type, None]).reshape(-1))
                made = np.arange(start, start + len(slots)) + after[:, type, None]
                targets.append(made.reshape(-1))
        for type, (sources, targets) in copies.items():
            self._arenas.move(type, np.concatenate(sources), np.concatenate(targets))


def _alike(moving: Sequence[tuple[Ticket, Branch]]) -> dict[Branch, list[int]]:
    """Positions of those that go the same way."""
    found: dict[Branch, list[int]] = {}
    for i, (_, branch) in enumerate(moving):
        found.setdefault(branch, []).append(i)
    return found
