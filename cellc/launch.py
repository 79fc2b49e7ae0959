"""Launches: what the engine hands to a kernel, and what it expects of one.

Duty: the one interface between runtime and kernels. A launch is one cell, N rows in K steps, with
index tables into the arenas. Rows of one step are independent of each other; a later step may read
what an earlier one wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cellc.cells import Cell
from cellc.ops import RowType

if TYPE_CHECKING:
    import torch

Index = npt.NDArray[np.int32]


class Crew(NamedTuple):
    """Who runs launches on a CPU: `team`s run theirs side by side, on at most so many threads each
    (None: torch's number).
    """

    team: int = 0
    threads: int | None = None


EVERYBODY = Crew()


@dataclass(frozen=True)
class Ragged:
    """A variable-length vector of rows a call: call j reads slots[offsets[j]:offsets[j + 1]]."""

    offsets: Index  # [N + 1]
    slots: Index  # [offsets[-1]]


@dataclass(frozen=True)
class Launch:
    """N rows of one cell in K steps: step k is rows steps[k]:steps[k + 1]; slots are arena rows.
    `table`: inputs and outputs as one array, where they are the rows of one, and nothing is ragged.
    """

    steps: Index  # [K + 1], steps[0] == 0, steps[K] == N
    inputs: Sequence[Index | Ragged]  # one a cell input; Index is [N]
    outputs: Index  # [number of cell outputs, N]
    crew: Crew = EVERYBODY
    table: Index | None = None

    @property
    def num_rows(self) -> int:
        return int(self.steps[-1])

    @property
    def num_steps(self) -> int:
        return len(self.steps) - 1


class Invalid(list[int]):
    """Positions of invalid rows; `errors`: what was raised for some of them."""

    def __init__(self, positions: Iterable[int], errors: Mapping[int, Exception]) -> None:
        super().__init__(positions)
        self.errors = errors


class Kernel(Protocol):
    """A compiled cell. Calling it runs a launch to completion (CPU) or submits it (GPU).

    Returns the positions of rows in the launch whose data was invalid (an index outside its table,
    or, in an `Invalid`, what an operation of torch refuses), usually empty; such rows hold
    unspecified values, all other rows are right.
    """

    source: str

    def __call__(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Sequence[int]: ...


@runtime_checkable
class Bindable(Protocol):
    """A kernel that can prepare a launch once and run it many times, while arenas stay where they
    are.
    """

    def bind(
        self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]
    ) -> Callable[[], Sequence[int]]: ...


class Prepared(Protocol):
    """A launch that other threads may run while the caller does something else: begun, then ended,
    as often as wanted. Meanwhile its rows belong to it, and no arena may grow.
    """

    def begin(self) -> None: ...

    def end(self) -> tuple[Sequence[int], float]:
        """Run what is left of it; (invalid rows, seconds since it began). Nothing, if it did not
        begin.
        """
        ...


@runtime_checkable
class Concurrent(Protocol):
    """A kernel of such launches."""

    def prepare(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Prepared: ...


class Backend(Protocol):
    """Makes kernels. `params` maps a cell's parameter names to tensors on the backend's device,
    contiguous.
    """

    name: str

    def kernel(self, cell: Cell, params: Mapping[str, torch.Tensor]) -> Kernel: ...
