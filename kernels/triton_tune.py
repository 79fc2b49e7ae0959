"""Measures tiles of generated Triton kernels on the GPU that is here.

Duty: for each kernel with products, compile every choice of its `Space` side by side, time each
from a CUDA graph at a few numbers of rows, and say which is best over all of them: tiles do not
depend on the number of rows, so that no row's result does. Comes in: a kernel and launches of it;
goes out: `Timed` choices, best first; `keep_best` writes them down for `triton_tuned`.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from cellc.kernels.triton_backend import TritonKernel, compile_options
from cellc.kernels.triton_tiles import PrintedKernel, Tiles
from cellc.kernels.triton_tuned import keep, key_of
from cellc.launch import Launch
from cellc.ops import RowType

REPEATS = 20  # of a kernel in one graph


@dataclass(frozen=True)
class Timed:
    """Seconds of one run at each number of rows; `cost` is their geometric mean."""

    kernel: PrintedKernel
    tiles: Tiles
    seconds: Mapping[int, float]

    @property
    def cost(self) -> float:
        return math.exp(statistics.mean(math.log(s) for s in self.seconds.values()))


def tune(
    kernel: TritonKernel,
    launches: Sequence[Launch],
    arenas: Mapping[RowType, torch.Tensor],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[Timed]]:
    """Every choice for every kernel with products of a cell, best first; the first step of each
    launch is what is timed. The launches overwrite their outputs.
    """
    properties: Any = torch.cuda.get_device_properties(kernel.device)
    found = []
    for i, printed in enumerate(kernel.kernels):
        if printed.space is None:
            continue
        runs = [_Run(kernel, i, launch, arenas) for launch in launches]
        choices = list(printed.space.choices(properties.shared_memory_per_block_optin))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            built = list(pool.map(runs[0].compiles, choices))
        timed = []
        for done, (tiles, fits) in enumerate(zip(choices, built, strict=True)):
            progress(done, len(choices))
            if fits:
                seconds = {run.num_rows: run.seconds(tiles) for run in runs}
                timed.append(Timed(printed, tiles, seconds))
        found.append(sorted(timed, key=lambda t: t.cost))
    return found


def keep_best(kernel: TritonKernel, found: Sequence[Sequence[Timed]]) -> None:
    """Write the best of each down for this device."""
    best = {key_of(kernel.source, f[0].kernel): f[0].tiles for f in found if f}
    keep(torch.cuda.get_device_name(kernel.device), best)


class _Run:
    """The first step of a launch by one of the cell's kernels."""

    def __init__(
        self,
        kernel: TritonKernel,
        index: int,
        launch: Launch,
        arenas: Mapping[RowType, torch.Tensor],
    ) -> None:
        self.num_rows = int(launch.steps[1])
        self._printed, self._function = kernel.kernels[index], kernel.functions[index]
        kernel(launch, arenas)  # fills what later kernels of the cell read
        tables, bases = kernel._upload(launch)
        bad = torch.zeros(launch.num_rows, dtype=torch.int32, device=kernel.device)
        ragged = [base for ref in self._printed.ragged for base in bases[ref]]
        self._args = [
            *kernel._arguments(self._printed, arenas, tables, bad),
            *(0, self.num_rows, launch.num_rows),
            *ragged,
        ]

    def compiles(self, tiles: Tiles) -> bool:
        """Whether the compiler takes it."""
        try:
            self._launch(tiles, self._function.warmup)
        except Exception:  # out of shared memory or registers, in the compiler's own words
            return False
        return True

    def _launch(self, tiles: Tiles, run: Callable[..., Any]) -> None:
        chosen = self._printed.tiled(tiles)
        grid = chosen.grid(self.num_rows)
        run(*self._args, grid=grid, **chosen.constants, **compile_options(chosen))

    def seconds(self, tiles: Tiles) -> float:
        """The median of a few replays; infinite where it does not run."""
        chosen = self._printed.tiled(tiles)
        options, grid = compile_options(chosen), chosen.grid(self.num_rows)

        def run() -> None:
            self._function[grid](*self._args, **chosen.constants, **options)

        try:
            run()
            torch.cuda.synchronize()
        except Exception:  # out of resources
            return math.inf
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                run()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(True) for _ in "ab")  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / REPEATS)
        return float(statistics.median(times))
