"""Cells of the zoo's models, the rows that they were given, and what their kernels are held to.

Duty: run a zoo model's requests once and keep each of its cells, with rows and with which outputs
its chains feed back; launches on fresh rows, outputs poisoned before; how far a kernel is from the
same cell in float64. No test in here.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cellc
from cellc.cells import Cell
from cellc.dtypes import TORCH_DTYPES
from cellc.kernels.eager import EagerBackend
from cellc.kernels.triton_targets import retyped
from cellc.launch import Kernel, Launch, Ragged
from cellc.ops import RowType
from cellc.samples import Sample, _Recorder, _Recording, copied, outputs

BY_LENGTH = frozenset(["multi_head_attention_decoder", "transformer_greedy"])
"""Models with a cell for every length: their first requests show cells of every kind."""

SMALL = 1e-30  # below it, differences are absolute: chains of products leave f32's range

Feed = Mapping[int, int]


@dataclass
class ZooCell:
    """A cell on rows that a model gave it; `feed`: which output of a step is which input of the
    next.
    """

    sample: Sample
    feed: Feed

    @property
    def cell(self) -> Cell:
        return self.sample.cell


@lru_cache
def cells_of(name: str) -> tuple[ZooCell, ...]:
    """One cell of every form that a model of the zoo has, the largest."""
    zoo = importlib.import_module(f"zoo.{name}")
    recording = _Feeding()
    torch.manual_seed(0)
    with cellc.compile(zoo.make().eval(), backend="eager") as compiled:
        compiled._compiler.store.backend = recording
        requests = zoo.requests()[: 1 if name in BY_LENGTH else None]
        compiled.map([copied(r) for r in requests], return_exceptions=True)
    found: dict[Any, ZooCell] = {}
    for sample in recording.samples.values():
        form = form_of(sample.cell)
        known = found.get(form)
        if sample.num_rows and (
            known is None or known.cell.flops_per_row < sample.cell.flops_per_row
        ):
            found[form] = ZooCell(sample, recording.feeds[sample.cell.key].pairs())
    return tuple(found.values())


def form_of(cell: Cell) -> Any:
    """What it computes, whatever its sizes."""
    return tuple(
        (op.op, op.operands, tuple((len(t.shape), t.dtype) for t in op.types)) for op in cell.ops
    )


# -- which outputs are fed back --------------------------------------------------------------------


@dataclass
class _Feeds:
    """How many rows of an input were, a step before, rows of an output of the same cell."""

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    last: Sequence[np.ndarray] = ()  # slots of each output in the step before

    def look(self, cell: Cell, launch: Launch) -> None:
        for start, stop in zip(launch.steps[:-1], launch.steps[1:], strict=True):
            for o, slots in enumerate(self.last):
                for i, spec in enumerate(cell.inputs):
                    table = launch.inputs[i]
                    if spec.type == cell.output_types[o] and not isinstance(table, Ragged):
                        self.counts[o, i] += int(np.isin(table[start:stop], slots).sum())
            self.last = [row[start:stop] for row in launch.outputs]

    def pairs(self) -> Feed:
        """An input has at most one output, the one that it was most often."""
        found: dict[int, int] = {}
        for (o, i), count in self.counts.most_common():
            if count and o not in found and i not in found.values():
                found[o] = i
        return found


@dataclass
class _Feeding(_Recording):
    feeds: dict[str, _Feeds] = field(default_factory=dict)

    def kernel(self, cell: Cell, params: Mapping[str, Tensor]) -> Any:
        return _Looking(
            super().kernel(cell, params), cell, self.feeds.setdefault(cell.key, _Feeds())
        )


class _Looking:
    backend = "eager"

    def __init__(self, recorder: _Recorder, cell: Cell, feeds: _Feeds) -> None:
        self.source, self._recorder, self._cell, self._feeds = (
            recorder.source,
            recorder,
            cell,
            feeds,
        )

    def __call__(self, launch: Launch, arenas: Mapping[RowType, Tensor]) -> Sequence[int]:
        self._feeds.look(self._cell, launch)
        return self._recorder(launch, arenas)


# -- rows ------------------------------------------------------------------------------------------


def fresh(sample: Sample, seed: int, dtype: str = "f32") -> Sample:
    """The sample's rows, every number of them times one drawn between 0.5 and 1.5, so that what a
    cell relies on stays true (a mask, a divisor, the sign of a logarithm's operand); f32 is
    replaced by `dtype`.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(row: Tensor) -> Tensor:
        if not row.dtype.is_floating_point:
            return row
        return row * (0.5 + torch.rand(row.shape, generator=rng, dtype=row.dtype))

    drawn = replace(sample, inputs=[[draw(row) for row in rows] for rows in sample.inputs])
    return drawn if dtype == "f32" else _in(drawn, dtype)


def _in(sample: Sample, dtype: str, cell: Cell | None = None) -> Sample:
    """The sample with every float in `dtype`; `cell`: with f32 where that is to be replaced."""

    def change(t: Tensor) -> Tensor:
        return t.to(TORCH_DTYPES[dtype]) if t.dtype.is_floating_point else t

    params = {name: change(p).contiguous() for name, p in sample.params.items()}
    inputs = [[change(row) for row in rows] for rows in sample.inputs]
    return replace(sample, cell=retyped(cell or sample.cell, dtype), params=params, inputs=inputs)


def launch_of(
    sample: Sample, num_rows: int, num_steps: int = 1, feed: Feed | None = None
) -> tuple[Launch, dict[RowType, Tensor]]:
    """A launch on the sample's rows, what it writes poisoned: nan, or a number far away."""
    launch, arenas = sample.launch(num_rows, num_steps, seed=num_rows)
    for o, i in (feed or {}).items():
        table = launch.inputs[i]
        assert not isinstance(table, Ragged)
        table[num_rows:] = launch.outputs[o, :-num_rows]
    for slots, kind in zip(launch.outputs, sample.cell.output_types, strict=True):
        arena = arenas[kind]
        arena[torch.from_numpy(slots.astype(np.int64))] = (
            float("nan") if arena.dtype.is_floating_point
            else True if arena.dtype == torch.bool
            else torch.iinfo(arena.dtype).max
        )  # fmt: skip
    return launch, arenas


# -- how far off -----------------------------------------------------------------------------------


def error(
    kernel: Kernel, cell: Cell, sample: Sample, B: int, K: int = 1, feed: Feed | None = None
) -> float:
    """The largest ||out - exact|| / ||exact|| of an output in a step, `exact` being the f32 `cell`
    computed in float64 on the same numbers. Rows that are no output stay as they are, bit by bit.
    """
    launch, arenas = launch_of(sample, B, K, feed)
    before = {kind: arena.clone() for kind, arena in arenas.items()}
    exact = _in(sample, "f64", cell)
    twin, arenas64 = launch_of(exact, B, K, feed)
    wrong = sorted(EagerBackend().kernel(exact.cell, exact.params)(twin, arenas64))
    assert sorted(kernel(launch, arenas)) == wrong
    _same_elsewhere(sample.cell, launch, before, arenas)
    keep = torch.ones(launch.num_rows, dtype=torch.bool)
    keep[torch.tensor(wrong, dtype=torch.int64)] = False
    worst = 0.0
    pairs = zip(outputs(sample, launch, arenas), outputs(exact, twin, arenas64), strict=True)
    for got, want in pairs:
        for k in range(K):
            step = slice(k * B, (k + 1) * B)
            worst = max(worst, _relative(got[step][keep[step]], want[step][keep[step]]))
    return worst


def _relative(got: Tensor, want: Tensor) -> float:
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want)
        return 0.0
    a, b, limits = got.double(), want, torch.finfo(got.dtype)
    b = torch.where(b.abs() > limits.max, b * float("inf"), b)  # out of the dtype's range
    finite = b.isfinite()
    assert torch.allclose(a[~finite], b[~finite], equal_nan=True)
    norm = max(float(b[finite].norm()), SMALL)
    off = float((a[finite] - b[finite]).norm())
    assert off == off, "poison is left"
    return off / norm


def _same_elsewhere(
    cell: Cell, launch: Launch, before: Mapping[RowType, Tensor], after: Mapping[RowType, Tensor]
) -> None:
    for kind, arena in after.items():
        rest = torch.ones(len(arena), dtype=torch.bool)
        for slots, other in zip(launch.outputs, cell.output_types, strict=True):
            if other == kind:
                rest[torch.from_numpy(slots.astype(np.int64))] = False
        assert torch.equal(arena[rest], before[kind][rest]), kind
