"""What unfolded requests are given and return, of many requests in one column.

Duty: for every leaf and every output the rows of all requests that have it. Used by
`cellc.forests`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from cellc.calls import DataColumn, OutputColumn
from cellc.dtypes import DTYPE_NAMES
from cellc.frontends.segments import OutType
from cellc.frontends.stub import StubType
from cellc.ops import RowType
from cellc.rows import Refs
from cellc.unfolded import DRAWN, Stamped, Unfolded


def data_of(runs: Sequence[Unfolded], stamped: Sequence[Stamped]) -> list[DataColumn]:
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
        return DataColumn(leaf, name, row_type(kind), (False, *rows), bases, counts, owners)
    return DataColumn(leaf, name, row_type(kind), rows, bases, np.ones_like(counts), owners)


def outputs_of(runs: Sequence[Unfolded], stamped: Sequence[Stamped]) -> list[OutputColumn]:
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
        return OutputColumn(rows, row_type(out.type), shape, (True,) * len(shape), owners)
    dims = (False, *[True] * (len(shape) - 1))
    type = RowType(shape[1:], DTYPE_NAMES[out.type.dtype])
    return OutputColumn(rows, type, shape, dims, owners)


@functools.cache
def row_type(kind: StubType) -> RowType:
    """Of such rows."""
    return RowType(kind.shape, DTYPE_NAMES[kind.dtype])
