"""Requests that were unfolded: their forwards, run on stand-ins, as plain data.

Duty: what is wanted of a request, what running it once showed, and requests whose forwards a
pattern wrote. Made by `cellc.unfolder` and `cellc.patterns`; read by `cellc.forests`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cellc.frontends.asking import Asked
from cellc.frontends.drawing import Draw
from cellc.frontends.pattern import Pattern
from cellc.frontends.reads import OPEN
from cellc.frontends.stub import StubType
from cellc.frontends.stubbing import Part
from cellc.frontends.unfold import Returned
from cellc.request import Request
from cellc.rows import Refs

DRAWN = 1 << 20  # leaves from here on are random numbers that the request draws


class Wanted(NamedTuple):
    """A request to unfold; where its forward reads values: answers to its first questions, how
    many more may be guessed, and how many of its questions were answered before what is wanted.
    """

    request: Request
    args: Any
    kwargs: Any
    script: tuple[Any, ...] = ()
    guesses: int = 0
    start: int = 0
    plain: bool = False  # what is read is asked for, and no stand-in


@dataclass
class Unfolded:
    """One request's forward, run on stubs."""

    request: Request
    data: list[tuple[int, int, StubType, int, str]] = field(default_factory=list)
    # ^ (leaf, first row, type of a row, rows or -1, name)
    call: tuple[Any, Any] = ((), {})  # the request as stubs
    parts: dict[int, Part] = field(default_factory=dict)
    shells: list[tuple[Any, list[Any]]] = field(default_factory=list)
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)  # first int, float and tensor row, and the end
    base: int = 0  # first row that its forward makes
    returned: Returned | None = None  # None: it failed, or asked what nobody knows
    reason: str | None = None  # why it cannot be unfolded, where that is why
    start: int = 0  # questions that were answered before what is wanted of it
    asked: list[Asked] = field(default_factory=list)
    yields: list[tuple[int, int, Returned]] = field(default_factory=list)
    # ^ (questions asked before, first row that is made after, what was yielded)
    generates: bool = False  # its forward is a generator
    draws: list[Draw] = field(default_factory=list)  # random numbers, in order
    plain: bool = False  # see `Wanted`
    error: Exception | None = None  # what its forward raised
    over_deep = False  # it recurses deeper than there is room for
    carried: list[Refs] = field(default_factory=list)  # rows from before the cut, by type
    carried_data: list[tuple[int, int, StubType, int]] = field(default_factory=list)
    # ^ (~number of the type, first value, type of a row, rows)

    @property
    def num_data(self) -> int:
        """Rows of its data."""
        return self.rows[3] - self.rows[0]

    def own(self, rows: Refs) -> Refs:
        """Its rows numbered by themselves: data first, then what its forward makes."""
        made = rows >= self.base
        return np.where(made, rows - self.base + self.num_data, rows - self.rows[0])

    @property
    def cut(self) -> int:
        """First row of what is wanted: what was made before is carried."""
        wanted = self.start and (self.raises or not self.failed)
        return self.asked[self.start - 1].until if wanted else self.base

    @property
    def failed(self) -> bool:
        """It ended in an error, or cannot be unfolded."""
        return self.error is not None or self.reason is not None or self.over_deep

    @property
    def raises(self) -> bool:
        """A generator raised, after what was wanted began: what it yielded until then counts."""
        return self.error is not None and self.generates and len(self.asked) >= self.start

    @property
    def open(self) -> bool:
        """It ended in a question that nobody has answered."""
        return bool(self.asked) and self.asked[-1].answer is OPEN

    @property
    def given(self) -> list[Returned]:
        """What it yielded and returned."""
        out = [piece for _, _, piece in self.yields]
        return out if self.returned is None else [*out, self.returned]

    @property
    def wanted(self) -> list[Returned]:
        """What it yielded after the cut, and returned."""
        if self.failed and not self.raises:
            return []
        out = [piece for before, _, piece in self.yields if before >= self.start]
        return out if self.returned is None else [*out, self.returned]

    @property
    def end(self) -> int | None:
        """First row after an open question; where nothing is wanted, the first row."""
        if self.failed and not self.raises:
            return self.base
        return self.asked[-1].until if self.open else None


@dataclass
class Stamped:
    """Requests whose forwards were not run: what they do was written, by a pattern."""

    pattern: Pattern
    requests: list[Request]
    bases: Refs  # first rows that they make
    data: list[tuple[int, str, StubType, Refs, Refs]]
    # ^ (leaf, name, type of a row, first row of each request, rows or -1)
    returned: Refs  # rows, [requests, rows]
