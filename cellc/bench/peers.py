"""Other libraries that a benchmark compares with, where they are installed.

Duty: say whether a library is there, and hand rows to one in padded batches. Nothing here imports
one of them: a peer is built when it first runs, so that what it takes (seconds, memory pools) is
not taken where it does not run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
PACKAGES = {"dynet": "dynet38", "tensorflow": "tensorflow-cpu"}  # where named otherwise


def why_not(*modules: str) -> str:
    """Why a peer cannot run here, or nothing."""
    lacking = [m for m in modules if importlib.util.find_spec(m) is None]
    if not lacking:
        return ""
    return f"not installed: pip install {' '.join(PACKAGES.get(m, m) for m in lacking)}"


def by_length(rows: Sequence[Sized], size: int) -> list[list[int]]:
    """Positions sorted by length, in batches of `size`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[at : at + size] for at in range(0, len(order), size)]


def pad(rows: Sequence[Array], *, time_first: bool = False) -> tuple[Array, Array]:
    """([B, T, I] or [T, B, I], lengths [B])."""
    lengths = np.array([len(r) for r in rows], np.int32)
    longest, batch, size = int(lengths.max()), len(rows), rows[0].shape[1]
    if batch == 1:
        return rows[0].reshape((longest, 1, size) if time_first else (1, longest, size)), lengths
    x = np.zeros((longest, batch, size) if time_first else (batch, longest, size), np.float32)
    by_row = x.swapaxes(0, 1) if time_first else x
    for k, row in enumerate(rows):
        by_row[k, : lengths[k]] = row
    return x, lengths


def in_batches(
    run: Callable[[Sequence[Array]], Array], rows: Sequence[Array], batches: Sequence[Sequence[int]]
) -> list[Tensor]:
    """`run` gives the results of one batch's rows; results in the order of the positions."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        results = torch.from_numpy(run([rows[i] for i in batch]))
        found |= zip(batch, results.unbind(), strict=True)
    return [found[i] for i in sorted(found)]
