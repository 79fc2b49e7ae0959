"""In place: writes into tensors while a forward runs on stubs.

Duty: `x[i] = v`, `x += v` and methods such as `masked_fill_` make a new row, which the stub is from
then on; whoever holds the stub sees it, as with tensors. Other stubs that show the same memory
(`frontends.memory`) are rows made anew from what it holds then. What PyTorch would change outside
of the forward (an argument, a weight), and what cannot be told, is refused. Stands between
`frontends.sharing` and `frontends.learning`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from cellc.frontends.asking import Asks, is_tensor
from cellc.frontends.choosing import has_bounds, is_number_tensor
from cellc.frontends.memory import Here, Place, overlap, put, repeats, shown_by, taken
from cellc.frontends.reads import holds_read
from cellc.frontends.segments import Op
from cellc.frontends.sharing import UNCLEAR, Sharing, stubs_in
from cellc.frontends.signature import line_of, name_of
from cellc.frontends.stub import CannotUnfold, Stack, Stub, StubType, current

_ROWS = frozenset("zeros ones full empty zeros_like ones_like full_like empty_like".split())
MOST_ROWS = 4096  # of a made tensor that is taken apart, for its rows to be written one by one
_NO_WRITES = frozenset(["requires_grad_", "detach_", "retain_grad_"])
_TURNS = frozenset(  # change how a tensor shows its memory
    "t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ as_strided_ resize_ resize_as_ set_ "
    "rename_".split()
)
_OF_ITSELF = frozenset(  # may read what they write, element by element
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ add_ sub_ mul_ div_ copy_".split()
)


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


class InPlace(Sharing):
    """A recorder of writes."""

    def begin(self, script: Any, guesses: int, look_at: int) -> None:
        super().begin(script, guesses, look_at)
        self._apart = False
        if self.writing:
            self.repeating = False

    # -- writes --

    def write(self, name: str, x: Stub, args: Any, kwargs: Any, frame: Any) -> Stub:
        """Write into a tensor that the forward made."""
        if not self.on:
            raise CannotUnfold("a value of the request is used from outside")
        if name in _NO_WRITES:
            return x
        if name in _TURNS:
            raise CannotUnfold(f"{name} changes a tensor's form in place", line_of(frame))
        if not self.writing:  # what ran before did not look after memory: run again
            self.writing, self.relearn = True, True
            self.memos.clear()
            current.ended = Asks()
            raise current.ended
        if holds_read((args, kwargs)):
            args, kwargs = self.without_reads(getattr(torch.Tensor, name), args, kwargs)
        if name == "__setitem__":
            if self._selected_there(x, *args):
                return x  # `x[t] += v`: it was written through what `x[t]` is
            index = _by_tensors(args[0])
            if type(index) in (Stub, tuple):
                index = _by_rows(index)
            args = (self.bounds(index) if has_bounds(index) else index, *args[1:])
        if type(x) is Stack:
            self._write_rows(name, x, args, kwargs, frame)
            return x
        place = self.place_of(x)
        if place.again is not None:
            made = self._record_apart(_functional(name), (x, *args), kwargs, frame)
            self.write("__setitem__", place.again[0], (place.again[1], made), {}, frame)
            return x
        self._may_write(x, place, frame)
        if self._writes_itself(name, x, place, args, kwargs, frame):
            return x
        if name == "copy_" and args and type(args[0]) is Stub and args[0].type is x.type:
            self._store(x, place, self.snapshot(args[0]), frame)
            return x
        made = self._record_apart(_functional(name), (x, *args), kwargs, frame)
        made = self._whole(made, frame)
        if made.type is not x.type:
            raise CannotUnfold(f"{name} changes a tensor's form", line_of(frame))
        self._store(x, place, made, frame)
        return x

    def _write_rows(self, name: str, x: Stack, args: Any, kwargs: Any, frame: Any) -> None:
        items = x.items
        if name == "__setitem__" and type(args[0]) is int:
            item, value = items[args[0]], args[1]
            if type(value) is Stub and value.type is item.type:
                place = self.place_of(item)
                self._may_write(item, place, frame)
                if not self._writes_itself(name, item, place, (..., value), {}, frame):
                    self._store(item, place, value, frame)
            else:
                self.write(name, item, (..., value), {}, frame)
            return
        places = [self.place_of(item) for item in items]
        for item, place in zip(items, places, strict=True):
            self._may_write(item, place, frame)
        if self._writes_itself(name, x, self._place_of_stack(x), args, kwargs, frame):
            return
        made = self._record_apart(_functional(name), (x, *args), kwargs, frame)
        if made.type is not x.type:
            raise CannotUnfold(f"{name} changes a tensor's form", line_of(frame))
        for item, place, row in zip(items, places, self._rows(made, frame), strict=True):
            self._store(item, place, row, frame)

    def _rows(self, x: Stub, frame: Any) -> list[Stub]:
        if type(x) is Stack:
            return x.items
        return list(self._record_apart(torch.Tensor.unbind, (x,), {}, frame))

    def _whole(self, x: Stub, frame: Any) -> Stub:
        """A result as one row."""
        if type(x) is Stack:
            x = self._record_apart(_joined, (x.items,), {}, frame)
            if type(x) is Stack:
                raise CannotUnfold(
                    "a tensor is written whose columns are held; hold a clone() of it",
                    line_of(frame),
                )
        return x

    def _may_write(self, x: Stub, place: Place, frame: Any) -> None:
        reason = next((m.refusal for m in place.memories if m.refusal), "")
        if not reason and place.strides is None:
            reason = UNCLEAR
        if not reason and repeats(x.type.shape, place.strides or ()):
            reason = "a tensor is written that shows an element twice; write to a clone() of it"
        if reason:
            raise CannotUnfold(reason, line_of(frame))

    def _writes_itself(
        self, name: str, x: Stub, place: Place, args: Any, kwargs: Any, frame: Any
    ) -> bool:
        """Is what is written what stands there already? What is read must be all of what is
        written, or none.
        """
        ours = {id(m) for m in place.memories}
        for y in stubs_in((args, kwargs)):
            other = self._known(y)
            if other is None or ours.isdisjoint(map(id, other.memories)):
                continue
            region = place, x.type.shape
            if name == "__setitem__":
                region = self._region(x, place, args[0]) if y is args[1] else (Place((), None), ())
            target, shape = region
            if None in (target.strides, other.strides) or target.memories != other.memories:
                raise CannotUnfold(_MIXED, line_of(frame))
            if (shape, *target[1:3]) == (y.type.shape, *other[1:3]):
                if name == "__setitem__":
                    return True
                if name in _OF_ITSELF:
                    continue
                raise CannotUnfold(_MIXED, line_of(frame))
            assert target.strides is not None and other.strides is not None
            if overlap(
                (shape, target.strides, target.offset), (y.type.shape, other.strides, other.offset)
            ):
                raise CannotUnfold(_MIXED, line_of(frame))
        return False

    @staticmethod
    def _selected_there(x: Stub, index: Any, value: Any) -> bool:
        """Is a value what this index of numbers in tensors selects of `x`?"""
        place: Place | None = getattr(value, "place", None)
        if place is None or place.again is None or place.again[0] is not x:
            return False
        parts = index if type(index) is tuple else (index,)
        kept = place.again[1] if type(place.again[1]) is tuple else (place.again[1],)
        return len(parts) == len(kept) and all(
            a.id == b.id if type(a) is type(b) is Stub else type(a) is type(b) and a == b
            for a, b in zip(parts, kept, strict=True)
        )

    def _region(self, x: Stub, place: Place, index: Any) -> tuple[Place, tuple[int, ...]]:
        """What of a tensor an index chooses."""
        nothing: tuple[Place, tuple[int, ...]] = Place((), None), ()
        parts = index if type(index) is tuple else (index,)
        if place.strides is None or any(is_tensor(p) or type(p) is list for p in parts):
            return nothing
        form = (x.type.shape, (torch.bool, x.type.device), place.strides, place.offset)
        shape: list[tuple[int, ...]] = []

        def chosen(tensor: Any) -> Any:
            made = tensor[index]
            shape.append(tuple(made.shape))
            return made

        with self.aside():
            shown = shown_by(chosen, ((Here(0),), {}), [form])
        if not shown or shown[0].source != 0:
            return nothing
        return Place(place.memories, shown[0].strides, place.offset + shown[0].offset), shape[-1]

    def _store(self, x: Stub, place: Place, made: Stub, frame: Any) -> None:
        """A stub becomes another row; its memory and all that show it follow."""
        row = self._whole(made, frame).id
        if self._is_whole(x, place):
            place.memories[0].value.id = row
        else:
            base, laid = self._base(place)
            written = (base, self.snapshot(made), laid, place.strides, place.offset)
            whole = self._record_apart(put, written, {}, frame)
            if type(base) is Stack:
                for memory, part in zip(place.memories, self._rows(whole, frame), strict=True):
                    memory.value.id = part.id
            else:
                place.memories[0].value.id = self._whole(whole, frame).id
        x.id = row
        self._refresh(x, place, frame)

    def _refresh(self, x: Stub, place: Place, frame: Any) -> None:
        """Views of what was written show it."""
        seen = {id(x)}
        chosen = []
        for memory in place.memories:
            for view in memory.live():
                if id(view) in seen:
                    continue
                seen.add(id(view))
                other: Place = view.place
                if other.again is not None:
                    chosen.append(view)
                elif other.strides is None:
                    raise CannotUnfold(
                        "a tensor is written while another is held that may share its memory; "
                        "hold a clone() of it",
                        line_of(frame),
                    )
                elif self._is_whole(view, other):
                    view.id = memory.value.id
                elif other.memories != place.memories or self._touch(x, place, view, other):
                    view.id = self._taken(view, other, frame)
        for view in chosen:  # from what is up to date now
            view.id = self._whole(self._selected_again(*view.place.again), frame).id

    @staticmethod
    def _touch(x: Stub, place: Place, y: Stub, other: Place) -> bool:
        assert place.strides is not None and other.strides is not None
        return overlap(
            (x.type.shape, place.strides, place.offset),
            (y.type.shape, other.strides, other.offset),
        )

    def _taken(self, x: Stub, place: Place, frame: Any) -> int:
        base, laid = self._base(place)
        args = (base, laid, x.type.shape, place.strides, place.offset)
        made = self._record_apart(taken, args, {}, frame)
        made = self._whole(made, frame)
        row: int = made.id
        return row

    def _record_apart(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        """Record what the forward does not say itself."""
        before, self._apart = self._apart, True
        try:
            return self.function(func, args, kwargs, frame)
        finally:
            self._apart = before

    def in_rows(self, func: Any, op: Op, made: Any) -> Any:
        """A tensor made of one number, as a list of rows."""
        form = op.study.outputs[0].type
        if name_of(func) not in _ROWS or type(made) is not Stub or len(form.shape) < 2:
            return made
        key: Any = self.constants[made.id]
        if key[0] != "full" or not 0 < form.shape[0] <= MOST_ROWS or hasattr(made, "place"):
            return made
        inner = StubType.of(form.shape[1:], form.dtype, form.device)
        row = self._constant_row(("full", tuple(form.shape[1:]), *key[2:]), inner)
        return Stack([Stub(row, inner) for _ in range(form.shape[0])])


_MIXED = "a tensor is written with what shares memory with it; write a clone() of that"


def _by_rows(index: Any) -> Any:
    """An index that begins with a number in a tensor, for which PyTorch reads it, as one that
    begins with a row of such.
    """
    parts = index if type(index) is tuple else (index,)
    if not parts or not is_number_tensor(parts[0]):
        return index
    made = tuple([x.reshape(1) if is_number_tensor(x) else x for x in parts])
    return made if type(index) is tuple else made[0]


def _by_tensors(index: Any) -> Any:
    """An index with rows of one for numbers in tensors, which PyTorch would read."""
    parts = index if type(index) is tuple else (index,)
    if all(type(p) is int or is_number_tensor(p) for p in parts):
        if any(map(is_number_tensor, parts)):
            return tuple([p if type(p) is int else p.reshape(1) for p in parts])
    return index


def _joined(rows: Any) -> Any:
    """A stack as one row."""
    return torch.cat([x[None] for x in rows])
