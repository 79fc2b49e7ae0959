"""Measurements: alternated rounds, a load generator, percentiles.

Duty: time several pieces of work against each other on a machine that may be shared. Works
alternate A B A B; what other programs took of the machine is read from /proc/stat where there is
one, and the quietest rounds are kept. Comes in: callables; goes out: plain numbers.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from cellc.bench.arrivals import Load
from cellc.report import QUIET

T = TypeVar("T")


@dataclass(frozen=True)
class Round(Generic[T]):
    """One result of each work, and what others took of the machine meanwhile (None: unknown)."""

    results: tuple[T, ...]
    others: float | None

    @property
    def quiet(self) -> bool:
        return self.others is None or self.others < QUIET


@dataclass
class Patience:
    """Seconds that are left for more rounds than were wanted, because those were disturbed."""

    seconds: float


def alternate(
    works: Sequence[Callable[[], T]],
    wanted: int,
    most: int,
    patience: Patience,
    pids: Sequence[int] = (),
) -> list[Round[T]]:
    """The `wanted` quietest of up to `most` rounds; ends as soon as that many were quiet.

    What the processes `pids` take of the machine counts as ours.
    """
    rounds: list[Round[T]] = []
    while len(rounds) < most and sum(r.quiet for r in rounds) < wanted:
        if len(rounds) >= wanted and patience.seconds <= 0:
            break
        start, before = time.perf_counter(), _cpu_seconds(pids)
        results = tuple(work() for work in works)
        rounds.append(Round(results, _share_of_others(before, _cpu_seconds(pids))))
        if len(rounds) > wanted:
            patience.seconds -= time.perf_counter() - start
    return sorted(rounds, key=lambda r: r.others or 0.0)[:wanted]


def noise(rounds: Sequence[Round[T]]) -> float | None:
    """The largest share of the machine that others took; None where it cannot be known."""
    known = [r.others for r in rounds if r.others is not None]
    return max(known, default=None)


def repeat_for(
    work: Callable[[], object], seconds: float, prepare: Callable[[], None] | None = None
) -> Callable[[], float]:
    """A work that returns its seconds a run: the median of runs for `seconds` in all. Warms up.
    `prepare` goes before every run, and is not timed.
    """
    prepare = prepare or (lambda: None)
    for _ in range(2):
        prepare()
        work()

    def timed() -> float:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            prepare()
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return timed


def medians(rounds: Sequence[Round[float]]) -> list[float]:
    """Of each work."""
    return [statistics.median(times) for times in zip(*(r.results for r in rounds), strict=True)]


# -- load ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """One run of a load: latencies in seconds from the scheduled arrival, and the results."""

    latencies: npt.NDArray[np.float64]
    results: Sequence[Any]
    chosen: npt.NDArray[np.int64]  # which of the requests each was


def serve(submit: Callable[[Any], Future[Any]], requests: Sequence[Any], load: Load) -> Served:
    """Send each request when it is due, whether or not earlier ones are done (open loop)."""
    finished = np.zeros(len(load.arrivals))

    def record(i: int, _: Future[Any]) -> None:
        finished[i] = time.perf_counter()

    futures: list[Future[Any]] = []
    due = time.perf_counter() + 0.01 + load.arrivals
    for i, (at, which) in enumerate(zip(due.tolist(), load.chosen.tolist(), strict=True)):
        delay = at - time.perf_counter()
        if delay > 0:
            time.sleep(delay)
        future = submit(requests[which])
        future.add_done_callback(partial(record, i))
        futures.append(future)
    wait(futures)
    results = [future.result() for future in futures]
    while not finished.all():  # wait() may return before the last callback ran
        time.sleep(1e-3)
    return Served(finished - due, results, load.chosen)


@contextmanager
def no_long_pauses() -> Iterator[None]:
    """Python's garbage collector looks at new objects only: to look at all of them, torch's too,
    stops every thread for a few hundred ms, and whichever server happens to be measured then."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def burst_rate(submit: Callable[[Any], Future[Any]], requests: Sequence[Any]) -> float:
    """Requests a second when all are there at once."""
    start = time.perf_counter()
    wait([submit(request) for request in requests])
    return len(requests) / (time.perf_counter() - start)


def percentiles(latencies: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """p50, p90 and p99 in ms of latencies in seconds.

    >>> percentiles(np.arange(101) / 1000)
    (50.0, 90.0, 99.0)
    """
    p50, p90, p99 = (float(np.quantile(latencies, q)) * 1e3 for q in (0.5, 0.9, 0.99))
    return p50, p90, p99


# -- the machine -----------------------------------------------------------------------------------


def _cpu_seconds(pids: Sequence[int]) -> tuple[float, float, float] | None:
    """(wall, busy seconds of all processors, CPU seconds of this process, of children that have
    ended and of `pids`), or None.
    """
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(x) for x in file.readline().split()[1:9]]
        ticks = sum(map(_ticks_of, pids))
    except (OSError, ValueError):
        return None
    second = os.sysconf("SC_CLK_TCK")
    busy = sum(fields) - fields[3] - fields[4]  # less idle, iowait
    ended = os.times()
    own = time.process_time() + ended.children_user + ended.children_system
    return time.perf_counter(), busy / second, own + ticks / second


def _ticks_of(pid: int) -> int:
    """CPU time of a process, user and system (proc(5): fields 14 and 15 of stat)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _share_of_others(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    wall, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))


def machine_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model na")]
    except OSError:
        names = []
    import platform

    return names[0] if names else platform.processor() or platform.machine()
