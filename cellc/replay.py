"""Replays: the launches of a request that ran alone, ready to run again.

Duty: a lone request should pay for its kernels, not for scheduling. When the engine has nothing
else, regions always start at the same place, so that launches recorded once for a plan are good for
every lone request of that plan. Used by the engine, which drops all of them when arenas grow or
weights change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cellc.cells import Cell
from cellc.launch import Bindable, Kernel, Launch
from cellc.ops import RowType

if TYPE_CHECKING:
    import torch

    from cellc.legs import Entry

MAX_REPLAYS = 512
MAX_LAUNCHES = 64


@dataclass(frozen=True)
class Bound:
    """One launch that can run again."""

    run: Callable[[], Sequence[int]]
    cell: Cell | None
    rows: int
    steps: int

    @classmethod
    def of(cls, kernel: Kernel, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Bound:
        cell = getattr(kernel, "cell", None)
        if isinstance(kernel, Bindable):
            run = kernel.bind(launch, arenas)
        else:
            run = _Call(kernel, launch, arenas)
        return cls(run, cell, launch.num_rows, launch.num_steps)


@dataclass(frozen=True)
class _Call:
    kernel: Kernel
    launch: Launch
    arenas: Mapping[RowType, torch.Tensor]

    def __call__(self) -> Sequence[int]:
        return self.kernel(self.launch, self.arenas)


class Replays:
    """Recorded launches by plan; the least recently used are dropped."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[Entry, int, Sequence[Bound]]] = OrderedDict()

    def get(self, entry: Entry, generation: int) -> Sequence[Bound] | None:
        found = self._kept.get(id(entry))
        if found is None or found[1] != generation:
            return None
        self._kept.move_to_end(id(entry))
        return found[2]

    def put(self, entry: Entry, generation: int, launches: Sequence[Bound]) -> None:
        if len(launches) > MAX_LAUNCHES:
            return
        self._kept[id(entry)] = (entry, generation, launches)
        if len(self._kept) > MAX_REPLAYS:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()
