"""Numbers on their way between the host and a GPU, while neither waits for the other.

Duty: send the integers of launches by way of page-locked memory, which a device fetches from by
itself, and fetch flags that are looked at later. Comes in: numpy arrays, tensors on the device. On
a CPU both are plain copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.kernels.triton_tiles import padded
from cellc.launch import Index

SLOTS = 16  # launches whose integers may be on their way at once


class _Slot:
    """Page-locked integers; `sent`: the device has fetched them."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self.numpy: npt.NDArray[np.int32] = self.tensor.numpy()
        self.sent: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]


class Staging:
    """Of one device; one thread at a time sends."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._slots: list[_Slot | None] = [None] * SLOTS
        self._next = 0

    def send(self, ints: Index, to: torch.Tensor) -> None:
        """Copy to the start of a tensor on the device, in order with its other work."""
        count = len(ints)
        if not self._on_gpu:
            to[:count].copy_(torch.from_numpy(ints))
            return
        slot = self._free(count)
        slot.numpy[:count] = ints
        to[:count].copy_(slot.tensor[:count], non_blocking=True)
        slot.sent.record(torch.cuda.current_stream(to.device))

    def _free(self, count: int) -> _Slot:
        number, self._next = self._next, (self._next + 1) % SLOTS
        slot = self._slots[number]
        if slot is not None:
            slot.sent.synchronize()
        if slot is None or len(slot.numpy) < count:
            slot = self._slots[number] = _Slot(max(padded(count), 1 << 12))
        return slot


class Fetched:
    """A copy of a tensor on the device as it is now, in order with its other work."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: Any = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    def numpy(self) -> npt.NDArray[Any]:
        """Waits for it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        values: npt.NDArray[Any] = self._host.numpy()
        return values
