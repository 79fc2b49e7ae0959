"""A cell's launches by kernels whose arguments never change.

Duty: the memory that a cell's kernels work on, and how a launch becomes calls that `triton_graphs`
can replay: one kernel a step, or one persistent kernel for all steps where every row keeps to its
position. Comes in: printed kernels with their functions, launches; goes out: rows in the arenas,
flags of bad rows. Used by `triton_backend`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from cellc.kernels.eager import DTYPES
from cellc.kernels.tile_ir import Ref, TileProgram
from cellc.kernels.triton_chains import apart
from cellc.kernels.triton_graphs import Arenas, Graphs, Node, bucket
from cellc.kernels.triton_staging import Fetched
from cellc.kernels.triton_steps import Head, Packed, pack
from cellc.kernels.triton_tiles import PrintedKernel, compile_options, padded
from cellc.launch import Launch
from cellc.ops import RowType

_NUMBERS = count()


class Memory:
    """Weights, and scratch rows, which are kept between launches and grow with the largest one."""

    def __init__(
        self,
        program: TileProgram,
        kernels: Sequence[PrintedKernel],
        params: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self.program, self.params, self.device = program, params, device
        self.used = {r.index for k in kernels for r in k.refs if r.kind == "buffer"}
        self.scratch: dict[int, torch.Tensor] = {}
        # scratch as long as vectors is sized launch by launch, which no graph is
        self.along = any(program.buffers[i].over is not None for i in self.used)

    def at(self, ref: Ref, arenas: Mapping[RowType, torch.Tensor]) -> torch.Tensor:
        if ref.kind == "param":
            return self.params[ref.index]
        if ref.kind == "buffer":
            return self.scratch[ref.index]
        return arenas[self.program.type_of(ref)]

    def grow(self, num_rows: int, entries: Mapping[int, int] | None = None) -> None:
        """`entries` of each ragged input: buffers along its vectors have as many rows."""
        for i in self.used:
            buffer = self.program.buffers[i]
            count = num_rows if buffer.over is None else (entries or {})[buffer.over]
            if i not in self.scratch or len(self.scratch[i]) < count:
                shape, dtype = (max(1, count), buffer.type.numel), DTYPES[buffer.type.dtype]
                self.scratch[i] = torch.empty(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Run:
    """A printed kernel and its function."""

    printed: PrintedKernel
    function: Any


@dataclass(frozen=True)
class Loop:
    """A persistent kernel, and the most rows of a step that it is used for."""

    run: Run
    most_rows: int


class Launches:
    """Launches of one cell; `runs` are kernels of `print_stepped`."""

    def __init__(
        self, memory: Memory, runs: Sequence[Run], loop: Loop | None, graphs: Graphs
    ) -> None:
        self.memory, self.runs, self.loop, self.graphs = memory, runs, loop, graphs
        self.number = next(_NUMBERS)
        self.cell, self.head = memory.program.cell, Head.of(memory.program.cell)
        self.reports = any(r.printed.reports for r in runs)
        self._refs = [*dict.fromkeys(ref for r in runs for ref in r.printed.refs)]
        weakref.finalize(self, graphs.forget, self.number)

    def bind(self, launch: Launch, arenas: Arenas) -> Callable[[], Sequence[Fetched]]:
        """The launch as a call that gives the flags of its bad rows, if any can be bad."""
        parts = list(pack(self.head, launch, apart=self.looped(launch)))

        def run() -> Sequence[Fetched]:
            found = []
            with current(self.memory.device):
                for part in parts:
                    flags = self.graphs.run(self, part, arenas)
                    if self.reports:
                        found.append(Fetched(flags))
            return found

        return run

    def looped(self, launch: Launch) -> bool:
        """Is it for the persistent kernel?"""
        if self.loop is None or launch.num_steps < 2:
            return False
        most = max((launch.steps[1:] - launch.steps[:-1]).tolist())
        return most <= self.loop.most_rows and apart(self.cell, launch)

    # -- an `Owner` of graphs --

    def form(self, packed: Packed) -> tuple[Hashable, int, int]:
        rows = padded(packed.most_rows)
        return ("loop", rows, 0) if packed.apart else ("steps", rows, bucket(packed.num_steps))

    def addresses(self, arenas: Arenas, num_rows: int) -> tuple[int, ...]:
        self.memory.grow(num_rows)
        return tuple(self.memory.at(ref, arenas).data_ptr() for ref in self._refs)

    def nodes(
        self, form: tuple[Hashable, int, int], arenas: Arenas, ints: torch.Tensor, bad: torch.Tensor
    ) -> Sequence[Callable[[], object]]:
        kind, rows, steps = form
        found: list[Callable[[], object]] = [bad.zero_] if self.reports else []
        if kind == "loop":
            assert self.loop is not None
            return [*found, self._node(self.loop.run, rows, arenas, ints, bad)]
        make = partial(self._node, num_rows=rows, arenas=arenas, ints=ints, bad=bad)
        return [*found, *(make(run, step=step) for step in range(steps) for run in self.runs)]

    def _node(
        self,
        run: Run,
        num_rows: int,
        arenas: Arenas,
        ints: torch.Tensor,
        bad: torch.Tensor,
        step: int | None = None,
    ) -> Node:
        kernel = run.printed
        rows = [self.memory.at(ref, arenas) for ref in kernel.refs]
        args = [ints[self.head.size :], *rows, *[bad] * kernel.reports, ints]
        options = dict(kernel.constants)
        if self.memory.device.type == "cuda":
            options |= compile_options(kernel)
        grid = kernel.grid(num_rows)
        return Node(run.function, grid, (*args, *[step] * (step is not None)), options)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU; its interpreter is numpy."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")
