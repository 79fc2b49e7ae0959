"""In place: writes into tensors while a forward runs on stubs.

Duty: `x[i] = v`, `x += v` and methods such as `masked_fill_` make a new row, which the stub is from
then on; whoever holds the stub sees it, as with tensors. A view is a stub of its own, so writing
through one, or to a tensor of which somebody holds a view, is refused. Stands between
`frontends.asking` and `frontends.unfold`.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from cellc.frontends.asking import Asker, has_bounds, is_number_tensor
from cellc.frontends.segments import Op
from cellc.frontends.signature import line_of, name_of
from cellc.frontends.stub import CannotUnfold, Stack, Stub, StubType

_VIEWS = frozenset(
    "__getitem__ view reshape transpose t permute squeeze unsqueeze expand expand_as view_as "
    "reshape_as select narrow unbind chunk split diagonal flatten unflatten movedim swapaxes "
    "T mT tensor_split".split()
)
_ROWS = frozenset("zeros ones full empty zeros_like ones_like full_like empty_like".split())
MOST_ROWS = 4096  # of a made tensor that is taken apart, for its rows to be written one by one


@functools.cache
def _functional(name: str) -> Callable[..., Any]:
    """What writes a copy, as a function."""
    method = getattr(torch.Tensor, name)

    def written(x: Any, *args: Any, **kwargs: Any) -> Any:
        copy = x.clone()
        method(copy, *args, **kwargs)
        return copy

    written.__name__ = name.strip("_")
    return written


class InPlace(Asker):
    """A recorder of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = False  # was a write ever seen: then views are looked after
        self._roots: dict[int, int] = {}  # by row of a view: that of the tensor
        self._views: dict[int, list[Stub]] = {}  # by row of the tensor

    def begin(self, script: Any, guesses: int, look_at: int) -> None:
        super().begin(script, guesses, look_at)
        self._roots, self._views = {}, {}
        if self.writing:
            self.repeating = False

    def write(self, name: str, x: Stub, args: Any, kwargs: Any, frame: Any) -> Stub:
        """Write into a tensor of the request, or one that the forward made."""
        if not self.on:
            raise CannotUnfold("a value of the request is used from outside")
        if not self.writing:  # what ran before did not look after views
            self.writing, self.relearn = True, True
            self.memos.clear()
        if name == "__setitem__" and type(args[0]) in (Stub, tuple):
            args = (_by_rows(args[0]), *args[1:])
        if name == "__setitem__" and has_bounds(args[0]):
            args = (self.bounds(args[0]), *args[1:])
        if name.startswith("__i") and x.id in self._roots and _is_stored_back(frame):
            plain: Stub = self.function(_functional(name), (x, *args), kwargs, frame)
            return plain  # `x[i] += v`: what follows is `x[i] = it`
        if x.id in self._roots and type(x) is Stub:
            raise CannotUnfold(
                "a tensor is written through a view of it; write t[i, j] = v", line_of(frame)
            )
        held = any(sys.getrefcount(view) > 3 for view in self._views.get(x.id, ()))
        if held and type(x) is Stub:
            raise CannotUnfold("a tensor is written while views of it are held", line_of(frame))
        if type(x) is Stack:
            self._write_rows(name, x, args, kwargs, frame)
        else:
            made = self.function(_functional(name), (x, *args), kwargs, frame)
            if made.type is not x.type:
                raise CannotUnfold(f"{name} changes a tensor's form", line_of(frame))
            x.id = made.id
        return x

    def _write_rows(self, name: str, x: Stack, args: Any, kwargs: Any, frame: Any) -> None:
        items = x.items
        if name == "__setitem__" and type(args[0]) is int and args[0] < len(items):
            item, value = items[args[0]], args[1]
            if type(value) is Stub and value.type is item.type:
                item.id = value.id
            else:
                self.write(name, item, (..., value), {}, frame)
            return
        made = self.function(_functional(name), (x, *args), kwargs, frame)
        rows = made.items if type(made) is Stack else [made[i] for i in range(len(items))]
        for item, row in zip(items, rows, strict=True):
            item.id = row.id

    def watch_view(self, func: Any, args: Any, result: Any) -> Any:
        """Remember views of a tensor; what is stacked is copied."""
        if not args or type(args[0]) is not Stub or name_of(func) not in _VIEWS:
            return result
        root = self._roots.get(args[0].id, args[0].id)
        for view in result if isinstance(result, (tuple, list)) else [result]:
            if type(view) is Stub and view.id != args[0].id:
                self._roots[view.id] = root
                self._views.setdefault(root, []).append(view)
        return result

    def in_rows(self, func: Any, op: Op, made: Any) -> Any:
        """A tensor made of one number, as a list of rows."""
        form = op.study.outputs[0].type
        if name_of(func) not in _ROWS or type(made) is not Stub or len(form.shape) < 2:
            return made
        key: Any = self.constants[made.id]
        if key[0] != "full" or not 0 < form.shape[0] <= MOST_ROWS:
            return made
        inner = StubType.of(form.shape[1:], form.dtype, form.device)
        row = self._constant_row(("full", tuple(form.shape[1:]), *key[2:]), inner)
        return Stack([Stub(row, inner) for _ in range(form.shape[0])])


def _by_rows(index: Any) -> Any:
    """An index that begins with a number in a tensor, for which PyTorch reads it, as one that
    begins with a row of such.
    """
    parts = index if type(index) is tuple else (index,)
    if not parts or not is_number_tensor(parts[0]):
        return index
    made = tuple([x.reshape(1) if is_number_tensor(x) else x for x in parts])
    return made if type(index) is tuple else made[0]


def _is_stored_back(frame: Any) -> bool:
    """Is the operator at a frame's instruction part of `x[i] op= v`?"""
    return frame.f_lasti in _stored_back(frame.f_code)


@functools.lru_cache(maxsize=4096)
def _stored_back(code: types.CodeType) -> frozenset[int]:
    found = set()
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for at, step in enumerate(steps):
        if step.opname == "BINARY_OP" or step.opname.startswith("INPLACE_"):
            for following in steps[at + 1 : at + 5]:
                if following.opname == "STORE_SUBSCR":
                    found.add(step.offset)
                if following.opname not in ("SWAP", "ROT_THREE", "ROT_TWO"):
                    break
    return frozenset(found)
