"""Answers: what launches say of the questions and yields of requests in flight.

Duty: read the events of a launch, vectorised over its calls: answers other than those that legs
expect, and rows that are yielded. Used by `cellc.onward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cellc.plan import EVENT_ENTRIES, I32, UNEXPECTED, YIELDED, ragged_range

_ENTRIES = np.arange(1, 1 + EVENT_ENTRIES)


class Events(NamedTuple):
    """Of one launch."""

    unexpected: dict[int, tuple[int, Any]]  # by request: its first question, what its row holds
    yielded: list[tuple[int, int]]  # (request, number of the yield), one a call


def read_events(
    begin: I32,
    requests: I32,
    entries: I32,
    values_of: Callable[[int, npt.NDArray[np.int64]], Any],
) -> Events:
    """Of calls whose events `begin` at those of the `entries` of the scheduler's table, one of each
    of `requests`; `values_of(type, slots)` reads rows of one number.
    """
    counts = entries[begin]
    if (counts == 1).all():  # as of most calls
        table = entries[begin[:, None] + _ENTRIES]
    else:
        index = ragged_range(begin.astype(np.int64) + 1, counts * EVENT_ENTRIES)
        table = entries[index].reshape(-1, EVENT_ENTRIES)
        requests = np.repeat(requests, counts)
    types, slots, expected, numbers = table.T
    unexpected: dict[int, tuple[int, Any]] = {}
    yielded: list[tuple[int, int]] = []
    alike = bool((types == types[0]).all())
    for type in [int(types[0])] if alike else np.unique(types).tolist():
        here = slice(None) if alike else np.flatnonzero(types == type)
        if type == YIELDED:
            yielded = list(zip(requests[here].tolist(), numbers[here].tolist(), strict=True))
            continue
        values = values_of(type, slots[here].astype(np.int64))
        wanted = expected[here]
        other = np.flatnonzero((values != wanted) | (wanted == UNEXPECTED))
        if not len(other):
            continue
        for request, number, value in zip(
            requests[here][other].tolist(),
            numbers[here][other].tolist(),
            values[other].tolist(),
            strict=True,
        ):
            known = unexpected.get(request)
            if known is None or number < known[0]:
                unexpected[request] = (number, value)
    return Events(unexpected, yielded)
