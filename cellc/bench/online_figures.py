"""Figures of serving: a run's numbers, medians over rounds.

Duty: plain data between `online`, which measures, and tables (`sheets`), JSON and plots.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from cellc.report import QUIET

CELLC, POISSON = "cellc", "Poisson"


@dataclass(frozen=True)
class Run:
    """One load, one server. Latencies in ms from the scheduled arrival to the result; `achieved`
    requests a second, until the last was answered.
    """

    p50: float
    p90: float
    p99: float
    achieved: float
    requests: int


@dataclass(frozen=True)
class LoadFigure:
    """One server under one load: medians over `rounds`, and the least and most of p90."""

    server: str
    share: float  # of the peer's peak
    offered: float  # requests a second
    achieved: float
    requests: int  # in all rounds
    p50: float
    p90: float
    p99: float
    p90_least: float
    p90_most: float
    p90_to_cellc: float  # the median over rounds
    rounds: int
    best: bool  # of the peer's configurations


@dataclass(frozen=True)
class OnlineOutcome:
    """All figures of a workload. `peak`: of the peer as `policy` says, `own_peak`: cellc's, in
    requests a second when many are there at once; `others`, `dropped` and `name` as in `Outcome`.
    """

    title: str
    peer: str
    policy: str
    distinct: int  # requests
    peak: float
    own_peak: float
    largest_difference: float
    figures: Sequence[LoadFigure]
    others: float | None
    dropped: int
    name: str = ""
    arrivals: str = POISSON

    @property
    def quiet(self) -> bool:
        """Whether figures may be quoted: others took little of the machine, if it is known."""
        return self.others is None or self.others < QUIET

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "quiet": self.quiet}

    @classmethod
    def from_json(cls, written: Mapping[str, object]) -> OnlineOutcome:
        """What `as_json` wrote."""
        given = {k: v for k, v in written.items() if k in cls.__dataclass_fields__}
        figures = [LoadFigure(**f) for f in given.pop("figures")]  # type: ignore[attr-defined]
        return cls(**given, figures=figures)  # type: ignore[arg-type]

    def of_peer(self, share: float, policy: str = "") -> LoadFigure | None:
        """The peer under a load, configured as `policy` says, or at its best."""
        of = [f for f in self.figures if f.server != CELLC and math.isclose(f.share, share)]
        wanted = f"{self.peer}, {policy}"
        return next((f for f in of if (f.server == wanted if policy else f.best)), None)


def figures_of(
    share: float, offered: float, names: Sequence[str], rounds: Sequence[Sequence[Run]]
) -> list[LoadFigure]:
    """Of servers by name from rounds of one run each: cellc, then configurations of the peer, of
    which the one with the least median p90 is its best.
    """
    base = [runs[0].p90 for runs in rounds]
    columns = list(zip(*rounds, strict=True))
    p90 = [statistics.median(run.p90 for run in runs) for runs in columns]
    best = p90.index(min(p90[1:]), 1)
    return [
        _figure(name, share, offered, runs, base, i == best)
        for i, (name, runs) in enumerate(zip(names, columns, strict=True))
    ]


def _figure(
    name: str, share: float, offered: float, runs: Sequence[Run], base: Sequence[float], best: bool
) -> LoadFigure:
    p90 = [run.p90 for run in runs]
    return LoadFigure(
        server=name,
        share=share,
        offered=offered,
        achieved=statistics.median(run.achieved for run in runs),
        requests=sum(run.requests for run in runs),
        p50=statistics.median(run.p50 for run in runs),
        p90=statistics.median(p90),
        p99=statistics.median(run.p99 for run in runs),
        p90_least=min(p90),
        p90_most=max(p90),
        p90_to_cellc=statistics.median(a / b for a, b in zip(p90, base, strict=True)),
        rounds=len(runs),
        best=best,
    )
