"""Costs of this machine's processor, for a simulation of it.

Duty: curves of an application's cells, measured by `cellc.tuning` where they are not known yet; and
from serving requests for a while, what they cost the engine (`cellc.simulation.fitting`). Comes in:
an `Application`; goes out: `Measured`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cellc import costs
from cellc.bench.arrivals import Load, make_load
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
from cellc.simulation.watch import Seen, Watch
from cellc.tuning import tune

EXAMPLES = 8  # requests that cells are measured on
SHARES, TOO_MUCH = (0.3, 0.6, 0.85), 1.3  # of the capacity: loads that costs are measured at
SECONDS, ENOUGH, MOST = 0.6, 800, 2.0  # of a load: longer where few requests are answered a second
SWEEPS = 2  # where nobody validates
SEED = 500  # of these loads, apart from those that are simulated
LONE, LEAST = 20, 8  # requests one after the other, and of a burst

Step = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]


def costs_here(app: Application, step: Step, seed: int = 0) -> tuple[Place, Measured]:
    """Measure what is not known. Raises BackendError where a cell has no kernel to measure."""
    here, curves = curves_here(app, step)
    with torch.no_grad(), compile(app.model, max_batch=ROWS) as compiled, no_long_pauses():
        with step("what requests and launches cost the host", None):
            meter = Meter(app, compiled, curves, seed)
            for _ in range(SWEEPS):
                meter.observe()
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
    """Measures on an engine, again and again. `peak`: requests a second at once; `capacity`: when
    more come, one after the other, than it can answer, as it was last; `seconds`: of a load.
    """

    def __init__(
        self, app: Application, compiled: Compiled, curves: dict[int, Curve], seed: int
    ) -> None:
        self.requests, self.submit = list(app.requests), submitting(compiled)
        for _ in range(2):
            compiled.map(self.requests)
        self.peak = statistics.median(burst_rate(self.submit, self.requests) for _ in range(3))
        self.seconds = min(max(SECONDS, ENOUGH / self.peak), MOST)
        numbers = {c.key: k for k, c in enumerate(app.cells)}
        self._watch, self._curves = Watch(compiled, numbers, curves), curves
        self.submit = self._watch.sending(self.submit)
        self._threads = num_threads() if self._watch.beside else 1
        self._seed = SEED + seed
        self._seen: list[tuple[Seen, int, float | None]] = []  # which load, seconds to the next
        self.capacity = self.peak
        for _ in range(2):  # arenas grow in the first
            self.capacity = self._served(TOO_MUCH)

    def observe(self) -> slice:
        """Three loads, one that is too much, and a burst; other ones each time. Returns which of
        the turns were theirs.
        """
        first, watch = len(self._seen), self._watch
        for number, share in enumerate((*SHARES, TOO_MUCH)):
            watch.turns.clear()
            gap = 1 / (share * self.capacity)
            reached = self._served(share)
            self._seen += [(turn, number, gap) for turn in watch.turns]
        self.capacity = reached
        watch.turns.clear()
        burst_rate(self.submit, self.requests[: self.burst])
        self._seen += [(turn, len(SHARES) + 1, None) for turn in watch.turns]
        return slice(first, len(self._seen))

    def measure(self) -> Measured:
        """From all that was observed."""
        turns, loads, _ = zip(*self._seen, strict=True)
        found = fit(turns, self._curves, self._threads, loads)
        wake, lag = self._lone(found.host)
        waits, waits_beside = self._waits(found.host.locked, statistics.mean(lag))
        host = replace(found.host, wake=wake, lag=lag, waits=waits, waits_beside=waits_beside)
        return replace(found, host=host)

    def _waits(self, each: float, lag: float) -> tuple[float, float]:
        """How long this thread waited before it sent, on average, while the host worked and while
        it was in kernels: of that time, what it neither sent nor slept, for each time it woke.
        """
        loads = [(t, gap) for t, _, gap in self._seen if gap is not None]
        host = _wait([(t.host, t.sent, t.woke, gap) for t, gap in loads], each)
        kernels = [(t.kernels - t.apart, t.met, t.woke_met, gap) for t, gap in loads]
        return max(0.0, host - lag), max(0.0, _wait(kernels, each) - lag)

    @property
    def burst(self) -> int:
        """Requests at once that take about half as long as a load."""
        return max(LEAST, min(len(self.requests), round(self.peak * self.seconds / 2)))

    def _served(self, share: float) -> float:
        """A load; answered a second."""
        load = make_load(share * self.capacity, self.seconds, len(self.requests), self._seed)
        self._seed += 1
        return answered_rate(load, serve(self.submit, self.requests, load).latencies)

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


def _wait(spans: Sequence[tuple[float, int, int, float]], each: float) -> float:
    """Of spans of (seconds, requests sent, times woken, seconds from one to the next)."""
    seconds, sent, woken, slept = (
        math.fsum(values)
        for values in zip(*((s, n, k, k * gap) for s, n, k, gap in spans), strict=True)
    )
    return (seconds - sent * each - slept) / max(1.0, woken)


def answered_rate(load: Load, latencies: np.ndarray) -> float:
    """A second, until the last one is."""
    return len(latencies) / float((load.arrivals + latencies).max())


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
