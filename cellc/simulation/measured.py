"""Costs of this machine's processor, for a simulation of it.

Duty: curves of an application's cells, measured by `cellc.tuning` where they are not known yet; and
from serving requests for a while, what they cost the engine (`cellc.simulation.fitting`). Comes in:
an `Application`; goes out: `Measured`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cellc import costs
from cellc.bench.arrivals import make_load
from cellc.bench.measure import burst_rate, no_long_pauses, serve
from cellc.compiled import Compiled
from cellc.costs import Curve, Place
from cellc.entry import compile, make_backend
from cellc.errors import BackendError
from cellc.machines import num_threads, place
from cellc.options import Options
from cellc.pacing import ROWS
from cellc.request import as_call
from cellc.simulation.applications import Application
from cellc.simulation.curves import Host
from cellc.simulation.fitting import Measured, fit
from cellc.simulation.watch import Watch
from cellc.tuning import tune

EXAMPLES = 8  # requests that cells are measured on
SHARES, SECONDS = (0.3, 0.6, 0.85), 1.0  # loads that the host's part is measured at
BURSTS = 3  # that it is measured at, too
SEED = 500  # of these loads, apart from those that are simulated
LONE = 20  # requests, one after the other

Step = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]


def costs_here(app: Application, step: Step, seed: int = 0) -> tuple[Place, Measured]:
    """Measure what is not known. Raises BackendError where a cell has no kernel to measure."""
    here, curves = curves_here(app, step)
    with torch.no_grad(), compile(app.model, max_batch=ROWS) as compiled, no_long_pauses():
        with step("what requests and launches cost the host", None):
            meter = Meter(app, compiled, curves, seed)
            return here, meter.measure()


def curves_here(app: Application, step: Step) -> tuple[Place, dict[int, Curve]]:
    """Curves by the cell's number: kept ones, or measured now."""
    cpu = torch.device("cpu")
    here = place(make_backend("auto", cpu, Options()).name, cpu)
    found = costs.known(here)
    if any(cell.key not in found for cell in app.cells):
        with torch.no_grad():
            tune(app.model, app.requests[:EXAMPLES], "auto", step=step)
        found = costs.known(here)
    for cell in app.cells:
        if cell.key not in found:
            raise BackendError(f"{cell.name} could not be measured", backend=here.backend)
    return here, {number: found[cell.key] for number, cell in enumerate(app.cells)}


class Meter:
    """Measures on an engine, again and again; `peak`: requests a second at once."""

    def __init__(
        self, app: Application, compiled: Compiled, curves: dict[int, Curve], seed: int
    ) -> None:
        self.requests, self.submit = list(app.requests), submitting(compiled)
        for _ in range(2):
            compiled.map(self.requests)
        bursts = [burst_rate(self.submit, self.requests) for _ in range(5)]
        self.peak = statistics.median(bursts)
        numbers = {c.key: k for k, c in enumerate(app.cells)}
        self._watch, self._curves = Watch(compiled, numbers, curves), curves
        self._threads = num_threads() if self._watch.beside else 1
        self._seed = SEED + seed

    def measure(self, seconds: float = SECONDS) -> Measured:
        """From three loads and some bursts, other ones each time."""
        self._watch.turns.clear()
        for share in SHARES:
            load = make_load(share * self.peak, seconds, len(self.requests), self._seed)
            serve(self.submit, self.requests, load)
            self._seed += 1
        for _ in range(BURSTS):
            burst_rate(self.submit, self.requests)
        found = fit(self._watch.turns, self._curves, self._threads)
        wake, lag = self._lone(found.host)
        return replace(found, host=replace(found.host, wake=wake, lag=lag))

    def _lone(self, host: Host) -> tuple[float, tuple[float, ...]]:
        """Of requests that nobody is with: seconds until one begins, and how much later than due
        this thread woke to send each.
        """
        waits, lags = [], []
        for request in self.requests[:LONE]:
            lags.append(_late(2e-3))
            start = time.perf_counter()
            ended: Future[None] = Future()
            self.submit(request).add_done_callback(partial(_note, ended))
            ended.result()
            time.sleep(1e-3)  # the turn is noted after that
            waits.append(self._watch.began - start - (0.0 if host.apart else host.sending))
        return max(0.0, statistics.median(waits)), tuple(lags)


def _note(ended: Future[None], _: Future[Any]) -> None:
    ended.set_result(None)


def _late(seconds: float) -> float:
    """Sleep for so long; how much longer it was."""
    start = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - start - seconds


def submitting(compiled: Compiled) -> Callable[[Any], Future[Any]]:
    """`submit` of one request, as examples are written."""

    def submit(request: Any) -> Future[Any]:
        args, kwargs = as_call(request)
        return compiled.submit(*args, **kwargs)

    return submit
