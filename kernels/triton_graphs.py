"""CUDA graphs of launches: many kernels replayed by one call.

Duty: run the steps of a launch as one graph that was captured for as many rows and steps or more,
from index tables that are copied to where the graph expects them. Comes in: an `Owner` of kernels,
a `Packed` launch; goes out: rows in the arenas. What cannot be captured runs kernel by kernel.
Graphs hold addresses: one whose arenas, weights or scratch rows moved is captured again. Nothing in
here needs a GPU but `captured`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cellc import log
from cellc.kernels.triton_staging import Staging
from cellc.kernels.triton_steps import Packed
from cellc.kernels.triton_tiles import padded
from cellc.ops import RowType

MAX_GRAPHS = 128  # of one backend
FIRST_INTS = 1 << 15
CAPTURED_AT = 2  # uses: what comes once is not worth a graph

Arenas = Mapping[RowType, torch.Tensor]


@dataclass(frozen=True)
class Node:
    """One kernel on memory that does not move."""

    function: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    options: Mapping[str, int]

    def __call__(self) -> None:
        self.function[self.grid](*self.args, **self.options)


Capture = Callable[[Sequence[Callable[[], object]]], Callable[[], object]]
"""What makes a replay of calls."""


class Owner(Protocol):
    """Kernels of a cell, with their weights and scratch rows."""

    number: int

    def form(self, packed: Packed) -> tuple[Hashable, int, int]:
        """How it runs a part, for how many rows a step, and for how many steps."""
        ...

    def addresses(self, arenas: Arenas, num_rows: int) -> tuple[int, ...]:
        """Of all memory that kernels are given; scratch rows grow to as many as asked for."""
        ...

    def nodes(
        self, form: tuple[Hashable, int, int], arenas: Arenas, ints: torch.Tensor, bad: torch.Tensor
    ) -> Sequence[Callable[[], object]]:
        """The kernels that run a part of that form."""
        ...


@dataclass
class _Entry:
    addresses: tuple[int, ...]
    uses: int = 0
    replay: Callable[[], object] | None = None


class Graphs:
    """The graphs of one backend; the least recently used are dropped."""

    def __init__(
        self, device: torch.device, capture: Capture | None, most: int = MAX_GRAPHS
    ) -> None:
        self.device, self.most, self._capture = device, most, capture
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._staging = Staging(device)
        self._ints = torch.zeros(FIRST_INTS, dtype=torch.int32, device=device)
        self._bad = torch.zeros(FIRST_INTS, dtype=torch.int32, device=device)
        self.captures = self.replays = 0

    def __len__(self) -> int:
        return sum(e.replay is not None for e in self._entries.values())

    def run(self, owner: Owner, packed: Packed, arenas: Arenas) -> torch.Tensor:
        """Run a part of a launch; returns the flags of its bad rows, good until the next."""
        self._reserve(len(packed.ints), packed.num_rows)
        form = owner.form(packed)
        entry = self._entry(owner, form, owner.addresses(arenas, form[1]))
        self._staging.send(packed.ints, self._ints)
        if entry.replay is None:
            nodes = owner.nodes(form, arenas, self._ints, self._bad)
            if entry.uses >= CAPTURED_AT and self._capture is not None:
                entry.replay = self._captured(nodes)
        if entry.replay is not None:
            self.replays += 1
            entry.replay()
        else:
            for node in nodes:
                node()
        return self._bad[: packed.num_rows]

    def forget(self, number: int) -> None:
        """An owner is gone."""
        for key in [k for k in self._entries if k[0] == number]:  # type: ignore[index]
            del self._entries[key]

    def _entry(
        self, owner: Owner, form: tuple[Hashable, int, int], addresses: tuple[int, ...]
    ) -> _Entry:
        """What is known of launches of a form, or a new one where memory moved."""
        key = (owner.number, *form)
        entry = self._entries.pop(key, None)
        if entry is None or entry.addresses != addresses:
            entry = _Entry(addresses)
        self._entries[key] = entry
        entry.uses += 1
        while len(self._entries) > self.most:
            self._entries.popitem(last=False)
        return entry

    def _captured(self, nodes: Sequence[Callable[[], object]]) -> Callable[[], object] | None:
        """A replay; None, from now on for all, where capturing fails."""
        assert self._capture is not None
        try:
            replay = self._capture(nodes)
        except Exception as error:  # in the driver's words
            log.info("kernel", f"launches are not captured as graphs: {error!r}")
            self._capture = None
            return None
        self.captures += 1
        return replay

    def _reserve(self, num_ints: int, num_rows: int) -> None:
        """Room for a part; graphs of smaller rooms are dropped."""
        if num_ints <= len(self._ints) and num_rows <= len(self._bad):
            return
        self._entries.clear()
        if num_ints > len(self._ints):
            self._ints = self._ints.new_zeros(padded(num_ints))
        if num_rows > len(self._bad):
            self._bad = self._bad.new_zeros(padded(num_rows))


def bucket(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, .. that is not less.

    >>> [bucket(n) for n in (1, 3, 5, 9, 13, 24, 25, 64)]
    [1, 3, 6, 12, 16, 24, 32, 64]
    """
    power = padded(count)
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def captured(nodes: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The calls as a CUDA graph on the current device; each must have run before, so that nothing
    is compiled or allocated meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for node in nodes:
                node()
        finally:
            graph.capture_end()
    return graph.replay
