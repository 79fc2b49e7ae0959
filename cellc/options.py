"""Options of `cellc.compile`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from cellc.errors import UnsupportedError
from cellc.scheduler import Policy

BackendName = Literal["auto", "triton", "cpp", "eager"]


@dataclass(frozen=True)
class Options:
    """Options of `cellc.compile`.

    fold_bytes: largest table that folding an embedding into a product may make, in bytes; 0 turns
    folding off. policy: `cellular` or `fifo` (see `cellc.scheduler`). memory_limit: bytes of rows
    and tables of all requests; past it requests wait, and one that alone needs more fails at once
    (None: a quarter of the device's memory, 8 GiB at most). tf32: f32 products on a GPU may use
    tf32. max_calls: calls of cells that one request may have, if its forward reads no values;
    max_steps: values that a forward may read; timeout: seconds that a request may take; past any
    of them it fails. workers: engines that run side by side on the device; on a CPU they share its
    cores.
    """

    fold_bytes: int = 256 << 20
    policy: Policy = "cellular"
    memory_limit: int | None = None
    tf32: bool = False
    max_calls: int | None = None
    max_steps: int | None = None
    timeout: float | None = None
    workers: int | None = None


def make_options(options: Mapping[str, Any] | None) -> Options:
    """Options from what a user passed; raises TypeError or UnsupportedError."""
    known = {f.name for f in fields(Options)}
    unknown = set(options or {}) - known
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; there are {sorted(known)}")
    chosen = Options(**(options or {}))
    if chosen.policy not in get_args(Policy):
        raise UnsupportedError(
            what=f"policy {chosen.policy!r}", remedy=f"use {' or '.join(get_args(Policy))}"
        )
    check_counts(
        memory_limit=chosen.memory_limit,
        max_calls=chosen.max_calls,
        max_steps=chosen.max_steps,
        workers=chosen.workers,
    )
    seconds = chosen.timeout
    if seconds is not None and (not isinstance(seconds, (int, float)) or not seconds > 0):
        raise UnsupportedError(
            what=f"timeout={seconds!r}", remedy="use a number of seconds above 0"
        )
    return chosen


def check_counts(**counts: int | None) -> None:
    """Raise UnsupportedError for a count that is given and not a positive integer."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UnsupportedError(what=f"{name}={count!r}", remedy="use an integer of at least 1")
