"""Tickets: requests on their way through the engine, and what is counted of them.

Duty: plain data that the engine and its callers share; errors of requests whose indices are wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

import torch

from cellc.carry import Carry, Held
from cellc.cells import Cell
from cellc.errors import RequestError
from cellc.faults import Fault, reads
from cellc.frontends.drawing import Draws
from cellc.launch import Invalid
from cellc.legs import Branch, Entry, Leg
from cellc.timeline import Timeline
from cellc.unfolded import DRAWN
from cellc.urgency import NO_WISH, Wish
from cellc.waiting import Future

NOTHING: Any = ()  # no pieces


@dataclass(slots=True)
class Ticket:
    """One request on its way."""

    entry: Entry
    tensors: Sequence[torch.Tensor]
    future: Future[Any] | None = None
    arrived: float = 0.0
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    first: Entry | None = None  # where it begins from its data, once it is in another leg
    number: int = -1
    bases: Any = None  # first slots of its regions, a row type
    nbytes: int = 0  # of its regions
    started: bool = False  # its future was told that it runs
    held: tuple[int, Any] | None = None  # its first answer that its leg does not go on with
    ask: Any = None  # what is asked for it
    branch: Branch | None = None  # where that leads
    failure: Exception | None = None  # why it leads nowhere
    fault: Fault | None = None  # its first call that failed, if it is not run in vain
    call: Any = None  # its arguments, where it may have to be planned anew
    draws: Draws | None = None  # random numbers of its generators
    streams: bool = False  # its forward yields
    unmade: Any = None  # calls to run until a piece is there, by number
    next_piece: int = 0
    pieces: deque[Any] = NOTHING  # that nobody has taken yet
    collects: bool = True  # the pieces are the result, as a list
    before_end: Callable[[Ticket], None] | None = None  # called before anyone sees the result
    carry: Carry | None = None  # what of its result a session keeps
    kept: Held | None = None  # that, copied with others'
    together: bool = False  # one call asks for it and others, and gets all results
    dropped: bool = False  # nobody wants it any more
    trial: bool = False  # a comparison with the model, which nobody asked for
    told: Callable[[Ticket], None] | None = None  # of pieces and of the end
    worker: int = -1  # that has it, where there are several
    stays: bool = False  # there: its rows are
    wish: Wish = NO_WISH  # when it is due, and its priority

    @property
    def plain(self) -> bool:
        """Does nobody see its end but the call that waits for it, or its future?"""
        told = self.told is None and self.before_end is None
        return told and self.wish is NO_WISH and not (self.trial or self.streams)

    def abandon(self) -> None:
        """End it, without a result: nobody wants it any more."""
        if self.done:
            return
        self.dropped = self.done = True
        self.tensors = ()
        if self.before_end is not None:
            self.before_end(self)

    def tensor(self, leaf: int) -> torch.Tensor:
        """A tensor of its data, or random numbers that it draws."""
        if leaf < DRAWN:
            return self.tensors[leaf]
        assert self.draws is not None and isinstance(self.entry, Leg)
        return self.draws(leaf - DRAWN, self.entry.draws)

    @classmethod
    def failed(cls, error: BaseException) -> Ticket:
        """One that is never queued."""
        return cls(None, (), error=error, done=True)  # type: ignore[arg-type]


@dataclass
class Counters:
    launches: int = 0
    rows: int = 0
    steps: int = 0
    requests: int = 0
    failed: int = 0
    shed: int = 0  # of those: they could not end before their deadlines
    late: int = 0  # ended after their deadlines
    seconds: float = 0.0
    cancelled: int = 0
    refused: int = 0  # past `max_queue`
    recoveries: int = 0  # of the loop, after what should not happen
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=8192))
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=8192))  # until they ran
    timeline: Timeline | None = None  # while somebody profiles


def together(counters: Sequence[Counters]) -> Counters:
    """What several workers counted, as if they were one."""
    made = Counters()
    for name in (f.name for f in fields(Counters) if f.name != "timeline"):
        found = [getattr(c, name) for c in counters]
        lists = isinstance(found[0], deque)
        joined = deque(chain.from_iterable(map(list, found))) if lists else sum(found)
        setattr(made, name, joined)
    return made


def bad_index(cell: Cell | None) -> RequestError:
    found = [op.origin for op in (cell.ops if cell else ()) if op.op == "embedding"]
    lines = dict.fromkeys(line for line in found if line)
    return RequestError(
        argument=f"cell {cell.name}" if cell else "a cell",
        got="an index outside its table",
        expected="computed indices that the weights have",
        origin=" or ".join(lines) or None,
    )


def invalid_error(cell: Cell | None, invalid: Sequence[int], number: int) -> Exception:
    """Why one of the invalid rows of a launch of a cell is."""
    raised = invalid.errors.get(invalid[number]) if isinstance(invalid, Invalid) else None
    return raised or bad_index(cell)


def error_of(ticket: Ticket, error: Exception, call: int | None = None) -> Exception:
    """What a request fails with of which a call (or, where that is not known, some call) failed: of
    an index that is its own data, an error that says which.
    """
    plan = ticket.entry.plan
    for rows in plan.data if isinstance(error, RequestError) else ():
        if rows.ahead is not None and rows.leaf >= 0:
            tensor = ticket.tensor(rows.leaf)
            parts = tensor.detach().cpu().reshape(rows.count, -1)
            for at in reads(plan, call, rows).tolist():
                if bool(((parts[at] < 0) | (parts[at] >= rows.ahead)).any()):
                    return out_of_range(rows.name, rows.ahead, tensor, at * parts.shape[1])
    return error


def out_of_range(
    name: str, bound: int | None, tensor: torch.Tensor, start: int = 0
) -> RequestError:
    """The first index from position `start` on that is outside."""
    assert bound is not None
    flat = tensor.detach().cpu().reshape(-1)
    at = start + int(torch.nonzero((flat[start:] < 0) | (flat[start:] >= bound))[0])
    return RequestError(
        argument=name,
        got=f"{flat[at].item()} at position {at}",
        expected=f"indices in [0, {bound})",
    )
