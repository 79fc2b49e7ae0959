"""Choosing: which rows an index or a mask selects, where its values are data.

Duty: indices that PyTorch would read become operations (`x[i]` with a number in a tensor selects a
row), masks and bounds of slices are asked for, value by value. Stands between `frontends.asking`
and `frontends.sharing`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch

from cellc.frontends.asking import Asker, is_tensor
from cellc.frontends.stub import Stack, Stub, StubType

MASKED = {torch.masked_select, torch.Tensor.masked_select}
NONZERO = {torch.nonzero, torch.Tensor.nonzero, torch.where}
CHOOSING = {torch.Tensor.__getitem__, *MASKED, *NONZERO}  # as many results as a mask says


def is_mask(x: Any) -> bool:
    """A tensor of bools, whose values say how many are chosen."""
    return type(x) in (Stub, Stack) and x.dtype is torch.bool and len(x.type.shape) > 0


def has_bounds(index: Any) -> bool:
    """Are there tensors that say where a slice begins or ends?"""
    if type(index) is slice:
        return any(type(y) in (Stub, Stack) for y in (index.start, index.stop, index.step))
    return type(index) is tuple and any(map(has_bounds, index))


def is_number_tensor(x: Any) -> bool:
    """A tensor of one integer without dimensions."""
    if type(x) is not Stub or x.type.shape:
        return False
    return not x.dtype.is_floating_point and x.dtype is not torch.bool


class Chooser(Asker):
    """A recorder of what is chosen by value. `function` records an operation."""

    def bounds(self, index: Any) -> Any:
        """An index whose slices have numbers for bounds: those of tensors are asked for."""
        if type(index) is tuple:
            return tuple(map(self.bounds, index))
        if type(index) is not slice:
            return index
        parts = (index.start, index.stop, index.step)
        return slice(*[int(self._number(y)) if type(y) in (Stub, Stack) else y for y in parts])

    def selected(self, x: Any, index: Any) -> Any:
        """`x[index]` where numbers in the index are tensors: PyTorch reads them; rows are selected
        instead.
        """
        parts = list(index) if type(index) is tuple else [index]
        tensors = {k: part for k, part in enumerate(parts) if is_number_tensor(part)}
        if any(
            part is Ellipsis or is_tensor(part) for k, part in enumerate(parts) if k not in tensors
        ):
            return None
        dims = {k: sum(type(p) is not int for p in parts[:k]) for k in tensors}
        for k in tensors:
            parts[k] = slice(None)
        if any(part != slice(None) for part in parts):
            x = x[tuple(parts)]
        for k in sorted(tensors, reverse=True):
            place, dim = tensors[k], dims[k]
            size = x.shape[dim]
            place = torch.where(place < 0, place + size, place)
            x = torch.index_select(x, dim, place.reshape(1)).squeeze(dim)
        return x

    def chosen(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a mask chooses: each of its values is asked for. None where no mask does."""
        if func in NONZERO:
            return self._nonzero(func, args, kwargs)
        x, mask = args[:2]
        if type(mask) is tuple and any(map(is_mask, mask)):
            return x[self._without_masks(mask)]
        if kwargs or not is_mask(mask):
            return None
        dims = len(mask.type.shape)
        if func not in MASKED:
            if mask.shape != x.shape[:dims]:
                return None
        elif mask.shape != x.shape:
            x, mask = torch.broadcast_tensors(x, mask)  # type: ignore[no-untyped-call]
            return self.chosen(func, (x, mask), {})
        places = self._places(mask)
        if dims != 1:
            x = x.reshape(-1, *x.shape[dims:])
        sizes = list(itertools.accumulate(reversed(mask.shape[1:]), operator.mul, initial=1))[::-1]
        rows = [sum(map(operator.mul, place, sizes)) for place in places]
        if not rows:
            return x[0:0] if type(x) is not Stack else torch.zeros((0, *x.shape[1:]), dtype=x.dtype)
        return torch.stack([x[i] for i in rows])

    def _without_masks(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        """An index with the places that masks choose."""
        parts: list[Any] = []
        for part in index:
            parts += self._nonzero(torch.where, (part,), {}) if is_mask(part) else [part]
        return tuple(parts)

    def _nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        apart = func is torch.where or kwargs.get("as_tuple", False)
        if len(args) != 1 or set(kwargs) - {"as_tuple"} or not args[0].type.shape:
            return None
        dims, places = len(args[0].type.shape), self._places(args[0])
        if not apart:
            return self._indices([i for place in places for i in place], (len(places), dims))
        return tuple([self._indices([p[d] for p in places], (len(places),)) for d in range(dims)])

    def _indices(self, numbers: list[int], shape: tuple[int, ...]) -> Any:
        frame = self.user_frame()
        if not numbers:
            return self.function(torch.zeros, (shape,), {"dtype": torch.int64}, frame)
        form = StubType.of(shape, torch.int64, self.device)
        return Stub(self._constant_row(("rows", shape, "i64", tuple(numbers)), form), form)

    def _places(self, mask: Any) -> list[tuple[int, ...]]:
        """Where a tensor is not zero."""

        def found(x: Any, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            if x.type.shape:
                for i, y in enumerate(x):
                    yield from found(y, (*place, i))
            elif self._truth(x):
                yield place

        return list(found(mask, ()))
