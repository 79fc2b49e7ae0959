"""What launches cost in a simulation: curves of cells, and the host's part.

Duty: seconds of launches from curves that were measured here, or that follow from a data sheet.
Comes in: cells by number; goes out: `CostTable`, to `cellc.simulation.servers`. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellc.cells import Cell
from cellc.costs import Curve
from cellc.kernels.triton_devices import DEVICES, V100, Device, roofline

GPUS: Mapping[str, Device] = {"v100": V100, "h100": DEVICES["cuda:90"]}
EFFICIENCY = 0.6  # of a data sheet's f32 that cellc's LSTM of 1,024 units reaches (docs/gpu.md)
STEP = 4.6e-6  # the least step that docs/gpu.md has, of kernels that run one after the other
POINTS = tuple(1 << k for k in range(17))


@dataclass(frozen=True)
class Host:
    """Seconds of the host, kernels aside: of every launch, of every request, and until it begins
    where it had nothing to do. `slowdown`: what kernels take longer than curves say, as a share.
    `beside`: what they lose to each request that comes meanwhile, as its thread takes a processor
    from them. `spread`: what turns took beyond all that, in the order they were seen: what disturbs
    one lasts. `lag`: until the engine has a request that is due, as often one as another.
    """

    turn: float
    request: float
    wake: float = 0.0
    slowdown: float = 0.0
    beside: float = 0.0
    spread: tuple[float, ...] = ()
    lag: tuple[float, ...] = ()


GIVEN = Host(turn=50e-6, request=45e-6)  # of GPUs, unless said: docs/gpu.md, docs/benchmarks.md


class CostTable:
    """Seconds of launches, by the cell's number."""

    def __init__(self, curves: Mapping[int, Curve], host: Host, max_batch: int) -> None:
        self.host, self.curves = host, curves
        rows = range(1, max_batch + 1)
        self._steps = {k: np.array([0.0, *map(c, rows)]) for k, c in curves.items()}
        self._fast = {k: seconds.tolist() for k, seconds in self._steps.items()}

    def step(self, cell: int, num_rows: int) -> float:
        """Seconds of one step of up to `max_batch` rows."""
        seconds: float = self._fast[cell][num_rows]
        return seconds

    def launch(self, cell: int, sizes: npt.NDArray[np.integer]) -> float:
        """Seconds of a launch, from the rows of each of its steps."""
        seconds = self._fast[cell]
        if len(sizes) < 8:
            total = float(sum(seconds[n] for n in sizes.tolist()))
        else:
            total = float(self._steps[cell][sizes].sum())
        return (self.curves[cell].launch + total) * (1 + self.host.slowdown)


def roofline_curves(
    cells: Sequence[Cell], device: Device, efficiency: float = EFFICIENCY
) -> dict[int, Curve]:
    """Every step is a kernel of its own: what starting it takes, then its bytes and arithmetic at a
    share of the data sheet's best.
    """
    return {
        number: Curve(
            POINTS,
            tuple(STEP + roofline(cell, device, n).seconds / efficiency for n in POINTS),
        )
        for number, cell in enumerate(cells)
    }
