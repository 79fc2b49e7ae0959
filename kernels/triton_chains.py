"""Chains: does every row of a launch stay at its own position from step to step?

Duty: say whether a persistent kernel, whose programs own positions and never wait for each other,
may run a launch. Pure. Comes in: a cell and a launch of it; goes out: yes or no.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from cellc.cells import Cell
from cellc.launch import Index, Launch, Ragged
from cellc.ops import RowType


def apart(cell: Cell, launch: Launch) -> bool:
    """Whether each slot that the launch writes is read and written at one position of its steps
    only, the position of a row being its place in its step.

    The scheduler's launches are so: a call runs in the same launch as the call before it only if
    it waits for nothing else, and then at the same position.
    """
    positions = _positions(launch.steps)
    return all(_apart(cell, launch, kind, positions) for kind in dict.fromkeys(cell.output_types))


def _positions(steps: Index) -> Index:
    found = np.arange(steps[-1], dtype=np.int32)
    for start, stop in pairwise(steps.tolist()):
        found[start:stop] -= start
    return found


def _apart(cell: Cell, launch: Launch, kind: RowType, positions: Index) -> bool:
    written = [s for s, t in zip(launch.outputs, cell.output_types, strict=True) if t == kind]
    read = [t for t, spec in zip(launch.inputs, cell.inputs, strict=True) if spec.type == kind]
    if any(isinstance(table, Ragged) for table in read):
        return False
    plain = [table for table in read if not isinstance(table, Ragged)]
    owner = np.full(1 + max(int(t.max()) for t in [*written, *plain]), -1, np.int32)
    for slots in written:
        owner[slots] = positions
    if any((owner[slots] != positions).any() for slots in written):
        return False
    for slots in plain:
        found = owner[slots]
        if ((found >= 0) & (found != positions)).any():
            return False
    return True
