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
from cellc.simulation.watch import SIZES, Seen

LEAST = 10  # turns with steps of some size that tell such a share


@dataclass(frozen=True)
class Measured:
    """Curves by the cell's number, as the engine's launches have them, and the host's part."""

    curves: dict[int, Curve]
    host: Host


def fit(turns: Sequence[Seen], curves: Mapping[int, Curve], threads: int = 1) -> Measured:
    """By least squares. Of long turns, seconds count less: what disturbs them adds up. With several
    `threads`, launches ran beside the host's work.
    """
    beside = threads > 1
    told = np.stack([t.told for t in turns])

    def of(name: str) -> F64:
        return np.array([getattr(t, name) for t in turns], np.float64)

    host, after, kernels, apart = of("host"), of("after"), of("kernels"), of("apart")
    requests, sent = of("requests"), of("sent")
    parts = np.stack(
        [of("launched"), requests, sent, (sent > 0) * beside, of("admits"), of("answers")], 1
    )
    of_turns = weighted(parts, host, 1 + requests)
    of_kernels = np.concatenate([told, np.stack([of("ended"), of("met"), of("begun")], 1)], 1)
    judged = np.array([t.ended > 0 and t.joined for t in turns])  # others say nothing of the rest
    share, sizes = (threads - 1) / threads if beside else 1.0, np.maximum(told.sum(1), 1e-6)
    work = kernels - (1 - share) * apart
    found = weighted(of_kernels[judged], work[judged], sizes[judged])
    *shares, launch, by_each, starting = found
    host_should, work_should = parts @ of_turns, of_kernels @ found
    spans = np.searchsorted(SPANS, host_should + work_should, "right")
    rest = np.stack([host - host_should, work - work_should], 1)
    spread = tuple(tuple(map(tuple, rest[spans == k].tolist())) for k in range(len(SPANS) + 1))
    known = [k for k, s in enumerate(shares) if s and (told[judged, k] > 0).sum() >= LEAST]
    assert known, "too few turns"
    factors = [shares[min(known, key=lambda n: abs(n - k))] for k in range(len(shares))]
    turn, request, locked, waking, admitting, answering = of_turns
    return Measured(
        {number: _slower(curve, factors, launch) for number, curve in curves.items()},
        Host(
            turn,
            request,
            after=float(after.sum() / host.sum()),
            beside=by_each,
            locked=locked,
            spread=spread,
            admitting=admitting,
            answering=answering,
            waking=waking,
            starting=starting,
            apart=share if beside else 0.0,
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
