"""`cellc bench`: workloads by name, in tables, JSON and Markdown.

Duty: measure the workloads asked for one after the other, print their tables as they come, then the
targets or the paper's claims, and write files. Comes in from `cellc.cli`; the cases are in
`workloads` and `memory`.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial

import torch
from rich.console import Console

from cellc.bench import page, paper, targets
from cellc.bench.case import Case, Differs, Outcome, measure
from cellc.bench.found import Found, Measured
from cellc.bench.lengths import DISTRIBUTION, draw_lengths, read_lengths
from cellc.bench.measure import Patience
from cellc.bench.memory import memory_case
from cellc.bench.sheets import Sheet, as_table, sheets_of
from cellc.bench.workloads import MEMORY, NAMES, Settings, cases_of
from cellc.errors import UsageError


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure; returns the exit code: 1 where results differ."""
    found = Found(noisy=args.noisy)
    for path in args.given:
        found.read(path)
    names = _names(args)
    settings, stated = _settings(args)
    console.print(
        f"{found.machine}, {found.threads} threads, torch {found.torch}; "
        f"{settings.count} requests, {stated}"
    )
    code = 0
    with torch.no_grad():
        for name in names:
            new: list[Measured] = []
            for make in _cases(name, settings):
                try:
                    outcome = _measured(make(), args, console)
                except Differs as error:
                    console.print(f"cellc: {error}", markup=False)
                    code = 1
                    continue
                for sheet in sheets_of(outcome, anyway=args.noisy):
                    console.print(as_table(sheet))
                command, today = _command(name, args), date.today().isoformat()
                shape = settings.count, settings.units, stated
                new.append(Measured(name, command, today, *shape, outcome))
                found.add(new)
                if args.json:  # as far as it came
                    found.write(args.json)
    _finish(args, found, console)
    return code


def _names(args: argparse.Namespace) -> Sequence[str]:
    """What to measure: what is named; else what is asked about; else all, or nothing where earlier
    figures are given.
    """
    for name in args.workload:
        if name not in NAMES:
            raise UsageError(f"workload {name!r} is not known; there are {', '.join(NAMES)}")
    if args.workload or args.given:
        return list(dict.fromkeys(args.workload))
    if args.markdown or not (args.targets or args.paper):
        return NAMES
    asked = [
        *(targets.workloads() if args.targets else ()),
        *(paper.WORKLOADS if args.paper else ()),
    ]
    return list(dict.fromkeys(asked))


def _settings(args: argparse.Namespace) -> tuple[Settings, str]:
    """(what workloads share, what lengths they have)."""
    count = args.requests
    lengths = read_lengths(args.lengths, count) if args.lengths else draw_lengths(count)
    stated = f"lengths from {args.lengths.name}" if args.lengths else DISTRIBUTION
    return Settings(lengths, args.backend, args.units, args.trees), stated


def _cases(name: str, settings: Settings) -> Sequence[Callable[[], Case]]:
    return [partial(memory_case, settings)] if name == MEMORY else cases_of(name, settings)


def _measured(case: Case, args: argparse.Namespace, console: Console) -> Outcome:
    try:
        with console.status(case.title):
            return measure(case, args.rounds, args.seconds, Patience(args.patience))
    finally:
        case.close()


def _command(name: str, args: argparse.Namespace) -> str:
    """The command that measures a workload again."""
    words = ["cellc", "bench", name]
    for option, value in (
        ("--requests", args.requests if args.requests != 512 else None),
        ("--units", args.units),
        ("--rounds", args.rounds),
        ("--seconds", f"{args.seconds:g}"),
        ("--lengths", args.lengths and args.lengths.name),
        ("--trees", args.trees and args.trees.name),
        ("--backend", args.backend if args.backend != "auto" else None),
    ):
        words += [option, str(value)] if value else []
    return shlex.join(words)


def _finish(args: argparse.Namespace, found: Found, console: Console) -> None:
    """Summaries and files."""
    summaries = list(_summaries(args, found))
    for _, sheet in summaries:
        console.print(as_table(sheet))
    if args.json:
        found.write(args.json)
        if args.targets:
            written = json.loads(args.json.read_text(encoding="utf-8"))
            written["targets"] = targets.as_json(targets.judge(found))
            args.json.write_text(json.dumps(written, indent=1), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(page.page(found, summaries), encoding="utf-8")


def _summaries(args: argparse.Namespace, found: Found) -> Iterator[tuple[str, Sheet]]:
    if args.targets:
        yield "cellc bench --targets", targets.sheet(found)
    if args.paper:
        yield "cellc bench --paper", paper.sheet(found)
