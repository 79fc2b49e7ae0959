"""Forests: the calls of many unfolded requests, written by numpy.

Duty: copy the template of every segment for each of its instances, with the rows that the instance
reads and makes in place of the template's values. Comes in from `cellc.unfolder`, goes to
`cellc.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cellc.calls import CallGraph, CallGroup, Forest, join, take
from cellc.columns import data_of, outputs_of
from cellc.frontends.segments import Segment
from cellc.frontends.stub import StubType
from cellc.frontends.unfold import Recorder
from cellc.rows import RaggedRefs, Refs
from cellc.unfolded import Stamped, Unfolded


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
    given, returned = data_of(runs, stamped), outputs_of(runs, stamped)
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
