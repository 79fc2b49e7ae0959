"""`cellc bench --online`, and TARGETs: which workloads are served, under which conditions.

Duty: arguments to `Conditions` and workloads, wrong ones to UsageErrors before anything is
measured. Called by `command`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from cellc.bench.arrivals import Trace, read_trace
from cellc.bench.measure import Patience
from cellc.bench.online import SHARES, Conditions, measure_online
from cellc.bench.online_figures import OnlineOutcome
from cellc.bench.online_workloads import (
    DecodeWorkload,
    RecurrentWorkload,
    TargetWorkload,
    Workload,
)
from cellc.bench.user_model import is_target
from cellc.bench.workloads import Settings
from cellc.errors import UsageError, hint


def _recurrent(kind: Any, hidden: int, lengths: Sequence[int]) -> list[Workload]:
    return [RecurrentWorkload(lengths, kind, hidden, tokens) for tokens in (True, False)]


def _decode(hidden: int, lengths: Sequence[int]) -> list[Workload]:
    return [DecodeWorkload(lengths, hidden)]


WORKLOADS: dict[str, tuple[int, Callable[[int, Sequence[int]], list[Workload]]]] = {
    "lstm-256": (256, partial(_recurrent, "lstm")),
    "lstm-1024": (1024, partial(_recurrent, "lstm")),
    "gru-256": (256, partial(_recurrent, "gru")),
    "seq2seq-256": (256, _decode),
    "seq2seq-1024": (1024, _decode),
}
DEFAULT = ("lstm-256", "seq2seq-256")  # without a name


@dataclass(frozen=True)
class Online:
    """What was asked for, checked."""

    conditions: Conditions
    args: argparse.Namespace
    settings: Settings

    def runs_of(self, name: str, console: Console) -> Iterator[Callable[[], OnlineOutcome]]:
        """The workloads of a name, each measured when it is called."""
        return (partial(self._measured, w, console) for w in self._workloads(name))

    def stated(self, lengths: str) -> str:
        """Where lengths come from."""
        trace = self.conditions.trace
        return f"lengths from {trace.name}" if trace else lengths

    def _workloads(self, name: str) -> list[Workload]:
        if is_target(name):
            return [TargetWorkload(name, self.args.input)]
        hidden, makes = WORKLOADS[name]
        trace = self.conditions.trace
        lengths = trace.lengths if trace else self.settings.lengths
        return makes(self.settings.units or hidden, lengths)

    def _measured(self, workload: Workload, console: Console) -> OnlineOutcome:
        patience = Patience(self.args.patience)
        with console.status(workload.title, refresh_per_second=1) as status:  # it takes time, too
            return measure_online(
                workload,
                self.conditions,
                patience,
                lambda what: status.update(f"{workload.title}: {what}"),
            )


def check(args: argparse.Namespace, served: Sequence[str]) -> None:
    """Raises UsageError for what does not go together; `served` are the names of what is served."""
    for name in served:
        if not is_target(name) and name not in WORKLOADS:
            raise UsageError(f"{name} is not served online; {hint(name, WORKLOADS)}")
    for option, value in (("--loads", args.loads), ("--trace", args.trace)):
        if value is not None and not served:
            raise UsageError(f"{option} is for --online, or a TARGET")
    if args.input is not None and sum(map(is_target, served)) != 1:
        raise UsageError("--input is for one TARGET")


def online_of(
    args: argparse.Namespace, settings: Settings, shares: Sequence[float] = SHARES
) -> Online:
    """`shares` where none are given. Raises UsageError for a trace that is none."""
    trace: Trace | None = read_trace(args.trace) if args.trace else None
    shares = args.loads or (() if trace else shares)
    conditions = Conditions(shares, args.seconds, args.rounds, args.backend, trace)
    return Online(conditions, args, settings)
