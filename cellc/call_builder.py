"""The call builder: a call graph from its form and numbers.

Duty: make the calls of a size that was never traced, by numpy, and check that the numbers fit each
other. Used by `cellc.family`; the other way goes `cellc.call_form`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cellc.call_form import RUN, CallForm, Source, constant_key
from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell
from cellc.rows import DataSource, RaggedRefs, Refs, RowOutput

Whole = npt.NDArray[np.int64]


def build(
    form: CallForm,
    cells: Sequence[Cell],
    numbers: Whole,
    shapes: Sequence[tuple[int, ...]],
) -> CallGraph | None:
    """None where the numbers do not fit each other. `shapes` are the tensor leaves' shapes."""
    try:
        return _build(form, cells, numbers, shapes)
    except _Inconsistent:
        return None


def _build(
    form: CallForm,
    cells: Sequence[Cell],
    numbers: Whole,
    shapes: Sequence[tuple[int, ...]],
) -> CallGraph:
    b = _Builder(numbers)
    data = []
    for leaf, name, type, row_dims, windows in form.data:
        positions = [s for s, r in zip(shapes[leaf], row_dims, strict=True) if not r]
        count = math.prod(positions) if windows is None else windows.count(shapes[leaf][0])
        base = b.allocate(("data", leaf, windows), count)
        data.append(DataSource(leaf, name, base, count, type, row_dims, windows))
    counts = _counts(form, cells, numbers)
    for g, cell in enumerate(cells):
        for o in range(len(cell.outputs)):
            b.allocate(("made", g, o), counts[g])
    kinds = iter(form.columns)
    groups = []
    for g, cell in enumerate(cells):
        inputs: list[Refs | RaggedRefs] = []
        for spec in cell.inputs:
            column = b.column(next(kinds))
            if spec.ragged:
                lengths = b.column(next(kinds))
                if len(lengths) != counts[g] or lengths.sum() != len(column):
                    raise _Inconsistent
                inputs.append(RaggedRefs(np.concatenate([[0], np.cumsum(lengths)]), column))
            elif len(column) == counts[g]:
                inputs.append(column)
            else:
                raise _Inconsistent
        b.column(next(kinds))
        made = [
            b.bases["made", g, o] + np.arange(counts[g], dtype=np.int64)
            for o in range(len(cell.outputs))
        ]
        groups.append(CallGroup(cell, inputs, made))
    refs = [b.column(next(kinds)) for _ in form.outputs]
    outputs: list[RowOutput] = []
    for ref, (type, row_dims) in zip(refs, form.outputs, strict=True):
        shape = tuple(b.take(len(row_dims)))
        outer = tuple(b.take(sum(not r for r in row_dims)))
        if math.prod(outer) != len(ref):
            raise _Inconsistent
        outputs.append(RowOutput(ref.reshape(outer), type, shape, row_dims))
    return CallGraph(groups, data, b.constants, outputs, b.num_values)


def _counts(form: CallForm, cells: Sequence[Cell], numbers: Whole) -> list[int]:
    """Number of calls of each cell: the last column of each group."""
    counts, column, at = [], 0, 0
    for cell in cells:
        width = sum(2 if i.ragged else 1 for i in cell.inputs)
        for _ in range(width):
            at += RUN * len(form.columns[column])
            column += 1
        counts.append(int(numbers[at]))
        at += RUN * len(form.columns[column])
        column += 1
    return counts


class _Inconsistent(Exception):
    """Derived numbers do not fit each other: the sizes are not of this family after all."""


class _Builder:
    def __init__(self, numbers: Whole) -> None:
        self.numbers, self.at = numbers, 0
        self.num_values = 0
        self.bases: dict[Source, int] = {}
        self.counts: dict[Source, int] = {}
        self.constants: dict[object, int] = {}

    def allocate(self, source: Source, count: int) -> int:
        self.bases[source] = self.num_values
        self.counts[source] = count
        self.num_values += count
        return self.bases[source]

    def take(self, count: int) -> list[int]:
        out: list[int] = self.numbers[self.at : self.at + count].tolist()
        self.at += count
        return out

    def column(self, kinds: Sequence[Source]) -> Refs:
        parts = [np.zeros(0, np.int64)]
        for source in kinds:
            start, step, length, stride, count = self.take(RUN)
            if length <= 0 or count <= 0:
                continue
            inner = start + step * np.arange(length)
            index = (inner + stride * np.arange(count)[:, None]).reshape(-1)
            if source[0] != "number" and not self._inside(source, index):
                raise _Inconsistent
            if source[0] == "number":
                parts.append(index)
            elif source in self.bases:
                parts.append(self.bases[source] + index)
            else:
                parts.append(
                    np.array([self._constant(source, i) for i in index.tolist()], np.int64)
                )
        return np.concatenate(parts)

    def _inside(self, source: Source, index: Refs) -> bool:
        """Does a source have these values?"""
        low, high = int(index.min()), int(index.max())
        if source in self.counts:
            return low >= 0 and high < self.counts[source]
        return low >= 0 or source[0] in ("full", "rows")

    def _constant(self, source: Source, index: int) -> int:
        key = constant_key(source, index)
        if key not in self.constants:
            self.constants[key] = self.num_values
            self.num_values += 1
        return self.constants[key]
