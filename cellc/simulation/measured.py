"""Costs of this machine's processor, for a simulation of it.

Duty: curves of an application's cells, measured by `cellc.tuning` where they are not known yet; and
the host's part, from serving requests for a while, by least squares: what turns of the engine's
loop took beside their kernels, shared out between launches and requests; and what kernels took
beyond their curves, between kernels and the requests that came meanwhile, whose threads take
processors from them. Comes in: an `Application`; goes out: `Measured`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from cellc import costs
from cellc.bench.arrivals import Load, make_load
from cellc.bench.measure import burst_rate, no_long_pauses, serve
from cellc.compiled import Compiled
from cellc.costs import Curve, Place
from cellc.entry import compile, make_backend
from cellc.errors import BackendError
from cellc.machines import place
from cellc.options import Options
from cellc.pacing import ROWS
from cellc.request import as_call
from cellc.scheduler import Batch
from cellc.simulation.applications import Application
from cellc.simulation.clock import F64
from cellc.simulation.curves import CostTable, Host
from cellc.tuning import tune

EXAMPLES = 8  # requests that cells are measured on
SHARES, SECONDS = (0.3, 0.6), 0.5  # loads that the host's part is measured at
SEED = 500  # of these loads, apart from those that are simulated
PARTS = 200  # that the lag of requests is kept in
LONE = 20  # requests, one after the other

Step = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Measured:
    """Curves by the cell's number, and the host's part."""

    place: Place
    curves: dict[int, Curve]
    host: Host


def costs_here(app: Application, step: Step, seed: int = 0) -> Measured:
    """Measure what is not known. Raises BackendError where a cell has no kernel to measure."""
    here, curves = curves_here(app, step)
    with torch.no_grad(), compile(app.model, max_batch=ROWS) as compiled, no_long_pauses():
        with step("what requests and launches cost the host", None):
            meter = Meter(app, compiled, curves, seed)
            return Measured(here, curves, meter.measure())


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
    """Measures the host's part on an engine, again and again; `peak`: requests a second at once."""

    def __init__(
        self, app: Application, compiled: Compiled, curves: dict[int, Curve], seed: int
    ) -> None:
        self.requests, self.submit = list(app.requests), submitting(compiled)
        self._began: list[float] = []  # when requests were sent,
        self._sent: list[float] = []  # and when the engine had them
        for _ in range(2):
            compiled.map(self.requests)
        bursts = [burst_rate(self.submit, self.requests) for _ in range(5)]
        self.peak = statistics.median(bursts)
        self._watch = _Watch(compiled, {c.key: k for k, c in enumerate(app.cells)}, curves)
        self._seed = SEED + seed

    def measure(self) -> Host:
        """From two loads and a burst, other ones each time."""
        self._watch.turns.clear()
        lags: list[F64] = []
        for share in SHARES:
            load = make_load(share * self.peak, SECONDS, len(self.requests), self._seed)
            lags.append(self._lags(load))
            self._seed += 1
        burst_rate(self.submit, self.requests)
        host = self._watch.fit()
        lag = np.array_split(np.sort(np.concatenate(lags)), PARTS)
        sending = statistics.median(b - a for a, b in zip(self._began, self._sent, strict=True))
        wake = max(0.0, self._lone() - host.turn - host.request - sending)
        return replace(host, wake=wake, lag=tuple(float(part.mean()) for part in lag))

    def _lags(self, load: Load) -> F64:
        """Serve a load: seconds from when each request was due until the engine had it."""
        self._began, self._sent = [], []

        def submit(request: Any) -> Future[Any]:
            self._began.append(time.perf_counter())
            future = self.submit(request)
            self._sent.append(time.perf_counter())
            return future

        serve(submit, self.requests, load)
        start = (np.array(self._began) - load.arrivals).min()
        lags: F64 = np.array(self._sent) - load.arrivals - start
        return lags

    def _lone(self) -> float:
        """Seconds of a request that nobody is with, kernels aside."""
        beside = []
        for request in self.requests[:LONE]:
            before, start = self._watch.predicted, time.perf_counter()
            self.submit(request).result()
            took = time.perf_counter() - start
            beside.append(took - (self._watch.predicted - before))
            time.sleep(2e-3)
        return statistics.median(beside)


def submitting(compiled: Compiled) -> Callable[[Any], Future[Any]]:
    """`submit` of one request, as examples are written."""

    def submit(request: Any) -> Future[Any]:
        args, kwargs = as_call(request)
        return compiled.submit(*args, **kwargs)

    return submit


class _Seen(NamedTuple):
    """A turn of the loop: seconds beside kernels and in them, and what curves say of these;
    requests that it admitted or answered, half each; and those that came meanwhile.
    """

    host: float
    kernels: float
    told: float
    requests: float
    meanwhile: int


@dataclass
class _Watch:
    """Turns of an engine's loop, and the seconds that curves say of its kernels in all."""

    compiled: Compiled
    numbers: dict[str, int]  # of cells, by key
    curves: dict[int, Curve]
    turns: list[_Seen] = field(default_factory=list)
    predicted: float = 0.0

    def __post_init__(self) -> None:
        engine = self.compiled._engine
        launcher, counters = engine.launcher, engine.counters
        by_number = self.compiled._compiler.by_number
        table = CostTable(self.curves, Host(0.0, 0.0), launcher._scheduler.max_batch)
        measure, note_host = launcher._measure, launcher.note_host
        kernels, live, done = 0.0, len(engine.flight.live), counters.requests
        before = 0.0

        def measured(batch: Batch, took: float) -> None:
            nonlocal kernels
            number = self.numbers[by_number[batch.cell].key]
            told = table.launch(number, np.diff(batch.steps))
            self.predicted += told
            kernels += took
            measure(batch, took)

        def noted(seconds: float) -> None:
            nonlocal kernels, live, done, before
            left = counters.requests - done
            came = len(engine.flight.live) - live + left
            told, before = self.predicted - before, self.predicted
            self.turns.append(_Seen(seconds, kernels, told, (came + left) / 2, engine.num_waiting))
            kernels, live, done = 0.0, len(engine.flight.live), counters.requests
            note_host(seconds)

        launcher._measure = measured  # type: ignore[method-assign]
        launcher.note_host = noted  # type: ignore[method-assign]

    def fit(self) -> Host:
        """By least squares. Of kernels, long ones count less: what disturbs them adds up."""
        host, kernels, told, requests, meanwhile = np.array(self.turns).T
        parts = np.stack([np.ones_like(host), requests], 1)
        turn, request = least_squares(parts, host)
        beyond = np.stack([told, meanwhile], 1)
        weights = 1 / np.sqrt(np.maximum(told, 1e-6))
        slowdown, beside = least_squares(beyond * weights[:, None], (kernels - told) * weights)
        rest = host - parts @ (turn, request) + kernels - told - beyond @ (slowdown, beside)
        spread = tuple(
            float(p.mean()) for p in np.array_split(np.sort(rest), min(PARTS, len(rest)))
        )
        return Host(turn, request, slowdown=slowdown, beside=beside, spread=spread)


def least_squares(columns: F64, seconds: F64) -> tuple[float, ...]:
    """Of each column; one that would be below 0 is left out."""
    parts, used = np.zeros(columns.shape[1]), list(range(columns.shape[1]))
    while used:
        found = np.linalg.lstsq(columns[:, used], seconds, rcond=None)[0]
        if (found >= 0).all():
            parts[used] = found
            break
        used.pop(int(found.argmin()))
    return tuple(parts.tolist())
