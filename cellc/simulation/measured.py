"""Costs of this machine's processor, for a simulation of it.

Duty: curves of an application's cells, measured by `cellc.tuning` where they are not known yet; and
from serving requests for a while, by least squares: what the engine's launches took beyond those
curves (alone and again and again, kernels find their weights in the cache), what turns of its loop
took beside kernels, shared out between launches and requests, and what both lost to requests that
were sent meanwhile, whose threads take processors and Python's lock from them. Comes in: an
`Application`; goes out: `Measured`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cellc import costs
from cellc.bench.arrivals import make_load
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
from cellc.simulation.curves import SPANS, CostTable, Host
from cellc.tuning import tune

EXAMPLES = 8  # requests that cells are measured on
SHARES, SECONDS = (0.3, 0.6, 0.85), 1.0  # loads that the host's part is measured at
SEED = 500  # of these loads, apart from those that are simulated
LONE = 20  # requests, one after the other
SIZES = (4, 16, 64, 256)  # rows of steps: fewer ones take longer than their curve by another share
LEAST = 10  # turns with steps of some size that tell such a share

Step = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Measured:
    """Curves by the cell's number, as the engine's launches have them, and the host's part."""

    curves: dict[int, Curve]
    host: Host


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
        self._watch = _Watch(compiled, {c.key: k for k, c in enumerate(app.cells)}, curves)
        self._seed = SEED + seed

    def measure(self) -> Measured:
        """From three loads and a burst, other ones each time."""
        self._watch.turns.clear()
        for share in SHARES:
            load = make_load(share * self.peak, SECONDS, len(self.requests), self._seed)
            serve(self.submit, self.requests, load)
            self._seed += 1
        burst_rate(self.submit, self.requests)
        found = self._watch.fit()
        wake, lag = self._lone(found.host)
        return replace(found, host=replace(found.host, wake=wake, lag=lag))

    def _lone(self, host: Host) -> tuple[float, tuple[float, ...]]:
        """Of requests that nobody is with: seconds until one begins, and how much later than due
        this thread woke to send each.
        """
        waits, lags = [], []
        for request in self.requests[:LONE]:
            lags.append(_late(2e-3))
            kernels, turns, start = self._watch.kernels, len(self._watch.turns), time.perf_counter()
            ended: Future[float] = Future()
            self.submit(request).add_done_callback(partial(_note, ended))
            took = ended.result() - start
            time.sleep(1e-3)  # the turn is noted after that
            launched = len(self._watch.turns) - turns
            took -= self._watch.kernels - kernels
            waits.append(took - launched * host.turn - host.request - host.sending)
        return max(0.0, statistics.median(waits)), tuple(lags)


def _note(ended: Future[float], _: Future[Any]) -> None:
    ended.set_result(time.perf_counter())


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


class _Seen(NamedTuple):
    """A turn of the loop: seconds beside kernels, and of those after them; seconds in kernels, and
    what curves say of these, by the rows of steps (SIZES); requests that it admitted or answered,
    half each; and those that were sent meanwhile.
    """

    host: float
    after: float
    kernels: float
    told: F64
    requests: float
    sent: int


@dataclass
class _Watch:
    """Turns of an engine's loop, and the seconds that its kernels took in all."""

    compiled: Compiled
    numbers: dict[str, int]  # of cells, by key
    curves: dict[int, Curve]
    turns: list[_Seen] = field(default_factory=list)
    kernels: float = 0.0

    def __post_init__(self) -> None:
        engine = self.compiled._engine
        launcher, counters = engine.launcher, engine.counters
        by_number = self.compiled._compiler.by_number
        table = CostTable(self.curves, Host(0.0, 0.0), launcher._scheduler.max_batch)
        measure, note_host = launcher._measure, launcher.note_host
        told, before, ended = _nothing(), 0.0, 0.0
        live, waiting, done = len(engine.flight.live), engine.num_waiting, counters.requests

        def measured(batch: Batch, took: float) -> None:
            nonlocal told, ended
            sizes = np.diff(batch.steps)
            number = self.numbers[by_number[batch.cell].key]
            told = by_size(sizes, table.steps(number, sizes))
            self.kernels += took
            measure(batch, took)
            ended = time.perf_counter()

        def noted(seconds: float) -> None:
            nonlocal told, before, live, waiting, done
            after = time.perf_counter() - ended
            left = counters.requests - done
            came = len(engine.flight.live) - live + left
            sent = came + engine.num_waiting - waiting
            kernels, before = self.kernels - before, self.kernels
            self.turns.append(_Seen(seconds, after, kernels, told, (came + left) / 2, sent))
            live, waiting, done = len(engine.flight.live), engine.num_waiting, counters.requests
            told = _nothing()
            note_host(seconds)

        launcher._measure = measured  # type: ignore[method-assign]
        launcher.note_host = noted  # type: ignore[method-assign]

    def fit(self) -> Measured:
        return fit(self.turns, self.curves)


def _nothing() -> F64:
    return np.zeros(len(SIZES) + 1)


def by_size(sizes: npt.NDArray[np.integer], seconds: F64) -> F64:
    """Seconds of steps, summed by their rows (SIZES)."""
    where = np.searchsorted(SIZES, sizes, "right")
    return np.bincount(where, seconds, len(SIZES) + 1).astype(np.float64)


def fit(turns: Sequence[_Seen], curves: Mapping[int, Curve]) -> Measured:
    """By least squares. Of long turns, seconds count less: what disturbs them adds up."""
    told = np.stack([t.told for t in turns])
    host, after, kernels, requests, sent = np.array(
        [(t.host, t.after, t.kernels, t.requests, t.sent) for t in turns]
    ).T
    one = np.ones_like(host)
    parts = np.stack([one, requests, sent], 1)
    turn, request, locked = weighted(parts, host, 1 + requests)
    of_kernels = np.concatenate([told, np.stack([one, sent], 1)], 1)
    *shares, launch, beside = weighted(of_kernels, kernels, np.maximum(told.sum(1), 1e-6))
    should = parts @ (turn, request, locked) + of_kernels @ (*shares, launch, beside)
    spans = np.searchsorted(SPANS, should, "right")
    rest = host + kernels - should
    spread = tuple(tuple(rest[spans == k].tolist()) for k in range(len(SPANS) + 1))
    known = [k for k, share in enumerate(shares) if share and (told[:, k] > 0).sum() >= LEAST]
    assert known, "too few turns"
    factors = [shares[min(known, key=lambda n: abs(n - k))] for k in range(len(shares))]
    return Measured(
        {number: _slower(curve, factors, launch) for number, curve in curves.items()},
        Host(
            turn,
            request,
            after=float(after.sum() / host.sum()),
            beside=beside,
            locked=locked,
            spread=spread,
        ),
    )


def _slower(curve: Curve, factors: Sequence[float], launch: float) -> Curve:
    """With what the engine's launches take: steps by their rows (SIZES), and one more time each."""
    where = np.searchsorted(SIZES, curve.rows, "right")
    seconds = [s * factors[k] for s, k in zip(curve.seconds, where, strict=True)]
    return Curve(curve.rows, tuple(seconds), launch)


def weighted(columns: F64, seconds: F64, sizes: F64) -> tuple[float, ...]:
    """Least squares where the variance of `seconds` grows with `sizes`."""
    weights = 1 / np.sqrt(sizes)
    return least_squares(columns * weights[:, None], seconds * weights)


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
