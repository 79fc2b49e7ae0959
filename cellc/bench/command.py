"""`cellc bench`: workloads by name, in tables and JSON.

Duty: make the cases of the workloads asked for, measure them one after the other, print tables and
write figures. Comes in from `cellc.cli`; the cases are in `recurrent`, `others`,
`targets` and `trees`, latency against load in `online`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from rich.console import Console

from cellc.bench import plots, trees
from cellc.bench.case import Case, Outcome, measure, table_of
from cellc.bench.lengths import DISTRIBUTION, draw_lengths, read_lengths
from cellc.bench.measure import Patience, machine_name
from cellc.bench.online_command import DEFAULT, online_of
from cellc.bench.online_figures import OnlineOutcome
from cellc.bench.others import decode_case, sessions_case, tagger_case
from cellc.bench.recurrent import alone_case, recurrent_case
from cellc.bench.targets import is_target, target_case
from cellc.errors import UsageError

ALONE = 24  # steps of a request alone


@dataclass(frozen=True)
class Settings:
    """What all workloads share."""

    lengths: Sequence[int]
    backend: str

    @property
    def count(self) -> int:
        return len(self.lengths)


def _lstm(kind: Any, hidden: int) -> Callable[[Settings], list[Callable[[], Case]]]:
    return lambda s: [
        lambda: recurrent_case(kind, hidden, True, s.lengths, s.backend),
        lambda: recurrent_case(kind, hidden, False, s.lengths, s.backend),
        lambda: alone_case(kind, hidden, ALONE, s.backend),
    ]


WORKLOADS: dict[str, Callable[[Settings], list[Callable[[], Case]]]] = {
    "lstm-256": _lstm("lstm", 256),
    "lstm-1024": _lstm("lstm", 1024),
    "gru-256": _lstm("gru", 256),
    "bilstm-tagger": lambda s: [lambda: tagger_case(256, s.lengths, s.backend)],
    "seq2seq-256": lambda s: [lambda: decode_case(256, s.count, s.backend)],
    "seq2seq-1024": lambda s: [lambda: decode_case(1024, s.count, s.backend)],
    "sessions": lambda s: [lambda: sessions_case(256, s.count, s.backend)],
}
TREES = {"treelstm-256": 256, "treelstm-1024": 1024}
NAMES = (*WORKLOADS, *TREES)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure; returns the exit code."""
    names = args.workload or (DEFAULT if args.online else NAMES)
    for name in names:
        if name not in NAMES and not is_target(name):
            raise UsageError(f"workload {name!r} is not known; there are {', '.join(NAMES)}")
    online = online_of(args, names)
    if args.plot:
        plots.check(args.plot)
    count = args.requests
    lengths = read_lengths(args.lengths, count) if args.lengths else draw_lengths(count)
    settings = Settings(lengths, args.backend)
    stated = f"lengths from {args.lengths.name}" if args.lengths else DISTRIBUTION
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lengths": stated,
        "cases": [],
        "online": [],
    }
    outcomes: list[Outcome] = []
    served: list[OnlineOutcome] = []
    console.print(
        f"{found['machine']}, {found['threads']} threads, torch {found['torch']}; "
        f"{count} requests, {stated}"
    )
    with torch.no_grad():
        for name in names:
            if name in TREES:
                _trees(TREES[name], args, console)
                continue
            for make in [] if args.online else _cases(name, settings, args):
                outcome = _measured(make(), args, console)
                console.print(table_of(outcome, anyway=args.noisy))
                outcomes.append(outcome)
                found["cases"].append({"workload": name, **outcome.as_json()})
                _write(found, args)  # as far as it came
            if online.serves(name):
                for one in online.run(name, lengths, console):
                    served.append(one)
                    found["online"].append({"workload": name, **one.as_json()})
                    _write(found, args)
    if args.plot:
        plots.draw(args.plot, outcomes, served)
    return 0


def _cases(name: str, settings: Settings, args: argparse.Namespace) -> list[Callable[[], Case]]:
    if is_target(name):
        return [lambda: target_case(name, args.input, settings.count, settings.backend)]
    return WORKLOADS[name](settings)


def _write(found: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _measured(case: Case, args: argparse.Namespace, console: Console) -> Outcome:
    try:
        with console.status(case.title):
            return measure(case, args.rounds, args.seconds, Patience(args.patience))
    finally:
        case.close()


def _trees(hidden: int, args: argparse.Namespace, console: Console) -> None:
    given = ["--size", str(hidden), "--batch", str(args.requests), "--rounds", str(args.rounds)]
    trees.main(given)
