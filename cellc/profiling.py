"""Profiling: what `Compiled.profile` returns.

Duty: turn a timeline (`cellc.timeline`) on for the engines of a compiled model, off again, and hand
out what it holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType

from cellc.errors import CellcError
from cellc.ticket import Counters
from cellc.timeline import Event, Timeline


class Profile:
    """What `Compiled.profile` returns: profiles inside `with`, and holds what was seen after it."""

    def __init__(
        self,
        counters: Sequence[Counters],
        device: str,
        path: str | PathLike[str] | None,
        check: Callable[[], None],
    ) -> None:
        self._counters, self._path, self._check = counters, path, check
        self._device = device
        self._timeline: Timeline | None = None

    def __enter__(self) -> Profile:
        self._check()
        if any(c.timeline is not None for c in self._counters):
            raise CellcError("this model is profiled already; leave that `with` block first")
        self._timeline = Timeline(self._device)
        for counters in self._counters:
            counters.timeline = self._timeline
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for counters in self._counters:
            counters.timeline = None
        self._seen.finish()
        if self._path is not None:
            self.save(self._path)

    @property
    def _seen(self) -> Timeline:
        if self._timeline is None:
            raise CellcError("nothing was profiled; use `with compiled.profile() as p:`")
        return self._timeline

    @property
    def events(self) -> list[Event]:
        """Trace events as in the file."""
        return self._seen.trace()["traceEvents"]  # type: ignore[no-any-return]

    def summary(self) -> dict[str, dict[str, float]]:
        """By cell: launches, rows, steps and microseconds."""
        return self._seen.summary()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace; https://ui.perfetto.dev and chrome://tracing open it."""
        Path(path).write_text(json.dumps(self._seen.trace()), encoding="utf-8")
