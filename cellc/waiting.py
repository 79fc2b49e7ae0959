"""Conditions and futures that stay usable after an interruption.

Duty: what threads wait on. The standard library's conditions are entered by a function in Python:
where a signal's handler raises in it (Ctrl-C), the lock under it stays held, and whoever needs it
next waits for ever; so do its futures and events, which are made of conditions. Those here are
entered by the lock itself, which nothing can come between.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from concurrent import futures
from concurrent.futures._base import LOGGER, PENDING
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")


class Condition(_thread.RLock, threading.Condition):  # type: ignore[misc]
    """A `threading.Condition` that is its own lock, which a thread may enter again."""

    def __init__(self) -> None:
        self._waiters: deque[Any] = deque()  # as `threading.Condition` keeps them

    if TYPE_CHECKING:  # of the lock

        def _is_owned(self) -> bool: ...
        def _release_save(self) -> Any: ...
        def _acquire_restore(self, entered: Any) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        """Leave the lock until told, or for so many seconds at most (False: then, untold)."""
        waiter, told = _thread.allocate_lock(), False
        entered: list[Any] = []  # how often, once it is left
        waiter.acquire()
        self._waiters.append(waiter)
        try:
            entered.extend(map(Condition._release_save, (self,)))  # one call: left, and known
            told = waiter.acquire(True, -1 if timeout is None else max(timeout, 0))
        finally:
            if entered:
                self._acquire_restore(entered[0])
            if not told and waiter in self._waiters:
                self._waiters.remove(waiter)
        return told


class Future(futures.Future[T]):
    """A `concurrent.futures.Future`; where telling it of a result was interrupted, `tell` it."""

    _done_callbacks: list[Any]

    def __init__(self) -> None:  # as its base does, but for the condition: thousands are made
        self._condition = Condition()
        self._state = PENDING
        self._result: T | None = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks = []

    def tell(self) -> None:
        """It has ended: wake who waits, call callbacks that were not called."""
        with self._condition:
            self._condition.notify_all()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        callbacks = self._done_callbacks
        while callbacks:
            try:
                callbacks[0](self)
            except Exception:
                LOGGER.exception("exception calling callback for %r", self)
            finally:
                del callbacks[0]
