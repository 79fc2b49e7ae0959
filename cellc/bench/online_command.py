"""`cellc bench --online`, and TARGETs: which workloads are served, under which conditions.

Duty: arguments to `Conditions` and workloads, wrong ones to UsageErrors before anything is
measured. Called by `command`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cellc.bench.arrivals import Trace, read_trace
from cellc.bench.measure import Patience
from cellc.bench.online import SHARES, Conditions, measure_online
from cellc.bench.online_figures import OnlineOutcome, table_of
from cellc.bench.online_workloads import (
    DecodeWorkload,
    RecurrentWorkload,
    TargetWorkload,
    Workload,
)
from cellc.bench.targets import is_target
from cellc.errors import UsageError


def _recurrent(kind: Any, hidden: int) -> Callable[[Sequence[int]], list[Workload]]:
    return lambda lengths: [
        RecurrentWorkload(lengths, kind, hidden, True),
        RecurrentWorkload(lengths, kind, hidden, False),
    ]


WORKLOADS: dict[str, Callable[[Sequence[int]], list[Workload]]] = {
    "lstm-256": _recurrent("lstm", 256),
    "lstm-1024": _recurrent("lstm", 1024),
    "gru-256": _recurrent("gru", 256),
    "seq2seq-256": lambda lengths: [DecodeWorkload(lengths, 256)],
    "seq2seq-1024": lambda lengths: [DecodeWorkload(lengths, 1024)],
}
DEFAULT = ("lstm-256", "seq2seq-256")  # without a name


@dataclass(frozen=True)
class Online:
    """What was asked for, checked."""

    conditions: Conditions
    args: argparse.Namespace

    def serves(self, name: str) -> bool:
        """Whether latency against load is measured."""
        return bool(self.args.online) or is_target(name)

    def run(self, name: str, lengths: Sequence[int], console: Console) -> Iterator[OnlineOutcome]:
        """Measure a name's workloads one by one, print their tables."""
        trace = self.conditions.trace
        for workload in self._workloads(name, trace.lengths if trace else lengths):
            yield self._measured(workload, console)

    def _workloads(self, name: str, lengths: Sequence[int]) -> list[Workload]:
        if is_target(name):
            return [TargetWorkload(name, self.args.input)]
        return WORKLOADS[name](lengths)

    def _measured(self, workload: Workload, console: Console) -> OnlineOutcome:
        patience = Patience(self.args.patience)
        with console.status(workload.title, refresh_per_second=1) as status:  # it takes time, too
            outcome = measure_online(
                workload,
                self.conditions,
                patience,
                lambda what: status.update(f"{workload.title}: {what}"),
            )
        console.print(table_of(outcome, anyway=self.args.noisy))
        return outcome


def online_of(args: argparse.Namespace, names: Sequence[str]) -> Online:
    """Raises UsageError for what does not go together."""
    for name in names:
        if args.online and not is_target(name) and name not in WORKLOADS:
            raise UsageError(f"{name} is not served online; there are {', '.join(WORKLOADS)}")
    serving = args.online or any(map(is_target, names))
    for option, value in (("--loads", args.loads), ("--trace", args.trace)):
        if value is not None and not serving:
            raise UsageError(f"{option} is for --online, or a TARGET")
    if args.input is not None and sum(map(is_target, names)) != 1:
        raise UsageError("--input is for one TARGET")
    trace: Trace | None = read_trace(args.trace) if args.trace else None
    shares = args.loads or (() if trace else SHARES)
    return Online(Conditions(shares, args.seconds, args.rounds, args.backend, trace), args)
