"""What launches and the host's part cost, from turns of an engine's loop that were seen.

Duty: by least squares, what the engine's launches took beyond curves that were measured alone and
again and again, where kernels find their weights in the cache; what turns took beside kernels,
shared out between launches and requests; and what both lost to requests that were sent meanwhile,
whose threads take processors and Python's lock from them. Comes in: `Seen`; goes out: `Measured`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellc.costs import Curve
from cellc.simulation.clock import F64
from cellc.simulation.curves import SPANS, Host
from cellc.simulation.tape import Tape
from cellc.simulation.watch import SIZES, Seen

LEAST = 10  # turns with steps of some size that tell such a share


@dataclass(frozen=True)
class Measured:
    """Curves by the cell's number, as the engine's launches have them, and the host's part."""

    curves: dict[int, Curve]
    host: Host
    tape: Tape  # of all turns; the host's is calm


def fit(
    turns: Sequence[Seen],
    curves: Mapping[int, Curve],
    threads: int = 1,
    loads: Sequence[int] | None = None,
) -> Measured:
    """By least squares. Of long turns, seconds count less: what disturbs them adds up. With several
    `threads`, launches ran beside the host's work. `loads`: what each turn was seen at; the tape
    holds how turns of each vary, not that costs fit one load less well than another.
    """
    beside = threads > 1
    told = np.stack([t.told for t in turns])

    def of(name: str) -> F64:
        return np.array([getattr(t, name) for t in turns], np.float64)

    host, after, kernels, apart = of("host"), of("after"), of("kernels"), of("apart")
    requests, sent = of("requests"), of("sent")
    woke, woke_met = of("woke") * beside, of("woke_met") * beside
    turns_that = of("admits"), of("answers")
    parts = np.stack([of("launched"), requests, sent, woke, *turns_that, of("early")], 1)
    of_turns = weighted(parts, host, 1 + requests)
    others = np.stack([of("ended"), of("met"), woke_met, of("begun")], 1)
    of_kernels = np.concatenate([told, others], 1)
    judged = np.array([t.ended > 0 and t.joined for t in turns])  # others say nothing of the rest
    share, sizes = (threads - 1) / threads if beside else 1.0, np.maximum(told.sum(1), 1e-6)
    work = kernels - (1 - share) * apart
    found = weighted(of_kernels[judged], work[judged], sizes[judged])
    *shares, launch, by_each, waking_beside, starting = found
    host_should, work_should = parts @ of_turns, of_kernels @ found
    should, took = np.stack([host_should, work_should], 1), np.stack([host, work], 1)
    spans = np.searchsorted(SPANS, should.sum(1), "right")
    members = [spans == k for k in range(len(SPANS) + 1)]
    slower = np.array([_ratios(should[those], took[those]) for those in members])
    tape = _tape((should * slower[spans]).sum(1), took.sum(1), loads)
    known = [k for k, s in enumerate(shares) if s and (told[judged, k] > 0).sum() >= LEAST]
    assert known, "too few turns"
    factors = [shares[min(known, key=lambda n: abs(n - k))] for k in range(len(shares))]
    turn, request, locked, waking, admitting, answering, early = of_turns
    return Measured(
        {number: _slower(curve, factors, launch) for number, curve in curves.items()},
        Host(
            turn,
            request,
            after=float(after.sum() / host.sum()),
            beside=by_each,
            locked=locked,
            slower=tuple((a, b) for a, b in slower.tolist()),
            tape=tape.calm(),
            admitting=admitting,
            answering=answering,
            early=early,
            waking=waking,
            waking_beside=waking_beside,
            starting=starting,
            apart=share if beside else 0.0,
        ),
        tape,
    )


def _ratios(should: F64, took: F64) -> F64:
    """How many times as long as they should turns took, on the host and in kernels."""
    total = should.sum(0)
    return np.where(total > 0, took.sum(0) / np.where(total > 0, total, 1), 1.0)


def _tape(should: F64, took: F64, loads: Sequence[int] | None) -> Tape:
    numbers = np.zeros(len(should), np.int64) if loads is None else np.asarray(loads)
    expected, got = np.bincount(numbers, should), np.bincount(numbers, took)
    return Tape(should.tolist(), (took * (expected / np.maximum(got, 1e-9))[numbers]).tolist())


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
