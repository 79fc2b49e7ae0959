"""How long a device takes that runs launches by itself.

Duty: time a launch on the device's own clock. Used by `cellc.launcher`, which waits for a few
launches of each size; tests put another `Clock` in its place.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Of one device."""

    def start(self) -> None:
        """Wait until the device has nothing to do."""
        ...

    def seconds(self) -> float:
        """Wait again; since the start."""
        ...


class DeviceClock:
    """Of a GPU, by its events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: Any = None
        self._end: Any = None

    def start(self) -> None:
        if self._begin is None:
            with torch.cuda.device(self._device):
                self._begin, self._end = (
                    torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                    for _ in range(2)
                )
        torch.cuda.synchronize(self._device)
        self._begin.record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        self._end.record(torch.cuda.current_stream(self._device))
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3
