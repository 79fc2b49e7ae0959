"""Steps of a long command: a progress bar on a terminal, plain lines elsewhere.

Duty: say what is being done, and how long it took. A bar is redrawn twice a second, so that drawing
it takes nothing from what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Steps on one console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    @contextmanager
    def step(self, text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """One step; gives a function to call when one of `total` parts is done."""
        start = time.perf_counter()
        if self._console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(text, total=total)
                yield lambda: bar.advance(task)
        else:
            yield lambda: None
        seconds = time.perf_counter() - start
        self._console.print(f"{text}: {seconds:.1f} s", markup=False)

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            refresh_per_second=2,
            transient=True,
        )
