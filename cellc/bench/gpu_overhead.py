"""What a launch costs the host, kernel by kernel, as a graph, and as one persistent kernel.

Duty: run one cell's launch of B rows and K steps each way. Comes in: a clock, a kernel with a
launch that was recorded; goes out: microseconds until the call returns, and until the device is
done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cellc.bench.gpu_clock import Clock
from cellc.kernels.triton_backend import TritonKernel
from cellc.kernels.triton_graphs import CAPTURED_AT, Graphs
from cellc.launch import Index, Launch, Ragged
from cellc.ops import RowType

Arenas = Mapping[RowType, Tensor]


def overheads(
    clock: Clock, kernel: TritonKernel, launch: Launch, arenas: Arenas, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a way and number of steps."""
    rows = []
    for steps in dict.fromkeys(min(k, launch.num_steps) for k in counts):
        part = first_steps(launch, steps)
        for way, bind in _ways(clock, kernel, part).items():
            run = bind(part, arenas)
            for _ in range(CAPTURED_AT + 1):
                run()
            submitted, done = clock.host_seconds(lambda: bind(part, arenas)())  # noqa: B023
            rows.append(
                {
                    "kernel": kernel.program.cell.name, "B": int(part.steps[1]), "K": steps,
                    "way": way, "host_us": submitted * 1e6, "done_us": done * 1e6,
                }
            )  # fmt: skip
    return rows


def _ways(
    clock: Clock, kernel: TritonKernel, launch: Launch
) -> dict[str, Callable[[Launch, Arenas], Callable[[], object]]]:
    graphed = kernel.launched(Graphs(kernel.device, clock.capture))
    found: dict[str, Callable[[Launch, Arenas], Callable[[], object]]] = {
        "kernel by kernel": kernel.plain,
        "graph": graphed.bind,
    }
    if kernel.persistent is not None:
        choices = list(kernel.persistent.choices(clock.shared_bytes))
        for choice in choices[:1]:
            loop = kernel.launched(Graphs(kernel.device, clock.capture), (choice, 1 << 30))
            if loop.looped(launch):
                found["persistent, untuned"] = loop.bind
    return found


def first_steps(launch: Launch, count: int) -> Launch:
    """The first steps of a launch."""
    stop = int(launch.steps[count])

    def cut(table: Index | Ragged) -> Index | Ragged:
        if not isinstance(table, Ragged):
            return table[:stop]
        offsets = table.offsets[: stop + 1]
        return Ragged(offsets, table.slots[: offsets[-1]])

    steps = np.ascontiguousarray(launch.steps[: count + 1])
    return Launch(steps, [cut(t) for t in launch.inputs], launch.outputs[:, :stop])
