"""What benchmarks found: outcomes by workload, with when and where, to JSON and back.

Duty: hold the outcomes of one machine, answer questions about them (a ratio, a fact, a latency),
and say why there is no answer. Figures of an earlier run may be added to; those of another machine
not.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from cellc.bench.case import Outcome
from cellc.bench.measure import machine_name
from cellc.bench.online_figures import POISSON, OnlineOutcome
from cellc.errors import UsageError

T = TypeVar("T", Outcome, OnlineOutcome)
SHARE = 0.7  # of the peer's peak: the load that targets and claims are about
REQUESTS = 512  # at once, likewise


@dataclass(frozen=True)
class Measured(Generic[T]):
    """An outcome, and how to get it again."""

    workload: str
    command: str
    date: str
    requests: int
    units: int | None  # in place of the workload's own
    lengths: str
    outcome: T

    @property
    def key(self) -> str:
        """The workload, and which of its cases."""
        return f"{self.workload} {self.outcome.name}".strip()

    def as_json(self) -> dict[str, Any]:
        ours = {k: v for k, v in vars(self).items() if k != "outcome"}
        return {**ours, **self.outcome.as_json()}

    @classmethod
    def from_json(cls, written: dict[str, Any], outcome: T) -> Measured[T]:
        ours = {k: written[k] for k in cls.__dataclass_fields__ if k != "outcome"}
        return Measured(**ours, outcome=outcome)


class Lacking(Exception):
    """Why a question has no answer."""


@dataclass
class Found:
    """Of one machine."""

    machine: str = field(default_factory=machine_name)
    threads: int = field(default_factory=torch.get_num_threads)
    torch: str = torch.__version__
    cases: list[Measured[Outcome]] = field(default_factory=list)
    online: list[Measured[OnlineOutcome]] = field(default_factory=list)
    steps: dict[str, Any] = field(default_factory=dict)  # of `cellc.bench.gpu`
    noisy: bool = False  # disturbed figures are answers, too

    def add(self, new: Sequence[Measured[Outcome]]) -> None:
        """In place of what there was of the same workloads."""
        self.cases = _replaced(self.cases, new)

    def add_online(self, new: Sequence[Measured[OnlineOutcome]]) -> None:
        """The same for latency against load."""
        self.online = _replaced(self.online, new)

    def of(self, workload: str) -> Iterator[Measured[Outcome]]:
        return (m for m in self.cases if m.workload == workload)

    @property
    def all(self) -> list[Measured[Any]]:
        return [*self.cases, *self.online]

    def unlike(self, workloads: Container[str]) -> str:
        """What of these was measured with other requests or units than is usual."""
        notes = [
            f"{m.key}: {m.requests} requests" + (f", {m.units} units" if m.units else "")
            for m in self.all
            if m.workload in workloads and (m.requests != REQUESTS or m.units)
        ]
        return "; ".join(dict.fromkeys(notes))  # at once and as they come

    def outcome(self, key: str) -> Outcome:
        """Raises Lacking where it was not measured, or disturbed."""
        return self._quiet(self.cases, key, f"cellc bench {key.split()[0]}")

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

    def latency(self, key: str, policy: str = "", share: float = SHARE) -> float:
        """p90 of cellc to that of its peer, of Poisson arrivals at a share of the peer's peak; the
        peer as `policy` says, or at its best. Raises Lacking.
        """
        command = f"cellc bench {key.split()[0]} --online"
        outcome = self._quiet(self.online, key, command)
        figure = outcome.of_peer(share, policy)
        if figure is None or outcome.arrivals != POISSON:
            raise Lacking(f"not measured: {command} --loads {share:g}")
        return 1 / figure.p90_to_cellc

    def _quiet(self, measured: Sequence[Measured[T]], key: str, command: str) -> T:
        for m in measured:
            if m.key == key:
                if m.outcome.quiet or self.noisy:
                    return m.outcome
                raise Lacking("disturbed: measure it again")
        raise Lacking(f"not measured: {command}")

    def write(self, path: Path) -> None:
        written = {
            "date": date.today().isoformat(),
            "machine": self.machine,
            "threads": self.threads,
            "torch": self.torch,
            "cases": [m.as_json() for m in self.cases],
            "online": [m.as_json() for m in self.online],
            "steps": self.steps,
        }
        path.write_text(json.dumps(written, indent=1), encoding="utf-8")

    def read(self, path: Path) -> None:
        """Add what `write` wrote. Raises UsageError for another file, or another machine's."""
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            cases = [Measured.from_json(c, Outcome.from_json(c)) for c in written["cases"]]
            online = [Measured.from_json(o, OnlineOutcome.from_json(o)) for o in written["online"]]
            theirs = [written[k] for k in ("machine", "threads", "torch")]
        except OSError as error:
            raise UsageError(f"--from {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--from {path}: no figures of cellc bench, as --json writes them"
            ) from error
        ours = [self.machine, self.threads, self.torch]
        if theirs != ours:
            raise UsageError(f"--from {path}: measured on {theirs}, and this is {ours}")
        self.add(cases)
        self.add_online(online)
        self.steps = written.get("steps") or self.steps


def _replaced(old: Sequence[Measured[T]], new: Sequence[Measured[T]]) -> list[Measured[T]]:
    workloads = {m.workload for m in new}
    return [m for m in old if m.workload not in workloads] + list(new)
