"""Stages: what each step made of the last request, as text.

Duty: keep a readable form of every step from a request to its plan for `compiled.stages`, `cellc
inspect --ir` and the logs. Filled by `cellc.compiler`; a text is made when it is first read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cellc import env, log
from cellc.calls import CallGraph
from cellc.printer import print_cell

_CHANNELS = {
    "graph": "graph",
    "rows": "graph",
    "extract": "cells",
    "passes": "cells",
    "plan": "plan",
}


@dataclass
class Stage:
    """One step of the last traced request, as text."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.text


class _LazyStage(Stage):
    """A stage whose text is made when it is first read."""

    def __init__(self, name: str, source: Any) -> None:
        self.name = name
        self._source = source

    @property
    def text(self) -> str:  # type: ignore[override]
        return str(self._source() if callable(self._source) else self._source)


class Stages:
    """The stages of the last request."""

    def __init__(self) -> None:
        self.all: list[Stage] = []

    def begin(self) -> None:
        """Another request begins."""
        self.all = []

    def add(self, name: str, text: Any) -> None:
        """`text`: what prints itself, or makes what does."""
        stage = _LazyStage(name, text)
        self.all.append(stage)
        channel = _CHANNELS[name]
        if log.enabled(channel) or env.dump() is not None:
            log.info(channel, str(stage))
            log.dump(name, str(stage))


def print_calls(calls: CallGraph) -> str:
    """A call graph and its cells."""
    return "\n".join([str(calls), *(print_cell(group.cell) for group in calls.groups)])
