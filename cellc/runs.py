"""Runs: calls of one model, run to their results.

Duty: make tickets of calls, as they are wanted; queue them, wait until they are done, cancel them
where the caller is interrupted; hand out results and errors in order. Between `cellc.compiled`,
which is the public face, and the engine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from cellc.batches import Batches
from cellc.engine import Engine
from cellc.errors import FORKED, ClosedError, Overloaded, distinct
from cellc.intake import Intake
from cellc.owning import owned
from cellc.ticket import Ticket
from cellc.waiting import Future
from cellc.wants import NOTHING_WANTED, Wants
from cellc.workers import Workers


class Runs:
    """Of one model; `_intake` is its owner's to set."""

    _intake: Intake

    def __init__(
        self, serving: Engine | Workers, max_queue: int | None, timeout: float | None
    ) -> None:
        self._serving, self._max_queue, self._timeout = serving, max_queue, timeout
        self._wants: Wants = NOTHING_WANTED
        self._pid = os.getpid()

    def _check_open(self) -> None:
        if self._serving.closed:
            raise ClosedError(what="this compiled model")
        if os.getpid() != self._pid:
            raise FORKED

    def _ticket(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        self._check_open()
        if self._wants is NOTHING_WANTED:
            return self._intake.ticket(args, kwargs)
        wish = self._wants.from_now()
        ticket = self._intake.ticket(args, kwargs)
        ticket.wish = wish
        return ticket

    def _tickets(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Ticket]:
        """Tickets in order, those of requests that cannot be planned already failed."""
        return self._wanted(lambda: self._intake.tickets(calls))

    def _wanted(self, make: Callable[[], list[Ticket]]) -> list[Ticket]:
        self._check_open()
        if self._wants is NOTHING_WANTED:
            return make()
        wish = self._wants.from_now()
        tickets = make()
        for ticket in tickets:
            ticket.wish = wish
        return tickets

    def _begun(self, requests: Sequence[Any]) -> list[Ticket]:
        """Tickets of what `map` is given, in order; where many are unfolded, the first run while
        others are.
        """
        timed = self._wants is not NOTHING_WANTED or self._timeout is not None
        if timed or self._max_queue is not None:  # the time of all begins when all can run
            return self._wanted(lambda: self._intake.mapped(requests))
        begun: list[Ticket] = []
        since = time.perf_counter()

        def begin(tickets: Sequence[Ticket]) -> None:
            nonlocal since
            begun.extend(tickets)
            _group(tickets)
            self._serving.enqueue(tickets)
            self._serving.nudge(time.perf_counter() - since)  # the next may take as long to make
            since = time.perf_counter()

        self._check_open()
        try:
            return self._intake.mapped(requests, begin)
        except BaseException:
            self._serving.cancel(begun)
            raise

    def _run(self, tickets: Sequence[Ticket]) -> None:
        """Queue requests, and block until they are done."""
        try:
            self._serving.enqueue([t for t in tickets if not t.arrived])
            self._serving.run(tickets)
        except (ClosedError, Overloaded):  # none is queued
            raise
        except BaseException:
            self._serving.cancel(tickets)
            raise

    def _run_all(self, tickets: Sequence[Ticket]) -> None:
        """Run those of many that are not done, so many at a time as may wait."""
        queued = [t for t in tickets if not t.done]
        _group(queued)
        portion = self._max_queue or max(len(queued), 1)
        for start in range(0, len(queued), portion):
            self._run(queued[start : start + portion])

    def _results(self, tickets: Sequence[Ticket], return_exceptions: bool) -> list[Any]:
        """Run tickets; their results in order."""
        self._run_all(tickets)
        failed = [t for t in tickets if t.error is not None]
        for ticket, error in zip(failed, distinct([t.error for t in failed]), strict=True):  # type: ignore[misc]
            ticket.error = error
        for i, ticket in enumerate(tickets):
            if ticket.error is not None and not return_exceptions:
                raise _noted(ticket.error, i, len(tickets))
        return [t.result if t.error is None else t.error for t in tickets]

    def _send(self, ticket: Ticket) -> Future[Any]:
        ticket.future = Future()
        self._serving.enqueue([owned(ticket)])
        self._serving.start()
        return ticket.future

    async def _answer(self, ticket: Ticket) -> Any:
        assert ticket.future is not None
        try:
            return await asyncio.wrap_future(ticket.future)
        except asyncio.CancelledError:
            self._serving.drop(ticket)
            raise

    def _batched(self, batches: Batches, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls, together = batches.cut(args, kwargs)
        tickets = self._tickets(calls)
        self._run_all(tickets)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return together([t.result for t in tickets])

    def _map_batches(
        self,
        batches: Batches,
        calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        return_exceptions: bool,
    ) -> list[Any]:
        results: list[Any] = []
        first: Exception | None = None
        for i, (args, kwargs) in enumerate(calls):
            try:
                results.append(self._batched(batches, args, kwargs))
            except Exception as error:
                first = first or _noted(error, i, len(calls))
                results.append(error)
        if first is not None and not return_exceptions:
            raise first
        return results


def _group(tickets: Sequence[Ticket]) -> None:
    """One call gets the results of all."""
    for ticket in tickets:
        ticket.together = True


def _noted(error: BaseException, number: int, count: int) -> Any:
    """The error, saying which request of `map` it is about (Python 3.11 and later print that)."""
    if hasattr(error, "add_note") and count > 1:
        error.add_note(f"in request {number} of the {count} given at once")
    return error
