"""The Triton backend: cells as generated kernels, on a GPU or in Triton's interpreter.

Duty: load the module that `triton_printer` wrote and launch its kernels. Comes in: a cell, its
weights, launches; goes out: rows in the arenas, positions of bad rows. On a GPU, the steps of a
launch are replayed as a graph (`triton_graphs`), or run in one persistent kernel where that was
measured to be faster; else a launch uploads its index tables once, then runs its steps as
successive grids over them. With TRITON_INTERPRET=1 (set before Triton is imported) everything runs
on CPU tensors, slowly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from cellc import env, files, log
from cellc.cells import Cell
from cellc.errors import BackendError, UnsupportedError, UsageError
from cellc.kernels.narrow import check_weights, narrowed
from cellc.kernels.tile import schedule, unsupported
from cellc.kernels.tile_ir import Ref, TileProgram
from cellc.kernels.triton_body import TYPES, identifier
from cellc.kernels.triton_graphs import Graphs, captured
from cellc.kernels.triton_interpreter import round_as_devices
from cellc.kernels.triton_launches import Launches, Loop, Memory, Run, current
from cellc.kernels.triton_persistent import print_persistent
from cellc.kernels.triton_printer import Printed, print_program
from cellc.kernels.triton_steps import print_stepped
from cellc.kernels.triton_tiles import PrintedKernel, compile_options
from cellc.kernels.triton_tuned import known_loop, tuned
from cellc.launch import Index, Launch, Ragged
from cellc.ops import RowType

PRECISIONS = ("ieee", "tf32", "tf32x3")


@dataclass(frozen=True)
class TritonOptions:
    """`input_precision`: of f32 products, one of ieee, tf32, tf32x3 (tl.dot's input_precision).
    `weights`: what products read (`cellc.kernels.narrow`).
    """

    input_precision: str = "ieee"
    weights: str | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if self.input_precision not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise UsageError(
                f"input_precision {self.input_precision!r} is not known; there are {names}"
            )


class TritonBackend:
    """Makes Triton kernels for one device; raises BackendError where they cannot run."""

    name = "triton"

    def __init__(
        self,
        device: torch.device | str | None = None,
        options: TritonOptions | Mapping[str, Any] | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        given = options or {}
        self.options = given if isinstance(given, TritonOptions) else TritonOptions(**given)
        self.interpreted = interpreting()
        if self.interpreted:
            round_as_devices()
        if self.device.type == "cpu" and not self.interpreted:
            raise BackendError(
                "no GPU; choose backend='cpp' or 'eager', or set TRITON_INTERPRET=1 before Triton "
                "is imported to run its interpreter",
                backend="triton",
            )
        self.compiles = self.device.type == "cuda" and not self.interpreted
        self.graphs = Graphs(self.device, captured) if self.compiles else None

    def kernel(self, cell: Cell, params: Mapping[str, torch.Tensor]) -> TritonKernel:
        """Raises UnsupportedError for a cell that has no Triton kernel."""
        narrow = narrowed(cell, self.options.weights)
        program, printed = print_cell(narrow.cell, self.options)
        log.dump(f"triton-{cell.name}", printed.source, ".py")
        given = narrow.params(params)
        weights = [given[p.name].contiguous() for p in program.cell.params]
        return TritonKernel(program, printed, weights, self, narrow.kind)


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels."""
    try:
        import triton
    except ImportError as error:
        raise BackendError(
            "Triton is not installed: pip install triton", backend="triton"
        ) from error
    return bool(triton.knobs.runtime.interpret)


def print_cell(cell: Cell, options: TritonOptions | None = None) -> tuple[TileProgram, Printed]:
    """The tile program and the Triton module of a cell; raises UnsupportedError."""
    reason = unsupported(cell, TYPES)
    if reason:
        remedy = "run this cell on the eager backend"
        raise UnsupportedError(what=f"triton: cell {cell.name}: {reason}", remedy=remedy)
    program = schedule(cell)
    return program, print_program(program, (options or TritonOptions()).input_precision)


def load(name: str, source: str) -> ModuleType:
    """Import generated text from a file that stays, since Triton reads a kernel's source there."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name = f"cellc_{identifier(name) or 'cell'}_{digest}"
    spec = importlib.util.spec_from_file_location(name, _written(f"{name}.py", source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _written(name: str, source: str) -> Path:
    """The file in the cache, or in a temporary folder where the cache cannot be written."""
    for folder in (env.cache() / "triton", Path(tempfile.gettempdir()) / f"cellc-{os.getuid()}"):
        path = folder / name
        try:
            if not path.exists() or path.read_bytes() != source.encode():
                files.write(path, source)
        except OSError:
            continue
        return path
    raise BackendError(
        f"cannot write {name} to {env.cache()}; set CELLC_CACHE to a folder that can be written",
        backend="triton",
    )


class TritonKernel:
    """A compiled cell; `weights`: what those of products are, if narrower than the model's."""

    def __init__(
        self,
        program: TileProgram,
        printed: Printed,
        params: Sequence[torch.Tensor],
        backend: TritonBackend,
        weights: str = "",
    ) -> None:
        self.program, self.source, self.weights = program, printed.source, weights
        self.device, self.interpreted = backend.device, backend.interpreted
        there = torch.cuda.get_device_name(self.device) if backend.compiles else None
        self.kernels = printed.kernels if there is None else tuned(printed, there)
        self.memory = Memory(program, self.kernels, params, self.device)
        self.reports = any(k.reports for k in printed.kernels)
        module = load(program.cell.name, printed.source)
        self.functions: list[Any] = [getattr(module, k.name) for k in printed.kernels]
        self.persistent = print_persistent(program, printed, backend.options.input_precision)
        loop = None
        if self.persistent is not None and there is not None:
            loop = known_loop(self.persistent, there)
        self.launches: Launches | None = None
        if backend.graphs is not None:
            self.launches = self.launched(backend.graphs, loop)

    def launched(self, graphs: Graphs, loop: tuple[PrintedKernel, int] | None = None) -> Launches:
        """Its launches by graphs; `loop`: a choice of the persistent kernel, and for how many rows
        of a step at most.
        """
        stepped = print_stepped(self.program, Printed(self.source, self.kernels))
        module = load(self.program.cell.name, stepped.source)
        runs = [Run(k, getattr(module, k.name)) for k in stepped.kernels]
        chosen = None
        if loop is not None:
            assert self.persistent is not None
            module = load(self.program.cell.name, self.persistent.printed.source)
            chosen = Loop(Run(loop[0], getattr(module, loop[0].name)), loop[1])
        return Launches(self.memory, runs, chosen, graphs)

    def __call__(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Sequence[int]:
        return self.bind(launch, arenas)()

    def bind(
        self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]
    ) -> Callable[[], Sequence[int]]:
        """The launch as a call without arguments, good for as long as no arena grows."""
        if launch.num_rows == 0:
            return tuple
        if self.launches is None or self.memory.along:
            return self.plain(launch, arenas)
        bound = self.launches.bind(launch, arenas)

        def run() -> Sequence[int]:
            flags = bound()
            return BadRows([part.numpy for part in flags]) if flags else ()

        return run

    def plain(
        self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]
    ) -> Callable[[], Sequence[int]]:
        """`bind`, kernel by kernel."""
        largest = int(np.diff(launch.steps).max())
        entries = {
            i: len(table.slots)
            for i, table in enumerate(launch.inputs)
            if isinstance(table, Ragged)
        }
        tables, bases = self._upload(launch)
        flags = launch.num_rows if self.reports else 0
        steps = [
            (start, stop - start) for start, stop in pairwise(launch.steps.tolist()) if stop > start
        ]

        def run() -> Sequence[int]:
            self.memory.grow(largest, entries)
            bad = torch.zeros(flags, dtype=torch.int32, device=self.device)
            calls = [self._arguments(k, arenas, tables, bad) for k in self.kernels]
            with current(self.device):
                for start, count in steps:
                    self._step(calls, bases, start, count, launch.num_rows)
            return BadRows([lambda: bad.cpu().numpy()]) if self.reports else ()

        return run

    def _step(
        self,
        calls: Sequence[Sequence[torch.Tensor]],
        bases: Mapping[Ref, tuple[int, int]],
        start: int,
        num_rows: int,
        num_total: int,
    ) -> None:
        """One grid after another over the rows of one step."""
        for kernel, function, pointers in zip(self.kernels, self.functions, calls, strict=True):
            ragged = [base for ref in kernel.ragged for base in bases[ref]]
            scalars = [start, num_rows, num_total, *ragged]
            options = {} if self.interpreted else compile_options(kernel)
            grid = kernel.grid(num_rows)
            function[grid](*pointers, *scalars, **kernel.constants, **options)

    def _arguments(
        self,
        kernel: PrintedKernel,
        arenas: Mapping[RowType, torch.Tensor],
        tables: torch.Tensor,
        bad: torch.Tensor,
    ) -> list[torch.Tensor]:
        pointers = [self.memory.at(ref, arenas) for ref in kernel.refs]
        return [tables, *pointers, *([bad] if kernel.reports else [])]

    def _upload(self, launch: Launch) -> tuple[torch.Tensor, dict[Ref, tuple[int, int]]]:
        """All index tables in one tensor, and where the parts of ragged inputs start."""
        parts: list[Index] = []
        ragged: list[tuple[Ref, Ragged]] = []
        for i, table in enumerate(launch.inputs):
            if isinstance(table, Ragged):
                ragged.append((Ref("input", i), table))
                parts.append(np.zeros(launch.num_rows, np.int32))
            else:
                parts.append(table)
        parts += list(launch.outputs)
        bases, size = {}, launch.num_rows * len(parts)
        for ref, table in ragged:
            bases[ref] = (size, size + len(table.offsets))
            parts += [table.offsets, table.slots]
            size += len(table.offsets) + len(table.slots)
        flat = np.concatenate(parts).astype(np.int32, copy=False)
        return torch.from_numpy(flat).to(self.device, non_blocking=True), bases


class BadRows(Sequence[int]):
    """Positions of bad rows, from flags of a launch's parts, waited for when first looked at."""

    def __init__(self, flags: Sequence[Callable[[], npt.NDArray[Any]]]) -> None:
        self._flags = flags
        self._rows: list[int] = []

    def rows(self) -> list[int]:
        if self._flags:
            flags = np.concatenate([part() for part in self._flags])
            self._rows, self._flags = np.flatnonzero(flags).tolist(), ()
        return self._rows

    def __len__(self) -> int:
        return len(self.rows())

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows())

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> list[int]: ...
    def __getitem__(self, i: int | slice) -> int | list[int]:
        return self.rows()[i]
