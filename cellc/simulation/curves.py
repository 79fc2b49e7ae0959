"""What launches cost in a simulation: curves of cells, and the host's part.

Duty: seconds of launches from curves that were measured here, or that follow from a data sheet.
Comes in: cells by number; goes out: `CostTable`, to `cellc.simulation.servers`. No torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellc.cells import Cell
from cellc.costs import Curve
from cellc.kernels.triton_devices import DEVICES, V100, Device, roofline
from cellc.simulation.tape import Tape

GPUS: Mapping[str, Device] = {"v100": V100, "h100": DEVICES["cuda:90"]}
EFFICIENCY = 0.6  # of a data sheet's f32 that cellc's LSTM of 1,024 units reaches (docs/gpu.md)
STEP = 4.6e-6  # the least step that docs/gpu.md has, of kernels that run one after the other
POINTS = tuple(1 << k for k in range(17))
EARLY = 8  # requests that a turn admits, or answers, and that cost more than what follows
AWAKE = 2e-5  # seconds between requests that are sent without sleeping
SPANS = (0.5e-3, 1e-3, 2e-3, 4e-3)  # seconds of turns: costs fit shorter ones otherwise


@dataclass(frozen=True)
class Host:
    """Seconds of the host, kernels aside: of every launch, of every request (half when it is
    admitted, half when it is answered), and until it begins where it had nothing to do; more of
    turns that admit (`admitting`) or answer (`answering`) any, and of the first EARLY that a turn
    admits or answers (`early`). `after`: the share of it that comes when the kernel has run.
    `apart`: the share of their speed that kernels have while the host does something else, as
    launches run beside its work; 0: they do not. `starting`: what such a launch takes more.
    `beside` and `locked`: what kernels and the host lose to each request that is sent meanwhile:
    the thread that sends it takes a processor from the former, Python's lock from the latter, which
    loses `waking` more, and kernels `waking_beside`, where that thread had slept. Then it waits
    before it sends, for Python's lock while the host works (`waits`), for a processor while kernels
    run (`waits_beside`): on average, and as likely to end at any time; who is due goes, too.
    `slower`: how many times as long turns take on the host and in kernels, by what they should
    take (SPANS); `tape`: the same of each that was seen, beyond that. `lag`: until the sending
    thread wakes when a request is due, as often one as another.
    """

    turn: float
    request: float
    wake: float = 0.0
    after: float = 0.0
    beside: float = 0.0
    locked: float = 0.0
    slower: tuple[tuple[float, float], ...] = ((1.0, 1.0),) * (len(SPANS) + 1)
    tape: Tape = Tape()
    lag: tuple[float, ...] = ()
    admitting: float = 0.0
    answering: float = 0.0
    early: float = 0.0
    apart: float = 0.0
    starting: float = 0.0
    waking: float = 0.0
    waking_beside: float = 0.0
    waits: float = 0.0
    waits_beside: float = 0.0

    def to_admit(self, count: int) -> float:
        """So many requests in a turn."""
        return bool(count) * self.admitting + self._half(count)

    def to_answer(self, count: int) -> float:
        """Likewise."""
        return bool(count) * self.answering + self._half(count)

    def _half(self, count: int) -> float:
        return count / 2 * self.request + min(count, EARLY) / 2 * self.early

    @property
    def sending(self) -> float:
        """What a turn loses to a request that is sent meanwhile."""
        return self.beside + self.locked


GIVEN = Host(turn=50e-6, request=45e-6)  # of GPUs, unless said: docs/gpu.md, docs/benchmarks.md


class CostTable:
    """Seconds of launches, by the cell's number."""

    def __init__(self, curves: Mapping[int, Curve], host: Host, max_batch: int) -> None:
        self.host, self.curves = host, curves
        rows = range(1, max_batch + 1)
        self._steps = {k: np.array([0.0, *map(c, rows)]) for k, c in curves.items()}
        self._fast = {k: seconds.tolist() for k, seconds in self._steps.items()}

    def with_host(self, host: Host) -> CostTable:
        """The same launches, another host."""
        table = copy.copy(self)
        table.host = host
        return table

    def step(self, cell: int, num_rows: int) -> float:
        """Seconds of one step of up to `max_batch` rows."""
        seconds: float = self._fast[cell][num_rows]
        return seconds

    def steps(self, cell: int, sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Seconds of each step, from its rows."""
        seconds: npt.NDArray[np.float64] = self._steps[cell][sizes]
        return seconds

    def launch(self, cell: int, sizes: npt.NDArray[np.integer]) -> float:
        """Seconds of a launch, from the rows of each of its steps."""
        seconds = self._fast[cell]
        if len(sizes) < 8:
            total = float(sum(seconds[n] for n in sizes.tolist()))
        else:
            total = float(self._steps[cell][sizes].sum())
        return self.curves[cell].launch + total


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
