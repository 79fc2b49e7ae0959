"""Who runs a loop: one thread at a time, and none after it was interrupted.

Duty: hold a loop for a thread while it works. A lock that is acquired and released by calls stays
locked for ever where a signal's handler raises (Ctrl-C) between a call and the `try` around it, or
on the way to the call that releases it: Python looks for signals after every call. Here the loop is
held by an attribute, which nothing can come between. Used by `cellc.engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cellc.waiting import Condition

SOON = 0.05  # seconds between looks: who held the loop may be interrupted before it tells


class Loop:
    """`turn` is told when the loop may be free."""

    def __init__(self, turn: Condition) -> None:
        self._turn = turn
        self._owner = 0  # the thread that holds it

    @property
    def held(self) -> bool:
        """Does any thread hold it?"""
        return bool(self._owner)

    @property
    def mine(self) -> bool:
        """Does this thread hold it?"""
        return self._owner == threading.get_ident()

    def run(self, work: Callable[[], object], *, wait: bool) -> bool:
        """Work while holding the loop. False, and no work, where it is held already and this is not
        to wait; a thread that holds it must not wait for itself.
        """
        me = threading.get_ident()
        if self._owner == me:
            assert not wait, "this thread holds the loop"
            return False
        try:
            if not self._take(me, wait):
                return False
            work()
        finally:
            if self._owner == me:  # no call, so nothing interrupts this
                self._owner = 0
        return True

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold it, once it is free, around a block. An interruption on the way out of the block
        frees it only when what was raised is dropped: for what is rare.
        """
        me = threading.get_ident()
        assert self._owner != me, "this thread holds the loop"
        try:
            self._take(me, wait=True)
            yield
        finally:
            if self._owner == me:
                self._owner = 0

    def _take(self, me: int, wait: bool) -> bool:
        """Become its owner, if nobody is or once nobody is. Whoever calls gives it back, though
        this was interrupted.
        """
        with self._turn:
            while self._owner:
                if not wait:
                    return False
                self._turn.wait(SOON)
            self._owner = me
        return True
