"""`cellc simulate --validate`: what the simulation predicts of this machine, against a real run.

Duty: serve Poisson arrivals by the engine, simulate the same arrivals with measured costs, in
alternation; print both. Comes in: an application; goes out: a table or JSON, an exit code: 1 where
a prediction misses by more than THROUGHPUT or P90.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cellc.bench.arrivals import Load, make_load
from cellc.bench.measure import Patience, alternate, no_long_pauses, noise, percentiles, serve
from cellc.demo_steps import Steps
from cellc.entry import compile
from cellc.kernels.native import find_arithmetic
from cellc.pacing import ROWS
from cellc.report import QUIET
from cellc.simulation import measured, runs
from cellc.simulation.applications import Application
from cellc.simulation.curves import CostTable
from cellc.simulation.servers import Work

THROUGHPUT, P90 = 0.15, 0.25  # a prediction may miss by
SHARES, SECONDS, ROUNDS = (0.3, 0.6, 0.85), 0.6, 11
BURST = 1024  # requests at once
PATIENCE = 20.0  # seconds, for rounds in place of disturbed ones


@dataclass(frozen=True)
class Check:
    """One load: medians over rounds of what was measured and what was predicted; p90 in ms."""

    load: str
    offered: float | None
    answered: float
    predicted_answered: float
    p90: float
    predicted_p90: float
    others: float | None  # the most of the machine that others took

    @property
    def misses(self) -> tuple[float, float]:
        """Of throughput and p90, as shares of what was measured."""
        return self.predicted_answered / self.answered - 1, self.predicted_p90 / self.p90 - 1

    @property
    def good(self) -> bool:
        throughput, p90 = self.misses
        return abs(throughput) <= THROUGHPUT and abs(p90) <= P90


def run(app: Application, args: argparse.Namespace, steps: Steps, console: Console) -> int:
    """The command; returns its exit code."""
    checks = validate(app, args.loads or SHARES, args.seed, steps)
    if args.json:
        found = [{**asdict(c), "good": c.good} for c in checks]
        console.out(json.dumps({"application": app.title, "checks": found}, indent=2))
    else:
        console.print(_table(app.title, checks))
    return 0 if all(c.good for c in checks) else 1


def validate(app: Application, shares: tuple[float, ...], seed: int, steps: Steps) -> list[Check]:
    """Many at once, then loads as shares of what the engine answers then. In each round the host's
    part is measured anew, on other arrivals, since a shared machine changes from minute to minute.
    """
    _, curves = measured.curves_here(app, steps.step)
    work = Work(app.plans, app.lengths, app.priority, np.zeros(0), np.zeros(0, np.int64))
    with torch.no_grad(), compile(app.model, max_batch=ROWS) as compiled, no_long_pauses():
        with steps.step("paths seen, and the peak"):
            meter = measured.Meter(app, compiled, curves, seed)
        rates = [None, *(share * meter.peak for share in shares)]
        seeds = iter(range(seed, seed + 10 * ROUNDS))
        with steps.step("rounds", ROUNDS) as done:

            def one_round() -> list[tuple[float, ...]]:
                costs = meter.measure(SECONDS)
                table = CostTable(costs.curves, costs.host, ROWS)
                setting, drawn = runs.Setting(table, find_arithmetic(), ROWS), next(seeds)
                done()
                return [_both(meter, setting, work, rate, drawn) for rate in rates]

            kept = alternate([one_round], ROUNDS, ROUNDS + 4, Patience(PATIENCE))
    checks = []
    for i, rate in enumerate(rates):
        middle = [statistics.median(x) for x in zip(*(r.results[0][i] for r in kept), strict=True)]
        name = "at once" if rate is None else f"{shares[i - 1]:.0%}"
        answered, told, p90, told_p90 = middle
        checks.append(Check(name, rate, answered, told, p90, told_p90, noise(kept)))
    return checks


def _both(
    meter: measured.Meter, setting: runs.Setting, work: Work, rate: float | None, seed: int
) -> tuple[float, ...]:
    """(answered, predicted, p90 and predicted p90 in ms) of one load."""
    load = _draw(rate, len(meter.requests), seed)
    real = _summed(load, serve(meter.submit, meter.requests, load).latencies)
    told = _summed(load, runs.simulate(runs.CELLULAR, setting, runs.loaded(work, load))[0])
    return real[0], told[0], real[1], told[1]


def _draw(rate: float | None, pool: int, seed: int) -> Load:
    if rate is not None:
        return make_load(rate, SECONDS, pool, seed)
    return Load(np.zeros(BURST), np.random.default_rng(seed).integers(0, pool, BURST))


def _summed(load: Load, latencies: np.ndarray) -> tuple[float, float]:
    """(answered a second, p90 in ms)."""
    last = float((load.arrivals + latencies).max())
    return len(latencies) / last, percentiles(latencies)[1]


def _table(title: str, checks: list[Check]) -> Table:
    table = Table(title=f"{title}: predicted and measured here", title_justify="left")
    table.add_column("load")
    for name in ("offered/s", "answered/s", "predicted", "off by", "p90 ms", "predicted", "off by"):
        table.add_column(name, justify="right")
    table.add_column("good")
    for c in checks:
        throughput, p90 = c.misses
        table.add_row(
            c.load,
            "" if c.offered is None else f"{c.offered:,.0f}",
            f"{c.answered:,.0f}",
            f"{c.predicted_answered:,.0f}",
            f"{throughput:+.0%}",
            f"{c.p90:,.3g}",
            f"{c.predicted_p90:,.3g}",
            f"{p90:+.0%}",
            "yes" if c.good else "no",
        )
    most = max((c.others for c in checks if c.others is not None), default=None)
    noisy = "what else ran is not known" if most is None else f"others took up to {most:.0%}"
    if most is not None and most >= QUIET:
        noisy += f" of the machine, more than the {QUIET:.0%} of a quiet one: validate again"
    table.caption = (
        f"medians of {ROUNDS} rounds; the same arrivals are served and simulated; good: within "
        f"{THROUGHPUT:.0%} of throughput and {P90:.0%} of p90; {noisy}"
    )
    return table
