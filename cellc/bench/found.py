"""What benchmarks found: outcomes by workload, with when and where, to JSON and back.

Duty: hold the outcomes of one machine, answer questions about them (a ratio, a fact), and say why
there is no answer. Figures of an earlier run may be added to; those of another machine not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cellc.bench.case import Outcome
from cellc.bench.measure import machine_name
from cellc.errors import UsageError


@dataclass(frozen=True)
class Measured:
    """An outcome, and how to get it again."""

    workload: str
    command: str
    date: str
    requests: int
    units: int | None  # in place of the workload's own
    lengths: str
    outcome: Outcome

    @property
    def key(self) -> str:
        """The workload, and which of its cases."""
        return f"{self.workload} {self.outcome.name}".strip()

    def as_json(self) -> dict[str, Any]:
        ours = {k: v for k, v in vars(self).items() if k != "outcome"}
        return {**ours, **self.outcome.as_json()}

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> Measured:
        ours = {k: written[k] for k in cls.__dataclass_fields__ if k != "outcome"}
        return cls(**ours, outcome=Outcome.from_json(written))


class Lacking(Exception):
    """Why a question has no answer."""


@dataclass
class Found:
    """Of one machine."""

    machine: str = field(default_factory=machine_name)
    threads: int = field(default_factory=torch.get_num_threads)
    torch: str = torch.__version__
    cases: list[Measured] = field(default_factory=list)
    noisy: bool = False  # disturbed figures are answers, too

    def add(self, new: Sequence[Measured]) -> None:
        """In place of what there was of the same workloads."""
        names = {m.workload for m in new}
        self.cases = [m for m in self.cases if m.workload not in names] + list(new)

    def of(self, workload: str) -> Iterator[Measured]:
        return (m for m in self.cases if m.workload == workload)

    def outcome(self, key: str) -> Outcome:
        """Raises Lacking where it was not measured, or disturbed."""
        for m in self.cases:
            if m.key == key:
                if m.outcome.quiet or self.noisy:
                    return m.outcome
                raise Lacking("disturbed: measure it again")
        raise Lacking(f"not measured: cellc bench {key.split()[0]}")

    def ratio(self, key: str, way: str, other: str) -> float:
        """How many times as fast a way is as another. Raises Lacking."""
        outcome = self.outcome(key)
        for name in (way, other):
            if outcome.figure(name) is None:
                raise Lacking(f"{name} {outcome.missing.get(name, 'was not measured')}")
        ratio = outcome.ratio(way, other)
        assert ratio is not None
        return ratio

    def fact(self, key: str, name: str) -> float:
        """Raises Lacking."""
        facts = self.outcome(key).facts
        if name not in facts:
            raise Lacking("; ".join(self.outcome(key).missing.values()) or "not measured")
        return facts[name]

    def write(self, path: Path) -> None:
        ours = {"machine": self.machine, "threads": self.threads, "torch": self.torch}
        cases = [m.as_json() for m in self.cases]
        path.write_text(
            json.dumps({"date": date.today().isoformat(), **ours, "cases": cases}, indent=1),
            encoding="utf-8",
        )

    def read(self, path: Path) -> None:
        """Add what `write` wrote. Raises UsageError for another file, or another machine's."""
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            cases = [Measured.from_json(case) for case in written["cases"]]
            theirs = [written[k] for k in ("machine", "threads", "torch")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--from {path}: no figures of cellc bench: {error!r}") from error
        ours = [self.machine, self.threads, self.torch]
        if theirs != ours:
            raise UsageError(f"--from {path}: measured on {theirs}, and this is {ours}")
        for workload in dict.fromkeys(m.workload for m in cases):
            self.add([m for m in cases if m.workload == workload])
