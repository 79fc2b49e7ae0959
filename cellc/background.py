"""The background thread that runs requests nobody blocks on.

Duty: run an engine's loop while it has work, sleep otherwise, end with the engine.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class Served(Protocol):
    """What the thread needs of an engine."""

    @property
    def idle(self) -> bool: ...

    @property
    def closed(self) -> bool: ...

    def serve_once(self) -> bool: ...


def start(engine: Served, turn: threading.Condition) -> threading.Thread:
    """Start the thread of an engine; `turn` is notified when there may be work."""
    thread = threading.Thread(
        target=_serve, args=(weakref.ref(engine), turn), name="cellc-engine", daemon=True
    )
    weakref.finalize(engine, _wake, turn)
    thread.start()
    return thread


def _serve(engine: weakref.ref[Served], turn: threading.Condition) -> None:
    """The background thread: sleeps while there is nothing to do, ends with close or its engine.

    Between rounds it holds no reference to the engine, so that one dropped without close is freed.
    """
    while True:
        strong = engine()
        if strong is None or not strong.serve_once():
            return
        with turn:
            if strong.idle and not strong.closed:
                del strong
                turn.wait()


def _wake(turn: threading.Condition) -> None:
    with turn:
        turn.notify_all()
