"""`cellc simulate --validate`: what the simulation predicts of this machine, against a real run.

Duty: serve Poisson arrivals by the engine, again and again, and measure costs on other arrivals in
between; then simulate the same arrivals; print both, and how far either varies. Comes in: an
application; goes out: a table or JSON, an exit code: 1 where a prediction misses by more than
THROUGHPUT or P90, and p90 lies beyond the quartiles of real runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

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
from cellc.simulation.measured import TOO_MUCH, answered_rate
from cellc.simulation.servers import Work
from cellc.simulation.tape import Tape

THROUGHPUT, P90 = 0.15, 0.25  # a prediction may miss by
SHARES = 0.3, 0.6, 0.85
MOST_ROUNDS, LEAST_ROUNDS, BUDGET = 11, 5, 60.0  # as many as take so many seconds
DRAWS = 3  # simulations of each real run
PATIENCE = 20.0  # seconds, for rounds in place of disturbed ones


@dataclass(frozen=True)
class Spread:
    """Of rounds."""

    median: float
    low: float  # quartiles
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Check:
    """One load: what was measured in rounds, and what was predicted; p90 in ms. `steady`: no more
    come than can be answered, or all are there; else p90 grows as long as the load lasts.
    """

    load: str
    steady: bool
    offered: float | None
    answered: Spread
    predicted_answered: Spread
    p90: Spread
    predicted_p90: Spread
    rounds: int
    others: float | None  # the most of the machine that others took

    @property
    def misses(self) -> tuple[float, float]:
        """Of throughput and p90, as shares of what was measured."""
        return (
            self.predicted_answered.median / self.answered.median - 1,
            self.predicted_p90.median / self.p90.median - 1,
        )

    @property
    def good(self) -> bool:
        throughput, p90 = self.misses
        return abs(throughput) <= THROUGHPUT and (abs(p90) <= P90 or not self.steady)

    @property
    def within_spread(self) -> bool:
        """Throughput is good, and p90 is what real runs of this load have, too."""
        throughput, _ = self.misses
        inside = self.p90.low <= self.predicted_p90.median <= self.p90.high
        return abs(throughput) <= THROUGHPUT and inside


@dataclass(frozen=True)
class _Run:
    """A load that was served; where turns of its round are on the tape."""

    load: Load
    offered: float | None
    latencies: np.ndarray
    turns: slice


def run(app: Application, args: argparse.Namespace, steps: Steps, console: Console) -> int:
    """The command; returns its exit code."""
    checks = validate(app, args.loads or SHARES, args.seed, steps, args.rounds)
    if args.json:
        found = [{**asdict(c), "good": c.good, "within_spread": c.within_spread} for c in checks]
        console.out(json.dumps({"application": app.title, "checks": found}, indent=2))
    else:
        console.print(_table(app.title, checks))
    return 0 if all(c.good for c in checks) else 1


def validate(
    app: Application,
    shares: Sequence[float],
    seed: int,
    steps: Steps,
    num_rounds: int | None = None,
) -> list[Check]:
    """Many at once, then loads as shares of what the engine could answer a moment before, then more
    than that. In each round costs are measured anew, on other arrivals, since a shared machine
    changes from minute to minute.
    """
    _, curves = measured.curves_here(app, steps.step)
    with torch.no_grad(), compile(app.model, max_batch=ROWS) as compiled, no_long_pauses():
        with steps.step("paths seen, and the capacity"):
            meter = measured.Meter(app, compiled, curves, seed)
            start = time.perf_counter()
            meter.observe()
            seconds = 2 * (time.perf_counter() - start)  # predictions take as many loads
        loads = (None, *shares, TOO_MUCH)
        rounds = num_rounds or min(max(int(BUDGET / seconds), LEAST_ROUNDS), MOST_ROUNDS)
        steps.say(f"{rounds} rounds of about {seconds:.0f} s follow, and their simulation")
        seeds = iter(range(seed, seed + 10 * (rounds + 4) * len(loads)))
        with steps.step("rounds", rounds) as done:

            def one_round() -> list[_Run]:
                turns = meter.observe()
                made = [_served(meter, share, next(seeds), turns) for share in loads]
                done()
                return made

            kept = alternate([one_round], rounds, rounds + 4, Patience(PATIENCE))
        costs = meter.measure()
    setting = runs.Setting(CostTable(costs.curves, costs.host, ROWS), find_arithmetic(), ROWS)
    checks = []
    with steps.step("simulations of them", len(loads)) as done:
        for i, share in enumerate(loads):
            made = [r.results[0][i] for r in kept]
            checks.append(_check(share, made, app, (setting, costs.tape), noise(kept)))
            done()
    return checks


def _served(meter: measured.Meter, share: float | None, seed: int, turns: slice) -> _Run:
    pool = len(meter.requests)
    if share is None:
        chosen = np.random.default_rng(seed).integers(0, pool, meter.burst)
        rate, load = None, Load(np.zeros(meter.burst), chosen)
    else:
        rate = share * meter.capacity
        load = make_load(rate, meter.seconds, pool, seed)
    return _Run(load, rate, serve(meter.submit, meter.requests, load).latencies, turns)


def _check(
    share: float | None,
    made: Sequence[_Run],
    app: Application,
    machine: tuple[runs.Setting, Tape],
    others: float | None,
) -> Check:
    real = [_summed(run.load, run.latencies) for run in made]
    told = [
        _summed(run.load, _simulated(run, app, *machine, DRAWS * number + draw))
        for number, run in enumerate(made)
        for draw in range(DRAWS)
    ]
    answered, p90 = (Spread.of(values) for values in zip(*real, strict=True))
    predicted_answered, predicted_p90 = (Spread.of(values) for values in zip(*told, strict=True))
    offered = [run.offered for run in made if run.offered is not None]
    return Check(
        "at once" if share is None else f"{share:.0%}",
        share is None or share < 1,
        float(np.median(offered)) if offered else None,
        answered,
        predicted_answered,
        p90,
        predicted_p90,
        len(made),
        others,
    )


def _simulated(
    run: _Run, app: Application, setting: runs.Setting, tape: Tape, seed: int
) -> np.ndarray:
    """Latencies, on a machine as fast as it was in the round."""
    costs, host = setting.costs, setting.costs.host
    table = costs.with_host(replace(host, tape=tape.part(run.turns).calm()))
    work = Work(app.plans, app.lengths, app.priority, run.load.arrivals, run.load.chosen)
    return runs.simulate(runs.CELLULAR, replace(setting, costs=table, seed=seed), work)[0]


def _summed(load: Load, latencies: np.ndarray) -> tuple[float, float]:
    """(answered a second, p90 in ms)."""
    return answered_rate(load, latencies), percentiles(latencies)[1]


def _table(title: str, checks: list[Check]) -> Table:
    table = Table(title=f"{title}: predicted and measured here", title_justify="left")
    table.add_column("load")
    names = "offered/s", "answered/s", "predicted", "off by", "p90 ms", "predicted", "off by"
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("good")
    for c in checks:
        throughput, p90 = c.misses
        table.add_row(
            c.load,
            "" if c.offered is None else f"{c.offered:,.0f}",
            f"{c.answered.median:,.0f}",
            f"{c.predicted_answered.median:,.0f}",
            f"{throughput:+.0%}",
            _ranged(c.p90),
            _ranged(c.predicted_p90),
            f"{p90:+.0%}",
            "yes" if c.good else "no, but as real runs vary" if c.within_spread else "no",
        )
    most = max((c.others for c in checks if c.others is not None), default=None)
    noisy = "what else ran is not known" if most is None else f"others took up to {most:.0%}"
    if most is not None and most >= QUIET:
        noisy += f" of the machine, more than the {QUIET:.0%} of a quiet one: validate again"
    table.caption = (
        f"medians (quartiles) of {checks[0].rounds} rounds, and of {DRAWS} simulations of each; "
        "loads: of what the engine could answer a moment before; good: within "
        f"{THROUGHPUT:.0%} of throughput and, up to 100%, {P90:.0%} of p90; as real runs vary: p90 "
        f"is off by more, but between their quartiles; {noisy}"
    )
    return table


def _ranged(spread: Spread) -> str:
    return f"{spread.median:,.3g} ({spread.low:,.3g} to {spread.high:,.3g})"
