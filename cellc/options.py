"""Options of `cellc.compile`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from cellc.errors import UnsupportedError, hint
from cellc.kernels.narrow import check_weights
from cellc.policies import MAX_AGE, POLICIES, Policy
from cellc.wants import check_seconds

BackendName = Literal["auto", "triton", "cpp", "eager"]


@dataclass(frozen=True)
class Options:
    """Options of `cellc.compile`.

    fold_bytes: largest table that folding an embedding into a product may make, in bytes; 0 turns
    folding off. policy: `cellular`, `fifo`, `deadline`, or an object of your own (see
    `cellc.policies`). max_age: launches after which a call that waits goes first, whatever the
    policy says. memory_limit: bytes of rows and tables of all requests; past it requests wait, and
    one that alone needs more fails at once (None: a quarter of the device's memory, 8 GiB at most).
    tf32: f32 products on a GPU may use tf32. weights: what products read, "bf16" (half the bytes of
    f32) or "int8" (a quarter, and an f32 scale an output column); rows, sums, biases and tables
    stay as they are (None: the model's weights). Weights as torch draws them, a step of an LSTM,
    GRU, TreeLSTM or of attention is off by at most 3e-3 of its norm with "bf16" and 6e-3 with
    "int8", states after 100 steps by twice as much. max_calls: calls of cells that one request may
    have, if its forward reads no values; max_steps: values that a forward may read; timeout:
    seconds that a request may take; past any of them it fails. workers: engines that run side by
    side on the device; on a CPU they share its cores.
    """

    fold_bytes: int = 256 << 20
    policy: str | Policy = "cellular"
    max_age: int = MAX_AGE
    memory_limit: int | None = None
    tf32: bool = False
    weights: str | None = None
    max_calls: int | None = None
    max_steps: int | None = None
    timeout: float | None = None
    workers: int | None = None


def make_options(options: Mapping[str, Any] | None) -> Options:
    """Options from what a user passed; raises TypeError or UnsupportedError."""
    known = {f.name for f in fields(Options)}
    unknown = set(options or {}) - known
    if unknown:
        wrong, *more = sorted(unknown, key=str)
        also = f" (nor {', '.join(map(repr, more))})" if more else ""
        raise TypeError(f"there is no option {wrong!r}{also}; {hint(str(wrong), sorted(known))}")
    chosen = Options(**(options or {}))
    named = isinstance(chosen.policy, str)
    if chosen.policy not in POLICIES if named else not _picks(chosen.policy):
        raise UnsupportedError(
            what=f"policy {chosen.policy!r}",
            remedy=f"{_meant(chosen.policy)}use {', '.join(POLICIES)}, or an object with a method "
            "pick(ready, turn)",
        )
    check_counts(
        memory_limit=chosen.memory_limit,
        max_calls=chosen.max_calls,
        max_steps=chosen.max_steps,
        max_age=chosen.max_age,
        workers=chosen.workers,
    )
    check_seconds(timeout=chosen.timeout)
    if not _counts(chosen.fold_bytes, 0):
        raise UnsupportedError(
            what=f"fold_bytes={chosen.fold_bytes!r}", remedy="use an integer of at least 0"
        )
    check_weights(chosen.weights)
    if not isinstance(chosen.tf32, bool):
        raise UnsupportedError(what=f"tf32={chosen.tf32!r}", remedy="use True or False")
    return chosen


def _meant(policy: object) -> str:
    text = hint(policy, POLICIES) if isinstance(policy, str) else ""
    return f"{text} " if text.startswith("did") else ""


def _picks(policy: object) -> bool:
    return not isinstance(policy, type) and callable(getattr(policy, "pick", None))


def check_counts(**counts: int | None) -> None:
    """Raise UnsupportedError for a count that is given and not a positive integer."""
    for name, count in counts.items():
        if count is not None and not _counts(count, 1):
            raise UnsupportedError(what=f"{name}={count!r}", remedy="use an integer of at least 1")


def _counts(count: object, least: int) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count >= least
