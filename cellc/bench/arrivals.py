"""When requests arrive: Poisson processes, and traces of a file.

Duty: all arrival times and choices of requests are drawn before a load is sent, so that a slow
server cannot slow its own load. Comes in: a rate and a seed, or a file; goes out: a `Load`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellc.errors import UsageError

LEAST = 8  # requests of a load


@dataclass(frozen=True)
class Load:
    """Arrivals: request i is number `chosen[i]` of the requests there are, due at `arrivals[i]`
    seconds.
    """

    arrivals: npt.NDArray[np.float64]
    chosen: npt.NDArray[np.int64]


def make_load(rate: float, seconds: float, num_requests: int, seed: int) -> Load:
    """Poisson: `rate` requests a second for about `seconds`, at least 8, each any of
    `num_requests`; the same for a seed.
    """
    generator = np.random.default_rng(seed)
    count = max(LEAST, round(rate * seconds))
    arrivals = np.cumsum(generator.exponential(1 / rate, count))
    return Load(arrivals, generator.integers(0, num_requests, count))


@dataclass(frozen=True)
class Trace:
    """Requests that came once: seconds from the first of them, in order, and lengths."""

    seconds: npt.NDArray[np.float64]
    lengths: Sequence[int]
    name: str  # of the file

    @property
    def rate(self) -> float:
        """Requests a second, on average."""
        return (len(self.seconds) - 1) / float(self.seconds[-1])

    def load(self, num_requests: int, rate: float | None = None) -> Load:
        """Request i is i-th of `num_requests`, again from the first where there are fewer; as it
        was recorded, or with all gaps stretched alike to give `rate`.
        """
        seconds = self.seconds if rate is None else self.seconds * (self.rate / rate)
        return Load(seconds, np.arange(len(seconds)) % num_requests)


def read_trace(path: Path) -> Trace:
    """A file of one request a line: `seconds length`, or `{"seconds": s, "length": n}`; empty lines
    and those that begin with # are nothing. Raises UsageError, with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--trace {path}: {error}") from error
    found: list[tuple[float, int]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found.append(_arrival(line, found[-1][0] if found else 0.0))
        except ValueError as error:
            raise UsageError(f"--trace {path}, line {number}: {error}") from error
    if len(found) < 2 or found[-1][0] <= found[0][0]:
        raise UsageError(f"--trace {path}: expected at least two requests at different times")
    seconds = np.array([at for at, _ in found])
    return Trace(seconds - seconds[0], [length for _, length in found], path.name)


def _arrival(line: str, before: float) -> tuple[float, int]:
    """Raises ValueError that says what is wrong."""
    at, length = _fields(line)
    if not (math.isfinite(at) and at >= 0):
        raise ValueError(f"{at} is no time in seconds of at least 0")
    if at < before:
        raise ValueError(f"{at:g} s is before {before:g} s, of the request above; sort the lines")
    if length < 1:
        raise ValueError(f"a length of {length}; it is at least 1")
    return at, length


def _fields(line: str) -> tuple[float, int]:
    if line.lstrip().startswith("{"):
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON: {error}") from error
        at, length = given.get("seconds"), given.get("length")
        if isinstance(at, bool) or not isinstance(at, (int, float)) or type(length) is not int:
            raise ValueError('expected {"seconds": s, "length": n}')
        return float(at), length
    words = line.split()
    try:
        at, length = words
        return float(at), int(length)
    except ValueError:
        raise ValueError(f"expected `seconds length`, found {line.strip()!r}") from None
