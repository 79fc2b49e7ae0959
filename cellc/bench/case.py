"""What a benchmark compares: ways to do the same work, checked against each other, then timed.

Duty: alternate the ways in rounds, drop rounds in which others took the machine, and say what came
out as rows of plain numbers. A way may run on a sample of the requests where it would take long.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from rich.table import Table
from torch import Tensor

from cellc.bench.measure import Patience, alternate, noise, repeat_for
from cellc.errors import CellcError
from cellc.report import QUIET

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Way:
    """`run` gives the results of the first `sample` requests (all of them where that is 0)."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    sample: int = 0


@dataclass
class Case:
    """One table. The first way is what results are checked against; `base` is what ratios are to;
    `unit` is what one request is called.
    """

    title: str
    count: int
    ways: list[Way]
    base: str
    unit: str = "requests"
    missing: dict[str, str] = field(default_factory=dict)  # ways that cannot run here, and why
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Figure:
    """One way's requests a second: the median of `rounds`, and the least and the most."""

    way: str
    rate: float
    least: float
    most: float
    ratio: float  # to the base, the median over rounds
    rounds: int


@dataclass(frozen=True)
class Outcome:
    """All figures of a case; `others` is the largest share of the machine that others took in the
    rounds kept, `dropped` how many rounds were not.
    """

    title: str
    base: str
    unit: str
    largest_difference: float
    figures: Sequence[Figure]
    others: float | None
    dropped: int
    missing: dict[str, str]

    @property
    def quiet(self) -> bool:
        """Whether figures may be quoted: others took little of the machine, if it is known."""
        return self.others is None or self.others < QUIET

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "quiet": self.quiet}

    def rate(self, way: str) -> float | None:
        return next((f.rate for f in self.figures if f.way == way), None)


class Differs(CellcError):
    """A way gives other results than the first."""


def check(case: Case) -> float:
    """The largest difference between any way's results and the first's. Raises Differs."""
    want = case.ways[0].run()
    worst = 0.0
    for way in case.ways[1:]:
        got = way.run()
        for i, (a, b) in enumerate(zip(got, want, strict=False)):
            same = a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
            if not same:
                raise Differs(f"{case.title}: {way.name} differs from {case.ways[0].name} at {i}")
            if a.is_floating_point() and a.numel():
                worst = max(worst, float((a - b).abs().max()))
    return worst


def measure(case: Case, rounds: int, seconds: float, patience: Patience) -> Outcome:
    """Check, then time every way for `seconds` a round, alternated."""
    worst = check(case)
    works = [repeat_for(way.run, seconds) for way in case.ways]
    most = 3 * rounds
    ran = [0]

    def counted() -> float:
        ran[0] += 1
        return works[0]()

    kept = alternate([counted, *works[1:]], rounds, most, patience)
    times = list(zip(*(r.results for r in kept), strict=True))
    sizes = [way.sample or case.count for way in case.ways]
    rates = [[n / t for t in column] for n, column in zip(sizes, times, strict=True)]
    base = rates[[way.name for way in case.ways].index(case.base)]
    figures = [
        Figure(
            way.name,
            statistics.median(column),
            min(column),
            max(column),
            statistics.median([a / b for a, b in zip(column, base, strict=True)]),
            len(column),
        )
        for way, column in zip(case.ways, rates, strict=True)
    ]
    return Outcome(
        case.title, case.base, case.unit, worst, figures, noise(kept), ran[0] - len(kept),
        case.missing,
    )  # fmt: skip


def table_of(outcome: Outcome, *, anyway: bool = False) -> Table:
    """For the console. What was measured while others used the machine is not quoted, unless
    `anyway`.
    """
    table = Table(title=outcome.title)
    for i, column in enumerate(("way", f"{outcome.unit}/s", "least to most", f"to {outcome.base}")):
        table.add_column(column, justify="right" if i else "left")
    for f in outcome.figures:
        if outcome.quiet or anyway:
            spread = f"{f.least:,.0f} to {f.most:,.0f}"
            table.add_row(f.way, f"{f.rate:,.0f}", spread, f"{f.ratio:.2f}x")
        else:
            table.add_row(f.way, "disturbed", "", "")
    for way, why in outcome.missing.items():
        table.add_row(way, why, "", "")
    share = outcome.others
    quiet = "what else ran is not known" if share is None else f"others took up to {share:.0%}"
    if not outcome.quiet:
        quiet += f" of the machine, more than the {QUIET:.0%} of a quiet one"
        quiet += "" if anyway else ": not quoted (--noisy does)"
    table.caption = (
        f"medians of {outcome.figures[0].rounds} alternated rounds, {outcome.dropped} dropped; "
        f"{quiet}; largest difference {outcome.largest_difference:.1e}"
    )
    return table
