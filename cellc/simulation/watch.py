"""Turns of an engine's loop, as somebody sees them who watches it.

Duty: what each turn took, on the host and in kernels, and what happened meanwhile. Comes in: an
engine that serves; goes out: `Seen`, to `cellc.simulation.fitting`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cellc.compiled import Compiled
from cellc.costs import Curve
from cellc.scheduler import Batch
from cellc.simulation.clock import F64
from cellc.simulation.curves import AWAKE, EARLY, CostTable, Host

SIZES = (4, 16, 64, 256)  # rows of steps: fewer ones take longer than their curve by another share


class Seen(NamedTuple):
    """A turn of the loop: seconds beside kernels, with those that the host waits for Python's lock
    after them and after the turn before, and those of it after them; seconds of kernels that ended
    in it, and what curves say of these, by the rows of steps (SIZES); requests that it admitted or
    answered, half each (`early`: of both, the first EARLY alone); those that were sent while the
    host worked, and while it was in kernels. `woke`, `woke_met`: before how many of those the
    thread that sends had slept. `launched`, `ended`: launches; `begun`: those of the latter that
    ran beside the host's work; `admits`, `answers`: did it do that at all; `apart`: seconds that
    other threads ran kernels while the host worked; `joined`: it was with each before it ended.
    """

    host: float
    after: float
    kernels: float
    told: F64
    requests: float
    sent: int
    met: int
    launched: int = 1
    ended: int = 1
    admits: bool = False
    answers: bool = False
    apart: float = 0.0
    joined: bool = True
    begun: int = 0
    woke: int = 0
    woke_met: int = 0
    early: float = 0.0


class Watch:
    """Turns of an engine's loop, and the seconds that its kernels took in all; `began`: when the
    last turn did that met nothing at work.
    """

    def __init__(
        self, compiled: Compiled, numbers: dict[str, int], curves: dict[int, Curve]
    ) -> None:
        """`numbers`: of cells, by key."""
        self._numbers, self._curves = numbers, curves
        self._by_number = compiled._compiler.by_number
        self._engine = engine = compiled._engine
        self._launcher = launcher = engine.launcher
        self.beside = launcher.concurrent
        self._table = CostTable(curves, Host(0.0, 0.0), launcher._scheduler.max_batch)
        self.turns: list[Seen] = []
        self.kernels = self.began = 0.0
        self._hook("settle", self._blocked)
        self._hook("_run_now", self._blocked)
        self._hook("begin", self._launched)
        self._hook("_measure", self._measured)
        self._hook("note_host", self._noted)
        engine._arenas.settle = launcher.settle
        step = engine._turns.step

        def turn() -> None:
            self._begin()
            step()

        engine._turns.step = turn  # type: ignore[method-assign]
        self._ended, self._known = 0.0, self._num_sent
        self._woken, self._known_woken, self._sent = 0, 0, 0.0
        self._left: float | None = None  # when a turn ended that left work to the next one
        self._begin()

    def sending(self, submit: Callable[[Any], Future[Any]]) -> Callable[[Any], Future[Any]]:
        """`submit`, by one thread, which may sleep until the next request is due."""

        def send(request: Any) -> Future[Any]:
            self._woken += time.perf_counter() - self._sent > AWAKE
            future = submit(request)
            self._sent = time.perf_counter()
            return future

        return send

    def _hook(self, name: str, wrapper: Callable[..., Any]) -> None:
        setattr(self._launcher, name, partial(wrapper, getattr(self._launcher, name)))

    @property
    def _num_sent(self) -> int:
        engine = self._engine
        return len(engine.flight.live) + engine.num_waiting + engine.counters.requests

    def _begin(self) -> None:
        """A turn does."""
        self._live, self._done = len(self._engine.flight.live), self._engine.counters.requests
        if not self._live:
            self.began = time.perf_counter()
        self._told, self._kernels, self._apart, self._joined = _nothing(), 0.0, 0.0, True
        self._late = time.perf_counter() - self._left if self._left is not None else 0.0
        self._num_launched = self._num_ended = self._num_begun = self._met = self._woke_met = 0
        if self.beside:  # who was sent since the last turn took nothing from the host
            self._known, self._known_woken = self._num_sent, self._woken

    def _blocked(self, work: Callable[..., None], *args: Any) -> None:
        """The host is in a kernel."""
        running, start, sent = self._launcher.running, time.perf_counter(), self._num_sent
        woken = self._woken
        begun = running is not None and running.prepared is not None
        work(*args)
        self._met += self._num_sent - sent
        self._woke_met += self._woken - woken
        if running is not None and begun:
            self._num_begun += 1
            end, apart = time.perf_counter(), start - running.start
            self._apart += min(apart, running.seconds)
            self._joined &= apart < running.seconds
            self._late += end - start - max(0.0, running.seconds - apart)

    def _launched(self, begin: Callable[..., Any], *args: Any, **given: Any) -> Any:
        self._num_launched += 1
        return begin(*args, **given)

    def _measured(self, measure: Callable[[Batch, float], None], batch: Batch, took: float) -> None:
        sizes = np.diff(batch.steps)
        number = self._numbers[self._by_number[batch.cell].key]
        self._told += by_size(sizes, self._table.steps(number, sizes))
        self._kernels += took
        self.kernels += took
        self._num_ended += 1
        measure(batch, took)
        self._ended = time.perf_counter()

    def _noted(self, note_host: Callable[[float], None], seconds: float) -> None:
        """A turn has ended."""
        after = time.perf_counter() - self._ended
        left = self._engine.counters.requests - self._done
        came = len(self._engine.flight.live) - self._live + left
        sent, woke = self._num_sent - self._known, self._woken - self._known_woken
        self.turns.append(
            Seen(
                seconds + self._late,
                after,
                self._kernels,
                self._told,
                (came + left) / 2,
                sent - self._met if self.beside else sent,
                self._met if self.beside else sent,
                self._num_launched,
                self._num_ended,
                came > 0,
                left > 0,
                self._apart,
                self._joined,
                self._num_begun,
                woke - self._woke_met,
                self._woke_met,
                (min(came, EARLY) + min(left, EARLY)) / 2,
            )
        )
        self._known, self._known_woken = self._num_sent, self._woken
        note_host(seconds)
        left_work = self._live - left + came > 0 or self._engine.num_waiting > 0
        self._left = time.perf_counter() if left_work else None


def _nothing() -> F64:
    return np.zeros(len(SIZES) + 1)


def by_size(sizes: npt.NDArray[np.integer], seconds: F64) -> F64:
    """Seconds of steps, summed by their rows (SIZES)."""
    where = np.searchsorted(SIZES, sizes, "right")
    return np.bincount(where, seconds, len(SIZES) + 1).astype(np.float64)
