"""Policies: which cell runs next.

Duty: the rule by which the scheduler chooses among cells that have ready calls. A policy is any
object with a method `pick`; `cellc.compile(model, options={"policy": ..})` takes one, or the name
of one of those here. Pure.

`cellular` (BatchMaker, EuroSys 2018; ARCHITECTURE.md says what is ours): a cell whose ready calls
fill its largest batch first; else what such a launch left behind, so that requests that came
together stay together; else the deepest cell with ready calls, since it brings requests nearer to
their end, but for a while a cell with many times as many: more may join the few. `fifo`: the cell
whose oldest ready call has waited longest. `deadline`: the cell with the most urgent call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cellc.queues import Queue

FEW = 4  # times as many ready calls elsewhere make those of a cell few
HURRY = 1e-3  # seconds: with less slack, a launch of others may make a request late
MAX_AGE = 256  # admissions and launches that a ready call waits at most, before it goes first


@dataclass(slots=True)
class Turn:
    """What else there is to know: `max_batch`, the most rows of a launch; `patience`, launches that
    few calls may wait for more; `cut`, the cell of a full launch that left ready calls behind (-1:
    none).
    """

    max_batch: int
    patience: int = 64
    cut: int = -1


@runtime_checkable
class Policy(Protocol):
    """`pick` returns one of `ready`, two or more cells with ready calls (where there is one, it is
    not asked). The scheduler overrules it for calls that have waited for MAX_AGE turns, so that
    nobody waits for ever. With an attribute `deadlines = True`, requests may have deadlines and
    priorities (`Compiled.with_options`): calls of a cell go by urgency, `slack` of a queue is the
    least of its calls, and who cannot make it is shed. It may keep state, for one compiled model.

    >>> class Longest:
    ...     def pick(self, ready, turn):
    ...         return max(ready, key=lambda queue: queue.size)
    """

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue: ...


class Cellular:
    """See the module."""

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        full = [q for q in ready if q.size >= turn.max_batch]
        if full:
            return max(full, key=_depth)
        if turn.cut >= 0:
            for queue in ready:
                if queue.cell == turn.cut:
                    return queue
        deepest = max(ready, key=_depth)
        largest = max(ready, key=_size)
        if largest.size >= FEW * deepest.size and deepest.age < turn.patience:
            return largest
        return deepest


class Fifo:
    """See the module."""

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        return max(ready, key=_age)


class Deadline(Cellular):
    """See the module."""

    deadlines = True

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        slacks = [queue.slack for queue in ready]
        least = min(slacks)
        if least < HURRY:
            return ready[slacks.index(least)]
        return super().pick(ready, turn)


def _depth(queue: Queue) -> tuple[int, int]:
    return queue.depth, -queue.cell


def _size(queue: Queue) -> tuple[int, int]:
    return queue.size, -queue.cell


def _age(queue: Queue) -> tuple[int, int]:
    return queue.age, -queue.cell


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "cellular": Cellular,
    "fifo": Fifo,
    "deadline": Deadline,
}


def make_policy(policy: str | Policy) -> Policy:
    """By its name, or itself."""
    return POLICIES[policy]() if isinstance(policy, str) else policy


def takes_deadlines(policy: str | Policy) -> bool:
    chosen = POLICIES.get(policy) if isinstance(policy, str) else policy
    return bool(getattr(chosen, "deadlines", False))
