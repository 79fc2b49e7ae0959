"""Requests as stubs: a copy of a request on which its forward is unfolded.

Duty: copy a request with a `Stub` for every tensor and a `Number` for every Python number that is
data, in walking order (`cellc.skeleton`), so that the rows of any part of it lie side by side; and
number the shapes of its containers, so that parts of one shape are known to be alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from cellc.copier import filler
from cellc.frontends.drawing import GeneratorStub
from cellc.frontends.stub import FloatNumber, IntNumber, Stack
from cellc.skeleton import VALUES, Place, Steering, children

MAX_SHAPES = 1 << 20
UNLIKE = -1  # the shape of a part that shares something with another part


# A container of the request: its shape, the rows of its first int, float and tensor, and the ends.
Part: TypeAlias = tuple[int, int, int, int, int, int, int]

_POOL: list[IntNumber] = []  # by row: they are made over and over
_POOL_SIZE = 1 << 18


def _int_number(row: int) -> IntNumber:
    if row < _POOL_SIZE:
        _POOL.extend(IntNumber(i) for i in range(len(_POOL), row + 1))
    return IntNumber(row)


@dataclass
class Shapes:
    """Numbers of shapes, over all requests of a model."""

    numbers: dict[Hashable, int]

    def of(self, key: Hashable) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


class Stubber:
    """Copies one request. `tensor(leaf, place, row)` makes the stub of a tensor from row `row` on;
    `steering` are places of numbers that Python code decides by.
    """

    def __init__(
        self,
        shapes: Shapes,
        steering: Steering,
        rows: tuple[int, int, int],
        tensor: Callable[[torch.Tensor, Place, int], Any],
    ) -> None:
        self._shapes, self._steering = shapes, steering
        self.ints, self.floats, self.tensors = rows
        self._tensor = tensor
        self._numbers, self._plain = shapes.numbers, not (steering.places or steering.everywhere)
        self.parts: dict[int, Part] = {}  # by id of the copy
        self.shells: list[tuple[Any, list[Any]]] = []  # copies that can change, what they held
        self.kept: list[Any] = []  # copies, alive so that ids stay theirs
        self._made: dict[int, Any] = {}  # by id of the original
        self._shape = 0  # of what was copied last
        self.generators = 0

    def call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = [
            self._leaf_or_part(x, ("argument", k)) for k, x in [*enumerate(args), *kwargs.items()]
        ]
        return tuple(made[: len(args)]), dict(zip(kwargs, made[len(args) :], strict=True))

    def _leaf_or_part(self, x: Any, place: Place) -> Any:
        kind = type(x)
        if kind is tuple:
            return self._tuple(x)
        if kind is int or kind is float:
            if place in self._steering:
                self._shape = self._shapes.of((kind, repr(x)))
                return x
            if kind is int:
                self._shape = -2
                self.ints += 1
                return IntNumber(self.ints - 1)
            self._shape = -3
            self.floats += 1
            return FloatNumber(self.floats - 1)
        if isinstance(x, torch.Tensor):
            made = self._tensor(x, place, self.tensors)
            self._shape = self._shapes.of((type(made), made.type))
            self.tensors += made.type.shape[0] if type(made) is Stack else 1
            return made
        if kind in VALUES:
            self._shape = self._shapes.of((kind, x))
            return x
        if kind is torch.Generator:
            self._shape = UNLIKE
            self.generators += 1
            return GeneratorStub(self.generators - 1)
        return self._container(x)

    def _tuple(self, x: tuple[Any, ...]) -> Any:
        made_of, numbers, parts, plain = self._made, self._numbers, self.parts, self._plain
        ints, shape = self.ints, 0

        def copied(x: tuple[Any, ...]) -> Any:
            nonlocal ints, shape
            made = made_of.get(id(x))
            if made is not None:
                shape = UNLIKE
                return made
            first, floats, tensors = ints, self.floats, self.tensors
            items: list[Any] = []
            key: list[int] = []
            for y in x:
                kind = type(y)
                if kind is tuple:
                    items.append(copied(y))
                    key.append(shape)
                elif kind is int and plain:
                    items.append(_POOL[ints] if ints < len(_POOL) else _int_number(ints))
                    key.append(-2)
                    ints += 1
                else:
                    self.ints = ints
                    items.append(self._leaf_or_part(y, (len(x), len(items))))
                    key.append(self._shape)
                    ints = self.ints
            if not items:
                shape = self._shapes.of(())
                return ()
            shape = UNLIKE if UNLIKE in key else numbers.setdefault(tuple(key), len(numbers))
            made = made_of[id(x)] = tuple(items)
            parts[id(made)] = (shape, first, floats, tensors, ints, self.floats, self.tensors)
            return made

        made = copied(x)
        self.ints, self._shape = ints, shape
        return made

    def _container(self, x: Any) -> Any:
        if id(x) in self._made:
            self._shape = UNLIKE
            return self._made[id(x)]
        parts = children(x)
        if parts is None:
            self._shape = self._shapes.of((type(x), x))
            return x
        head, values, places = parts
        self.kept.append(values)
        finish, shell = filler(x)
        ints, floats, tensors = self.ints, self.floats, self.tensors
        if shell is not None:
            self._made[id(x)] = shell
        items, key = [], [head]
        for y, place in zip(values, places, strict=True):
            items.append(self._leaf_or_part(y, place))
            key.append(self._shape)
        shape = UNLIKE if UNLIKE in key else self._shapes.of(tuple(key))
        self._shape = shape
        made = self._made[id(x)] = finish(items)
        if shell is not None and (type(shell) in (list, dict) or type(x).__dictoffset__):
            self.shells.append((shell, items))
        self.parts[id(made)] = (shape, ints, floats, tensors, self.ints, self.floats, self.tensors)
        return made
