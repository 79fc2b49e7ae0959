"""Gathering: what many requests return, copied out of arenas together.

Duty: returned tensors of requests that end together, in few copies: one reads an output of many
requests, and each gets its part. Used by `cellc.flight`; a request that ends alone is read by
`cellc.state`.

Memory: tensors never overlap, none lies in an arena, and what is done in place to one is nothing to
the others, nor (but for tensors without dimensions, views of one) to what autograd knows of them.
One piece of memory holds one output of several requests, GATHERED bytes at most: who keeps a small
tensor keeps no more than that, and who keeps one output of each request nothing of the others. A
larger tensor has its own memory; so has one of over SMALL_OUTPUT bytes where requests came one by
one, whose results go to different hands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch

from cellc.layout import parted
from cellc.plan import I64, OutputRows, ragged_range
from cellc.state import SMALL_OUTPUT, Arenas

GATHERED = 1 << 20  # bytes of a piece of memory that tensors share


class _Column(NamedTuple):
    """One output of some requests, alike but for the number of rows."""

    leaf: int
    owners: Sequence[int]  # positions of the requests
    rows: Sequence[OutputRows]
    bases: I64  # where the regions of their row type begin
    sizes: I64
    nbytes: I64

    def slots(self) -> I64:
        """Where the rows are, request by request."""
        firsts = np.array([rows.first for rows in self.rows])
        if (firsts >= 0).all():
            return ragged_range(firsts + self.bases, self.sizes)
        owned = np.concatenate([rows.owned for rows in self.rows])
        slots = np.concatenate([rows.slots for rows in self.rows])
        made: I64 = slots + owned * np.repeat(self.bases, self.sizes)
        return made

    def only(self, which: I64) -> _Column:
        """Of some of these requests."""
        places = which.tolist()
        owners, rows = ([column[k] for k in places] for column in (self.owners, self.rows))
        return _Column(self.leaf, owners, rows, *(array[which] for array in self[3:]))


def gather(
    arenas: Arenas,
    outputs: Sequence[Sequence[OutputRows]],
    bases: I64,
    together: Sequence[bool],
) -> Sequence[Sequence[torch.Tensor]]:
    """Returned tensors of each request, whose regions begin at `bases` ([requests, row types]).
    `together`: which came in one call with others, that gets the results of all.
    """
    made: list[list[Any]] = [[None] * len(given) for given in outputs]
    shared: list[_Column] = []
    for column in _columns(arenas, outputs, bases):
        if int(column.nbytes.max()) > SMALL_OUTPUT:
            most = np.where([together[i] for i in column.owners], GATHERED, SMALL_OUTPUT)
            alone = column.nbytes > most
            for k in np.flatnonzero(alone).tolist():
                wanted = [(column.rows[k], int(column.bases[k]))]
                made[column.owners[k]][column.leaf] = arenas.read(wanted)[0]
            column = column.only(np.flatnonzero(~alone)) if alone.any() else column
        if len(column.rows):
            shared.append(column)
    if not shared:
        return made
    slots = [column.slots() for column in shared]
    index, start = arenas.index(slots[0] if len(slots) == 1 else np.concatenate(slots)), 0
    for column in shared:
        leaf, first, sizes = column.leaf, column.rows[0], column.sizes.tolist()
        tensors: list[torch.Tensor] = []
        for begin, end in _pieces(column.nbytes):
            stop = start + sum(sizes[begin:end])
            tensors += parted(arenas.take(first.type, index[start:stop]), first, sizes[begin:end])
            start = stop
        for owner, tensor in zip(column.owners, tensors, strict=True):
            made[owner][leaf] = tensor
    return made


def _columns(
    arenas: Arenas, outputs: Sequence[Sequence[OutputRows]], bases: I64
) -> Iterator[_Column]:
    """Outputs of one place and kind of all requests that have it."""
    for leaf, column in enumerate(zip_longest(*outputs)):
        kinds = [rows and rows.kind for rows in column]
        if kinds.count(kinds[0]) == len(kinds):
            yield _column(arenas, leaf, range(len(column)), column, bases)
            continue
        alike: dict[Any, list[int]] = {}
        for i, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(i)
        alike.pop(None, None)  # those that return fewer
        for owners in alike.values():
            yield _column(arenas, leaf, owners, [column[i] for i in owners], bases[owners])


def _column(
    arenas: Arenas, leaf: int, owners: Sequence[int], rows: Sequence[OutputRows], bases: I64
) -> _Column:
    type = rows[0].type
    sizes = np.array([len(r.slots) for r in rows])
    nbytes = sizes * arenas.row_bytes(type)
    return _Column(leaf, owners, rows, bases[:, type], sizes, nbytes)


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
