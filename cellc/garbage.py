"""Python's garbage collector, put off while much is made that stays.

Duty: run a piece of work without it. What tracing and imports make is kept; to look at all of
torch's objects meanwhile takes 0.1 s, a third of a first request whose kernels are cached.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def put_off(work: Callable[[], T]) -> T:
    """The work's result. The collector is off in all threads until it ends, if it was on."""
    on = gc.isenabled()
    try:
        gc.disable()
        return work()
    finally:
        if on:
            gc.enable()
