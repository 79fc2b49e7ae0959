"""Families: call graphs whose arrays are affine in the request's sizes.

Duty: after a few sizes of one structure were traced, make the call graph of another size with numpy
alone. Comes in: traced `CallGraph`s with their sizes; goes out: a `CallGraph` for new sizes, to
`cellc.plan`. No torch here.

Every column of a call graph (which value does call j read?) is written as (repeated) arithmetic
runs over a source: "the outputs of cell 2, from call 0, by steps of 1, n - 1 of them". A family is
a set of traces with the same runs, whose starts, steps and lengths are affine functions of the
sizes: solved from the traces, exact on all of them, with at least one more trace than unknowns.
Prediction is used *between* sizes that were traced; a size beyond them is traced and checked first,
since a model may truncate or branch at some length.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell
from cellc.ops import RowType
from cellc.rows import DataSource, RaggedRefs, Refs, RowOutput

Floats = npt.NDArray[np.float64]
Source = tuple[Hashable, ...]
MAX_RUNS = 4096
RUN = 5  # numbers that describe a block of runs


@dataclass(frozen=True)
class _Form:
    """A call graph without its numbers: equal for members of one family."""

    cells: tuple[str, ...]
    columns: tuple[tuple[Source, ...], ...]  # sources of each column's runs
    outputs: tuple[tuple[RowType, tuple[bool, ...]], ...]
    data: tuple[tuple[int, str, RowType, tuple[bool, ...]], ...]


@dataclass
class _Sample:
    sizes: tuple[int, ...]
    numbers: Floats  # start, step, length of every run; then output shapes


@dataclass
class _Member:
    """All samples of one form, and the affine map once it is known."""

    cells: list[Cell]
    example: CallGraph
    samples: list[_Sample] = field(default_factory=list)
    coefficients: Floats | None = None  # [1 + varying sizes, numbers]
    varying: tuple[int, ...] = ()

    def fit(self) -> None:
        sizes = np.array([s.sizes for s in self.samples], float)
        self.varying = _independent(sizes)
        self.coefficients = None
        if any(len(set(sizes[:, i])) < 3 for i in self.varying):
            return  # two values of a size cannot tell a line from a square
        basis = self._basis(sizes)
        if len(basis) < basis.shape[1] + 1 or np.linalg.matrix_rank(basis) < basis.shape[1]:
            return
        numbers = _filled(np.stack([s.numbers for s in self.samples]))
        if numbers is None:
            return
        solution, *_ = np.linalg.lstsq(basis, numbers, rcond=None)
        if np.abs(basis @ solution - numbers).max(initial=0) < 1e-6:
            self.coefficients = np.asarray(solution, np.float64)

    def _basis(self, sizes: Floats) -> Floats:
        """1, the varying sizes, and their products: what a count may be a sum of."""
        kept = [sizes[:, i] for i in self.varying]
        products = [a * b for k, a in enumerate(kept) for b in kept[:k]]
        return np.stack([np.ones(len(sizes)), *kept, *products], 1)

    def covers(self, sizes: Sequence[int]) -> bool:
        """Do `sizes` lie between those of the samples, and agree where those do not vary?"""
        if self.coefficients is None:
            return False
        known = np.array([s.sizes for s in self.samples])
        wanted = np.array(sizes)
        return bool(((known.min(0) <= wanted) & (wanted <= known.max(0))).all()) and self._tied(
            sizes
        )

    def _tied(self, sizes: Sequence[int]) -> bool:
        """Sizes that always moved together must do so now."""
        known = np.array([s.sizes for s in self.samples], float)
        columns = list(self.varying)
        basis = np.concatenate([np.ones((len(known), 1)), known[:, columns]], 1)
        solution, *_ = np.linalg.lstsq(basis, known, rcond=None)
        wanted = np.array([1.0, *(sizes[i] for i in columns)])
        return bool(np.abs(wanted @ solution - np.array(sizes)).max(initial=0) < 1e-6)

    def predict(self, sizes: Sequence[int]) -> npt.NDArray[np.int64] | None:
        assert self.coefficients is not None
        numbers = (self._basis(np.array([sizes], float)) @ self.coefficients)[0]
        whole: npt.NDArray[np.int64] = np.rint(numbers).astype(np.int64)
        return whole if np.abs(whole - numbers).max(initial=0) < 1e-4 else None


def _filled(numbers: Floats) -> Floats | None:
    """Steps of runs of one element are unknown (nan): they are what the other samples say, if those
    agree.
    """
    unknown = np.isnan(numbers)
    if not unknown.any():
        return numbers
    low = np.min(np.where(unknown, np.inf, numbers), 0)
    high = np.max(np.where(unknown, -np.inf, numbers), 0)
    known = np.where(np.isinf(low), 0, low)
    if (low < high)[unknown.any(0)].any():
        return None
    return np.where(unknown, known, numbers)


def _independent(sizes: Floats) -> tuple[int, ...]:
    """Sizes that vary, but for those that are affine in the others (two inputs of one length)."""
    kept: list[int] = []
    columns = np.ones((len(sizes), 1))
    for i in np.flatnonzero((sizes != sizes[0]).any(0)).tolist():
        wider = np.concatenate([columns, sizes[:, i : i + 1]], 1)
        if np.linalg.matrix_rank(wider) > columns.shape[1]:
            columns, kept = wider, [*kept, i]
    return tuple(kept)


class Family:
    """All sizes of one structure seen so far."""

    def __init__(self) -> None:
        self._members: dict[_Form, _Member] = {}

    def learn(self, sizes: Sequence[int], graph: CallGraph) -> None:
        """Add a traced request."""
        described = _describe(graph)
        if described is None:
            return
        form, numbers = described
        member = self._members.setdefault(form, _Member([g.cell for g in graph.groups], graph))
        if all(s.sizes != tuple(sizes) for s in member.samples):
            member.samples.append(_Sample(tuple(sizes), numbers))
            member.fit()

    def predict(self, sizes: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> CallGraph | None:
        """The call graph of a size between the traced ones, or None. `shapes` are the tensor
        leaves' shapes.
        """
        for form, member in self._members.items():
            if member.covers(sizes) and self._alone(member, sizes):
                numbers = member.predict(sizes)
                if numbers is not None:
                    return _build_checked(form, member, numbers, shapes)
        return None

    def _alone(self, member: _Member, sizes: Sequence[int]) -> bool:
        """No trace of another form lies inside this member's range: the structure changes in
        between.
        """
        known = np.array([s.sizes for s in member.samples])
        low, high = known.min(0), known.max(0)
        for other in self._members.values():
            if other is not member:
                for sample in other.samples:
                    inside = (low < np.array(sample.sizes)) & (np.array(sample.sizes) < high)
                    if inside[list(member.varying)].any():
                        return False
        return True


# -- describing a call graph --


def _describe(graph: CallGraph) -> tuple[_Form, Floats] | None:
    sources: list[Source] = []
    source_of = np.full(graph.num_values, -1, np.int64)
    index_of = np.zeros(graph.num_values, np.int64)

    def put(values: Refs, source: Source, index: Any) -> None:
        source_of[values] = len(sources)
        index_of[values] = index
        sources.append(source)

    for data in graph.data:
        put(
            np.arange(data.base, data.base + data.count), ("data", data.leaf), np.arange(data.count)
        )
    known: dict[Source, int] = {}
    for key, value in graph.constants.items():
        source, index = _constant_source(key)
        if source not in known:
            known[source] = len(sources)
            sources.append(source)
        source_of[value], index_of[value] = known[source], index
    for g, group in enumerate(graph.groups):
        for o, made in enumerate(group.outputs):
            put(made, ("made", g, o), np.arange(len(made)))
    columns: list[tuple[Source, ...]] = []
    numbers: list[float] = []
    for values in _columns(graph):
        kinds, blocks = _blocks(*_runs(values, source_of, index_of, sources))
        if len(blocks) > MAX_RUNS:
            return None
        columns.append(kinds)
        for start, step, length, stride, count in blocks:
            step, stride = step if length > 1 else np.nan, stride if count > 1 else np.nan
            numbers += [start, step, length, stride, count]
    for output in graph.outputs:
        numbers += [*output.shape, *output.refs.shape]
    form = _Form(
        tuple(g.cell.key for g in graph.groups),
        tuple(columns),
        tuple((o.type, o.row_dims) for o in graph.outputs),
        tuple((d.leaf, d.name, d.type, d.row_dims) for d in graph.data),
    )
    return form, np.array(numbers, float)


def _constant_source(key: Any) -> tuple[Source, int]:
    """Constants that count (a loop's number, rows of a table) are one source with an index."""
    if key[0] == "param":
        return ("param", *key[1:-1]), int(key[-1])
    if key[0] == "full" and _is_count(key, key[-1]):
        return ("full", *key[1:-1], type(key[-1]).__name__), int(key[-1])
    if key[0] == "rows" and len(key[-1]) == 1 and _is_count(key, key[-1][0]):
        return ("rows", *key[1:-1], type(key[-1][0]).__name__), int(key[-1][0])
    return ("constant", key), 0


def _is_count(key: Any, value: Any) -> bool:
    """Is it a whole number that a float holds exactly, and not one of those told by their text?"""
    whole = isinstance(value, (int, float)) and float(value).is_integer()
    return whole and abs(value) < 2**53 and len(key) == 4


def _constant_key(source: Any, index: int) -> Hashable:
    kinds = {"int": int, "float": float, "bool": bool}
    if source[0] == "param":
        return (*source, index)
    if source[0] == "full":
        return (*source[:-1], kinds[source[-1]](index))
    if source[0] == "rows":
        return (*source[:-1], (kinds[source[-1]](index),))
    key: Hashable = source[1]
    return key


def _columns(graph: CallGraph) -> list[Refs | tuple[Refs]]:
    """Everything that says who reads what; a 1-tuple holds plain numbers (lengths of ragged
    vectors).
    """
    out: list[Refs | tuple[Refs]] = []
    for group in graph.groups:
        for column in group.inputs:
            if isinstance(column, RaggedRefs):
                out += [column.refs, (np.diff(column.offsets),)]
            else:
                out.append(column)
        out.append((np.array([group.num_calls]),))
    out += [output.refs.reshape(-1) for output in graph.outputs]
    return out


def _runs(
    values: Refs | tuple[Refs], source_of: Refs, index_of: Refs, sources: list[Source]
) -> tuple[tuple[Source, ...], list[tuple[int, int, int]]]:
    """Split a column into arithmetic runs: (start, step, length), each over one source."""
    if isinstance(values, tuple):
        index, source = values[0], np.full(len(values[0]), -1, np.int64)
    else:
        index, source = index_of[values], source_of[values]
    kinds: list[Source] = []
    runs: list[tuple[int, int, int]] = []
    n, i = len(index), 0
    step = np.diff(index)
    same = source[1:] == source[:-1]
    while i < n and len(runs) <= MAX_RUNS:
        j = i + 1
        if j < n and same[i]:
            breaks = np.flatnonzero((step[i:] != step[i]) | ~same[i:])
            j = i + (int(breaks[0]) if len(breaks) else n - 1 - i) + 1
        kinds.append(sources[source[i]] if source[i] >= 0 else ("number",))
        runs.append((int(index[i]), int(step[i]) if j > i + 1 else 0, j - i))
        i = j
    return tuple(kinds), runs


def _blocks(
    kinds: tuple[Source, ...], runs: list[tuple[int, int, int]]
) -> tuple[tuple[Source, ...], list[tuple[float, ...]]]:
    """Join equal runs at equal distances: (start, step, length, their distance, their number)."""
    out: list[Source] = []
    blocks: list[list[float]] = []
    for kind, (start, step, length) in zip(kinds, runs, strict=True):
        last = blocks[-1] if blocks and out[-1] == kind else None
        if last is not None and last[1:3] == [step, length] and length > 1:
            distance = start - last[0] - last[3] * (last[4] - 1)
            if last[4] == 1 or distance == last[3]:
                last[3], last[4] = distance, last[4] + 1
                continue
        out.append(kind)
        blocks.append([start, step, length, 0, 1])
    return tuple(out), [tuple(block) for block in blocks]


# -- building one --


class _Inconsistent(Exception):
    """Derived numbers do not fit each other: the sizes are not of this family after all."""


class _Builder:
    def __init__(self, numbers: npt.NDArray[np.int64]) -> None:
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
        key = _constant_key(source, index)
        if key not in self.constants:
            self.constants[key] = self.num_values
            self.num_values += 1
        return self.constants[key]


def _build_checked(
    form: _Form,
    member: _Member,
    numbers: npt.NDArray[np.int64],
    shapes: Sequence[tuple[int, ...]],
) -> CallGraph | None:
    try:
        return _build(form, member, numbers, shapes)
    except _Inconsistent:
        return None


def _build(
    form: _Form,
    member: _Member,
    numbers: npt.NDArray[np.int64],
    shapes: Sequence[tuple[int, ...]],
) -> CallGraph:
    b = _Builder(numbers)
    data = []
    for leaf, name, type, row_dims in form.data:
        positions = [s for s, r in zip(shapes[leaf], row_dims, strict=True) if not r]
        count = int(np.prod(positions, dtype=np.int64))
        data.append(
            DataSource(leaf, name, b.allocate(("data", leaf), count), count, type, row_dims)
        )
    counts = _counts(form, member, numbers)
    for g, cell in enumerate(member.cells):
        for o in range(len(cell.outputs)):
            b.allocate(("made", g, o), counts[g])
    kinds = iter(form.columns)
    groups = []
    for g, cell in enumerate(member.cells):
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


def _counts(form: _Form, member: _Member, numbers: npt.NDArray[np.int64]) -> list[int]:
    """Number of calls of each cell: the last column of each group."""
    counts, column, at = [], 0, 0
    for cell in member.cells:
        width = sum(2 if i.ragged else 1 for i in cell.inputs)
        for _ in range(width):
            at += RUN * len(form.columns[column])
            column += 1
        counts.append(int(numbers[at]))
        at += RUN * len(form.columns[column])
        column += 1
    return counts


def same_graph(a: CallGraph, b: CallGraph) -> bool:
    """Do two call graphs say the same thing (value numbers apart)?"""
    first, second = _describe(a), _describe(b)
    return (
        first is not None
        and second is not None
        and first[0] == second[0]
        and np.array_equal(first[1], second[1], equal_nan=True)
    )
