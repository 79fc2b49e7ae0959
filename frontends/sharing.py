"""Sharing: which memory the tensors of a forward show, while it runs on stubs.

Duty: learn of every operation, by running it once apart, what its results show
(`frontends.memory`), and keep for every stub its place: which memories, and how it lies in them.
Looked after from the first write in place on. Stands between `frontends.choosing` and
`frontends.inplace`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

from cellc.frontends.choosing import Chooser
from cellc.frontends.memory import (
    FRESH,
    OUTSIDE,
    Here,
    Memory,
    Place,
    Shown,
    fits,
    repeats,
    shown_by,
    strides_of,
)
from cellc.frontends.segments import Op
from cellc.frontends.stub import Stack, Stub

_GIVEN = "an argument of the request is written in place; write to a copy of it: x = x.clone()"
_MODEL = "a tensor of the model is written; write to a copy of it: x = x.clone()"
UNCLEAR = "a tensor is written that shares memory in a way not followed; write to a clone() of it"


class Sharing(Chooser):
    """A recorder of who shows what memory."""

    def __init__(self) -> None:
        super().__init__()
        self._apart = False  # is what is recorded now not the forward's

    def place_of(self, x: Stub) -> Place:
        """How a stub shows memory; one that nothing is known of is alone in its own."""
        found: Place | None = getattr(x, "place", None)
        if found is None:
            given = self.data[0] <= x.id < self.data[3]
            memory = Memory(self.snapshot(x), strides_of(x.type.shape), _GIVEN if given else "")
            found = self._show(x, Place((memory,), memory.strides))
        return found

    def _show(self, x: Stub, place: Place) -> Place:
        x.place = place
        for memory in place.memories:
            memory.views.append(weakref.ref(x))
        return place

    def fresh(self, x: Stub) -> Stub:
        """A tensor of the same values in memory of its own."""
        made = self.snapshot(x)
        if self.data[0] <= x.id < self.data[3]:
            memory = Memory(self.snapshot(x), strides_of(x.type.shape))
            self._show(made, Place((memory,), memory.strides))
        return made

    def copied(self, made: Any) -> Any:
        """A stack in memory of its own, where it matters."""
        if self.writing and type(made) is Stack:
            return Stack([self.fresh(x) for x in made.items])
        return made

    def _place_of_stack(self, x: Stack) -> Place:
        places = [self.place_of(item) for item in x.items]
        first = places[0]
        inner = strides_of(x.inner.shape)
        if all(len(p.memories) == 1 and self._is_whole(i, p) and p.memories[0].strides == inner
               for i, p in zip(x.items, places, strict=True)):  # fmt: skip
            memories = tuple([p.memories[0] for p in places])
            if len({id(m) for m in memories}) == len(memories):
                return Place(memories, strides_of(x.type.shape))
        if first.strides is not None and all(
            p.memories == first.memories and p.strides == first.strides for p in places
        ):
            step = places[1].offset - first.offset if len(places) > 1 else 1
            if all(p.offset == first.offset + k * step for k, p in enumerate(places)) and step >= 0:
                return Place(first.memories, (step, *first.strides), first.offset)
        return Place(tuple({id(m): m for p in places for m in p.memories}.values()), None)

    @staticmethod
    def _is_whole(x: Stub, place: Place) -> bool:
        """Is a stub all of its memory, as it lies there?"""
        if len(place.memories) != 1:
            return False
        (memory,) = place.memories
        return x.type is memory.value.type and place.strides == memory.strides and not place.offset

    def watch(self, op: Op, args: Any, kwargs: Any, made: Any) -> Any:
        """Note what the results of an operation show."""
        if self._apart:
            return made
        tensors = list(stubs_in((args, kwargs)))
        known = [self._known(x) for x in tensors]
        plain = not any(known)
        key: Any = () if plain else tuple([p and (p.strides, p.offset) for p in known])
        if key not in op.shown:
            op.shown[key] = self._learn_shown(op, args, kwargs, tensors, known)
        shown = op.shown[key]
        if shown is None:
            return made
        results = list(stubs_in(made))
        groups = [s.group for s in shown if s.source == FRESH]
        for k, x in enumerate(results):
            if not shown or len(shown) != len(results):  # nobody knows
                self._unclear(x, tensors)
            elif shown[k].source == OUTSIDE:
                self._spread(x, Place((Memory(self._start_of(x), (), _MODEL),), None))
            elif shown[k].source == FRESH:
                self._place_fresh(x, shown[k], groups.count(shown[k].group) > 1)
            else:
                self._place_view(x, tensors[shown[k].source], shown[k])
        return made

    def _known(self, x: Stub) -> Place | None:
        if type(x) is Stack:
            if x._items is None or not any(hasattr(item, "place") for item in x.items):
                return None
            return self._place_of_stack(x)
        found: Place | None = getattr(x, "place", None)
        return found

    def _learn_shown(
        self, op: Op, args: Any, kwargs: Any, tensors: list[Stub], known: list[Place | None]
    ) -> tuple[Shown, ...] | None:
        """None where all results have memory of their own, () where nobody knows."""
        forms = []
        for x, place in zip(tensors, known, strict=True):
            strides = strides_of(x.type.shape) if place is None else place.strides
            if strides is None:  # as a view of something, any
                strides = strides_of(x.type.shape)
            kind = (x.type.dtype, x.type.device)
            forms.append((x.type.shape, kind, strides, place.offset if place else 0))
        count = iter(range(len(tensors)))
        with self.aside():
            shown = shown_by(op.run, _numbered((args, kwargs), count), forms)
        outputs = op.study.outputs
        if shown is None or len(shown) != len(outputs):
            return ()
        fresh = [s.source == FRESH and not s.offset for s in shown]
        alone = len({s.group for s in shown}) == len(shown)
        laid = [s.strides == strides_of(o.type.shape) for s, o in zip(shown, outputs, strict=True)]
        return None if all(fresh) and alone and all(laid) else shown

    def _spread(self, x: Stub, place: Place) -> None:
        """Place a result; the rows of a stack each."""
        if type(x) is not Stack:
            self._show(x, place)
            return
        for k, item in enumerate(x.items):
            if place.strides is None:
                self._show(item, place)
            else:
                offset = place.offset + k * place.strides[0]
                self._show(item, Place(place.memories, place.strides[1:], offset))

    def _place_fresh(self, x: Stub, shown: Shown, shared: bool) -> None:
        shape = x.type.shape
        if shared or repeats(shape, shown.strides) or type(x) is Stack:
            if not shared and shown.strides == strides_of(shape):
                return
            self._spread(x, Place((Memory(self._start_of(x), (), UNCLEAR),), None))
        elif shown.strides != strides_of(shape) or shown.offset:
            memory = Memory(self.snapshot(x), shown.strides)
            self._show(x, Place((memory,), shown.strides))

    def _place_view(self, x: Stub, source: Stub, shown: Shown) -> None:
        place = self._place_of_stack(source) if type(source) is Stack else self.place_of(source)
        if place.strides is None:
            self._spread(x, Place(place.memories, None))
            return
        offset = place.offset + shown.offset
        base, laid = self._laid(place)
        if offset < 0 or not fits(base, laid, x.type.shape, shown.strides, offset):
            self._spread(x, Place(place.memories, None))
        else:
            self._spread(x, Place(place.memories, shown.strides, offset))

    def _unclear(self, x: Stub, tensors: list[Stub]) -> None:
        memories: dict[int, Memory] = {}
        for source in tensors:
            for y in source.items if type(source) is Stack else [source]:
                memories.update((id(m), m) for m in self.place_of(y).memories)
        self._spread(x, Place((*memories.values(), Memory(self._start_of(x), (), UNCLEAR)), None))

    def _start_of(self, x: Stub) -> Stub:
        return self.snapshot(x.items[0] if type(x) is Stack else x)

    def selected_view(self, made: Stub, x: Stub, index: Any) -> Stub:
        """What numbers in tensors select of `x`: a view, whose place they say."""
        if self._apart:
            return made
        parts = index if type(index) is tuple else (index,)
        kept = tuple([self.snapshot(p) if type(p) is Stub else p for p in parts])
        of = self._place_of_stack(x) if type(x) is Stack else self.place_of(x)
        self._spread(made, Place(of.memories, None, 0, (x, kept)))
        return made

    def _selected_again(self, x: Stub, index: Any) -> Stub:
        before, self._apart = self._apart, True
        try:
            made: Stub = self.selected(x, index)
        finally:
            self._apart = before
        return made

    def _laid(self, place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of what a place's memories are together."""
        first = place.memories[0]
        shape, laid = first.value.type.shape, first.strides
        if len(place.memories) > 1:
            shape = (len(place.memories), *shape)
            laid = strides_of(shape)
        return shape, laid

    def _base(self, place: Place) -> tuple[Stub, tuple[int, ...]]:
        memories = place.memories
        base = memories[0].value if len(memories) == 1 else Stack([m.value for m in memories])
        return base, self._laid(place)[1]

    def aside(self) -> Any:
        """Inside, what runs is not part of the forward."""
        raise NotImplementedError


def stubs_in(x: Any) -> Iterator[Stub]:
    """Stubs in arguments or results, in order of signature."""
    kind = type(x)
    if kind is Stub or kind is Stack:
        yield x
    elif kind is dict:
        for name in sorted(x) if all(type(k) is str for k in x) else x:
            yield from stubs_in(x[name])
    elif kind is list or isinstance(x, tuple):
        for y in x:
            yield from stubs_in(y)


def _numbered(x: Any, count: Iterator[int]) -> Any:
    """A call with a number for each stub, in the order of `stubs_in`."""
    kind = type(x)
    if kind is Stub or kind is Stack:
        return Here(next(count))
    if kind is dict:
        names = sorted(x) if all(type(k) is str for k in x) else list(x)
        return {name: _numbered(x[name], count) for name in names}
    if kind is list:
        return [_numbered(y, count) for y in x]
    if isinstance(x, tuple) and kind is not torch.Size:
        made = [_numbered(y, count) for y in x]
        return tuple(made) if kind is tuple else kind(*made)
    return x
