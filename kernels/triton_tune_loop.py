"""Measures persistent kernels against a kernel a step on the GPU that is here.

Duty: say up to how many rows a step a cell's persistent kernel is faster, and whether its results
are the same, bit for bit: else a row's result would depend on what else is in its launch. Comes in:
a kernel, launches of several steps; goes out: `LoopTimed` choices, best first; `keep_best_loop`
writes the best down for `triton_tuned`. `measure` and `capture` stand for the GPU in tests.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cellc.kernels.triton_backend import TritonKernel
from cellc.kernels.triton_graphs import CAPTURED_AT, Capture, Graphs, captured
from cellc.kernels.triton_tiles import PrintedKernel
from cellc.kernels.triton_tuned import Looped, keep_loop
from cellc.launch import Launch
from cellc.ops import RowType

FASTER = 0.97  # of the time of a kernel a step: less is noise
ANY_ROWS = 1 << 30

Arenas = Mapping[RowType, torch.Tensor]


@dataclass(frozen=True)
class LoopTimed:
    """Seconds of a launch at each number of rows a step, beside `single` of a kernel a step.
    `refusal`: why there are none.
    """

    kernel: PrintedKernel
    seconds: Mapping[int, float] = field(default_factory=dict)
    single: Mapping[int, float] = field(default_factory=dict)
    refusal: str = ""

    @property
    def most_rows(self) -> int:
        """It is faster with so many rows a step, and with fewer; 0 if it is not."""
        most = 0
        for rows in sorted(self.seconds):
            if self.seconds[rows] > FASTER * self.single[rows]:
                break
            most = rows
        return most

    @property
    def gain(self) -> float:
        """How much faster it is, in logarithms, with all numbers of rows where it is."""
        logs = [math.log(self.single[n] / s) for n, s in self.seconds.items()]
        kept = [x for n, x in zip(self.seconds, logs, strict=True) if n <= self.most_rows]
        return sum(kept)


def on_device(run: Callable[[], object], times: int = 9) -> float:
    """The median time on the device of a call."""
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(True) for _ in "ab")  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(found))


def tune_loop(
    kernel: TritonKernel,
    launches: Sequence[Launch],
    arenas: Arenas,
    shared_bytes: int,
    measure: Callable[[Callable[[], object]], float] = on_device,
    capture: Capture = captured,
) -> list[LoopTimed]:
    """Every choice of the persistent kernel, best first; none where there is no such kernel. The
    launches overwrite their outputs.
    """
    if kernel.persistent is None:
        return []
    kept = {kind: arenas[kind].clone() for kind in dict.fromkeys(kernel.program.cell.output_types)}

    def ran(launch: Launch, loop: PrintedKernel | None) -> tuple[float, list[torch.Tensor]]:
        """Seconds, and what the first run wrote."""
        for kind, rows in kept.items():
            arenas[kind].copy_(rows)
        chosen = None if loop is None else (loop, ANY_ROWS)
        launched = kernel.launched(Graphs(kernel.device, capture), chosen)
        run = launched.bind(launch, arenas)
        run()
        if loop is not None and not launched.looped(launch):
            raise ValueError("rows of the launch read what other positions wrote")
        wrote = [arenas[kind].clone() for kind in kept]
        for _ in range(CAPTURED_AT):
            run()
        return measure(run), wrote

    singles = [ran(launch, None) for launch in launches]
    sizes = [int(launch.steps[1]) for launch in launches]
    single = {n: seconds for n, (seconds, _) in zip(sizes, singles, strict=True)}
    found = []
    for choice in kernel.persistent.choices(shared_bytes):
        seconds, refusal = dict[int, float](), ""
        for n, launch, (_, want) in zip(sizes, launches, singles, strict=True):
            try:
                seconds[n], got = ran(launch, choice)
            except Exception as error:  # out of resources, in the driver's words
                refusal = repr(error)
                break
            if not all(map(torch.equal, got, want)):
                refusal = f"its results differ from those of a kernel a step at {n} rows"
                break
        found.append(LoopTimed(choice, {} if refusal else seconds, single, refusal))
    return sorted(found, key=lambda t: (-t.most_rows, -t.gain))


def keep_best_loop(kernel: TritonKernel, found: Sequence[LoopTimed], device: str) -> Looped | None:
    """Write down what was found for a device: the best choice, or that none is faster."""
    assert kernel.persistent is not None
    best = next((t for t in found if t.most_rows), None)
    chosen = None
    if best is not None:
        chosen = Looped(best.kernel.constants["BM"], best.kernel.num_warps, best.most_rows)
    keep_loop(device, kernel.persistent, chosen)
    return chosen
