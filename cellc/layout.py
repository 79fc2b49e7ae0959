"""Layout: tensors of requests as rows of an arena, and rows as returned tensors.

Duty: which of a tensor's dimensions are positions and which a row's, both ways; used by
`cellc.state`, `cellc.gathering` and `cellc.writing`, which copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.plan import OutputRows
from cellc.rows import Windows

FEW = 64  # numbers
# Rows that were copied out of an arena: by numpy where it can, since most calls of torch cost more
# than all of numpy's here, after a kernel has filled the caches, and let another thread have Python
Held = torch.Tensor | npt.NDArray[Any]


def as_rows(
    tensor: torch.Tensor,
    row_dims: tuple[bool, ...],
    shape: tuple[int, ...],
    windows: Windows | None = None,
) -> torch.Tensor:
    """[rows, *shape]: positions flattened, in row-major order; or windows."""
    if windows is not None:
        pieces = tensor[windows.start :].unfold(0, windows.size, windows.step)
        return pieces.movedim(-1, 1)
    order, free = _order(row_dims)
    if order is not None:
        tensor = tensor.permute(order)
    if free == 1 and tensor.dim() == 1 + len(shape):
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:free]), *shape)


@cache
def _order(row_dims: tuple[bool, ...]) -> tuple[tuple[int, ...] | None, int]:
    """(dimensions in an order that has positions first, None where they are; how many those are)"""
    order = sorted(range(len(row_dims)), key=lambda i: row_dims[i])
    free = row_dims.count(False)
    return (None if order == list(range(len(order))) else tuple(order)), free


@cache
def in_order(row_dims: tuple[bool, ...], windows: Windows | None = None) -> bool:
    """Is the memory of a contiguous tensor of this layout its rows, one after the other?"""
    return windows is None and _order(row_dims)[0] is None


@cache
def are_rows(
    row_dims: tuple[bool, ...], shape: tuple[int, ...], windows: Windows | None = None
) -> bool:
    """Are tensors of this layout rows as they are?"""
    return in_order(row_dims, windows) and row_dims.count(False) == 1 == len(row_dims) - len(shape)


def outside(
    arrays: Sequence[npt.NDArray[Any]], flat: Sequence[torch.Tensor], bound: int
) -> list[int]:
    """Which tensors hold an index outside [0, bound); `arrays` are what they hold."""
    values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if 0 < values.size <= FEW:  # Python is faster
        listed = values.reshape(-1).tolist()
        if min(listed) >= 0 and max(listed) < bound:
            return []
    elif not values.size or values.view(f"u{values.dtype.itemsize}").max() < bound:
        return []
    return [i for i, t in enumerate(flat) if bool(((t < 0) | (t >= bound)).any())]


def arranged(flat: Held, rows: OutputRows) -> torch.Tensor:
    """Rows of a tensor, [positions flattened, *row], with dimensions in the model's order."""
    if len(rows.positions) != 1:
        flat = flat.reshape((*rows.positions, *flat.shape[1:]))
    return _tensor(_ordered(flat, rows.order))


def parted(flat: Held, rows: OutputRows, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Rows of tensors like one, [rows of all, *row], as these, with dimensions in the model's
    order. Each has a version of its own: autograd sees no writing to one in another.
    """
    if rows.kind[1] is None:
        return torch.unsafe_split_with_sizes(_tensor(flat), sizes)
    block = _block(flat, rows, len(sizes))
    if block.ndim == 1 or not block.shape[1]:
        return _tensor(block).unbind(0)
    whole = block.reshape((block.shape[0] * block.shape[1], *block.shape[2:]))
    return torch.unsafe_split_with_sizes(_tensor(whole), [block.shape[1]] * len(sizes))


def as_block(flat: Held, rows: OutputRows, count: int) -> torch.Tensor:
    """[count * positions flattened, *row] as [count, ..]: tensors with dimensions in the model's
    order.
    """
    return _tensor(_block(flat, rows, count))


def _block(flat: Held, rows: OutputRows, count: int) -> Held:
    order = None if rows.order is None else (0, *(1 + d for d in rows.order))
    return _ordered(flat.reshape((count, *rows.positions, *flat.shape[1:])), order)


def _ordered(held: Held, order: tuple[int, ...] | None) -> Held:
    if order is None:
        return held
    if isinstance(held, np.ndarray):
        return np.ascontiguousarray(held.transpose(order))
    return held.permute(order).contiguous()


def _tensor(held: Held) -> torch.Tensor:
    return torch.from_numpy(held) if isinstance(held, np.ndarray) else held
