"""Carry: what a step of a session gives to the next.

Duty: find the carried arguments of a step in the result of the step before, by their paths; put
them beside those that the caller gives. Of requests that are answered together, say which tensors
of their results are carried (`Kept`), so that copies of all of them are made at once. Used by
`cellc.sessions` and `cellc.flight`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch.utils import _pytree as pytree

from cellc.copier import Copier
from cellc.errors import RequestError, UnsupportedError
from cellc.legs import Entry, Result

_MISSING: Any = object()


Blocks: TypeAlias = tuple[torch.Tensor, ...]  # [sessions, ..] of each carried tensor
Held: TypeAlias = "tuple[Kept, Blocks, int]"  # a session's state: a row of blocks

MAX_FORMS = 64  # of steps after those of one plan


@dataclass(frozen=True)
class Form:
    """Steps that share a plan: the order of all tensors, those given first, in the request."""

    entry: ReferenceType[Entry]  # whose results have such a state: it knows of the form
    order: tuple[int, ...]
    dropped: int  # plans, before it was made: after that its own may be another


class Late(Sequence[torch.Tensor]):
    """Tensors of a step that has a form: those given, then of each block a row, which is made a
    tensor only where one is asked for.
    """

    __slots__ = ("blocks", "form", "given", "row")

    def __init__(self, form: Form, given: Sequence[torch.Tensor], blocks: Blocks, row: int) -> None:
        self.form, self.given, self.blocks, self.row = form, given, blocks, row

    def __len__(self) -> int:
        return len(self.form.order)

    def __getitem__(self, leaf: Any) -> Any:
        place = self.form.order[leaf] - len(self.given)
        return self.given[place] if place < 0 else self.blocks[place][self.row]


@dataclass(eq=False)
class Kept:
    """Which output tensors of an entry are carried, what makes a state of copies of them, and the
    forms of steps from such a state, by what is given beside it.
    """

    outputs: tuple[int, ...]
    state: Callable[[Sequence[torch.Tensor]], dict[str, Any]]
    forms: dict[Hashable, Form] = field(default_factory=dict)

    def made(self, blocks: Blocks, row: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Carried tensors, and the state that they make."""
        tensors = [block[row] for block in blocks]
        return tensors, self.state(tensors)

    def learn(
        self,
        given: Sequence[Any],
        state: Sequence[torch.Tensor],
        entry: Entry,
        tensors: Sequence[torch.Tensor],
        dropped: int,
    ) -> None:
        """What was given beside a state, and the request that it became. It has a form if its
        tensors are just those, each once.
        """
        key = form_key(given)
        places = {id(x): i for i, x in enumerate((*given, *state))}
        order = tuple([places.get(id(x), -1) for x in tensors])
        if key is None or sorted(order) != list(range(len(given) + len(state))):
            return
        if len(self.forms) >= MAX_FORMS:
            self.forms.clear()
        self.forms[key] = Form(ref(entry), order, dropped)


def form_key(given: Sequence[Any]) -> Hashable:
    """Equal for arguments that share a form; None where they are not just tensors."""
    key: list[Hashable] = []
    for x in given:
        if type(x) is not torch.Tensor:
            return None
        key += (x.shape, x.dtype)
    return tuple(key)


class Carry:
    """Which arguments are what a result holds, checked against a forward's arguments."""

    def __init__(self, paths: Mapping[str, str], names: Sequence[str]) -> None:
        self.paths = {
            name: [(step, int(step) if step.isdecimal() else None) for step in str(path).split(".")]
            for name, path in paths.items()
        }
        strange = [name for name in paths if name not in names]
        if strange:
            raise UnsupportedError(
                what=f"carry of {', '.join(strange)}",
                remedy=f"name arguments of the forward: {', '.join(names)}",
            )
        self.free = [name for name in names if name not in paths]  # given at each step
        self._carried = [name if name in paths else None for name in names]  # by argument
        self._items = [(n, p[0][1]) for n, p in self.paths.items() if len(p) == 1]
        self._kept: WeakKeyDictionary[Entry, Kept | None] = WeakKeyDictionary()

    def check_begin(self, initial: Mapping[str, Any], required: Sequence[str]) -> None:
        """Raises RequestError where a first step would lack what is carried into it."""
        missing = [n for n in self.paths if n in required and n not in initial]
        if missing and all(name in self.paths for name in initial):
            given = ", ".join(f"{name!r}: .." for name in missing)
            raise RequestError(
                argument=", ".join(missing),
                got="no initial value",
                expected=f"one for the first step: session({{{given}}}); or give it a default",
            )

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A step's arguments."""
        if not kwargs and len(args) == len(self.free) and len(state) == len(self.paths):
            following = iter(args)
            return tuple([next(following) if n is None else state[n] for n in self._carried]), {}
        if len(args) > len(self.free) or not self.paths.keys().isdisjoint(kwargs):
            given = ", ".join([*map(str, range(len(args))), *kwargs])
            raise RequestError(
                argument=", ".join(self.paths),
                got=f"arguments {given}",
                expected=f"a step of ({', '.join(self.free)}); the session carries the rest",
            )
        return (), {**dict(zip(self.free, args, strict=False)), **kwargs, **state}

    def of(self, result: Any) -> dict[str, Any]:
        """The next step's state; tensors of its own, whatever the caller does to the result."""
        if type(result) is tuple and len(self._items) == len(self.paths):
            try:
                return {name: _owned(result[place]) for name, place in self._items}  # type: ignore[index]
            except (TypeError, IndexError):
                pass  # said below
        return {name: _owned(_at(result, path, name)) for name, path in self.paths.items()}

    def kept(self, entry: Entry) -> Kept | None:
        """What is carried of an entry's results; None where it is more than tensors, or not there:
        `of` sees to each result.
        """
        if entry not in self._kept:
            self._kept[entry] = self._find(entry.result)
        return self._kept[entry]

    def _find(self, result: Result) -> Kept | None:
        if not result.returned:
            return None
        places = [_Place(number if kind == "t" else None) for kind, number in result.returned]
        form = pytree.tree_unflatten(places, result.spec) if result.spec is not None else places[0]
        try:
            state = {name: _at(form, path, name) for name, path in self.paths.items()}
        except UnsupportedError:
            return None
        leaves, spec = pytree.tree_flatten(state)
        numbers = [leaf.number if type(leaf) is _Place else None for leaf in leaves]
        if not numbers or None in numbers:
            return None
        made = Result(tuple(("t", i) for i in range(len(numbers))), spec)
        return Kept(tuple(numbers), made.rebuild)  # type: ignore[arg-type]


class _Place:
    """Where a result has an output tensor, or (None) something else."""

    __slots__ = ("number",)

    def __init__(self, number: int | None) -> None:
        self.number = number


def _owned(state: Any) -> Any:
    if type(state) is torch.Tensor:
        return state.clone()
    if type(state) is tuple and all(type(x) is torch.Tensor for x in state):
        return tuple([x.clone() for x in state])
    return pytree.tree_map(_own, state)


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with tensors of its own, objects that hold tensors included."""
    return Copier(lambda leaf, _: _own(leaf)).call((), state)[1]


def _at(result: Any, path: Sequence[tuple[str, int | None]], name: str) -> Any:
    found = result
    for step, place in path:
        if place is not None and type(found) is tuple and place < len(found):
            found = found[place]
        else:
            found = _inside(found, step, place, name, path)
    return found


def _inside(
    found: Any, step: str, place: int | None, name: str, path: Sequence[tuple[str, int | None]]
) -> Any:
    following: Any = _MISSING
    there: Any = type(found).__name__
    if isinstance(found, Mapping):
        there = list(found)
        following = found[step] if step in found else found.get(place, _MISSING)
    elif isinstance(found, (tuple, list)) and place is not None:
        there = f"{len(found)} items"
        following = found[place] if place < len(found) else _MISSING
    elif not isinstance(found, torch.Tensor):
        following = getattr(found, step, _MISSING)
    if following is _MISSING:
        whole = ".".join(step for step, _ in path)
        raise UnsupportedError(
            what=f"carry={{{name!r}: {whole!r}}}: the result has no {step!r}",
            remedy=f"give the path of {name} in what the forward returns; there is: {there}",
        )
    return following
