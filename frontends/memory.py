"""Memory: which tensors of a forward share theirs, and how each of them shows it.

Duty: what PyTorch would have laid where. A `Memory` is one row that may be written in place; a
`Place` is how a stub shows one (or several on end, for a stack of rows): strides and an offset.
What an operation's results show is learned by running it on true tensors of the same layout
(`shown_by`), never from its name. `taken` and `put` read and write any such view, as functions.
Used by `frontends.inplace`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils import _pytree as pytree

from cellc.frontends.placeholder import modes_off, row_major
from cellc.frontends.stub import Stub

Ints: TypeAlias = tuple[int, ...]
FRESH, OUTSIDE = -1, -2  # memory of its own; of the model


class Memory:
    """What may be written: `value` holds what it is now, laid out by `strides`; `refusal` says why
    it must not be written; `views` are the stubs that show it.
    """

    __slots__ = ("refusal", "strides", "value", "views")

    def __init__(self, value: Stub, strides: Ints, refusal: str = "") -> None:
        self.value, self.strides, self.refusal = value, strides, refusal
        self.views: list[weakref.ref[Stub]] = []

    def live(self) -> list[Stub]:
        """The stubs that still show it."""
        found = [(ref, ref()) for ref in self.views]
        self.views = [ref for ref, view in found if view is not None]
        return [view for _, view in found if view is not None]


class Place(NamedTuple):
    """How a stub shows memory: `memories` on end, from `offset` on, by `strides`, which are None
    where numbers in tensors choose it: `again` is what of, and by which; or where nobody knows.
    """

    memories: tuple[Memory, ...]
    strides: Ints | None
    offset: int = 0
    again: tuple[Stub, Any] | None = None


class Shown(NamedTuple):
    """What a result of an operation shows: the memory of an argument, by its number, or FRESH (one
    `group` each), or OUTSIDE; the offset is counted from where the argument begins.
    """

    source: int
    strides: Ints
    offset: int
    group: int = 0


def strides_of(shape: Sequence[int]) -> Ints:
    """Of a contiguous tensor."""
    return row_major(shape, torch.float32).stride


def elements(shape: Sequence[int], strides: Ints, offset: int) -> list[int]:
    """Where each element of a view lies, in order."""
    found = [offset]
    for n, step in zip(shape, strides, strict=True):
        found = [at + i * step for at in found for i in range(n)]
    return found


def bounds(shape: Sequence[int], strides: Ints, offset: int) -> tuple[int, int]:
    """First element of a view in memory, and one after the last."""
    if 0 in shape:
        return offset, offset
    return offset, offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def overlap(a: tuple[Sequence[int], Ints, int], b: tuple[Sequence[int], Ints, int]) -> bool:
    """Have two views of one memory elements in common?"""
    (first, end), (other, other_end) = bounds(*a), bounds(*b)
    if end <= other or other_end <= first:
        return False
    return not set(elements(*a)).isdisjoint(elements(*b))


def repeats(shape: Sequence[int], strides: Ints) -> bool:
    """Does a view show an element twice?"""
    end = 1
    for step, n in sorted(zip(strides, shape, strict=True)):
        if n > 1:
            if step < end:
                all_of_them = elements(shape, strides, 0)
                return len(set(all_of_them)) < len(all_of_them)
            end = step * (n - 1) + end
    return False


# -- what operations show --


def shown_by(
    run: Callable[..., Any], call: Any, forms: Sequence[tuple[Ints, Any, Ints, int]]
) -> tuple[Shown, ...] | None:
    """What the results of a call show, from its arguments' (shape, dtype, strides, offset), which
    stand in `call`, (args, kwargs), as `Slot`s do; None where it cannot be run like that.
    """
    for fill in (0, 1):
        try:
            with modes_off(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _shown(run, call, [_example(form, fill) for form in forms])
        except Exception:
            continue
    return None


def _example(form: tuple[Ints, Any, Ints, int], fill: int) -> torch.Tensor:
    shape, kind, strides, offset = form
    memory = torch.full((bounds(shape, strides, offset)[1],), fill, dtype=kind[0], device=kind[1])
    return memory.as_strided(shape, strides, offset)


class Here(NamedTuple):
    """Stands for the tensor of this number in a call."""

    at: int


def _filled(x: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if type(x) is Here:
        return tensors[x.at]
    if type(x) is list:
        return [_filled(y, tensors) for y in x]
    if type(x) is dict:
        return {k: _filled(y, tensors) for k, y in x.items()}
    if isinstance(x, tuple) and type(x) is not torch.Size:
        made = [_filled(y, tensors) for y in x]
        return tuple(made) if type(x) is tuple else type(x)(*made)
    return x


def _memory_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _shown(
    run: Callable[..., Any], call: Any, tensors: Sequence[torch.Tensor]
) -> tuple[Shown, ...]:
    def results() -> list[torch.Tensor]:
        args, kwargs = _filled(call, tensors)
        leaves = pytree.tree_leaves(run(*args, **kwargs))
        return [x for x in leaves if isinstance(x, torch.Tensor)]

    made = results()
    given = {_memory_of(x): k for k, x in enumerate(tensors)}
    kept: set[int] = set()
    if any(_memory_of(x) not in given for x in made):
        again = results()
        kept = {_memory_of(x) for x in again} & {_memory_of(x) for x in made}
    groups: dict[int, int] = {}
    found = []
    for x in made:
        memory, strides, at = _memory_of(x), tuple(x.stride()), int(x.storage_offset())
        if memory in given:
            k = given[memory]
            found.append(Shown(k, strides, at - int(tensors[k].storage_offset())))
        elif memory in kept:
            found.append(Shown(OUTSIDE, strides, 0))
        else:
            group = groups.setdefault(memory, len(groups))
            found.append(Shown(FRESH, strides, at, group))
    return tuple(found)


# -- views as functions --


def taken(base: torch.Tensor, laid: Ints, shape: Ints, strides: Ints, offset: int) -> torch.Tensor:
    """A view of a memory that holds `base`, laid out by `laid`."""
    index = _box(base.shape, laid, shape, strides, offset)
    if index is not None:
        slices, order = index
        return base[slices].permute(order).reshape(shape)
    flat = _flat(base, laid)
    size = torch.Size(shape).numel()
    if strides == strides_of(shape):
        return flat[offset : offset + size].reshape(shape)
    where = torch.tensor(elements(shape, strides, offset), device=base.device)
    return flat.index_select(0, where).reshape(shape)


def put(
    base: torch.Tensor, new: torch.Tensor, laid: Ints, strides: Ints, offset: int
) -> torch.Tensor:
    """What a memory that holds `base` holds when a view of it is written."""
    shape = tuple(new.shape)
    index = _box(base.shape, laid, shape, strides, offset)
    if index is not None:
        slices, order = index
        out = base.clone()
        long = new.reshape([n for n in shape if n > 1])
        back = sorted(range(len(order)), key=order.__getitem__)
        out[slices] = long.permute(back)
        return out
    flat = _flat(base, laid).clone()
    size = torch.Size(shape).numel()
    if strides == strides_of(shape):
        if size == flat.shape[0]:
            flat = new.reshape(-1)
        else:
            flat[offset : offset + size] = new.reshape(-1)
    else:
        where = torch.tensor(elements(shape, strides, offset), device=base.device)
        flat = flat.index_copy(0, where, new.reshape(-1))
    order = _order(laid)
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([base.shape[d] for d in order]).permute(back).clone()


def fits(base: Ints, laid: Ints, shape: Ints, strides: Ints, offset: int) -> bool:
    """Can a view be taken of a memory like that?"""
    return _box(base, laid, shape, strides, offset) is not None or _dense(base, laid)


def _order(laid: Ints) -> list[int]:
    return sorted(range(len(laid)), key=lambda d: -laid[d])


def _dense(shape: Sequence[int], laid: Ints) -> bool:
    """No gaps, nothing twice."""
    end = 1
    for step, n in sorted(zip(laid, shape, strict=True)):
        if n > 1:
            if step != end:
                return False
            end *= n
    return True


def _flat(base: torch.Tensor, laid: Ints) -> torch.Tensor:
    return base.permute(_order(laid)).reshape(-1)


def _box(
    base: Sequence[int], laid: Ints, shape: Ints, strides: Ints, offset: int
) -> tuple[tuple[Any, ...], list[int]] | None:
    """(index of a box in the memory's tensor, order of its dimensions) that shows what a view does,
    dimensions of one element aside; None where no box does.
    """
    if 0 in shape or 0 in base:
        return None
    index: list[Any] = [0] * len(base)
    for d in _order(laid):
        if base[d] > 1:
            if laid[d] == 0:
                return None
            index[d], offset = divmod(offset, laid[d])
            if index[d] >= base[d]:
                return None
    if offset:
        return None
    dims = []
    for n, step in zip(shape, strides, strict=True):
        if n == 1:
            continue
        for d in _order(laid):
            far = step // laid[d] if laid[d] else 0
            if (
                base[d] > 1
                and type(index[d]) is int
                and far
                and step == far * laid[d]
                and index[d] + (n - 1) * far < base[d]
            ):
                index[d] = slice(index[d], index[d] + (n - 1) * far + 1, far)
                dims.append(d)
                break
        else:
            return None
    rank = sorted(dims)
    return tuple(index), [rank.index(d) for d in dims]
