"""Pacing: how many steps and rows a launch takes, and how long few calls wait for more.

Duty: the rule by which a launch's size follows from what its steps cost, and whether it runs beside
the host's work. Pure; shared by `cellc.launcher`, which measures costs, and `cellc.simulation`,
which is given them.
"""

from __future__ import annotations

from collections.abc import Callable

from cellc.scheduler import Batch, Scheduler

ALONE, SHARED = 8e-3, 1e-3  # seconds a launch may take when nobody, or somebody, could join
PATIENT_ALONE, PATIENT = 64, 2  # launches that few calls of a deep cell wait for more, likewise
HOST_SHARE = 3  # but a shared launch may take this many times what a turn costs the host
ROWS_ALONE, ROWS = 2048, 512  # of a step at most, likewise
MAX_LIVE = 4096  # requests admitted at a time; more wait without rows
BESIDE = 2e-4  # seconds from which on a launch runs beside the host's work: waking a thread costs
LONG = 2e-3  # seconds of a launch that runs while some requests are unfolded
ROWS_BESIDE = 256  # of a step at least, where ready calls are halved for that
ADMITTED = 1024  # requests a turn, likewise: their launches begin meanwhile
SMOOTH = 16  # turns that the cost of a turn is averaged over


def num_steps(step_seconds: float, host_seconds: float, *, shared: bool) -> int:
    """Steps of a launch; `host_seconds`: of a turn, kernels aside; `shared`: somebody could join.

    >>> num_steps(1e-4, 0.0, shared=True), num_steps(1e-4, 0.0, shared=False)
    (10, 80)
    """
    budget = min(max(SHARED, HOST_SHARE * host_seconds), ALONE) if shared else ALONE
    return max(1, int(budget / max(step_seconds, 1e-7)))


def patience(*, joined: bool) -> int:
    """For `Turn.patience` of the scheduler; `joined`: requests may come."""
    return PATIENT if joined else PATIENT_ALONE


def most_rows(*, joined: bool) -> int:
    """Rows of a step where the user sets no bound: products of more rows are cheaper a row, but
    whoever joins would wait for them.
    """
    return ROWS if joined else ROWS_ALONE


def admissions(request_seconds: float) -> int:
    """Requests that are admitted in a turn where deadlines count: more would hold up those that
    run; `request_seconds`: what one costs the host.
    """
    return max(1, int(SHARED / max(request_seconds, 1e-7)))


def averaged(host_seconds: float, turn_seconds: float) -> float:
    """What a turn costs the host, after one more turn."""
    return host_seconds + (min(turn_seconds, ALONE) - host_seconds) / SMOOTH


def learned(known: float | None, seconds: float) -> float:
    """What a step is known to take, after a launch whose steps took so long: what disturbs launches
    makes them longer.
    """
    return seconds if known is None else min(seconds, 0.8 * known + 0.2 * seconds)


def size_of(batch: Batch) -> tuple[int, int]:
    """What launches are measured by: (cell, log2 rows of the first step)."""
    return batch.cell, int(batch.steps[1]).bit_length()


class Pacer:
    """Takes launches from a scheduler. `step_seconds`: what a step of a cell, of so many rows, is
    expected to take; `ahead`: of so many seconds, how many may run beyond answers, where requests
    read some; `host_seconds`: of a turn, kernels aside, averaged.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_seconds: Callable[[int, int], float],
        max_batch: int | None = None,
        ahead: Callable[[float], int | None] = lambda seconds: None,
    ) -> None:
        self._scheduler, self._max_batch = scheduler, max_batch
        self._step_seconds, self._ahead = step_seconds, ahead
        self._answering: set[int] = set()  # cells that answer requests
        self.host_seconds = 0.0

    def schedule(
        self, *, joined: bool, waited: bool, beside: bool = False, busy: bool = False
    ) -> Batch | None:
        """The next launch, None when nothing is ready. `joined`: requests may come that nobody
        blocks on; `waited`: somebody waits for the loop; `beside`: it may run beside the host, as
        the one before does (`busy`).
        """
        scheduler = self._scheduler
        scheduler.turn.patience = patience(joined=joined)
        scheduler.max_batch = self._max_batch or most_rows(joined=joined)
        chosen = scheduler.peek()
        if chosen is None:
            return None
        cell, rows = chosen
        if beside and not busy and cell in self._answering and rows >= 2 * ROWS_BESIDE:
            rows = (rows + 1) // 2  # the answers of one half are read while the other runs
            scheduler.max_batch = rows
        steps = self.steps(cell, rows, shared=joined or waited)
        batch = scheduler.next(steps, hold=beside)
        if batch is not None and len(batch.events):
            self._answering.add(cell)
        return batch

    def steps(self, cell: int, rows: int, *, shared: bool) -> int:
        """Of a launch at most; `shared`: somebody could join."""
        seconds = self._step_seconds(cell, rows)
        steps = num_steps(seconds, self.host_seconds, shared=shared)
        most = self._ahead(seconds)
        return steps if most is None else min(steps, most)

    def worth_beside(self) -> bool:
        """Would the next launch keep the machine busy while the host does its part?"""
        chosen = self._scheduler.peek()
        return chosen is not None and self._step_seconds(*chosen) >= 0.5 * self.host_seconds

    def expected(self, batch: Batch) -> float:
        """Seconds of a launch."""
        return (len(batch.steps) - 1) * self._step_seconds(batch.cell, int(batch.steps[1]))

    def note_host(self, seconds: float) -> None:
        """What a turn cost, kernels aside."""
        self.host_seconds = averaged(self.host_seconds, seconds)
