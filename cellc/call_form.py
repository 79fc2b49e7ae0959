"""Call forms: a call graph as a form and numbers.

Duty: write every column of a call graph (which value does call j read?) as (repeated) arithmetic
runs over a source: "the outputs of cell 2, from call 0, by steps of 1, n - 1 of them". What is left
without the numbers is the same for all sizes of a family. Used by `cellc.family`; back again goes
`cellc.call_builder`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellc.calls import CallGraph
from cellc.ops import RowType
from cellc.rows import RaggedRefs, Refs, Windows

Floats = npt.NDArray[np.float64]
Source = tuple[Hashable, ...]
MAX_RUNS = 4096
RUN = 5  # numbers that describe a block of runs


@dataclass(frozen=True)
class CallForm:
    """A call graph without its numbers: equal for members of one family."""

    cells: tuple[str, ...]
    columns: tuple[tuple[Source, ...], ...]  # sources of each column's runs
    outputs: tuple[tuple[RowType, tuple[bool, ...]], ...]
    data: tuple[tuple[int, str, RowType, tuple[bool, ...], Windows | None], ...]


def describe(graph: CallGraph) -> tuple[CallForm, Floats] | None:
    """None where there are too many runs. The step of a run of one element is not a number."""
    sources: list[Source] = []
    source_of = np.full(graph.num_values, -1, np.int64)
    index_of = np.zeros(graph.num_values, np.int64)

    def put(values: Refs, source: Source, index: Any) -> None:
        source_of[values] = len(sources)
        index_of[values] = index
        sources.append(source)

    for data in graph.data:
        rows = np.arange(data.base, data.base + data.count)
        put(rows, ("data", data.leaf, data.windows), np.arange(data.count))
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
    form = CallForm(
        tuple(g.cell.key for g in graph.groups),
        tuple(columns),
        tuple((o.type, o.row_dims) for o in graph.outputs),
        tuple((d.leaf, d.name, d.type, d.row_dims, d.windows) for d in graph.data),
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


def constant_key(source: Any, index: int) -> Hashable:
    """The constant that is this one of its source."""
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
