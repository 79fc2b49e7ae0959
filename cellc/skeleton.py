"""Skeletons: what a request is made of, whatever Python structure holds it.

Duty: walk nested tuples, lists, dicts, named tuples, registered pytrees and plain objects
(dataclasses, `ast` nodes, any class with attributes) once, in one order, to take out the data
(tensors, and the Python numbers that only become tensors), key what is left, and name the data by
where it is. Used by `cellc.request`; copies are made by `cellc.copier`.

Walking is iterative, so that depth costs no recursion.
"""

from __future__ import annotations

import enum
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

# Objects that are what they are: no two of them act alike, and none changes.
BY_IDENTITY = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
VALUES = (str, bytes, bool, complex, type(None))

TENSOR, INT, FLOAT, REF, STEERS = "tensor", "int data", "float data", "ref", "steers"
GENERATOR = "generator"
_HEAP_TYPE = 1 << 9

Place = Hashable  # where in its container a leaf is, whatever the container's own place


@dataclass(frozen=True)
class Steering:
    """Places whose numbers Python code decides by: they are structure, not data.

    A number that is a whole argument decides as a rule (how many steps, which layer), but not of an
    argument that is a container in other requests: there it is a tree of one leaf.
    """

    places: frozenset[Place] = frozenset()
    everywhere: bool = False
    containers: frozenset[Place] = frozenset()  # arguments

    def __contains__(self, place: Any) -> bool:
        if self.everywhere or place in self.places:
            return True
        if type(place) is tuple and place[0] == "argument":
            return place[1] not in self.containers
        return False


class NotFlat(Exception):
    """A leaf that is neither data nor structure; `leaf` is it."""

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf


@dataclass(slots=True)
class Flat:
    """A walked request: its tensors and numbers in walking order, and the rest as one key."""

    tensors: list[torch.Tensor]
    ints: list[int]
    floats: list[float]
    tokens: tuple[Hashable, ...]
    generators: list[torch.Generator]
    nested: bool  # is there a container?
    structured: bool  # more than flat groups of tensors?


class _Steering:
    """A number whose place says that Python code decides by it."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


def children(x: Any) -> tuple[Hashable, list[Any], list[Place]] | None:
    """(what a container is without its items, its items, their places); None for a leaf."""
    kind = type(x)
    if kind is tuple:
        return ("tuple", len(x)), list(x), [(len(x), i) for i in range(len(x))]
    if kind is list:
        return (list, len(x)), x, ["item"] * len(x)
    if kind in (dict, OrderedDict):
        keys = tuple((type(k), k) for k in x)
        return (kind, keys), list(x.values()), [("key", k) for k in x]
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return (kind, len(x)), list(x), [(kind, i) for i in range(len(x))]
    if kind in pytree.SUPPORTED_NODES:
        items, context = pytree.SUPPORTED_NODES[kind].flatten_fn(x)
        items = list(items)
        return (kind, _frozen(context), len(items)), items, [(kind, i) for i in range(len(items))]
    if isinstance(x, (list, dict, tuple)):
        return _subclassed(x)
    if is_object(x):
        names = attributes(x)
        return (
            (kind, tuple(names)),
            [getattr(x, n) for n in names],
            [(kind, n) for n in names],
        )
    return None


def _subclassed(x: Any) -> tuple[Hashable, list[Any], list[Place]]:
    """A list, dict or tuple of a class of the user's: its items, then its attributes."""
    kind = type(x)
    names = attributes(x)
    keys = tuple((type(k), k) for k in x) if isinstance(x, dict) else len(x)
    items = [*(x.values() if isinstance(x, dict) else x), *[getattr(x, n) for n in names]]
    places: list[Place] = [(kind, "item")] * (len(items) - len(names))
    return (kind, keys, tuple(names)), items, [*places, *[(kind, n) for n in names]]


def is_object(x: Any) -> bool:
    """Is it a plain object whose attributes are its content?"""
    kind = type(x)
    if getattr(kind, "structured", False) is True:
        return False  # a structure of arrays: a value
    if isinstance(x, (torch.Tensor, nn.Module, *BY_IDENTITY, *VALUES, int, float)):
        return False
    if not kind.__flags__ & _HEAP_TYPE or not (hasattr(x, "__dict__") or _slots(kind)):
        return False
    home = kind.__module__.split(".")[0]
    if home in ("torch", "numpy", "threading", "_thread", "weakref", "_weakref"):
        return False
    if hasattr(kind, "__dataclass_fields__"):
        return True
    by_value = "__hash__" in own_names(kind) and kind.__hash__ is not None
    return not (by_value and home in sys.stdlib_module_names)


def attributes(x: Any) -> list[str]:
    """Names of an object's attributes: of its dict, then its slots that are filled."""
    if type(x) in (list, dict, tuple):
        return []
    return [*getattr(x, "__dict__", ()), *[n for n in _slots(type(x)) if hasattr(x, n)]]


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__[:-1]:
        slots = vars(base).get("__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
        found += [
            f"_{base.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n
            for n in names
        ]
    return [n for n in found if n not in ("__dict__", "__weakref__")]


def own_names(kind: type) -> set[str]:
    """What a class and its bases define, object aside."""
    return {name for base in kind.__mro__[:-1] for name in vars(base)}


def holds_tensors(leaf: Any) -> bool:
    """Does a Python object that is no container hold tensors: as attributes, or as a set does?"""
    held = [*getattr(leaf, "__dict__", {}).values()] if not isinstance(leaf, type) else []
    held += [getattr(leaf, name, None) for name in getattr(type(leaf), "__slots__", ())]
    held += leaf if isinstance(leaf, (set, frozenset)) else []
    return any(isinstance(x, torch.Tensor) for x in held)


ARRAYS: set[type] = set()  # classes met that hold a structure as arrays (`cellc.trees`)


def plain_tokens(args: tuple[Any, ...]) -> tuple[Hashable, ...] | None:
    """What `flatten` keys a call by that has structures of arrays and tensors for arguments, at
    least one of those; None of others.
    """
    tokens: list[Hashable] = [len(args)]
    known: list[Any] = []
    for x in args:
        kind = type(x)
        if kind is torch.Tensor:
            tokens.append(TENSOR)
        elif kind in ARRAYS and x.__dict__.keys() <= kind.array_names:
            same = next((i for i, y in enumerate(known) if y is x), None)
            tokens += [x] if same is None else [REF, same]
            if same is None:
                known.append(x)
        else:
            return None
    return tuple(tokens) if known else None


def _beside(x: Any) -> tuple[Hashable, ...]:
    """What a structure of arrays holds that is not its structure: it is part of the key."""
    held: list[Any] = []
    for name in attributes(x):
        if name not in type(x).array_names:
            value = getattr(x, name)
            if type(value) not in (int, float, *VALUES):
                raise NotFlat(x)
            held += name, type(value), repr(value)
    return tuple(held)


def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any], steers: Steering | None) -> Flat:
    """Walk a request. `steers`: which numbers Python code decides by; None: all of them.

    Raises NotFlat for a leaf that cannot be part of a request.
    """
    tensors: list[torch.Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    generators: list[torch.Generator] = []
    tokens: list[Hashable] = [len(args), *kwargs]
    seen: dict[int, int] = {}
    kept: list[Any] = []  # what registered containers made: alive, so that no id comes twice
    data = steers is not None and not steers.everywhere
    steering = steers.places if steers is not None else frozenset()
    structured = nested = False
    stack: list[Any] = []
    for place, x in (*enumerate(args), *kwargs.items()):
        bare = steers is not None and type(x) in (int, float)
        decides = bare and ("argument", place) in (steers or Steering())
        stack.append(_Steering(x) if decides else x)
    stack.reverse()
    pop, push, emit = stack.pop, stack.extend, tokens.append
    while stack:
        x = pop()
        kind: Any = type(x)
        if kind is int and data:
            emit(INT)
            ints.append(x)
        elif kind is tuple and not steering:
            if x:
                number = id(x)
                if number in seen:
                    emit(REF)
                    emit(seen[number])
                    continue
                seen[number] = len(seen)
                structured = structured or any(type(y) is tuple for y in x)
            emit(len(x))
            push(x[::-1])
        elif kind is torch.Tensor:
            emit(TENSOR)
            tensors.append(x)
        elif kind in ARRAYS:
            structured = nested = True
            if id(x) in seen:
                emit(REF)
                emit(seen[id(x)])
                continue
            seen[id(x)] = len(seen)
            emit(x)
            tokens += _beside(x)
        elif kind in VALUES:
            emit(kind)
            emit(x if kind is not complex else repr(x))
        elif kind is _Steering:
            emit(STEERS)
            emit(type(x.value).__name__)
            emit(repr(x.value) if type(x.value) is float else x.value)
        elif kind is float and data:
            emit(FLOAT)
            floats.append(x)
        elif isinstance(x, torch.Tensor):
            emit(TENSOR)
            tensors.append(x)
        elif kind is torch.Generator:
            emit(GENERATOR)
            generators.append(x)
        elif isinstance(x, (int, float)) or isinstance(x, BY_IDENTITY):
            emit(kind)
            emit(repr(x) if isinstance(x, float) else x)
        else:
            if id(x) in seen:
                emit(REF)
                emit(seen[id(x)])
                continue
            parts = children(x)
            if parts is None:
                if getattr(kind, "structured", False) is True:
                    ARRAYS.add(kind)
                    structured = nested = True
                    seen[id(x)] = len(seen)
                    emit(x)
                    tokens += _beside(x)
                    continue
                emit(kind)
                emit(_value(x))
                continue
            seen[id(x)] = len(seen)
            head, items, places = parts
            flat_group = isinstance(x, (tuple, dict)) and not any(
                isinstance(y, (tuple, list, dict)) for y in items
            )
            structured = structured or not flat_group or bool(steering)
            emit(head)
            if steering:
                items = [_marked(y, p, steering) for y, p in zip(items, places, strict=True)]
            kept.append(items)
            push(items[::-1])
    nested = nested or bool(ints or floats)
    structured = structured or nested
    nested = bool(seen) or nested
    return Flat(tensors, ints, floats, tuple(tokens), generators, nested, structured)


def _marked(x: Any, place: Place, steering: frozenset[Place]) -> Any:
    if type(x) in (int, float) and place in steering:
        return _Steering(x)
    return x


def _value(leaf: Any) -> Hashable:
    """A leaf that compares by value."""
    try:
        hash(leaf)
        fits = "__hash__" in own_names(type(leaf)) and not holds_tensors(leaf)
        fits = fits and not isinstance(leaf, weakref.ref)  # it would lead out of the request
    except TypeError:
        fits = False
    if not fits:
        raise NotFlat(leaf)
    value: Hashable = leaf
    return value


def _frozen(context: Any) -> Hashable:
    """What a pytree says of a node, lists in it as tuples."""
    if isinstance(context, (list, tuple)):
        return tuple(map(_frozen, context))
    frozen: Hashable = context
    return frozen


def tensor_paths(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str]) -> list[str]:
    """A name for every tensor in walking order: its argument, with its path inside."""
    found = []
    seen: set[int] = set()
    roots = [names[i] if i < len(names) else f"args[{i}]" for i in range(len(args))]
    stack = list(zip([*args, *kwargs.values()], [*roots, *kwargs], strict=True))[::-1]
    while stack:
        x, path = stack.pop()
        if isinstance(x, torch.Tensor):
            found.append(path)
            continue
        if type(x) in (int, float, *VALUES) or id(x) in seen:
            continue
        parts = children(x)
        if parts is not None:
            seen.add(id(x))
            stack += list(zip(parts[1], steps(x, path), strict=True))[::-1]
    return found


def steps(x: Any, path: str) -> Iterator[str]:
    """Paths of a container's items, in order."""
    kind = type(x)
    if isinstance(x, tuple) and hasattr(kind, "_fields"):
        return (f"{path}.{name}" for name in kind._fields)
    if isinstance(x, (tuple, list, dict)) and kind not in pytree.SUPPORTED_NODES:
        names = [f"{path}.{n}" for n in attributes(x)]
        keys = x if isinstance(x, dict) else range(len(x))
        return iter([*[f"{path}[{k!r}]" for k in keys], *names])
    if isinstance(x, dict):
        return (f"{path}[{k!r}]" for k in x)
    if isinstance(x, (tuple, list)):
        return (f"{path}[{i}]" for i in range(len(x)))
    if kind in pytree.SUPPORTED_NODES:
        items, _ = pytree.SUPPORTED_NODES[kind].flatten_fn(x)
        return (f"{path}[{i}]" for i in range(len(list(items))))
    return (f"{path}.{name}" for name in attributes(x))
