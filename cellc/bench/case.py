"""What a benchmark compares: ways to do the same work, checked against each other, then timed.

Duty: alternate the ways in rounds, drop rounds in which others took the machine, and say what came
out as plain numbers. A way may run on a sample of the requests where it would take long. What is
not a rate (a cost, a share, megabytes) is a fact, measured in rounds of its own. Tables of what
came out are in `sheets`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from cellc.bench.measure import Patience, Round, alternate, noise, repeat_for
from cellc.bench.place import settle
from cellc.compiled import Compiled
from cellc.errors import CellcError
from cellc.report import QUIET

TOLERANCE = 1e-4
T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """`run` gives the results of the first `sample` requests (all of them where that is 0). `fresh`
    gives this way requests never seen, as large; it goes before every timed run, untimed.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    sample: int = 0
    fresh: Callable[[], None] | None = None


@dataclass
class Case:
    """One table. The first way is what results are checked against; `base` is what ratios are to,
    and `against` names more; `unit` is what one request is called. `again` gives all ways other
    requests, on which they are checked once more. A case without ways has facts only.
    """

    title: str
    count: int = 1
    ways: Sequence[Way] = ()
    base: str = ""
    unit: str = "requests"
    missing: Mapping[str, str] = field(default_factory=dict)  # ways that cannot run here, and why
    compiled: Sequence[Compiled] = ()
    name: str = ""  # among the cases of its workload
    against: Sequence[str] = ()
    again: Callable[[], None] | None = None
    facts: Callable[[], Mapping[str, float]] | None = None  # names say the unit
    timed: bool = True  # facts depend on what else runs, and are taken in rounds

    def close(self) -> None:
        for compiled in self.compiled:
            compiled.close()


@dataclass(frozen=True)
class Figure:
    """One way's requests a second: the median of `rounds`, and the least and the most."""

    way: str
    rate: float
    least: float
    most: float
    ratio: float  # to the base, the median over rounds
    rounds: int
    rates: Sequence[float] = ()  # of each round; ways of a case share the rounds


@dataclass(frozen=True)
class Outcome:
    """All figures and facts of a case; `others` is the largest share of the machine that others
    took in the rounds kept, `dropped` how many rounds were not.
    """

    title: str
    base: str
    unit: str
    largest_difference: float
    figures: Sequence[Figure]
    others: float | None
    dropped: int
    missing: Mapping[str, str]
    name: str = ""
    against: Sequence[str] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def quiet(self) -> bool:
        """Whether figures may be quoted: others took little of the machine, if it is known."""
        return self.others is None or self.others < QUIET

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "quiet": self.quiet}

    @classmethod
    def from_json(cls, written: Mapping[str, object]) -> Outcome:
        """What `as_json` wrote."""
        given = {k: v for k, v in written.items() if k in cls.__dataclass_fields__}
        figures = [Figure(**f) for f in given.pop("figures")]  # type: ignore[attr-defined]
        return cls(**given, figures=figures)  # type: ignore[arg-type]

    def figure(self, way: str) -> Figure | None:
        return next((f for f in self.figures if f.way == way), None)

    def rate(self, way: str) -> float | None:
        figure = self.figure(way)
        return figure.rate if figure else None

    def ratio(self, way: str, other: str) -> float | None:
        """How many times as fast a way is as another: the median over rounds."""
        one, two = self.figure(way), self.figure(other)
        return _ratio(one.rates, two.rates) if one and two else None


class Differs(CellcError):
    """A way gives other results than the first."""


def check(case: Case) -> float:
    """The largest difference between any way's results and the first's; beyond what that one
    gives, the first's that gives more. Raises Differs.
    """
    want = list(case.ways[0].run()) if case.ways else []
    worst = 0.0
    for way in case.ways[1:]:
        got = way.run()
        if len(got) != (way.sample or case.count):
            raise Differs(f"{case.title}: {way.name} gives {len(got)} results")
        for i, (a, b) in enumerate(zip(got, want, strict=False)):
            same = a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
            if not same:
                raise Differs(f"{case.title}: {way.name} differs from {case.ways[0].name} at {i}")
            if a.is_floating_point() and a.numel():
                worst = max(worst, float((a - b).abs().max()))
        want += got[len(want) :]
    return worst


def measure(case: Case, rounds: int, seconds: float, patience: Patience) -> Outcome:
    """Check, then time every way for `seconds` a round, alternated; then the facts."""
    worst = check(case)
    if case.again:
        case.again()
        worst = max(worst, check(case))
    figures, shares, dropped = _figures(case, rounds, seconds, patience)
    facts: Mapping[str, float] = {}
    if case.facts and case.timed:
        facts, share, more = _facts(case.facts, rounds, patience)
        dropped, shares = dropped + more, [*shares, share]
    elif case.facts:
        facts = case.facts()
    known = [share for share in shares if share is not None]
    return Outcome(
        case.title, case.base, case.unit, worst, figures, max(known, default=None), dropped,
        case.missing, case.name, case.against, facts,
    )  # fmt: skip


def _figures(
    case: Case, rounds: int, seconds: float, patience: Patience
) -> tuple[list[Figure], list[float | None], int]:
    """(figures, what others took, rounds dropped)."""
    if not case.ways:
        return [], [], 0
    works = [repeat_for(partial(_done, way.run), seconds, way.fresh) for way in case.ways]
    kept, dropped = _rounds(works, rounds, patience)
    sizes = [way.sample or case.count for way in case.ways]
    columns = zip(*(r.results for r in kept), strict=True)
    rates = [[n / t for t in column] for n, column in zip(sizes, columns, strict=True)]
    base = rates[[way.name for way in case.ways].index(case.base)]
    figures = [
        Figure(
            way.name,
            statistics.median(column),
            min(column),
            max(column),
            _ratio(column, base),
            len(column),
            column,
        )
        for way, column in zip(case.ways, rates, strict=True)
    ]
    return figures, [noise(kept)], dropped


def _done(run: Callable[[], object]) -> None:
    run()
    settle()


def _facts(
    work: Callable[[], Mapping[str, float]], rounds: int, patience: Patience
) -> tuple[dict[str, float], float | None, int]:
    """(medians, what others took, rounds dropped)."""
    kept, dropped = _rounds([lambda: dict(work())], rounds, patience)
    found = [r.results[0] for r in kept]
    return {k: statistics.median(f[k] for f in found) for k in found[0]}, noise(kept), dropped


def _rounds(
    works: Sequence[Callable[[], T]], rounds: int, patience: Patience
) -> tuple[list[Round[T]], int]:
    """(the rounds kept, how many were not)."""
    ran = [0]

    def counted() -> T:
        ran[0] += 1
        return works[0]()

    kept = alternate([counted, *works[1:]], rounds, 3 * rounds, patience)
    return kept, ran[0] - len(kept)


def _ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median([a / b for a, b in zip(rates, base, strict=True)])
