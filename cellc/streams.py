"""Streams: what a generator forward yields, piece by piece.

Duty: iterators over the pieces of one request. A plain one runs the engine's loop in the thread
that asks for the next piece, or waits for whoever runs it; an asynchronous one leaves that to the
background thread. Closing either cancels the request, and frees its rows at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

from cellc.engine import Engine
from cellc.ticket import Ticket
from cellc.workers import Workers


class Stream(Iterator[Any]):
    """Pieces of one request, as their cells finish; made by `Compiled.stream`."""

    def __init__(self, engine: Engine | Workers, ticket: Ticket) -> None:
        self._engine, self._ticket = engine, ticket
        ticket.collects = False
        engine.enqueue([ticket])

    def __next__(self) -> Any:
        ticket = self._ticket
        if not (ticket.pieces or ticket.dropped):
            try:
                self._engine.run_until(lambda: bool(ticket.pieces) or ticket.done)
            except BaseException:
                self.close()
                raise
        if ticket.dropped:
            raise StopIteration
        if ticket.pieces:
            return ticket.pieces.popleft()
        if ticket.error is not None:
            error, ticket.error = ticket.error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """Cancel what is left of the request. Calling it again does nothing."""
        ticket, self._ticket.dropped = self._ticket, True
        if ticket.pieces:
            ticket.pieces.clear()
        if not ticket.done:
            self._engine.drop(ticket)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ticket"):
            self.close()


async def pieces_of(engine: Engine | Workers, ticket: Ticket) -> AsyncIterator[Any]:
    """Pieces of one request in asyncio."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: Ticket) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(news.set)

    ticket.told, ticket.collects = tell, False
    engine.enqueue([ticket])
    engine.start()
    try:
        while True:
            news.clear()
            while ticket.pieces:
                yield ticket.pieces.popleft()
            if ticket.done and not ticket.pieces:
                if ticket.error is not None:
                    raise ticket.error
                return
            if not ticket.pieces:
                await news.wait()
    finally:
        if not ticket.done:
            engine.drop(ticket)
