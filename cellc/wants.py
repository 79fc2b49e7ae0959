"""Wants: what a caller asks of requests beside their arguments.

Duty: deadlines and priorities as callers give them, checked, to `Wish`es by the engine's clock.
Used by `cellc.compiled` and `cellc.sessions`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from cellc.errors import UnsupportedError
from cellc.policies import takes_deadlines
from cellc.urgency import Wish


@dataclass(frozen=True)
class Wants:
    """`deadline`: seconds from the call on."""

    deadline: float = math.inf
    priority: int = 0

    def from_now(self) -> Wish:
        """Of a request that comes now."""
        return Wish(time.perf_counter() + self.deadline, self.priority)


NOTHING_WANTED = Wants()


def make_wants(deadline: Any, priority: Any, policy: Any) -> Wants:
    """From what a user passed; raises UnsupportedError."""
    if not takes_deadlines(policy):
        raise UnsupportedError(
            what=f"a deadline or a priority under the policy {policy!r}",
            remedy="cellc.compile(model, options={'policy': 'deadline'}), or a policy of your own "
            "with deadlines = True",
        )
    check_seconds(deadline=deadline)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > 1000:
        raise UnsupportedError(
            what=f"priority={priority!r}", remedy="use an integer from -1000 to 1000"
        )
    return Wants(math.inf if deadline is None else float(deadline), priority)


def check_seconds(**given: float | None) -> None:
    """Raise UnsupportedError for a time that is given and not a positive number."""
    for name, seconds in given.items():
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (number and seconds > 0):
            raise UnsupportedError(
                what=f"{name}={seconds!r}", remedy="use a number of seconds above 0"
            )
