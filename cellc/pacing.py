"""Pacing: how many steps and rows a launch takes, and how long few calls wait for more.

Duty: the rule by which a launch's size follows from what its steps cost. Pure; shared by
`cellc.launcher`, which measures costs, and `cellc.simulation`, which is given them.
"""

from __future__ import annotations

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
