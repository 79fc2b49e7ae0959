"""Tuning: each cell's kernel measured at many numbers of rows, and kept for the scheduler.

Duty: run example requests to get rows of every cell; on a GPU, measure tiles of kernels with
products and keep the best; then time launches of one step and of a few at every batch size, in
alternated rounds, and keep the curves. Comes in: a model, requests, a backend; goes out: `Tuned`
cells, to `cellc.tune_command`; curves go to `cellc.costs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cellc import costs
from cellc.bench.measure import Patience, Round, alternate, medians, noise, repeat_for
from cellc.cells import Cell
from cellc.checking import Step, silent
from cellc.costs import Curve, Place
from cellc.entry import make_backend
from cellc.errors import BackendError, UnsupportedError
from cellc.kernels.eager import EagerKernel
from cellc.launch import Backend, Bindable, Kernel
from cellc.machines import place
from cellc.modules import named_tensors
from cellc.options import BackendName, Options
from cellc.samples import Sample, collect, narrowed, part

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEPS = 4  # of the longer of two launches: their difference tells steps from the launch
ROUNDS, MOST_ROUNDS = 3, 6
TILE_ROWS = (64, 256, 512)  # that tiles are measured at
LOOP_ROWS, LOOP_STEPS = (1, 8, 64, 256, 512), 16  # that persistent kernels are


@dataclass(frozen=True)
class Tuned:
    """One cell; `left`: why it was not measured. `choices`: of each kernel with products, how many
    tiles were tried, and the best; `disturbed`: the share of the machine that others took, if any
    did in a kept round.
    """

    cell: Cell
    curve: Curve | None = None
    left: str = ""
    choices: Sequence[tuple[str, int, str]] = ()
    disturbed: float | None = None


@dataclass
class Tuning:
    """What was measured at one place, and the file that it is kept in."""

    place: Place
    cells: list[Tuned] = field(default_factory=list)
    path: str = ""


def tune(
    model: Any,
    requests: Sequence[Any],
    backend: BackendName = "auto",
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seconds: float = 0.02,
    tiles: bool = True,
    step: Step = silent,
) -> Tuning:
    """Measure every cell that example requests show, and keep the curves.

    seconds: of each launch in a round. tiles: measure kernel configurations first, where the
    backend has some (Triton on a GPU). Raises BackendError for a backend that cannot run here.
    """
    device = next((t.device for t in named_tensors(model).values()), torch.device("cpu"))
    maker = make_backend(backend, device, Options())
    try:
        with step("rows of cells", 1):
            samples = collect(model, requests)
        tuning = Tuning(place(maker.name, device))
        with step(f"cells by {maker.name}", len(samples)) as done:
            for sample in samples:
                tuning.cells.append(_tuned(sample, maker, batch_sizes, seconds, tiles))
                done()
    finally:
        if hasattr(maker, "close"):
            maker.close()
    found = {one.cell.key: one.curve for one in tuning.cells if one.curve is not None}
    try:
        tuning.path = str(costs.keep(tuning.place, found))
    except OSError as error:
        raise BackendError(
            f"cannot keep curves ({error}); set CELLC_CACHE to a folder that can be written",
            backend=maker.name,
        ) from error
    return tuning


def _tuned(
    sample: Sample, maker: Backend, batch_sizes: Sequence[int], seconds: float, tiles: bool
) -> Tuned:
    try:
        kernel = maker.kernel(sample.cell, sample.params)
    except UnsupportedError as error:
        return Tuned(sample.cell, left=str(error))
    if isinstance(kernel, EagerKernel) and maker.name != "eager":
        return Tuned(
            sample.cell, left=f"{maker.name} writes no kernel for it: it runs through torch"
        )
    choices: list[tuple[str, int, str]] = []
    for measured in (_best_tiles, _best_loop) if tiles else ():
        found = list(measured(sample, kernel))
        if found:
            kernel = maker.kernel(sample.cell, sample.params)  # with what was kept
        choices += found
    curve, disturbed = measure(sample, kernel, batch_sizes, seconds)
    return Tuned(sample.cell, curve, choices=choices, disturbed=disturbed)


# -- curves ----------------------------------------------------------------------------------------


def measure(
    sample: Sample, kernel: Kernel, batch_sizes: Sequence[int], seconds: float
) -> tuple[Curve, float | None]:
    """A cell's curve; and what others took of the machine meanwhile."""
    sizes = sorted(set(batch_sizes))
    points = [(n, steps) for n in sizes for steps in (1, STEPS)]
    works = [repeat_for(_launch(sample, kernel, n, steps), seconds) for n, steps in points]
    rounds: list[Round[float]] = alternate(works, ROUNDS, MOST_ROUNDS, Patience(5.0))
    took = dict(zip(points, medians(rounds), strict=True))
    steps = [_a_step(took[n, 1], took[n, STEPS]) for n in sizes]
    rest = sorted(took[n, 1] - s for n, s in zip(sizes, steps, strict=True))
    return Curve(tuple(sizes), tuple(steps), max(0.0, rest[len(rest) // 2])), noise(rounds)


def _a_step(one: float, several: float) -> float:
    """Seconds of a step, from launches of one and of several; of the shorter, where noise makes a
    longer one look as fast.
    """
    step = (several - one) / (STEPS - 1)
    return min(one, step) if step > 0.05 * one else one


def _launch(sample: Sample, kernel: Kernel, num_rows: int, num_steps: int) -> Callable[[], object]:
    """A launch to run again and again, until the device is done."""
    launch, arenas = sample.launch(num_rows, num_steps)
    if isinstance(kernel, Bindable):
        run: Callable[[], object] = kernel.bind(launch, arenas)
    else:
        run = partial(kernel, launch, arenas)
    waits = any(t.is_cuda for t in arenas.values())

    def done(held: object = arenas) -> None:  # a bound launch has addresses only
        run()
        if waits:
            torch.cuda.synchronize()

    return done


# -- kernel configurations -------------------------------------------------------------------------


def _best_tiles(sample: Sample, kernel: Kernel) -> Iterator[tuple[str, int, str]]:
    """Measure the tiles of each kernel with products of a cell on a GPU, and keep the best."""
    from cellc.kernels.triton_backend import TritonKernel

    if not isinstance(kernel, TritonKernel) or kernel.interpreted:
        return
    from cellc.kernels.triton_tune import keep_best
    from cellc.kernels.triton_tune import tune as tune_tiles

    launch, arenas = sample.launch(max(TILE_ROWS))
    parts = [part(launch, 0, n) for n in TILE_ROWS]
    found = tune_tiles(kernel, parts, arenas)
    keep_best(kernel, found)
    for choices in found:
        best = choices[0]
        yield best.kernel.name, len(choices), str(best.tiles)


def _best_loop(sample: Sample, kernel: Kernel) -> Iterator[tuple[str, int, str]]:
    """Measure the persistent kernel of a cell against a kernel a step, and keep which is faster."""
    from cellc.kernels.triton_backend import TritonKernel

    if not isinstance(kernel, TritonKernel) or kernel.interpreted or kernel.persistent is None:
        return
    from cellc.kernels.triton_tune_loop import keep_best_loop, tune_loop

    launch, arenas = sample.launch(max(LOOP_ROWS), LOOP_STEPS)
    properties: Any = torch.cuda.get_device_properties(kernel.device)
    shared = properties.shared_memory_per_block_optin
    found = tune_loop(kernel, [narrowed(launch, n) for n in LOOP_ROWS], arenas, shared)
    chosen = keep_best_loop(kernel, found, torch.cuda.get_device_name(kernel.device))
    yield kernel.persistent.kernel.name, len(found), str(chosen or "a kernel a step")
