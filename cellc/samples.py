"""Samples: rows that a model's cells were given when example requests ran.

Duty: run requests on the eager backend and keep some of what each cell reads, so that any kernel of
the cell can be launched on real rows at any batch size. Comes in: a model and requests; goes out:
one `Sample` a cell, to `cellc.checking` and `cellc.tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellc import ops
from cellc.cells import Cell
from cellc.copier import Copier
from cellc.dtypes import TORCH_DTYPES
from cellc.entry import compile
from cellc.kernels.eager import EagerBackend, EagerKernel
from cellc.launch import Index, Launch, Ragged
from cellc.ops import RowType
from cellc.request import as_call

PER_STEP, MOST = 8, 64  # rows kept of a step, and of a cell

Arenas = dict[RowType, Tensor]


@dataclass
class Sample:
    """Rows of one cell: of each input a tensor a row, [*shape], or [n, *shape] where ragged."""

    cell: Cell
    params: Mapping[str, Tensor]
    inputs: list[list[Tensor]]
    num_calls: int = 0  # in the requests that were run

    @property
    def num_rows(self) -> int:
        return len(self.inputs[0]) if self.inputs else min(self.num_calls, MOST)

    def launch(self, num_rows: int, num_steps: int = 1, seed: int = 0) -> tuple[Launch, Arenas]:
        """A launch of `num_steps` times `num_rows` calls on these rows, again and again, in arenas
        of its own; no two calls share a slot.
        """
        total = num_rows * num_steps
        rng = np.random.default_rng(seed)
        picked = np.arange(total, dtype=np.int32) % np.int32(max(1, self.num_rows))
        taken = _Slots(self, picked.tolist(), rng)
        inputs = [taken.input(i) for i in range(len(self.cell.inputs))]
        outputs = [taken.take(t, total) for t in self.cell.output_types]
        steps = np.arange(num_steps + 1, dtype=np.int32) * np.int32(num_rows)
        table = np.stack(outputs) if outputs else np.zeros((0, total), np.int32)
        return Launch(steps, inputs, table), taken.arenas


class _Slots:
    """Arenas that hold a launch's rows, each at a place drawn at random."""

    def __init__(self, sample: Sample, picked: Sequence[int], rng: np.random.Generator) -> None:
        self._sample, self._picked = sample, picked
        device = next((p.device for p in sample.params.values()), torch.device("cpu"))
        needed: dict[RowType, int] = {}
        for i, spec in enumerate(sample.cell.inputs):
            needed[spec.type] = needed.get(spec.type, 0) + sum(
                len(sample.inputs[i][j]) if spec.ragged else 1 for j in picked
            )
        for kind in sample.cell.output_types:
            needed[kind] = needed.get(kind, 0) + len(picked)
        self.arenas: Arenas = {
            kind: torch.zeros((count, *kind.shape), dtype=TORCH_DTYPES[kind.dtype], device=device)
            for kind, count in needed.items()
        }
        self._free = {k: rng.permutation(n).astype(np.int32) for k, n in needed.items()}

    def take(self, kind: RowType, count: int) -> Index:
        slots, self._free[kind] = self._free[kind][:count], self._free[kind][count:]
        return slots

    def input(self, i: int) -> Index | Ragged:
        spec, rows = self._sample.cell.inputs[i], self._sample.inputs[i]
        parts = [rows[j] for j in self._picked]
        if spec.ragged:
            offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
            slots = self.take(spec.type, int(offsets[-1]))
            self._write(spec.type, slots, [row for part in parts for row in part])
            return Ragged(offsets, slots)
        slots = self.take(spec.type, len(parts))
        self._write(spec.type, slots, parts)
        return slots

    def _write(self, kind: RowType, slots: Index, rows: Sequence[Tensor]) -> None:
        if len(rows):
            arena = self.arenas[kind]
            at = torch.from_numpy(slots.astype(np.int64)).to(arena.device)
            arena[at] = torch.stack(list(rows)).to(arena.dtype)


def outputs(sample: Sample, launch: Launch, arenas: Mapping[RowType, Tensor]) -> list[Tensor]:
    """What a launch wrote: [N, *shape] an output, in the order of its rows."""
    pairs = zip(launch.outputs, sample.cell.output_types, strict=True)
    return [arenas[t][torch.from_numpy(s.astype(np.int64)).to(arenas[t].device)] for s, t in pairs]


# -- of a model ------------------------------------------------------------------------------------


def collect(
    model: Any, requests: Sequence[Any], compiling: Mapping[str, Any] | None = None
) -> list[Sample]:
    """Run requests, and return a sample of each cell that computes; `compiling`: of `compile`."""
    recording = _Recording()
    with compile(model, backend="eager", **(compiling or {})) as compiled:
        compiled._compiler.store.backend = recording
        compiled.map([copied(r) for r in requests], return_exceptions=True)
    return [s for s in recording.samples.values() if s.num_rows]


def copied(request: Any) -> Any:
    """A request that shares no tensor and no generator with another, in a form of `map`."""
    args, kwargs = Copier(lambda leaf, _: leaf.detach().clone()).call(*as_call(request))
    return kwargs if kwargs else args


@dataclass
class _Recording:
    """The eager backend, whose kernels keep what they read."""

    name: str = "eager"
    samples: dict[str, Sample] = field(default_factory=dict)

    def kernel(self, cell: Cell, params: Mapping[str, Tensor]) -> _Recorder:
        sample = self.samples.setdefault(
            cell.key, Sample(cell, {p.name: params[p.name] for p in cell.params}, [])
        )
        if not sample.inputs:
            sample.inputs = [[] for _ in cell.inputs]
        return _Recorder(EagerBackend().kernel(cell, params), sample)


class _Recorder:
    backend = "eager"

    def __init__(self, kernel: EagerKernel, sample: Sample) -> None:
        self.source, self._kernel, self._sample = kernel.source, kernel, sample

    def __call__(self, launch: Launch, arenas: Mapping[RowType, Tensor]) -> Sequence[int]:
        """Step by step: a step may read what the one before wrote, and overwrite it."""
        self._sample.num_calls += launch.num_rows
        if self._sample.inputs and self._sample.num_rows >= MOST:
            return self._kernel(launch, arenas)
        bad: list[int] = []
        for start, stop in zip(launch.steps[:-1].tolist(), launch.steps[1:].tolist(), strict=True):
            step = part(launch, start, stop)
            rows = [_rows(step, i, spec.type, arenas) for i, spec in enumerate(self._inputs)]
            wrong = self._kernel(step, arenas)
            for j in range(min(stop - start, PER_STEP)):
                if j not in wrong:
                    for kept, given in zip(self._sample.inputs, rows, strict=True):
                        kept.append(given[j])
            bad += [start + j for j in wrong]
        return bad

    @property
    def _inputs(self) -> Sequence[Any]:
        return self._sample.cell.inputs


def part(launch: Launch, start: int, stop: int) -> Launch:
    """Rows start:stop of a launch, as one step."""

    def cut(table: Index | Ragged) -> Index | Ragged:
        if not isinstance(table, Ragged):
            return table[start:stop]
        offsets = table.offsets[start : stop + 1]
        return Ragged(offsets - offsets[0], table.slots[offsets[0] : offsets[-1]])

    steps = np.array([0, stop - start], np.int32)
    return Launch(steps, [cut(t) for t in launch.inputs], launch.outputs[:, start:stop])


def narrowed(launch: Launch, num_rows: int) -> Launch:
    """The first rows of every step, none of whose inputs is ragged."""
    tables = [t for t in launch.inputs if not isinstance(t, Ragged)]
    assert len(tables) == len(launch.inputs) and (np.diff(launch.steps) >= num_rows).all()
    at = (launch.steps[:-1, None] + np.arange(num_rows)).reshape(-1)
    steps = np.arange(len(launch.steps), dtype=np.int32) * np.int32(num_rows)
    return Launch(steps, [t[at] for t in tables], launch.outputs[:, at])


def _rows(launch: Launch, i: int, kind: RowType, arenas: Mapping[RowType, Tensor]) -> list[Tensor]:
    """The first rows that a step reads."""
    table, arena = launch.inputs[i], arenas[kind]
    if isinstance(table, Ragged):
        ends = table.offsets[: PER_STEP + 1].tolist()
        parts = [table.slots[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    else:
        parts = [table[j] for j in range(min(len(table), PER_STEP))]
    found = [torch.from_numpy(np.asarray(p, np.int64)).to(arena.device) for p in parts]
    return [arena[at].clone() for at in found]


# -- of a cell alone -------------------------------------------------------------------------------


def drawn(cell: Cell, num_rows: int = MOST, seed: int = 0) -> Sample:
    """A sample of random rows and weights, for a cell that no model is known of."""
    rng = torch.Generator().manual_seed(seed)
    tables = [
        cell.shape_of(op.operands[0])[0] for op in cell.ops if op.op == "embedding"
    ]  # an index lies in all of them
    limit = min([5, *tables])

    def rows(kind: RowType, count: int) -> Tensor:
        shape = (count, *kind.shape)
        if kind.dtype == "bool":
            return torch.rand(shape, generator=rng) < 0.5
        if kind.dtype in ops.INT_DTYPES:
            return torch.randint(0, limit, shape, generator=rng).to(TORCH_DTYPES[kind.dtype])
        return torch.randn(shape, generator=rng).to(TORCH_DTYPES[kind.dtype])

    params = {p.name: rows(p.type, 1)[0] * 0.5 for p in cell.params}
    inputs = [
        [rows(i.type, 1 + j % 3) if i.ragged else rows(i.type, 1)[0] for j in range(num_rows)]
        for i in cell.inputs
    ]
    return Sample(cell, params, inputs, num_rows)
