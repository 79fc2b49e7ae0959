"""Limits: what one request may take, and what all together may.

Duty: refuse requests that could never run, with an error that says which limit they are past, and
choose how much memory rows may take where nobody said. Used by `cellc.engine` and `cellc.moves`;
requests that only have to wait for others do so there.
"""

from __future__ import annotations

import os

import torch

from cellc.errors import CallsError, CellcError, TooLarge
from cellc.legs import Entry, Leg
from cellc.state import Arenas

USUAL = 8 << 30  # bytes of rows, where there is four times as much memory


class Limits:
    """Of one engine. memory: bytes of all rows; calls: of one request's plan."""

    def __init__(self, arenas: Arenas, memory: int, calls: int | None) -> None:
        self._arenas, self.memory, self._calls = arenas, memory, calls

    def refusal(self, entry: Entry) -> CellcError | None:
        """Why a request can never run. A leg holds calls that may not be needed: those of forwards
        that read values are limited by the values read.
        """
        plan, most = entry.plan, self._calls
        if most is not None and plan.num_calls > most and not isinstance(entry, Leg):
            return CallsError(calls=f"{plan.num_calls:,}", limit=f"{most:,}")
        needed = plan.nbytes or self._arenas.bytes_of(plan)
        if needed > self.memory:
            return TooLarge(needed=f"{needed:,}", limit=f"{self.memory:,}")
        return None


def usual_memory(device: torch.device) -> int:
    """A quarter of the device's memory, 8 GiB at most: arenas double, and are copied then."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = _machine_memory()
    return min(USUAL, total // 4)


def _machine_memory() -> int:
    """Bytes that this process may use: the machine's, or its control group's."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 4 * USUAL
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(name, encoding="ascii") as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return total
