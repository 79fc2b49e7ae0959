"""Tunes the kernels of the GPU benchmark: tiles, then persistent kernels, and keeps the best.

Duty: give `triton_tune` and `triton_tune_loop` the launches of a `Work` at several batch sizes, and
print what they found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from cellc.bench.gpu_clock import Clock
from cellc.bench.gpu_launches import compiling, joined, recorded
from cellc.bench.gpu_work import Work
from cellc.kernels.triton_backend import TritonKernel
from cellc.kernels.triton_tune import keep_best, tune
from cellc.kernels.triton_tune_loop import keep_best_loop, tune_loop
from cellc.launch import Launch


def tune_work(console: Console, clock: Clock, work: Work, name: str) -> None:
    """Measure tiles of a model's kernels, then its persistent kernels, and keep the best."""
    for persistent in (False, True):
        found: dict[int, tuple[TritonKernel, list[Launch]]] = {}
        with compiling(clock, work, 512, name) as compiled:  # with what was kept before
            for B in (1, 8, 64, 256, 512):
                requests = work.requests(work.batch(B))
                compiled.map(requests)
                for _, kernel, launch in joined(recorded(compiled, requests)):
                    if isinstance(kernel, TritonKernel):
                        kept = found.setdefault(id(kernel), (kernel, []))[1]
                        if all(int(k.steps[1]) != int(launch.steps[1]) for k in kept):
                            kept.append(launch)
            arenas = compiled._engine._arenas
            for kernel, given in found.values():
                if persistent:
                    _tune_loop(console, clock, kernel, given, arenas)
                else:
                    _tune_tiles(console, kernel, given, arenas, name)


def _tune_tiles(
    console: Console, kernel: TritonKernel, given: Sequence[Launch], arenas: Any, name: str
) -> None:
    start = time.perf_counter()
    large = [launch for launch in given if int(launch.steps[1]) >= 64] or given
    timed = tune(kernel, large, arenas)
    keep_best(kernel, timed)
    for choices in timed:
        took = time.perf_counter() - start
        console.print(f"{choices[0].kernel.name} {name}: {len(choices)} in {took:.0f} s")
        refused = [t for t in choices if t.refusal]
        for t in refused[:1]:
            console.print(f"  {len(refused)} refused, as {t.tiles}: {t.refusal[:200]}")
        for t in choices[:4]:
            us = {n: f"{s * 1e6:.1f} us" for n, s in t.seconds.items()}
            console.print(f"  {t.tiles} {us}")


def _tune_loop(
    console: Console, clock: Clock, kernel: TritonKernel, given: Sequence[Launch], arenas: Any
) -> None:
    several = [launch for launch in given if launch.num_steps > 1]
    if kernel.persistent is None or not several:
        return
    found = tune_loop(kernel, several, arenas, clock.shared_bytes, clock.seconds, clock.capture)
    chosen = keep_best_loop(kernel, found, clock.name)
    console.print(f"{kernel.persistent.kernel.name}: {chosen or 'a kernel a step is faster'}")
    for t in found:
        sizes = f"BM={t.kernel.constants['BM']} num_warps={t.kernel.num_warps}"
        us = {n: f"{s * 1e6:.1f} of {t.single[n] * 1e6:.1f} us" for n, s in t.seconds.items()}
        console.print(f"  {sizes} {t.refusal[:200] or us}")
