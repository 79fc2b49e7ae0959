"""Figures of serving: a run's numbers, medians over rounds, tables.

Duty: plain data between `online`, which measures, and the console, JSON and plots.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from cellc.report import QUIET

CELLC = "cellc"


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
    requests a second when many are there at once; `others` and `dropped` as in `Outcome`.
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

    @property
    def quiet(self) -> bool:
        """Whether figures may be quoted: others took little of the machine, if it is known."""
        return self.others is None or self.others < QUIET

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "quiet": self.quiet}


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


def table_of(outcome: OnlineOutcome, *, anyway: bool = False) -> Table:
    """For the console. What was measured while others used the machine is not quoted, unless
    `anyway`.
    """
    table = Table(title=outcome.title)
    table.add_column("load")
    table.add_column("server")
    for column in ("requests/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "p90 least to most"):
        table.add_column(column, justify="right")
    table.add_column(f"p90 to {CELLC}'s", justify="right")
    above = None
    for f in outcome.figures:
        if above not in (None, f.share):
            table.add_section()
        load = f"{f.share:.0%}" if f.share != above else ""
        above = f.share
        server = f"{f.server} (best)" if f.best else f.server
        if outcome.quiet or anyway:
            table.add_row(load, server, *_cells(f))
        else:
            table.add_row(load, server, "disturbed")
    table.caption = _caption(outcome, anyway)
    return table


def _cells(f: LoadFigure) -> list[str]:
    spread = f"{f.p90_least:.3g} to {f.p90_most:.3g}"
    latencies = (f"{ms:.3g}" for ms in (f.p50, f.p90, f.p99))
    return [f"{f.offered:,.0f}", f"{f.achieved:,.0f}", *latencies, spread, f"{f.p90_to_cellc:.2f}x"]


def _caption(outcome: OnlineOutcome, anyway: bool) -> str:
    share = outcome.others
    quiet = "what else ran is not known" if share is None else f"others took up to {share:.0%}"
    if not outcome.quiet:
        quiet += f" of the machine, more than the {QUIET:.0%} of a quiet one"
        quiet += "" if anyway else ": not quoted (--noisy does)"
    return (
        f"load: of the peer's peak, {outcome.peak:,.0f} requests/s ({outcome.policy}); {CELLC}'s "
        f"own is {outcome.own_peak:,.0f}; medians of {outcome.figures[0].rounds} alternated "
        f"rounds, {outcome.dropped} dropped; {quiet}; largest difference "
        f"{outcome.largest_difference:.1e}"
    )
