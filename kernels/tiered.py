"""Tiered kernels: a kernel that is not made before it pays.

Duty: where a model shows the same computation in size after size (attention over a memory taken
whole), each size is a cell of its own, and compiling it takes seconds. Such a cell runs on the
eager backend until it has cost about as much as compiling does. Used by `cellc.cell_store`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from cellc.cells import Cell
from cellc.launch import Kernel, Launch
from cellc.ops import RowType

SIZES = 4  # of one computation that get kernels at once
ENOUGH = 1.0  # seconds on the eager backend: about what compiling takes


class TieredKernel:
    """Runs `first` for `ENOUGH` seconds, then what `make` makes."""

    def __init__(self, first: Kernel, make: Callable[[], Kernel]) -> None:
        self._kernel, self._make = first, make
        self._left = ENOUGH
        self.backend, self.source = "eager", first.source

    def __call__(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Sequence[int]:
        if self._left <= 0:
            return self._kernel(launch, arenas)
        start = time.perf_counter()
        invalid = self._kernel(launch, arenas)
        self._left -= time.perf_counter() - start
        if self._left <= 0:
            self._kernel = self._make()
            self.backend = getattr(self._kernel, "backend", "cpp")
            self.source = self._kernel.source
        return invalid


def form_of(cell: Cell) -> Hashable:
    """Equal for cells that differ in sizes only, be it in how many inputs they put together."""
    inputs = [(len(i.type.shape), i.type.dtype, i.ragged) for i in cell.inputs]
    operations = [op.op for op in cell.ops]
    params = tuple([p.name for p in cell.params])
    return _without_runs(inputs), params, _without_runs(operations), len(cell.outputs)


def _without_runs(items: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """
    >>> _without_runs("aabca")
    ('a', 'b', 'c', 'a')
    """
    return tuple([x for i, x in enumerate(items) if i == 0 or items[i - 1] != x])
