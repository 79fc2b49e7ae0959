"""The background thread that runs requests nobody blocks on.

Duty: run an engine's loop while it has work, sleep otherwise, end with the engine. What ends a
round that should not (`SystemExit` in a callback of a future, an exception set from outside) fails
the requests that were in flight, and the thread goes on.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Protocol

from cellc.waiting import Condition

SOON = 0.05  # seconds between looks where another thread runs the loop
LAST = 5.0  # seconds that the interpreter's end waits for a launch that runs


class Leaver(Protocol):
    """Who has a thread."""

    def leave(self) -> None:
        """The interpreter ends: so does the thread, soon."""


class Served(Leaver, Protocol):
    """What the thread needs of an engine."""

    @property
    def idle(self) -> bool: ...

    @property
    def working(self) -> bool: ...

    @property
    def closed(self) -> bool: ...

    def serve_once(self) -> bool: ...

    def recover(self, error: BaseException) -> None: ...


_started: weakref.WeakKeyDictionary[Leaver, threading.Thread] = weakref.WeakKeyDictionary()


def start(engine: Served, turn: Condition) -> threading.Thread:
    """Start the thread of an engine; `turn` is notified when there may be work."""
    thread = threading.Thread(
        target=_serve, args=(weakref.ref(engine), turn), name="cellc-engine", daemon=True
    )
    weakref.finalize(engine, _wake, turn, os.getpid()).atexit = False
    start_of(engine, thread)
    return thread


def start_of(owner: Leaver, thread: threading.Thread) -> None:
    """Start a thread that ends before the interpreter does."""
    _started[owner] = thread
    thread.start()


@atexit.register
def _end() -> None:
    """The interpreter ends: threads end before it stops them in the midst of C++, which aborts."""
    threads = []
    for owner, thread in list(_started.items()):
        if thread.is_alive():  # none is in a fork
            owner.leave()
            threads.append(thread)
    for thread in threads:
        thread.join(LAST)


def _serve(engine: weakref.ref[Served], turn: Condition) -> None:
    """The background thread."""
    while True:
        try:
            _rounds(engine, turn)
            return
        except BaseException as error:
            strong = engine()
            if strong is None:
                return
            strong.recover(error)
            del strong


def _rounds(engine: weakref.ref[Served], turn: Condition) -> None:
    """Sleeps while there is nothing to do, ends with close or its engine.

    Between rounds it holds no reference to the engine, so that one dropped without close is freed.
    """
    while True:
        strong = engine()
        if strong is None or not strong.serve_once():
            return
        with turn:
            if strong.idle and not strong.closed:
                # who runs the loop may be interrupted before it tells that it is free
                seconds = SOON if strong.working else None
                del strong
                turn.wait(seconds)


def _wake(turn: Condition, process: int) -> None:
    if os.getpid() == process:  # a fork has none of the threads, but may have their locks
        with turn:
            turn.notify_all()
