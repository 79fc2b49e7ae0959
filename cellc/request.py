"""Requests: from a call's arguments to a structure key and tensor leaves.

Duty: flatten a request, name its parts for error messages, and key its structure: requests of equal
keys share a plan. Comes in from `cellc.compiled`; goes to `cellc.compiler`. Tensors of a request
are its data; everything else about it (shapes, dtypes, the pytree, Python values) is structure.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from cellc.dtypes import DTYPE_NAMES
from cellc.errors import RequestError

# Objects that are what they are: no two of them act alike, and none changes.
_BY_IDENTITY = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_VALUES = (int, float, bool, str, bytes, complex, type(None))


@dataclass(frozen=True)
class Structure:
    """What requests that share a plan have in common."""

    key: Hashable  # exact
    family: Hashable  # the same, without sizes
    sizes: tuple[int, ...]  # every size of every tensor leaf
    shapes: tuple[tuple[int, ...], ...]


class Arguments:
    """Binds and flattens calls of one forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        try:
            self._signature: inspect.Signature | None = inspect.signature(forward)
        except (TypeError, ValueError):
            self._signature = None
        kinds = [p.kind for p in self._signature.parameters.values()] if self._signature else []
        self._plain = all(
            k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for k in kinds
        ) and bool(kinds)
        self._num = len(kinds)
        self.names = list(self._signature.parameters) if self._signature else []

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments as positional where the signature allows; raises RequestError where it does not
        fit.
        """
        if not kwargs and self._plain and len(args) == self._num:
            return args, {}
        if self._signature is None:
            return args, dict(kwargs)
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(self.names)
            strange = [k for k in kwargs if k not in self.names]
            raise RequestError(
                argument=", ".join(strange) or _culprit(str(error), self.names),
                got="an unknown keyword" if strange else str(error).removeprefix("got "),
                expected=f"a call of forward({names})",
            ) from None
        return bound.args, bound.kwargs

    def flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[Any], Any]:
        """(tensor leaves, all leaves with None in place of tensors, pytree)."""
        if not kwargs and all(isinstance(a, torch.Tensor) for a in args):
            return list(args), [None] * len(args), len(args)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for k, leaf in enumerate(leaves):
            if not isinstance(leaf, (torch.Tensor, *_VALUES)):
                self._check_value(k, leaf, args, kwargs)
        rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        mask = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return tensors, rest, (_spec_key(spec), mask)

    def _check_value(
        self, k: int, leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A Python object in a request is part of its structure: it must compare by value."""
        try:
            hash(leaf)
            plain = isinstance(leaf, _BY_IDENTITY) or "__hash__" in _own_names(type(leaf))
            fits = plain and not holds_tensors(leaf)
        except TypeError:
            fits = False
        if not fits:
            raise RequestError(
                argument=self.leaf_names(args, kwargs)[k],
                got=f"an object of {type(leaf).__name__}",
                expected="tensors, numbers, strings, and tuples, lists or dicts of them; a class "
                "of your own can be registered with torch.utils._pytree.register_pytree_node",
            )

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, in order."""
        spare = [f"args[{i}]" for i in range(len(self.names), len(args))]
        return {**dict(zip([*self.names, *spare], args, strict=False)), **kwargs}

    def key(self, tensors: Sequence[torch.Tensor], rest: Sequence[Any], tree: Any) -> Hashable:
        """Exact key of a flattened request: requests of equal keys share a plan."""
        if isinstance(tree, int):
            return (tree, *[(t.shape, t.dtype) for t in tensors])
        return (tree[0], tree[1], _values(rest, tree), *[(t.shape, t.dtype) for t in tensors])

    def structure(
        self, tensors: Sequence[torch.Tensor], rest: Sequence[Any], tree: Any
    ) -> Structure:
        """The request's structure; Python values are compared by type and value."""
        shapes = tuple(tuple(t.shape) for t in tensors)
        kinds = tuple((len(t.shape), t.dtype) for t in tensors)
        values = _values(rest, tree)
        key = self.key(tensors, rest, tree)
        family = (tree if isinstance(tree, int) else (tree[0], tree[1]), kinds, values)
        return Structure(key, family, tuple(s for shape in shapes for s in shape), shapes)

    def leaf_names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """A name for every leaf: the argument, with its path inside (`state[0]`)."""
        paths, _ = pytree.tree_flatten_with_path((args, kwargs))
        names = []
        for path, _ in paths:
            number, *rest = cast(Any, path[1:])
            if path[0] == pytree.SequenceKey(0):
                index = number.idx
                variadic = index >= len(self.names)
                name = f"args[{index}]" if variadic else self.names[index]
            else:
                name = str(number.key)
            names.append(name + pytree.keystr(tuple(rest)))
        return names


def _own_names(kind: type) -> set[str]:
    """What a class and its bases define, object aside."""
    return {name for base in kind.__mro__[:-1] for name in vars(base)}


def holds_tensors(leaf: Any) -> bool:
    """Does a Python object that is no pytree hold tensors: as attributes, or as a set does?"""
    held = [*getattr(leaf, "__dict__", {}).values()] if not isinstance(leaf, type) else []
    held += [getattr(leaf, name, None) for name in getattr(type(leaf), "__slots__", ())]
    held += leaf if isinstance(leaf, (set, frozenset)) else []
    return any(isinstance(x, torch.Tensor) for x in held)


def _values(rest: Sequence[Any], tree: Any) -> Hashable:
    """Python values of a request, in place; equal only where they act alike (1 and True do not)."""
    if isinstance(tree, int):
        return ()
    return tuple(
        (type(value), repr(value) if isinstance(value, (float, complex)) else value)
        for value, is_tensor in zip(rest, tree[1], strict=True)
        if not is_tensor
    )


def _spec_key(spec: Any) -> Hashable:
    """A pytree's form as something that hashes."""
    if spec.is_leaf():
        return 0
    context = _frozen(spec.context)
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    return (spec.type, context, tuple(map(_spec_key, children)))


def _frozen(context: Any) -> Hashable:
    """What a pytree says of a node, lists in it as tuples."""
    if isinstance(context, (list, tuple)):
        return tuple(map(_frozen, context))
    frozen: Hashable = context
    return frozen


def _culprit(message: str, names: Sequence[str]) -> str:
    """The argument that a binding error is about."""
    quoted = message.split("'")
    return quoted[1] if len(quoted) > 2 else ", ".join(names)


def kind_of(value: Any) -> tuple[Any, ...]:
    """What requests of one model usually have in common in an argument."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.dim())
    return (type(value).__name__,)


def unlike(value: Any, good: tuple[Any, ...]) -> str | None:
    """What an argument should have been, going by one that worked; None where it is alike."""
    kind = kind_of(value)
    if kind[0] != good[0]:
        wanted = f"a tensor of dtype {DTYPE_NAMES[good[1]]}" if good[0] == "tensor" else good[0]
        return f"{wanted}, as in requests that worked"
    if kind[1:2] != good[1:2]:
        return f"dtype {DTYPE_NAMES[good[1]]}, as in requests that worked"
    if kind != good:
        return f"{good[2]} dimension{'s' * (good[2] != 1)}, as in requests that worked"
    return None


def describe(value: Any) -> str:
    """`f32[3, 4]`, or a Python value as it prints."""
    if not isinstance(value, torch.Tensor):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = DTYPE_NAMES.get(value.dtype, str(value.dtype))
    return f"{name}[{', '.join(map(str, value.shape))}]"


def as_call(request: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A request of `map`: a tuple is positional arguments, a dict keywords, else one argument.

    A named tuple is one argument.
    """
    if isinstance(request, tuple) and not hasattr(request, "_fields"):
        return request, {}
    if isinstance(request, dict):
        return (), request
    return (request,), {}
