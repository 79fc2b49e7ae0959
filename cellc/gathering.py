"""Gathering: what many requests return, copied out of arenas together.

Duty: returned tensors of requests that end together, in few copies: one reads an output of many
requests, and each gets its part. Used by `cellc.flight`; a request that ends alone is read by
`cellc.state`.

Memory: tensors never overlap, none lies in an arena, and what is done in place to one is nothing to
the others, their versions (`torch.Tensor._version`) included. One piece of memory holds one output
of several requests, GATHERED bytes at most: who keeps a small tensor keeps no more than that, and
who keeps one output of each request nothing of the others. A larger tensor has its own memory; so
has one of over SMALL bytes where requests came one by one, whose results go to different hands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cellc.layout import parted
from cellc.plan import I64, OutputRows
from cellc.state import Arenas

GATHERED = 1 << 20  # bytes of a piece of memory that tensors share
SMALL = 1 << 14  # bytes of a tensor that shares one with requests of other callers


class _Column(NamedTuple):
    """One output of some requests, alike but for the number of rows."""

    leaf: int
    members: I64  # positions of the requests
    rows: Sequence[OutputRows]
    sizes: I64


def gather(
    arenas: Arenas,
    outputs: Sequence[Sequence[OutputRows]],
    bases: I64,
    together: npt.NDArray[np.bool_],
) -> Sequence[Sequence[torch.Tensor]]:
    """Returned tensors of each request, whose regions begin at `bases` ([requests, row types]).
    `together`: which came in one call with others, that gets the results of all.
    """
    made: list[list[Any]] = [[None] * len(given) for given in outputs]
    most = np.where(together, GATHERED, SMALL)
    shared: list[_Column] = []
    for column in _columns(outputs):
        type = column.rows[0].type
        alone = column.sizes * arenas.row_bytes(type) > most[column.members]
        if alone.any():
            for k in np.flatnonzero(alone).tolist():
                owner = column.members[k]
                wanted = [(column.rows[k], int(bases[owner, type]))]
                made[owner][column.leaf] = arenas.read(wanted)[0]
            column = _taken(column, np.flatnonzero(~alone))
        if len(column.rows):
            shared.append(column)
    if not shared:
        return made
    slots = [_slots(column, bases[column.members, column.rows[0].type]) for column in shared]
    index, start = arenas.index(slots[0] if len(slots) == 1 else np.concatenate(slots)), 0
    for column in shared:
        leaf, first, sizes = column.leaf, column.rows[0], column.sizes
        for begin, end in _pieces(sizes * arenas.row_bytes(first.type)):
            stop = start + int(sizes[begin:end].sum())
            flat = arenas.take(first.type, index[start:stop])
            tensors = parted(flat, first, sizes[begin:end].tolist())
            for owner, tensor in zip(column.members[begin:end].tolist(), tensors, strict=True):
                made[owner][leaf] = tensor
            start = stop
    return made


def _columns(outputs: Sequence[Sequence[OutputRows]]) -> Iterator[_Column]:
    """Outputs of one place and kind of all requests that have it."""
    forms = {id(given): tuple([rows.kind for rows in given]) for given in outputs}
    if len(set(forms.values())) == 1:
        everyone = np.arange(len(outputs))
        for leaf, column in enumerate(zip(*outputs, strict=True)):
            yield _Column(leaf, everyone, column, _sizes(column))
        return
    found: dict[Any, tuple[list[int], list[OutputRows]]] = {}
    for i, given in enumerate(outputs):
        for key, rows in zip(enumerate(forms[id(given)]), given, strict=True):
            owners, alike = found.setdefault(key, ([], []))
            owners.append(i)
            alike.append(rows)
    for (leaf, _), (owners, alike) in found.items():
        yield _Column(leaf, np.array(owners), alike, _sizes(alike))


def _sizes(rows: Sequence[OutputRows]) -> I64:
    return np.array([len(r.slots) for r in rows], np.int64)


def _taken(column: _Column, which: I64) -> _Column:
    rows = [column.rows[k] for k in which.tolist()]
    return _Column(column.leaf, column.members[which], rows, column.sizes[which])


def _slots(column: _Column, bases: I64) -> I64:
    """Where the rows are, request by request."""
    rows, first = column.rows, column.rows[0]
    if all(r is first for r in rows):
        slots: I64 = (first.slots + first.owned * bases[:, None]).reshape(-1)
        return slots
    owned = np.concatenate([r.owned for r in rows])
    slots = np.concatenate([r.slots for r in rows]) + owned * np.repeat(bases, column.sizes)
    return slots


def _pieces(nbytes: I64) -> Iterator[tuple[int, int]]:
    """Ranges of tensors that share a piece of memory.

    >>> list(_pieces(np.array([GATHERED // 2, GATHERED // 2, 1, 2, GATHERED])))
    [(0, 2), (2, 4), (4, 5)]
    """
    ends = np.cumsum(nbytes)
    begin, before = 0, 0
    while begin < len(ends):
        end = max(int(np.searchsorted(ends, before + GATHERED, "right")), begin + 1)
        yield begin, end
        begin, before = end, int(ends[end - 1])
