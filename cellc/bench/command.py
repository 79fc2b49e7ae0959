"""`cellc bench`: workloads by name, in tables, JSON, Markdown and pictures.

Duty: measure the workloads asked for one after the other, print their tables as they come, then the
targets or the paper's claims, and write files. Comes in from `cellc.cli`; the cases are in
`workloads`, `memory` and `user_model`, latency against load in `online_command`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from cellc.bench import gpu, online_command, page, paper, plots, reference, targets
from cellc.bench.case import Case, Differs, Outcome, measure
from cellc.bench.found import SHARE, Found, Measured
from cellc.bench.lengths import DISTRIBUTION, draw_lengths, read_lengths
from cellc.bench.measure import Patience
from cellc.bench.memory import memory_case
from cellc.bench.online import SHARES
from cellc.bench.online_command import Online, online_of
from cellc.bench.online_figures import OnlineOutcome
from cellc.bench.place import Place
from cellc.bench.sheets import Sheet, as_table, online_sheet, sheets_of
from cellc.bench.user_model import is_target, target_case
from cellc.bench.workloads import MEMORY, NAMES, ON_DEVICES, STEPS, Settings, cases_of
from cellc.errors import UsageError, hint

T = TypeVar("T", Outcome, OnlineOutcome)


@dataclass(frozen=True)
class Asked:
    """Names of what is measured with requests at once, and as they come; `shares` are the loads
    where none are given.
    """

    at_once: Sequence[str]
    served: Sequence[str]
    shares: Sequence[float] = SHARES


@dataclass
class Bench:
    """What is being measured; `code` is the exit code: 1 where results differ."""

    args: argparse.Namespace
    console: Console
    found: Found
    settings: Settings
    lengths: str
    code: int = 0

    def at_once(self, name: str) -> None:
        works = (partial(self._measured, make) for make in _cases(name, self.settings))
        measured = partial(self._with_command, name, _command(name, self.args), self.lengths)
        new: list[Measured[Outcome]] = []
        for outcome in self._outcomes(works, partial(sheets_of, anyway=self.args.noisy)):
            new.append(measured(outcome))
            self.found.add(new)
            self._write()

    def served(self, name: str, online: Online) -> None:
        command = _command(name, self.args, online.conditions.shares)
        measured = partial(self._with_command, name, command, online.stated(self.lengths))
        new: list[Measured[OnlineOutcome]] = []
        works = online.runs_of(name, self.console)
        for outcome in self._outcomes(works, lambda o: [online_sheet(o, anyway=self.args.noisy)]):
            new.append(measured(outcome))
            self.found.add_online(new)
            self._write()

    def steps(self) -> None:
        """On a GPU, kernels alone beside cuDNN's, and what launches cost."""
        units = [] if self.args.units is None else ["--hidden", str(self.args.units)]
        asked = gpu.arguments().parse_args([*units, "--rounds", str(self.args.rounds)])
        self.found.steps = gpu.run(asked, self.console)
        self._write()

    def _outcomes(
        self, works: Iterable[Callable[[], T]], sheets: Callable[[T], Sequence[Sheet]]
    ) -> Iterator[T]:
        """One by one, printed; those that differ are told."""
        for work in works:
            try:
                outcome = work()
            except Differs as error:
                self.console.print(f"cellc: {error}", markup=False)
                self.code = 1
                continue
            for sheet in sheets(outcome):
                self.console.print(as_table(sheet))
            yield outcome

    def _measured(self, make: Callable[[], Case]) -> Outcome:
        case, args = make(), self.args
        try:
            with self.console.status(case.title):
                return measure(case, args.rounds, args.seconds, Patience(args.patience))
        finally:
            case.close()

    def _with_command(self, name: str, command: str, lengths: str, outcome: T) -> Measured[T]:
        settings, today = self.settings, date.today().isoformat()
        return Measured(name, command, today, settings.count, settings.units, lengths, outcome)

    def _write(self) -> None:
        """As far as it came."""
        if self.args.json:
            self.found.write(self.args.json)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure; returns the exit code: 1 where results differ."""
    settings, stated = _settings(args)
    found = Found(settings.place.machine, noisy=args.noisy)
    for path in args.given:
        found.read(path)
    asked = _asked(args, settings.place)
    online_command.check(args, asked.served)
    if args.plot:
        plots.check(args.plot)
    online = online_of(args, settings, asked.shares)
    console.print(
        f"{found.machine}, {found.threads} threads, torch {found.torch}; "
        f"{settings.count} requests, {stated}"
    )
    bench = Bench(args, console, found, settings, stated)
    with torch.no_grad():
        for name in dict.fromkeys([*asked.at_once, *asked.served]):
            if name == STEPS:
                bench.steps()
            elif name in asked.at_once:
                bench.at_once(name)
            if name in asked.served:
                bench.served(name, online)
    _finish(args, found, console)
    return bench.code


def _asked(args: argparse.Namespace, place: Place) -> Asked:
    """What to measure: what is named; else what is asked about; else all, or nothing where earlier
    figures are given.
    """
    known = NAMES if place.on_cpu else ON_DEVICES
    for name in args.workload:
        if is_target(name) or name in known:
            continue
        if name in (*NAMES, *ON_DEVICES):
            where = "a GPU: --device cuda" if place.on_cpu else "a processor"
            raise UsageError(f"{name} is about {where}; {hint(name, known)}")
        raise UsageError(f"workload {name!r} is not known; {hint(name, known)}")
    if not place.on_cpu:
        return _asked_of_device(args)
    if args.workload or args.given:
        names = list(dict.fromkeys(args.workload))
        if args.online:
            return Asked((), names)
        return Asked(names, [name for name in names if is_target(name)])
    if args.online:
        return Asked((), online_command.DEFAULT)
    at_once = [
        *(targets.workloads() if args.targets else ()),
        *(paper.WORKLOADS if args.paper else ()),
        *(reference.WORKLOADS if args.peers else ()),
    ]
    served = [
        *(targets.workloads(online=True) if args.targets else ()),
        *(paper.ONLINE if args.paper else ()),
    ]
    return Asked(NAMES if args.markdown else at_once or NAMES, served, [SHARE])


def _asked_of_device(args: argparse.Namespace) -> Asked:
    for option in ("online", "targets", "paper", "peers"):
        if getattr(args, option):
            raise UsageError(f"--{option} is about processors, and does not go with --device")
    return Asked(list(dict.fromkeys(args.workload)) or (() if args.given else ON_DEVICES), ())


def _settings(args: argparse.Namespace) -> tuple[Settings, str]:
    """(what workloads share, what lengths they have)."""
    count = args.requests
    lengths = read_lengths(args.lengths, count) if args.lengths else draw_lengths(count)
    stated = f"lengths from {args.lengths.name}" if args.lengths else DISTRIBUTION
    place = Place(args.backend, args.device)
    place.check()
    return Settings(lengths, place, args.units, args.trees, args.input), stated


def _cases(name: str, settings: Settings) -> Sequence[Callable[[], Case]]:
    if is_target(name):
        return [partial(target_case, name, settings.inputs, settings.count, settings.place)]
    return [partial(memory_case, settings)] if name == MEMORY else cases_of(name, settings)


def _command(name: str, args: argparse.Namespace, shares: Sequence[float] | None = None) -> str:
    """The command that measures a workload again; `shares`: as requests come, under these loads."""
    served = shares is not None
    words = ["cellc", "bench", name, *(["--online"] if served else [])]
    loads = ",".join(f"{share:g}" for share in shares or ())
    for option, value in (
        ("--loads", loads if tuple(shares or ()) != SHARES else None),
        ("--trace", served and args.trace and args.trace.name),
        ("--input", args.input),
        ("--requests", args.requests if args.requests != 512 else None),
        ("--units", args.units),
        ("--rounds", args.rounds),
        ("--seconds", f"{args.seconds:g}"),
        ("--lengths", args.lengths and args.lengths.name),
        ("--trees", args.trees and args.trees.name),
        ("--backend", args.backend if args.backend != "auto" else None),
        ("--device", args.device if args.device != "cpu" else None),
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
    if args.plot:
        cases = [] if args.online else [m.outcome for m in found.cases]
        plots.draw(args.plot, cases, [m.outcome for m in found.online])
    if args.markdown:
        picture = _link(args.plot, args.markdown) if args.plot else ""
        args.markdown.write_text(page.page(found, summaries, picture), encoding="utf-8")


def _link(to: Path, page: Path) -> str:
    return Path(os.path.relpath(to, page.resolve().parent)).as_posix()


def _summaries(args: argparse.Namespace, found: Found) -> Iterator[tuple[str, Sheet]]:
    if args.targets:
        yield "cellc bench --targets", targets.sheet(found)
    if args.paper:
        yield "cellc bench --paper", paper.sheet(found)
    if args.peers:
        yield "cellc bench --peers", reference.sheet(found)
