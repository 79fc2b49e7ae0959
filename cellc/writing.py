"""Writing: tensors of requests into rows of arenas.

Duty: copy tensors that are laid out alike to the slots that their requests have, by the way that is
fastest for their size and number, and find those that hold indices which nothing has. Used by
`cellc.loading`, which finds out what is alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cellc.arithmetic import Arithmetic
from cellc.dtypes import TORCH_DTYPES
from cellc.layout import are_rows, as_rows, in_order, outside
from cellc.ops import RowType
from cellc.plan import I64, DataRows, ragged_range
from cellc.state import Arenas

SMALL_DATA = 1 << 12  # bytes of a request's tensor
STACKED = 1 << 14  # elements at once: they stay in cache, and torch leaves its threads asleep
FEW = 16  # tensors that are copied one by one
_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Writer:
    """To some arenas; `arithmetic` copies memory."""

    def __init__(self, arenas: Arenas, arithmetic: Arithmetic) -> None:
        self._arenas, self._arithmetic = arenas, arithmetic

    def write(
        self, rows: DataRows, starts: I64, counts: I64, tensors: Sequence[torch.Tensor]
    ) -> list[int]:
        """Copy tensors of several requests, so many rows each, to slots from `starts` on; `rows`
        says how they are laid out.

        Returns the positions of those that hold an index outside [0, bound).
        """
        type, arena, view = self._arenas.arena(rows.type)
        form = rows.row_dims, type.shape, rows.windows
        many, large = len(tensors) > FEW, type.nbytes * int(counts[0]) > SMALL_DATA
        if many and rows.count == 1 and rows.windows is None:
            return self._write_together(rows, starts, tensors)
        on_cpu = arena.is_cpu and all([t.is_cpu for t in tensors])
        whole = many and large and on_cpu and rows.bound is None and in_order(form[0], form[2])
        if whole and self._copied(type, arena, starts, counts, tensors):
            return []
        flat = list(tensors) if are_rows(*form) else [as_rows(t, *form) for t in tensors]
        if view is None or not on_cpu:
            slots = torch.from_numpy(ragged_range(starts, counts)).to(arena.device)
            joined = torch.cat(flat).detach()
            arena.index_copy_(0, slots, joined.to(arena.device))
            return [] if rows.bound is None else outside([joined.cpu().numpy()], flat, rows.bound)
        if large or not many:
            arrays = [t.detach().numpy() for t in flat]
            for start, part in zip(starts.tolist(), arrays, strict=True):
                view[start : start + len(part)] = part
        else:
            arrays = [torch.cat(flat).detach().numpy()]
            view[ragged_range(starts, counts)] = arrays[0]
        return [] if rows.bound is None else outside(arrays, flat, rows.bound)

    def write_one(self, rows: DataRows, start: int, tensor: torch.Tensor) -> bool:
        """`write` of one tensor; False where it takes more than a copy, or is wrong."""
        type, _, view = self._arenas.arena(rows.type)
        if view is None or not tensor.is_cpu:
            return False
        form = rows.row_dims, type.shape, rows.windows
        flat = tensor if are_rows(*form) else as_rows(tensor, *form)
        part = (flat.detach() if flat.requires_grad else flat).numpy()
        view[start : start + len(part)] = part
        return rows.bound is None or not outside([part], [flat], rows.bound)

    def _copied(
        self,
        type: RowType,
        arena: torch.Tensor,
        starts: I64,
        counts: I64,
        tensors: Sequence[torch.Tensor],
    ) -> bool:
        """`write` of tensors whose memory is rows of the arena; False where one's is not."""
        kind, dtype = torch.Tensor, TORCH_DTYPES[type.dtype]
        if not {t.__class__ for t in tensors} <= _PLAIN or any(map(kind.is_neg, tensors)):
            return False
        if not all([t.is_contiguous() and t.dtype is dtype for t in tensors]):
            return False
        if list(map(kind.numel, tensors)) != (counts * math.prod(type.shape)).tolist():
            return False
        sources = np.array(list(map(kind.data_ptr, tensors)), np.int64)
        targets, sizes = arena.data_ptr() + starts * type.nbytes, counts * type.nbytes
        self._arithmetic.copy(np.stack([targets, sources, sizes], 1))
        return True

    def _write_together(
        self, rows: DataRows, slots: I64, tensors: Sequence[torch.Tensor]
    ) -> list[int]:
        """`write` of many tensors of one row each."""
        type, arena, view = self._arenas.arena(rows.type)
        shape, wrong = type.shape, []
        together = max(1, STACKED // max(1, type.numel)) if arena.is_cpu else len(tensors)
        for at in range(0, len(tensors), together):
            part, to = tensors[at : at + together], slots[at : at + together]
            # where positions are has no say: there is one of each
            values = torch.stack([*part]).detach().reshape(-1, *shape)
            if view is not None:
                view[to] = values.cpu().numpy()
            else:
                index = torch.from_numpy(to).to(arena.device)
                arena.index_copy_(0, index, values.to(arena.device))
            if rows.bound is not None:
                given = values.cpu().numpy()
                outside = (given < 0) | (given >= rows.bound)
                found = np.flatnonzero(outside.reshape(len(given), -1).any(1))
                wrong += (found + at).tolist()
        return wrong

    def write_rows(
        self, rows: DataRows, starts: I64, blocks: Sequence[torch.Tensor], numbers: Sequence[int]
    ) -> bool:
        """`write` of tensors that are rows of blocks, of which many share one; False where that is
        not to be had so.
        """
        type, _, view = self._arenas.arena(rows.type)
        if view is None or rows.count != 1 or rows.bound is not None or rows.windows is not None:
            return False
        members: dict[int, list[int]] = {}
        for k, block in enumerate(blocks):
            members.setdefault(id(block), []).append(k)
        if len(members) * FEW > len(blocks) + FEW:
            return False
        for those in members.values():
            values = blocks[those[0]].numpy().reshape(-1, *type.shape)
            view[starts[those]] = values[[numbers[k] for k in those]]
        return True
