"""Replicas: what is learned of a model, as a worker on a device of its own sees it.

Duty: plans, cells and their numbers are the same on every device and shared; weights and kernels
are there once a device. `Learned` is what an engine needs of either, `cellc.compiler.Compiler` or a
`Replica` of it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cellc.cells import Cell
from cellc.launch import Backend, Kernel
from cellc.legs import Branch, Entry
from cellc.paths import Ask, Paths
from cellc.plan import Tables

if TYPE_CHECKING:
    from cellc.compiler import Compiler


class Learned(Protocol):
    """What an engine needs to know of a model. Safe in threads."""

    tables: Tables
    backend: Backend
    device: torch.device
    paths: Paths
    by_number: dict[int, Cell]
    priority: dict[int, int]
    record_lengths: dict[int, int]

    @property
    def params(self) -> Mapping[str, torch.Tensor]: ...

    def kernel(self, number: int) -> Kernel: ...

    def refresh(self) -> None: ...

    def onward(self, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]: ...

    def planned_anew(self, args: Any, kwargs: Any) -> tuple[Entry, Sequence[torch.Tensor]]: ...


class Replica:
    """See the module."""

    def __init__(self, compiler: Compiler, backend: Backend, device: torch.device) -> None:
        self._compiler, self.backend, self.device = compiler, backend, device
        self.tables, self.paths, self.by_number = (
            compiler.tables,
            compiler.paths,
            compiler.by_number,
        )
        self.priority, self.record_lengths = compiler.priority, compiler.record_lengths
        self.params = OnDevice(compiler.params, device)
        self._kernels: dict[int, Kernel] = {}
        self._lock = threading.Lock()

    def kernel(self, number: int) -> Kernel:
        """The kernel of a cell on this device, made on first use."""
        found = self._kernels.get(number)
        if found is None:
            with self._lock:
                found = self._kernels.get(number)
                if found is None:
                    found = self._compiler.store.made(number, self.backend, self.params)
                    self._kernels[number] = found
        return found

    def onward(self, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]:
        return self._compiler.onward(asks)

    def planned_anew(self, args: Any, kwargs: Any) -> tuple[Entry, Sequence[torch.Tensor]]:
        return self._compiler.planned_anew(args, kwargs)

    def refresh(self) -> None:
        """The weights changed; the compiler knows."""
        with self._lock:
            self.params.clear()
            self._kernels.clear()


def replicas(
    compiler: Compiler, backends: Sequence[Backend], devices: Sequence[torch.device]
) -> list[Learned]:
    """What each worker knows: the compiler itself, where backend and device are its own."""
    return [
        compiler
        if backend is compiler.backend and device == compiler.device
        else Replica(compiler, backend, device)
        for backend, device in zip(backends, devices, strict=True)
    ]


class OnDevice(Mapping[str, torch.Tensor]):
    """Tensors by name, copied to a device when first asked for."""

    def __init__(self, there: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._there, self._device = there, device
        self._copies: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._copies.get(name)
        if found is None:
            found = self._copies[name] = self._there[name].to(self._device)
        return found

    def __iter__(self) -> Any:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def clear(self) -> None:
        self._copies.clear()
