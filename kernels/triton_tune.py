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

from cellc.kernels.triton_backend import TritonKernel
from cellc.kernels.triton_tiles import PrintedKernel, Tiles, compile_options
from cellc.kernels.triton_tuned import keep, key_of
from cellc.launch import Launch
from cellc.ops import RowType

REPEATS = 20  # of a kernel in one graph


@dataclass(frozen=True)
class Timed:
    """Seconds of one run at each number of rows; `cost` is their geometric mean. `refusal`: why
    there are none.
    """

    kernel: PrintedKernel
    tiles: Tiles
    seconds: Mapping[int, float]
    refusal: str = ""

    @property
    def cost(self) -> float:
        if self.refusal:
            return math.inf
        return math.exp(statistics.mean(math.log(s) for s in self.seconds.values()))


def tune(
    kernel: TritonKernel,
    launches: Sequence[Launch],
    arenas: Mapping[RowType, torch.Tensor],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[Timed]]:
    """Every choice for every kernel with products of a cell, the one in use among them, best first;
    the first step of each launch is what is timed. The launches overwrite their outputs.
    """
    properties: Any = torch.cuda.get_device_properties(kernel.device)
    found = []
    for i, printed in enumerate(kernel.kernels):
        if printed.space is None:
            continue
        runs = [_Run(kernel, i, launch, arenas) for launch in launches]
        fits = printed.space.choices(properties.shared_memory_per_block_optin)
        choices = list(dict.fromkeys([printed.tiles, *fits]))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            refusals = list(pool.map(runs[0].refusal, choices))
        timed = []
        for done, (tiles, refusal) in enumerate(zip(choices, refusals, strict=True)):
            progress(done, len(choices))
            seconds = {run.num_rows: math.inf for run in runs}
            if not refusal:
                try:
                    seconds = {run.num_rows: run.seconds(tiles) for run in runs}
                except Exception as error:  # out of resources, in the driver's words
                    refusal = repr(error)
            timed.append(Timed(printed, tiles, seconds, refusal))
        found.append(sorted(timed, key=lambda t: t.cost))
    return found


def keep_best(kernel: TritonKernel, found: Sequence[Sequence[Timed]]) -> None:
    """Write the best of each down for this device."""
    best = {
        key_of(kernel.source, first.kernel): first.tiles for first, *_ in found if not first.refusal
    }
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

    def refusal(self, tiles: Tiles) -> str:
        """What the compiler says against it, or nothing."""
        try:
            self._launch(tiles, self._function.warmup)
        except Exception as error:  # out of shared memory or registers, in the compiler's words
            return repr(error)
        return ""

    def _launch(self, tiles: Tiles, run: Callable[..., Any]) -> None:
        chosen = self._printed.tiled(tiles)
        grid = chosen.grid(self.num_rows)
        run(*self._args, grid=grid, **chosen.constants, **compile_options(chosen))

    def seconds(self, tiles: Tiles) -> float:
        """The median of a few replays."""
        chosen = self._printed.tiled(tiles)
        options, grid = compile_options(chosen), chosen.grid(self.num_rows)

        def run() -> None:
            self._function[grid](*self._args, **chosen.constants, **options)

        run()
        torch.cuda.synchronize()
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
