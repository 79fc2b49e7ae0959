"""Lengths and arrivals of requests: drawn from a stated distribution, or read from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cellc.errors import UsageError

MEAN, SIGMA, LONGEST = 23.6, 0.65, 143
DISTRIBUTION = f"log-normal lengths (sigma {SIGMA}), mean {MEAN}, at most {LONGEST}"


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths of at least 1, as sentences of translation sets have them: see DISTRIBUTION."""
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return [int(n) for n in np.clip(np.round(drawn), 1, LONGEST)]


def read_lengths(path: Path, count: int, seed: int = 0) -> list[int]:
    """`count` lengths out of a file of one a line, in an order of the seed's; again from the start
    where there are fewer. Raises UsageError for a file that holds something else.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
        lengths = [int(w) for w in words]
    except (OSError, ValueError) as error:
        raise UsageError(f"--lengths {path}: {error}") from error
    if not lengths or min(lengths) < 1:
        raise UsageError(f"--lengths {path}: expected one length of at least 1 a line")
    order = np.random.default_rng(seed).permutation(len(lengths))
    return [lengths[order[i % len(lengths)]] for i in range(count)]
