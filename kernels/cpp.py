"""The C++ backend: generated kernels for the machine's vector unit.

Duty: cells to kernels on the CPU. Comes in: a cell, its weights, launches; goes out: rows written
into the arenas, and the positions of rows with invalid data. A launch is one call into the runtime
library, which holds the threads; cells that a tile program cannot express run on the eager backend.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.cells import Cell
from cellc.kernels import cpp_build
from cellc.kernels.address import address, brief
from cellc.kernels.cpp_body import Want
from cellc.kernels.cpp_expr import C_TYPES
from cellc.kernels.cpp_printer import CppSource, print_cpp
from cellc.kernels.eager import EagerBackend
from cellc.kernels.narrow import narrowed
from cellc.kernels.tile import schedule, unsupported
from cellc.launch import Kernel, Launch, Ragged
from cellc.ops import RowType

INT32 = np.dtype(np.int32)
_open_backends = 0
_open_lock = threading.Lock()


@lru_cache
def _runtime() -> ctypes.CDLL:
    """The library that holds threads and products, one a process."""
    library = cpp_build.load_own("runtime")
    library.cellc_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.cellc_launch.restype = ctypes.c_int64
    job = ctypes.POINTER(ctypes.c_void_p)
    library.cellc_end.argtypes = [job, ctypes.POINTER(ctypes.c_int64)]
    library.cellc_end.restype = ctypes.c_int64
    library.cellc_packed_count.argtypes = [ctypes.c_int64] * 3
    library.cellc_packed_count.restype = library.cellc_num_workers.restype = ctypes.c_int64
    _declare_pack(library.cellc_pack_f32)
    library.cellc_use_f64.argtypes, library.cellc_use_f64.restype = [ctypes.c_void_p], None
    library.cellc_use_narrow.argtypes = [ctypes.c_void_p] * 2
    library.cellc_use_narrow.restype = None
    library.cellc_alloc.argtypes, library.cellc_alloc.restype = [ctypes.c_int64], ctypes.c_void_p
    library.cellc_free.argtypes, library.cellc_free.restype = [ctypes.c_void_p], None
    library.cellc_stop.restype = None
    return library


@lru_cache
def _begin() -> Callable[..., None]:
    job = ctypes.POINTER(ctypes.c_void_p)
    given = ctypes.c_void_p, ctypes.c_char_p, job
    return brief(_runtime(), "cellc_begin", None, *given)  # type: ignore[no-any-return]


@lru_cache
def _products_f64() -> ctypes.CDLL:
    """The library of products of doubles, known to the runtime from then on."""
    library = cpp_build.load_own("gemm_f64")
    _declare_pack(library.cellc_pack_f64)
    _runtime().cellc_use_f64(ctypes.cast(library.cellc_gemm_f64, ctypes.c_void_p))
    return library


@lru_cache
def _products_narrow() -> ctypes.CDLL:
    """The library of products with weights in fewer bits, likewise."""
    library = cpp_build.load_own("gemm_narrow")
    _declare_pack(library.cellc_pack_bf16)
    _declare_pack(library.cellc_pack_i8)
    products = (library.cellc_gemm_bf16, library.cellc_gemm_i8)
    _runtime().cellc_use_narrow(*(ctypes.cast(p, ctypes.c_void_p) for p in products))
    return library


def _declare_pack(function: Any) -> None:
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None


def shutdown() -> None:
    """Join all worker threads; they start again at the next launch that wants them."""
    if _runtime.cache_info().currsize:
        _runtime().cellc_stop()


def num_workers() -> int:
    """Threads that live, beside those that call."""
    return int(_runtime().cellc_num_workers()) if _runtime.cache_info().currsize else 0


class CppBackend:
    """Compiles cells, or raises BackendError where no C++ compiler is found.

    `weights`: what products read (`cellc.kernels.narrow`). The last one to close ends the threads.
    """

    name = "cpp"

    def __init__(self, weights: str | None = None) -> None:
        global _open_backends
        self.weights = weights
        cpp_build.prepare_own("native")  # the engine's, compiled beside the runtime
        _runtime()
        self._open = True
        with _open_lock:
            _open_backends += 1

    def kernel(self, cell: Cell, params: Mapping[str, torch.Tensor]) -> Kernel:
        if unsupported(cell, C_TYPES):
            return EagerBackend().kernel(cell, params)
        narrow = narrowed(cell, self.weights)
        given = narrow.params(params)
        return CppKernel(narrow.cell, [given[p.name] for p in narrow.cell.params], narrow.kind)

    def close(self) -> None:
        global _open_backends
        with _open_lock:
            if not self._open:
                return
            self._open = False
            _open_backends -= 1
            if _open_backends == 0:
                shutdown()


@lru_cache(maxsize=4096)
def _printed(cell: Cell) -> CppSource:
    return print_cpp(schedule(cell))


class CppKernel:
    """One compiled cell with its weights; `weights`: what those of products are, if narrower."""

    def __init__(self, cell: Cell, params: Sequence[torch.Tensor], weights: str = "") -> None:
        printed = _printed(cell)
        self.cell, self.source, self.weights = cell, printed.text, weights
        self._marks_bad = printed.marks_bad
        self._library = cpp_build.load(printed.text, cell.name)
        self._entry = ctypes.addressof(ctypes.c_char.in_dll(self._library, "cellc_kernel"))
        self._weights = _Weights(params, printed.wants)
        self._types = tuple(dict.fromkeys([*(i.type for i in cell.inputs), *cell.output_types]))
        self._of_input = [self._types.index(i.type) for i in cell.inputs]
        self._of_output = [self._types.index(t) for t in cell.output_types]
        self._of_record = [*self._of_input, *self._of_output]
        self._pack = struct.Struct(f"{6 + 3 * (len(cell.inputs) + len(cell.outputs))}q").pack
        self._cores = num_cores()

    @property
    def packed_bytes(self) -> int:
        """Of its copy of the weights of products."""
        return self._weights.packed_bytes

    def __call__(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Sequence[int]:
        return self.bind(launch, arenas)()

    def bind(
        self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]
    ) -> Callable[[], Sequence[int]]:
        """The launch as a call without arguments, good for as long as no arena grows."""
        return self.prepare(launch, arenas)

    def prepare(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> CppLaunch:
        """The launch, which also other threads may run."""
        steps = np.ascontiguousarray(launch.steps, INT32)
        num_rows = int(steps[-1])
        bad = np.zeros(num_rows, np.uint8) if self._marks_bad else None
        crew = launch.crew
        threads = min(crew.threads or torch.get_num_threads(), self._cores)
        fields = [
            len(steps) - 1,
            address(steps),
            threads,
            crew.team,
            0 if bad is None else address(bad),
            self._weights.address,
        ]
        bases = [arenas[t].data_ptr() for t in self._types]
        kept: list[object] = [steps]  # what must live until the call is over
        if launch.table is not None:
            whole = np.ascontiguousarray(launch.table, INT32)
            kept.append(whole)
            first, row = address(whole), 4 * num_rows
            for i, t in enumerate(self._of_record):
                fields += (bases[t], first + i * row, 0)
            return CppLaunch(self._entry, self._pack(*fields), bad, (*kept, self))
        for table, t in zip(launch.inputs, self._of_input, strict=True):
            offsets = 0
            if isinstance(table, Ragged):
                bounds = np.ascontiguousarray(table.offsets, INT32)
                kept.append(bounds)
                offsets, table = address(bounds), table.slots
            table = np.ascontiguousarray(table, INT32)
            kept.append(table)
            fields += (bases[t], address(table), offsets)
        table = np.ascontiguousarray(launch.outputs, INT32)
        first, row = address(table), 4 * table.shape[1]
        for i, t in enumerate(self._of_output):
            fields += (bases[t], first + i * row, 0)
        kept.append(table)
        return CppLaunch(self._entry, self._pack(*fields), bad, (*kept, self))


class CppLaunch:
    """A launch with the addresses of all it needs: called, or begun and then ended."""

    __slots__ = ("_bad", "_entry", "_job", "_kept", "_packed")

    def __init__(
        self, entry: int, packed: bytes, bad: npt.NDArray[np.uint8] | None, kept: Sequence[object]
    ) -> None:
        self._entry, self._packed, self._bad, self._kept = entry, packed, bad, kept
        self._job: ctypes.c_void_p | None = None

    def __call__(self) -> Sequence[int]:
        return self._invalid(_runtime().cellc_launch(self._entry, self._packed))

    def begin(self) -> None:
        job = self._job = ctypes.c_void_p()  # written by the library: nothing comes between
        _begin()(self._entry, self._packed, job)

    def end(self) -> tuple[Sequence[int], float]:
        if self._job is None or not self._job.value:
            return (), 0.0
        took = ctypes.c_int64()
        found = _runtime().cellc_end(self._job, took)
        return self._invalid(found), took.value * 1e-9

    def _invalid(self, found: int) -> Sequence[int]:
        bad = self._bad
        if not found or bad is None:
            return ()
        wrong = [int(r) for r in np.flatnonzero(bad)]
        bad[:] = 0
        return wrong

    def __del__(self) -> None:
        if self._job is not None:  # its memory is about to go
            self.end()


def num_cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Weights:
    """Parameters as a kernel wants them, and the array of their addresses."""

    def __init__(self, params: Sequence[torch.Tensor], wants: Sequence[Want]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.packed: list[_Packed] = []
        addresses = []
        for want in wants:
            tensor = params[want.param].detach().contiguous()
            if want.packed:
                self.packed.append(_Packed(tensor))
                addresses.append(self.packed[-1].address)
            else:
                self.tensors.append(tensor)
                addresses.append(tensor.data_ptr())
        self.packed_bytes = sum(p.num_bytes for p in self.packed)
        self._array = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self.address = ctypes.addressof(self._array)


class _Packed:
    """A matrix in panels of columns, in memory of the runtime library."""

    def __init__(self, weight: torch.Tensor) -> None:
        library, (k, n), item = _runtime(), weight.shape, weight.element_size()
        pack, sum_bytes = _packing(weight.dtype)
        self.num_bytes: int = library.cellc_packed_count(k, n, sum_bytes) * item
        memory = library.cellc_alloc(self.num_bytes)
        if not memory:
            raise MemoryError(f"no memory for a packed weight of {k} x {n}")
        weakref.finalize(self, library.cellc_free, memory).atexit = False
        self.address: int = memory
        pack(weight.data_ptr(), k, n, memory)


def _packing(dtype: torch.dtype) -> tuple[Any, int]:
    """The function that packs such weights, and how many bytes their sums have."""
    if dtype == torch.float32:
        return _runtime().cellc_pack_f32, 4
    if dtype == torch.float64:
        return _products_f64().cellc_pack_f64, 8
    library = _products_narrow()
    return (library.cellc_pack_bf16 if dtype == torch.bfloat16 else library.cellc_pack_i8), 4
