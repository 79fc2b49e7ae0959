"""`cellc simulate`: the scheduler on a virtual clock.

Duty: arguments to an application, costs and loads; run every way of batching; print a table, JSON,
a plot. Comes in: parsed arguments; goes out: text on the console, an exit code.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from cellc.bench import plots
from cellc.bench.arrivals import Load, Trace, read_trace
from cellc.bench.lengths import DISTRIBUTION, draw_lengths, read_lengths
from cellc.costs import Curve
from cellc.demo_steps import Steps
from cellc.errors import UsageError
from cellc.kernels.native import find_arithmetic
from cellc.policies import Policy
from cellc.simulation import applications, measured, runs, validation
from cellc.simulation.applications import Application
from cellc.simulation.curves import GIVEN, GPUS, CostTable, Host, roofline_curves
from cellc.simulation.report import SHOWN, CellCost, Outcome, draw, table_of
from cellc.simulation.servers import Work
from cellc.target import load_object

POOL = 1000  # different requests
REQUESTS, LOADS = 100_000, (0.3, 0.7, 0.95)
HIDDEN, HIDDEN_HERE = 1024, 256  # units on GPUs, and here


def run(args: argparse.Namespace, console: Console) -> int:
    """The command; returns its exit code."""
    _check(args)
    steps = Steps(Console(stderr=True, highlight=False))
    trace = read_trace(args.trace) if args.trace else None
    lengths = _lengths(args, trace)
    hidden = args.hidden or (HIDDEN_HERE if args.device == "cpu" else HIDDEN)
    with steps.step(f"plans of {len(lengths):,} requests"):
        app = applications.make(args.application, lengths, hidden, args.seed)
    if args.validate:
        return validation.run(app, args, steps, console)
    curves, host, device, source = _costs(app, args, steps)
    table = CostTable(curves, host, args.max_batch)
    setting = runs.Setting(
        table,
        find_arithmetic(),
        args.max_batch,
        args.devices,
        args.timeout_ms,
        args.width,
        _policy(args.policy),
    )
    start = time.perf_counter()
    figures = list(_Loads(app, setting, args, steps, trace).figures())
    outcome = Outcome(
        app.title,
        device,
        source,
        args.devices,
        args.max_batch,
        host,
        [
            CellCost(c.name, c.flops_per_row, tuple(map(curves[k], SHOWN)))
            for k, c in enumerate(app.cells)
        ],
        _arrivals(args),
        f"lengths of {args.lengths or args.trace}" if args.lengths or args.trace else DISTRIBUTION,
        figures,
        time.perf_counter() - start,
    )
    if args.plot:
        draw(args.plot, outcome)
    if args.json:
        console.out(json.dumps(outcome.as_json(), indent=2), highlight=False)
    else:
        console.print(table_of(outcome))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what does not go together."""
    if args.plot:
        plots.check(Path(args.plot))
    if args.trace and args.lengths:
        raise UsageError("--trace has lengths of its own: leave --lengths out")
    if args.trace and args.requests:
        raise UsageError("--trace says how many requests there are: leave --requests out")
    if args.trace and args.variation != 1.0:
        raise UsageError("--trace says when requests come: leave --variation out")
    if args.cellular_only and not args.rate:
        raise UsageError("--cellular-only needs --rate: loads are shares of what others answer")
    if args.rate and args.loads:
        raise UsageError("--rate or --loads, not both")
    if args.validate and (args.device != "cpu" or args.trace or args.plot or args.devices > 1):
        raise UsageError("--validate is for --device cpu, one device, without --trace and --plot")
    if args.rounds and not args.validate:
        raise UsageError("--rounds is for --validate")


def _lengths(args: argparse.Namespace, trace: Trace | None) -> Sequence[int]:
    """Of the pool's requests."""
    if trace is not None:
        return sorted(set(trace.lengths))
    if args.lengths:
        return read_lengths(args.lengths, POOL, args.seed)
    return draw_lengths(POOL, args.seed)


def _costs(
    app: Application, args: argparse.Namespace, steps: Steps
) -> tuple[dict[int, Curve], Host, str, str]:
    """Curves by the cell's number, the host's part, the device, and where they are from."""
    if args.device == "cpu":
        place, found = measured.costs_here(app, steps.step, args.seed)
        return found.curves, _host(args, found.host), place.device, "measured here"
    gpu = GPUS[args.device]
    curves = roofline_curves(app.cells, gpu, args.efficiency)
    source = f"{args.efficiency:.0%} of the roofline in f32 ({gpu.source})"
    return curves, _host(args, GIVEN), gpu.name, source


def _policy(name: str | None) -> Policy | None:
    """Of the user's own: an object with a method `pick`, or a class of such."""
    if name is None:
        return None
    found = load_object(name)
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Policy):
        raise UsageError(f"--policy {name}: it has no method pick(ready, turn)")
    return made


def _host(args: argparse.Namespace, host: Host) -> Host:
    turn, request = args.host_turn_us, args.host_request_us
    return replace(
        host,
        turn=host.turn if turn is None else turn / 1e6,
        request=host.request if request is None else request / 1e6,
    )


def _arrivals(args: argparse.Namespace) -> str:
    if args.trace:
        return f"arrivals of {args.trace}"
    if args.variation == 1.0:
        return f"Poisson arrivals, seed {args.seed}"
    return f"gaps with a coefficient of variation of {args.variation:g}, seed {args.seed}"


@dataclass
class _Loads:
    """All figures, load by load."""

    app: Application
    setting: runs.Setting
    args: argparse.Namespace
    steps: Steps
    trace: Trace | None

    def figures(self) -> list[runs.Figure]:
        count = self.args.requests or REQUESTS
        work = replace(work_of(self.app), deadline=(self.args.deadline_ms or math.inf) / 1e3)
        if self.args.cellular_only:
            return [f for rate in self.args.rate for f in self._load(work, None, rate, count)]
        peak = runs.at_once(work, min(count, runs.AT_ONCE), self.args.seed)
        found = self._all(f"{len(peak.arrivals):,} requests at once", peak, None, None)
        for share, rate in self._rates(runs.best_other(found).answered):
            found += self._load(work, share, rate, count)
        return found

    def _load(self, work: Work, share: float | None, rate: float, count: int) -> list[runs.Figure]:
        load = self._draw(rate, count)
        text = f"{len(load.arrivals):,} requests, {rate:,.0f} a second"
        return self._all(text, runs.loaded(work, load), rate, share)

    def _rates(self, peak: float) -> list[tuple[float | None, float]]:
        if self.args.rate:
            return [(None, rate) for rate in self.args.rate]
        if self.trace is not None and not self.args.loads:
            return [(None, self.trace.rate)]
        return [(share, share * peak) for share in self.args.loads or LOADS]

    def _draw(self, rate: float, count: int) -> Load:
        if self.trace is None:
            pool = len(self.app.plans)
            return runs.draw_load(rate, count, pool, self.args.seed, self.args.variation)
        seconds = self.trace.load(1, rate).arrivals
        return Load(seconds, np.searchsorted(self.app.lengths, self.trace.lengths))

    def _all(
        self, text: str, work: Work, rate: float | None, share: float | None
    ) -> list[runs.Figure]:
        figures = []
        timed = self.args.deadline_ms is not None
        ways = runs.batchings(self.setting, padded=self.app.padded, deadline=timed)
        if self.args.cellular_only:
            ways = [way for way in ways if way != runs.FIFO and runs.ours(way)]
        parts = 100
        total = len(work.arrivals)
        with self.steps.step(text, parts * len(ways)) as done:
            for way in ways:
                shown = 0

                def tell(answered: int) -> None:
                    nonlocal shown
                    while shown < parts * answered // total:
                        shown += 1
                        done()

                figures.append(runs.figure(way, self.setting, work, rate, share, tell))
        return figures


def work_of(app: Application) -> Work:
    """Of no requests yet."""
    nobody = np.zeros(0, np.int64)
    return Work(app.plans, app.lengths, app.priority, np.zeros(0), nobody)
