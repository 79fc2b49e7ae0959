"""Faults: calls of requests that failed, and where in the forwards these calls stand.

Duty: a call that a forward which reads values makes only after some answer fails its request only
if that is the answer: say which answers, and what else comes before. Comes in from
`cellc.launcher`: failures; goes out, by `cellc.onward`: who fails.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from cellc.legs import Entry, Leg
from cellc.plan import I64, RECORD, DataRows, Plan

_NONE = np.zeros(0, np.int64)


Failure: TypeAlias = dict[int, Exception]  # a request's calls that failed, and why


class Fault(NamedTuple):
    """The first call of a request that failed: questions that its forward asks before, the first
    row that it makes, and what else has to run until it is known that the request fails.
    """

    questions: int
    row: int
    call: int
    error: Exception
    needs: I64 = _NONE


def fault_of(entry: Entry, failure: Failure) -> Fault:
    """Its calls are numbered in the plan."""
    if not isinstance(entry, Leg):
        call, error = next(iter(failure.items()))
        return Fault(0, 0, call, error)
    row, call = min((_first_row(entry, call), call) for call in failure)
    questions = int(np.searchsorted(entry.ends, entry.places.when[call], "right"))
    asking = entry.asking[: max(0, questions - entry.first)]
    made = [np.array(y.makers, np.int64) for y in entry.yields.values() if y.at <= row]
    needs = np.unique(np.concatenate([asking, *made]))
    return Fault(questions, row, call, failure[call], needs)


def _first_row(leg: Leg, call: int) -> int:
    """Of a call that makes no row that the forward sees, the first of what it is part of."""
    made = np.flatnonzero(leg.places.calls == call)
    return int(made[0] if len(made) else leg.places.when[call])


def reads(plan: Plan, call: int | None, rows: DataRows) -> I64:
    """Which rows of some data a call reads, or any call."""
    record = slice(None)
    if call is not None:
        end = plan.calls[call + 1, RECORD] if call + 1 < plan.num_calls else len(plan.records)
        record = slice(plan.calls[call, RECORD], end)
    slots: I64 = plan.records[record][plan.record_base[record] == rows.type].astype(np.int64)
    own: I64 = slots[(slots >= rows.start) & (slots < rows.start + rows.count)] - rows.start
    return own
