"""The launches that the runtime made of some requests, to run again.

Duty: record what cellc launches, and give it back kernel by kernel, joined where launches follow
each other. Used by the GPU benchmark, which times launches without the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellc.bench.gpu_clock import Clock
from cellc.bench.gpu_work import Work
from cellc.cells import Cell
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.kernels.triton_backend import TritonKernel
from cellc.launch import Bindable, Kernel, Launch


class Ran(NamedTuple):
    """One launch that the runtime made."""

    cell: Cell
    kernel: Kernel
    launch: Launch


class Recorded:
    """A kernel that keeps what it was launched with."""

    def __init__(self, cell: Cell, kernel: Kernel, kept: list[Ran]) -> None:
        self.source, self._cell, self._kernel, self._kept = kernel.source, cell, kernel, kept

    def __call__(self, launch: Launch, arenas: Any) -> Sequence[int]:
        self._kept.append(Ran(self._cell, self._kernel, launch))
        return self._kernel(launch, arenas)


def recorded(compiled: Compiled, requests: Sequence[Any]) -> list[Ran]:
    """The launches that these requests need together, in order."""
    kept: list[Ran] = []
    kernels, cells = compiled._compiler.kernels, compiled._compiler.by_number
    plain = dict(kernels)
    kernels.update({k: Recorded(cells[k], v, kept) for k, v in plain.items()})
    compiled._engine._replays.clear()
    compiled.map(requests)
    kernels.update(plain)
    compiled._engine._replays.clear()
    return kept


def again(compiled: Compiled, kept: Sequence[Ran]) -> Callable[[], None]:
    """Those of generated kernels, to run again kernel by kernel: uploaded once."""
    arenas = compiled._engine._arenas
    runs = []
    for _, kernel, launch in kept:
        if isinstance(kernel, TritonKernel):
            runs.append(kernel.plain(launch, arenas))
        elif isinstance(kernel, Bindable):
            runs.append(kernel.bind(launch, arenas))

    def run() -> None:
        for one in runs:
            one()

    return run


def joined(kept: Sequence[Ran]) -> list[Ran]:
    """Launches of one kernel that follow each other as one, where none has ragged inputs."""
    found: list[Ran] = []
    for ran in kept:
        ragged = any(spec.ragged for spec in ran.cell.inputs)
        if ragged or not found or found[-1].kernel is not ran.kernel:
            found.append(ran)
            continue
        before, after = found[-1].launch, ran.launch
        steps = np.concatenate([before.steps, after.steps[1:] + before.num_rows])
        tables: Any = zip(before.inputs, after.inputs, strict=True)
        inputs = [np.concatenate(pair) for pair in tables]
        outputs = np.concatenate([before.outputs, after.outputs], 1)
        found[-1] = Ran(ran.cell, ran.kernel, Launch(steps, inputs, outputs))
    return found


def compiling(clock: Clock, work: Work, max_batch: int, name: str) -> Compiled:
    backend = "auto" if clock.real else "triton"
    options = {"tf32": name == "tf32"}
    return compile(work.model, backend=backend, max_batch=max_batch, options=options)  # type: ignore[arg-type]
