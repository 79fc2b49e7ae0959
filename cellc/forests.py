"""Forests: the calls of many unfolded requests, written by numpy.

Duty: copy the template of every segment for each of its instances, with the rows that the instance
reads and makes in place of the template's values. Comes in from `cellc.unfolder`, goes to
`cellc.plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellc.calls import CallGraph, CallGroup, Forest, join, take
from cellc.dtypes import DTYPE_NAMES
from cellc.frontends.segments import OutType, Segment
from cellc.frontends.stub import StubType
from cellc.frontends.stubbing import Part
from cellc.frontends.unfold import Recorder, Returned
from cellc.ops import RowType
from cellc.request import Request
from cellc.rows import DataSource, RaggedRefs, Refs, RowOutput


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
    returned: Returned | None = None  # None: it failed
    reason: str | None = None  # why it cannot be unfolded, where that is why


@dataclass
class Template:
    """A segment as a call graph of its own: values of its inputs, of its constants, and others."""

    graph: CallGraph
    inputs: list[int]
    constants: list[tuple[int, Hashable]]
    results: list[tuple[int, int]]  # (row of the segment, value)
    inner: Refs  # values that its calls make
    version: int = 0  # of the roles that it is made by


def make_forest(
    recorder: Recorder, runs: Sequence[Unfolded], template_of: Callable[[Segment], Template]
) -> Forest:
    """Calls of the recorded requests: an instance of a segment is a copy of its template."""
    starts = np.array([run.base for run in runs], np.int64)
    next_value = recorder.next_row
    constants: dict[Hashable, int] = {}
    constant_rows = np.zeros(len(recorder.constants) + 2, np.int64)
    for row, key in recorder.constants.items():
        if key not in constants:
            constants[key] = next_value
            next_value += 1
        constant_rows[-row] = constants[key]
    alias: list[tuple[Refs, Refs]] = []
    pieces: dict[str, list[tuple[CallGroup, Refs, Refs]]] = {}

    def values_of(rows: Refs) -> Refs:
        return np.where(rows < 0, constant_rows[np.where(rows < 0, -rows, 0)], rows)

    for segment in recorder.used:
        template = template_of(segment)
        reads, first = segment.instances()
        n = len(first)
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
    groups, all_owners = [], []
    for _, parts in sorted(pieces.items()):  # in one order, whatever came first
        group, owners = _joined(parts)
        if alias:
            group.inputs = [
                RaggedRefs(c.offsets, final[c.refs]) if isinstance(c, RaggedRefs) else final[c]
                for c in group.inputs
            ]
        groups.append(group)
        all_owners.append(owners)
    data, data_owners, output_owners = [], [], []
    result_rows: list[int] = []
    forms: list[tuple[int, OutType]] = []
    for r, run in enumerate(runs):
        for leaf, base, kind, count, name in run.data:
            data.append(_source(leaf, base, kind, count, name))
            data_owners.append(r)
        if run.returned is not None:
            for returned_rows, out in run.returned.tensors:
                result_rows += returned_rows
                forms.append((len(returned_rows), out))
                output_owners.append(r)
    refs = final[values_of(np.array(result_rows, np.int64))]
    outputs, at = [], 0
    for size, out in forms:
        outputs.append(_output(refs[at : at + size], out))
        at += size
    graph = CallGraph(groups, data, constants, outputs, next_value)
    return Forest(graph, len(runs), all_owners, data_owners, output_owners)


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


def _joined(parts: Sequence[tuple[CallGroup, Refs, Refs]]) -> tuple[CallGroup, Refs]:
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
        owners = owners[order]
    return group, owners


@functools.cache
def _row_type(kind: StubType) -> RowType:
    return RowType(kind.shape, DTYPE_NAMES[kind.dtype])


def _source(leaf: int, base: int, kind: StubType, count: int, name: str) -> DataSource:
    type = _row_type(kind)
    rows = (True,) * len(kind.shape)
    if count < 0:
        return DataSource(leaf, name, base, 1, type, rows)
    return DataSource(leaf, name, base, count, type, (False, *rows))


def _output(refs: Refs, out: OutType) -> RowOutput:
    shape = out.type.shape
    if out.rows < 0:
        return RowOutput(refs.reshape(()), _row_type(out.type), shape, (True,) * len(shape))
    dims = (False, *[True] * (len(shape) - 1))
    type = RowType(shape[1:], DTYPE_NAMES[out.type.dtype])
    return RowOutput(refs, type, shape, dims)
