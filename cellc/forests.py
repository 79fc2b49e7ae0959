"""Forests: the calls of many unfolded requests, written by numpy.

Duty: copy the template of every segment for each of its instances, with the rows that the instance
reads and makes in place of the template's values. Comes in from `cellc.unfolder`, goes to
`cellc.plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cellc.calls import CallGraph, CallGroup, DataColumn, Forest, OutputColumn, join, take
from cellc.dtypes import DTYPE_NAMES
from cellc.frontends.asking import Asked
from cellc.frontends.drawing import Draw
from cellc.frontends.pattern import Pattern
from cellc.frontends.reads import OPEN
from cellc.frontends.segments import OutType, Segment
from cellc.frontends.stub import StubType
from cellc.frontends.stubbing import Part
from cellc.frontends.unfold import Recorder, Returned
from cellc.ops import RowType
from cellc.request import Request
from cellc.rows import RaggedRefs, Refs

DRAWN = 1 << 20  # leaves from here on are random numbers that the request draws


class Wanted(NamedTuple):
    """A request to unfold; where its forward reads values: answers to its first questions, how
    many more may be guessed, and how many of its questions were answered before what is wanted.
    """

    request: Request
    args: Any
    kwargs: Any
    script: tuple[Any, ...] = ()
    guesses: int = 0
    start: int = 0
    plain: bool = False  # what is read is asked for, and no stand-in


@dataclass
class Unfolded:
    """One request's forward, run on stubs."""

    request: Request
    data: list[tuple[int, int, StubType, int, str]] = field(default_factory=list)
    # ^ (leaf, first row, type of a row, rows or -1, name)
    call: tuple[Any, Any] = ((), {})  # the request as stubs
    parts: dict[int, Part] = field(default_factory=dict)
    shells: list[tuple[Any, list[Any]]] = field(default_factory=list)
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)  # first int, float and tensor row, and the end
    base: int = 0  # first row that its forward makes
    returned: Returned | None = None  # None: it failed, or asked what nobody knows
    reason: str | None = None  # why it cannot be unfolded, where that is why
    start: int = 0  # questions that were answered before what is wanted of it
    asked: list[Asked] = field(default_factory=list)
    yields: list[tuple[int, int, Returned]] = field(default_factory=list)
    # ^ (questions asked before, first row that is made after, what was yielded)
    generates: bool = False  # its forward is a generator
    draws: list[Draw] = field(default_factory=list)  # random numbers, in order
    plain: bool = False  # see `Wanted`
    error: Exception | None = None  # what its forward raised
    over_deep = False  # it recurses deeper than there is room for
    carried: list[Refs] = field(default_factory=list)  # rows from before the cut, by type
    carried_data: list[tuple[int, int, StubType, int]] = field(default_factory=list)
    # ^ (~number of the type, first value, type of a row, rows)

    @property
    def num_data(self) -> int:
        """Rows of its data."""
        return self.rows[3] - self.rows[0]

    def own(self, rows: Refs) -> Refs:
        """Its rows numbered by themselves: data first, then what its forward makes."""
        made = rows >= self.base
        return np.where(made, rows - self.base + self.num_data, rows - self.rows[0])

    @property
    def cut(self) -> int:
        """First row of what is wanted: what was made before is carried."""
        wanted = self.start and (self.raises or not self.failed)
        return self.asked[self.start - 1].until if wanted else self.base

    @property
    def failed(self) -> bool:
        """It ended in an error, or cannot be unfolded."""
        return self.error is not None or self.reason is not None or self.over_deep

    @property
    def raises(self) -> bool:
        """A generator raised, after what was wanted began: what it yielded until then counts."""
        return self.error is not None and self.generates and len(self.asked) >= self.start

    @property
    def open(self) -> bool:
        """It ended in a question that nobody has answered."""
        return bool(self.asked) and self.asked[-1].answer is OPEN

    @property
    def given(self) -> list[Returned]:
        """What it yielded and returned."""
        out = [piece for _, _, piece in self.yields]
        return out if self.returned is None else [*out, self.returned]

    @property
    def wanted(self) -> list[Returned]:
        """What it yielded after the cut, and returned."""
        if self.failed and not self.raises:
            return []
        out = [piece for before, _, piece in self.yields if before >= self.start]
        return out if self.returned is None else [*out, self.returned]

    @property
    def end(self) -> int | None:
        """First row after an open question; where nothing is wanted, the first row."""
        if self.failed and not self.raises:
            return self.base
        return self.asked[-1].until if self.open else None


@dataclass
class Stamped:
    """Requests whose forwards were not run: what they do was written, by a pattern."""

    pattern: Pattern
    requests: list[Request]
    bases: Refs  # first rows that they make
    data: list[tuple[int, str, StubType, Refs, Refs]]
    # ^ (leaf, name, type of a row, first row of each request, rows or -1)
    returned: Refs  # rows, [requests, rows]


@dataclass
class Template:
    """A segment as a call graph of its own: values of its inputs, of its constants, and others."""

    graph: CallGraph
    inputs: list[int]
    constants: list[tuple[int, Hashable]]
    results: list[tuple[int, int]]  # (row of the segment, value)
    inner: Refs  # values that its calls make
    versions: tuple[int, int] = (0, 0)  # of the roles and the facts that it is made by


def make_forest(
    recorder: Recorder,
    runs: Sequence[Unfolded],
    template_of: Callable[[Segment], Template],
    type_of: Callable[[int], StubType | None],
    stamped: Sequence[Stamped] = (),
) -> Forest:
    """Calls of the recorded requests, then of those that were stamped: an instance of a segment is
    a copy of its template. `type_of` a row that an operation made; None where its value is not
    kept.
    """
    first_rows = np.array([run.base for run in runs], np.int64)
    starts = np.concatenate([first_rows, *[many.bases for many in stamped]])
    window = _Window(recorder, runs, starts)
    constants: dict[Hashable, int] = {}
    next_value = recorder.next_row
    moved = np.arange(next_value)
    for run in runs:
        next_value = window.carry(run, moved, next_value, type_of)
    constant_rows = np.zeros(len(recorder.constants) + 2, np.int64)
    for row, key in recorder.constants.items():
        if key not in constants:
            constants[key] = next_value
            next_value += 1
        constant_rows[-row] = constants[key]
    alias: list[tuple[Refs, Refs]] = []
    pieces: dict[str, list[tuple[CallGroup, Refs, Refs]]] = {}

    def values_of(rows: Refs) -> Refs:
        constant = constant_rows[np.where(rows < 0, -rows, 0)]
        return np.where(rows < 0, constant, moved[np.maximum(rows, 0)])

    for segment in recorder.used:
        template = template_of(segment)
        reads, first = window.instances(segment)
        n = len(first)
        if not n:
            continue
        values = np.zeros((n, template.graph.num_values), np.int64)
        values[:, template.inputs] = values_of(reads)
        for value, key in template.constants:
            if key not in constants:
                constants[key] = next_value
                next_value += 1
            values[:, value] = constants[key]
        inner = template.inner
        values[:, inner] = next_value + np.arange(n * len(inner)).reshape(n, len(inner))
        next_value += n * len(inner)
        own = set(inner.tolist())
        for row, value in template.results:
            if value in own:
                values[:, value] = first + row
                own.discard(value)
            else:
                alias.append((first + row, values[:, value]))
        owners = np.searchsorted(starts, first, "right") - 1
        for group in template.graph.groups:
            copied = _copies(group, values)
            calls = np.repeat(owners, group.num_calls)
            when = np.repeat(first, group.num_calls)
            pieces.setdefault(group.cell.key, []).append((copied, calls, when))
    final = np.arange(next_value)
    for rows, values in alias:
        final[rows] = values
    while alias and not np.array_equal(following := final[final], final):
        final = following
    groups, all_owners, all_when = [], [], []
    for _, parts in sorted(pieces.items()):  # in one order, whatever came first
        group, owners, when = _joined(parts)
        if alias:
            group.inputs = [
                RaggedRefs(c.offsets, final[c.refs]) if isinstance(c, RaggedRefs) else final[c]
                for c in group.inputs
            ]
        groups.append(group)
        all_owners.append(owners)
        all_when.append(when)
    graph = CallGraph(groups, [], constants, [], next_value)
    given, returned = _data_of(runs, stamped), _outputs_of(runs, stamped)
    rows = np.concatenate([np.zeros(0, np.int64), *[o.refs.reshape(-1) for o in returned]])
    refs, at = final[values_of(rows)], 0
    for output in returned:
        size = output.refs.size
        output.refs = refs[at : at + size].reshape(output.refs.shape)
        at += size
    forest = Forest(graph, len(starts), all_owners, given, returned)
    if window.steered:
        forest.rows = window.rows(moved, final)
        forest.when, forest.answered = all_when, window.answered
    return forest


def _data_of(runs: Sequence[Unfolded], stamped: Sequence[Stamped]) -> list[DataColumn]:
    """What requests are given, those of `runs` first."""
    found: dict[tuple[int, str, StubType, bool], list[tuple[int, int, int]]] = {}
    for owner, run in enumerate(runs):
        given = [*run.data]
        for number, draw in enumerate(run.draws):
            if draw.row >= run.cut and (run.end is None or draw.row < run.end):
                given.append((DRAWN + number, draw.row, draw.form, -1, "drawn"))
        given += [(*carried, "carried") for carried in run.carried_data]
        for leaf, base, kind, count, name in given:
            place = found.setdefault((leaf, name, kind, count < 0), [])
            place.append((base, count, owner))
    columns = [
        _data_column(*key[:3], *np.array(members, np.int64).T) for key, members in found.items()
    ]
    first = len(runs)
    for many in stamped:
        owners = np.arange(first, first + len(many.requests))
        columns += [_data_column(*column, owners) for column in many.data]
        first += len(many.requests)
    return columns


def _data_column(
    leaf: int, name: str, kind: StubType, bases: Refs, counts: Refs, owners: Refs
) -> DataColumn:
    """`counts`: -1 of tensors that are rows themselves."""
    rows = (True,) * len(kind.shape)
    if counts[0] >= 0:
        return DataColumn(leaf, name, _row_type(kind), (False, *rows), bases, counts, owners)
    return DataColumn(leaf, name, _row_type(kind), rows, bases, np.ones_like(counts), owners)


def _outputs_of(runs: Sequence[Unfolded], stamped: Sequence[Stamped]) -> list[OutputColumn]:
    """What requests return, those of `runs` first: their rows."""
    found: dict[tuple[int, int, OutType], tuple[list[list[int]], list[int]]] = {}
    for owner, run in enumerate(runs):
        tensors = [tensor for piece in run.wanted for tensor in piece.tensors]
        for number, (rows, out) in enumerate(tensors):
            members, owners = found.setdefault((number, len(rows), out), ([], []))
            members.append(rows)
            owners.append(owner)
    columns = [
        _output_column(np.array(rows, np.int64).reshape(len(rows), size), out, np.array(owners))
        for (_, size, out), (rows, owners) in sorted(found.items(), key=lambda one: one[0][0])
    ]
    first = len(runs)
    for many in stamped:
        owners_of = np.arange(first, first + len(many.requests))
        at = 0
        for size, out in many.pattern.forms:
            columns.append(_output_column(many.returned[:, at : at + size], out, owners_of))
            at += size
        first += len(many.requests)
    return columns


def _output_column(rows: Refs, out: OutType, owners: Refs) -> OutputColumn:
    """`rows`: [requests, rows]."""
    shape = out.type.shape
    if out.rows < 0:
        rows = rows.reshape(len(rows))
        return OutputColumn(rows, _row_type(out.type), shape, (True,) * len(shape), owners)
    dims = (False, *[True] * (len(shape) - 1))
    type = RowType(shape[1:], DTYPE_NAMES[out.type.dtype])
    return OutputColumn(rows, type, shape, dims, owners)


class _Window:
    """What is wanted of runs: of a forward that reads values, what is between an answer and an open
    question. What was made before and is needed, or may be, is carried: data of what is wanted.
    """

    def __init__(self, recorder: Recorder, runs: Sequence[Unfolded], starts: Refs) -> None:
        self._recorder, self._runs, self._starts = recorder, runs, starts
        self.steered = any(run.asked or run.generates or run.draws for run in runs)
        if self.steered:
            last = recorder.next_row
            whole = starts[len(runs) :]  # of those that were stamped, all is wanted
            self._cuts = np.concatenate([np.array([run.cut for run in runs], np.int64), whole])
            ends = [last if run.end is None else run.end for run in runs]
            self._ends = np.concatenate([np.array(ends, np.int64), np.full(len(whole), last)])
            sure = [run.asked[run.start].until if run.asked[run.start :] else last for run in runs]
            self.answered = np.concatenate([np.array(sure, np.int64), np.full(len(whole), last)])

    def instances(self, segment: Segment) -> tuple[Refs, Refs]:
        """(rows read, first rows made) of the instances that are wanted."""
        reads, first = segment.instances()
        if not self.steered:
            return reads, first
        owners = np.searchsorted(self._starts, first, "right") - 1
        wanted = (first >= self._cuts[owners]) & (first < self._ends[owners])
        return reads[wanted], first[wanted]

    def carry(
        self, run: Unfolded, moved: Refs, next_value: int, type_of: Callable[[int], StubType | None]
    ) -> int:
        """Give what a run needs of before its cut values side by side, type by type."""
        if run.cut <= run.base:
            return next_value
        needed: set[int] = set()
        for segment in self._recorder.used:
            reads, first = self.instances(segment)
            mine = reads[(first >= run.cut) & (first < self._end_of(run))]
            needed.update(mine[(mine >= run.base) & (mine < run.cut)].tolist())
        for piece in run.wanted:
            needed.update(r for rows, _ in piece.tensors for r in rows)
        if run.open:
            needed |= run.asked[run.start - 1].live
        groups: dict[StubType, list[int]] = {}
        drawn = {draw.row: draw.form for draw in run.draws}
        for row in sorted(needed):
            if run.base <= row < run.cut and (kind := drawn.get(row) or type_of(row)) is not None:
                groups.setdefault(kind, []).append(row)
        for number, (kind, rows) in enumerate(groups.items()):
            moved[rows] = next_value + np.arange(len(rows))
            run.carried_data.append((~number, next_value, kind, len(rows)))
            run.carried.append(run.own(np.array(rows, np.int64)))
            next_value += len(rows)
        return next_value

    def _end_of(self, run: Unfolded) -> int:
        following = self._starts[self._starts > run.base]
        return int(following.min(initial=self._recorder.next_row))

    def rows(self, moved: Refs, final: Refs) -> list[Refs]:
        """For every run the values of its rows, data included; -1 for what is not there."""
        out = []
        for run in self._runs:
            rows = np.concatenate(
                [np.arange(run.rows[0], run.rows[3]), np.arange(run.base, self._end_of(run))]
            )
            values = np.full(len(rows), -1, np.int64)
            there = (rows < run.base) | (rows >= run.cut) | (moved[rows] != rows)
            if run.end is not None:
                there &= rows < run.end
            values[there] = final[moved[rows[there]]]
            out.append(values)
        none = np.zeros(0, np.int64)
        return [*out, *[none] * (len(self._starts) - len(out))]


def _copies(group: CallGroup, values: Refs) -> CallGroup:
    """The calls of a template's group for every instance, instance by instance."""
    n = len(values)

    def column(refs: Refs | RaggedRefs) -> Refs | RaggedRefs:
        if not isinstance(refs, RaggedRefs):
            return values[:, refs].reshape(-1)
        counts = np.tile(np.diff(refs.offsets), n)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return RaggedRefs(offsets, values[:, refs.refs].reshape(-1))

    outputs = [values[:, o].reshape(-1) for o in group.outputs]
    return CallGroup(group.cell, [column(c) for c in group.inputs], outputs)


def _joined(parts: Sequence[tuple[CallGroup, Refs, Refs]]) -> tuple[CallGroup, Refs, Refs]:
    """One group of a cell's calls from all segments, request by request, in time order."""
    first, owners, when = parts[0]
    group = CallGroup(first.cell, list(first.inputs), list(first.outputs))
    for more, more_owners, more_when in parts[1:]:
        group.inputs = [join(a, b) for a, b in zip(group.inputs, more.inputs, strict=True)]
        group.outputs = [np.concatenate(p) for p in zip(group.outputs, more.outputs, strict=True)]
        owners, when = np.concatenate([owners, more_owners]), np.concatenate([when, more_when])
    if len(parts) > 1:
        order = np.argsort(when, kind="stable")
        group.inputs = [take(c, order) for c in group.inputs]
        group.outputs = [o[order] for o in group.outputs]
        owners, when = owners[order], when[order]
    return group, owners, when


@functools.cache
def _row_type(kind: StubType) -> RowType:
    return RowType(kind.shape, DTYPE_NAMES[kind.dtype])
