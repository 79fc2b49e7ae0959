"""Figures: what a compiled model has done and holds, as `Compiled.stats` says it.

Duty: counters of an engine, or of several workers together, as one dict. Used by `cellc.compiled`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from cellc.compiler import Compiler
from cellc.ticket import Counters


class Serving(Protocol):
    """An engine, or workers."""

    @property
    def counters(self) -> Counters: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def arena_bytes(self) -> int: ...

    @property
    def live_bytes(self) -> int: ...

    def figures(self) -> list[dict[str, Any]]: ...


def figures_of(serving: Serving, compiler: Compiler) -> dict[str, Any]:
    """See `Compiled.stats`."""
    counters = serving.counters
    plans = compiler.counts
    return {
        "launches": counters.launches,
        "rows": counters.rows,
        "steps": counters.steps,
        "mean_batch": counters.rows / max(counters.steps, 1),
        "kernel_seconds": counters.seconds,
        "requests": counters.requests,
        "failed": counters.failed,
        "cancelled": counters.cancelled,
        "refused": counters.refused,
        "shed": counters.shed,
        "late": counters.late,
        "recoveries": counters.recoveries,
        "waiting": serving.num_waiting,
        "running": serving.num_running,
        **plans,
        "arena_bytes": serving.arena_bytes,
        "live_bytes": serving.live_bytes,
        "caches": compiler.cache_sizes(),
        "waiting_ms": _quantiles(counters.waits),
        "latency_ms": _quantiles(counters.latencies),
        "workers": serving.figures(),
    }


def _quantiles(seconds: Iterable[float]) -> dict[str, float]:
    values = np.array(list(seconds)) * 1e3
    found = np.quantile(values, (0.5, 0.9, 0.99)).tolist() if len(values) else (0.0, 0.0, 0.0)
    return dict(zip(("p50", "p90", "p99"), found, strict=True))
