"""Costs: how long a step of a cell takes at a number of rows, as measured on this machine.

Duty: curves of seconds against rows, kept on disk by cell, backend, device and threads.
`cellc.tuning` measures and keeps them; the engine reads them, to know what a launch costs before
its first. Pure: neither torch nor a clock. A file that cannot be read counts as empty.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from cellc import env, files
from cellc.cells import Cell

GUESS = 20e-6  # seconds a row and step, of a cell that was never measured


@dataclass(frozen=True)
class Place:
    """Where kernels run: curves of another place say nothing."""

    backend: str
    device: str  # a name, as `cellc.machines.device_name` gives it
    threads: int


@dataclass(frozen=True)
class Curve:
    """Seconds of one step at some numbers of rows, ascending; `launch`: what a launch takes beside
    its steps.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    launch: float = 0.0

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        sound = len(self.rows) == len(self.seconds) > 0 and ascending and self.rows[0] > 0
        if not sound or not all(0 < s < math.inf for s in self.seconds):
            raise ValueError(f"no curve: {self.rows}, {self.seconds}")

    def __call__(self, num_rows: int) -> float:
        """Seconds of a step: between points a power of the rows, beyond the last one linear, below
        the first one as there.
        """
        if num_rows <= self.rows[0]:
            return self.seconds[0]
        if num_rows >= self.rows[-1]:
            return self.seconds[-1] * num_rows / self.rows[-1]
        i = bisect_left(self.rows, num_rows)
        (a, b), (s, t) = self.rows[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        share = math.log(num_rows / a) / math.log(b / a)
        return s * math.exp(share * math.log(t / s))

    def of_launch(self, num_rows: int, num_steps: int = 1) -> float:
        """Seconds of a whole launch."""
        return self.launch + num_steps * self(num_rows)

    @property
    def best_rate(self) -> float:
        """Most rows a second."""
        return max(n / self.of_launch(n) for n in self.rows)

    def enough(self, share: float = 0.9) -> int:
        """The fewest measured rows that give this share of the best rate."""
        return next(n for n in self.rows if n / self.of_launch(n) >= share * self.best_rate)


class Costs:
    """Curves of one place, read when first asked for."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def curve(self, cell: Cell) -> Curve | None:
        """What was measured of a cell, if anything."""
        return self._curves.get(cell.key)

    def seconds(self, cell: Cell, num_rows: int) -> float:
        """Of one step: measured, or a guess."""
        curve = self.curve(cell)
        return GUESS * num_rows if curve is None else curve(num_rows)

    @cached_property
    def _curves(self) -> Mapping[str, Curve]:
        return known(self.place)


def known(place: Place) -> dict[str, Curve]:
    """All curves of a place, by the cell's key."""
    try:
        data = json.loads(_file(place).read_text(encoding="utf-8"))
        return {key: _curve(points) for key, points in data.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _curve(points: Mapping[str, list[float]]) -> Curve:
    rows = tuple(int(n) for n in points["rows"])
    return Curve(rows, tuple(points["seconds"]), float(points["launch"]))  # type: ignore[arg-type]


def keep(place: Place, found: Mapping[str, Curve]) -> Path:
    """Add to what is known; the file is replaced whole."""
    path = _file(place)
    data = {key: asdict(curve) for key, curve in {**known(place), **found}.items()}
    files.write(path, json.dumps(data, indent=1, sort_keys=True))
    return path


def _file(place: Place) -> Path:
    device = re.sub("[^0-9A-Za-z]+", "-", place.device).strip("-")
    return env.cache() / "curves" / f"{place.backend}-{device}-{place.threads}.json"
