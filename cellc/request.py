"""Requests: from a call's arguments to a structure key and tensor leaves.

Duty: flatten a request, name its parts for error messages, and key its structure: requests of equal
keys share a plan. Comes in from `cellc.compiled`; goes to `cellc.compiler`. Tensors of a request
are its data; everything else about it (shapes, dtypes, the pytree, Python values) is structure.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from cellc import skeleton
from cellc.dtypes import DTYPE_NAMES
from cellc.errors import RequestError
from cellc.skeleton import Steering

_LEAVES = (torch.Tensor, int, float, *skeleton.VALUES)


@dataclass(frozen=True)
class Structure:
    """What requests that share a plan have in common."""

    key: Hashable  # exact
    family: Hashable  # the same, without sizes
    sizes: tuple[int, ...]  # every size of every tensor leaf
    shapes: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Request:
    """A flattened call: tensor leaves, then the Python numbers that are data as one tensor each of
    int64 and float64; and what is left of it as tokens (or, of a flat call, the number of tensors).
    """

    tensors: list[torch.Tensor]
    tokens: Hashable
    given: int = -1  # how many of the tensors the caller gave
    ints: bool = False
    floats: bool = False
    nested: bool = False  # does it hold a container
    structured: bool = False  # does it hold more than flat groups of tensors
    steering: Steering | None = None  # what numbers decided when it was flattened
    generators: Sequence[torch.Generator] = ()

    aliased: bool = False  # are some of its tensors one, and does that matter
    entry: Any = None  # its plan, where that is known
    _key: Hashable = None

    @property
    def key(self) -> Hashable:
        """Exact: requests of equal keys share a plan."""
        if self._key is None:
            self._key = (self.tokens, *[(t.shape, t.dtype) for t in self.tensors])
        return self._key

    @property
    def structure(self) -> Structure:
        shapes = tuple(tuple(t.shape) for t in self.tensors)
        family = (self.tokens, tuple((len(t.shape), t.dtype) for t in self.tensors))
        return Structure(self.key, family, tuple(s for shape in shapes for s in shape), shapes)


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
        self._named = self._plain and inspect.Parameter.POSITIONAL_ONLY not in kinds
        self._num = len(kinds)
        given = self._signature.parameters.values() if self._signature else ()
        self.required = [p.name for p in given if p.default is inspect.Parameter.empty]
        self._required = len(self.required)
        self.steering: Steering | None = None  # see `skeleton.flatten`
        self.identity = False  # which tensors are one is part of a request's structure
        self.names = list(self._signature.parameters) if self._signature else []

    def fits(self, count: int) -> bool:
        """Can it be called with that many positional arguments and no others?"""
        return self._plain and self._required <= count <= self._num

    def in_order(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Those names of arguments as positional ones; None where a call with these keywords is no
        call with positional arguments alone.
        """
        order = tuple(self.names[: len(names)])
        return order if set(order) == set(names) and self._named and self.fits(len(order)) else None

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments as positional where the signature allows; raises RequestError where it does not
        fit.
        """
        if not kwargs and self.fits(len(args)):
            return args, {}
        if self._signature is None:
            return args, dict(kwargs)
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(self.names)
            strange = [k for k in kwargs if k not in self.names]
            got = str(error).removeprefix("got ")
            if strange:
                got = "an unknown keyword"
            elif got.startswith("missing"):
                got = "nothing"
            raise RequestError(
                argument=", ".join(strange) or _culprit(str(error), self.names),
                got=got,
                expected=f"a call of forward({names})"
                + (
                    "; in map a dict is keywords, and ({...},) one argument"
                    * bool(strange and not args)
                ),
            ) from None
        return bound.args, bound.kwargs

    def flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, exact: bool = False
    ) -> Request:
        """A bound call as data and structure; `exact`: Python numbers are structure."""
        request = self._flattened(args, kwargs, exact)
        if self.identity:
            first: dict[int, int] = {}
            given = request.tensors[: request.given if request.given >= 0 else None]
            alike = [first.setdefault(id(t), i) for i, t in enumerate(given)]
            if len(first) < len(alike):
                tokens: Any = request.tokens
                tokens = (tokens,) if type(tokens) is int else tokens
                request.tokens, request.aliased = (*tokens, ("one", *alike)), True
        return request

    def _flattened(self, args: tuple[Any, ...], kwargs: dict[str, Any], exact: bool) -> Request:
        if not kwargs and all(isinstance(a, torch.Tensor) for a in args):
            return Request(list(args), len(args))
        steering = None if exact else self.steering
        if not kwargs and (tokens := skeleton.plain_tokens(args)) is not None:
            tensors = [x for x in args if type(x) is torch.Tensor]
            return Request(tensors, tokens, len(tensors), False, False, True, True, steering)
        try:
            flat = skeleton.flatten(args, kwargs, steering)
        except skeleton.NotFlat as error:
            raise self._refusal(error.leaf, args, kwargs) from None
        if self.steering is not None and flat.nested:
            self._note_containers(args, kwargs)
        tensors = flat.tensors
        given = len(tensors)
        if flat.ints:
            tensors.append(self._numbers(flat.ints, args, kwargs))
        if flat.floats:
            tensors.append(torch.tensor(flat.floats, dtype=torch.float64))
        return Request(
            tensors,
            flat.tokens,
            given,
            bool(flat.ints),
            bool(flat.floats),
            flat.nested,
            flat.structured,
            steering,
            flat.generators,
        )

    def _note_containers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which arguments are containers: a number there is a leaf."""
        known = self.steering
        for place, x in (*enumerate(args), *kwargs.items()):
            arrays = getattr(type(x), "structured", False)
            if known is None or place in known.containers or type(x) in _LEAVES or arrays:
                continue
            if skeleton.children(x) is not None:
                known = replace(known, containers=known.containers | {place})
                self.steering = known

    def _numbers(
        self, ints: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        try:
            return torch.from_numpy(np.array(ints, np.int64))
        except OverflowError:
            raise RequestError(
                argument=", ".join(self.by_name(args, kwargs)),
                got=f"the number {max(ints, key=abs)}",
                expected="numbers of 64 bits",
            ) from None

    def _refusal(self, leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RequestError:
        if (known := getattr(type(leaf), "array_names", None)) is not None:
            held = ", ".join(n for n in skeleton.attributes(leaf) if n not in known)
            return RequestError(
                argument=_where(leaf, self.by_name(args, kwargs)),
                got=f"a {type(leaf).__name__} that also holds {held}",
                expected="tensors and objects as arguments of their own, beside the structure",
            )
        return RequestError(
            argument=_where(leaf, self.by_name(args, kwargs)),
            got=f"an object of {type(leaf).__name__}",
            expected="tensors, numbers, strings, tuples, lists and dicts of them, and objects that "
            "hold such in attributes (torch.as_tensor makes a tensor of a numpy array); a class of "
            "your own can be registered with torch.utils._pytree.register_pytree_node",
        )

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, in order."""
        spare = [f"args[{i}]" for i in range(len(self.names), len(args))]
        return {**dict(zip([*self.names, *spare], args, strict=False)), **kwargs}

    def leaf_names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """A name for every tensor leaf: the argument, with its path inside (`state[0]`)."""
        return skeleton.tensor_paths(args, kwargs, self.names)


def _where(leaf: Any, given: Mapping[str, Any]) -> str:
    """Path of a leaf among named arguments."""
    seen: set[int] = set()
    stack = list(given.items())
    while stack:
        path, x = stack.pop()
        if x is leaf:
            return path
        if id(x) not in seen and (parts := skeleton.children(x)) is not None:
            seen.add(id(x))
            stack += zip(skeleton.steps(x, path), parts[1], strict=True)
    return ", ".join(given)


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


LONGEST, DEEPEST = 120, 5  # of what is said of a value
_BRACKETS: Mapping[type[Any], str] = {dict: "{}", list: "[]", tuple: "()"}


def describe(value: Any) -> str:
    """`f32[3, 4]`, or a Python value as it prints, its tensors so, too."""
    text = _said(value, 0)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _said(value: Any, depth: int) -> str:
    if isinstance(value, torch.Tensor):
        name = DTYPE_NAMES.get(value.dtype, str(value.dtype))
        return f"{name}[{', '.join(map(str, value.shape))}]"
    kind = type(value)
    inside = _BRACKETS.get(kind, "")
    fields = [f.name for f in dataclasses.fields(value)] if _is_record(value) else None
    if depth >= DEEPEST and (inside or fields):
        return f"a {kind.__name__}"
    if kind is dict:
        parts = [f"{k!r}: {_said(v, depth + 1)}" for k, v in islice(value.items(), LONGEST)]
    elif inside:
        parts = [_said(v, depth + 1) for v in islice(value, LONGEST)]
    elif fields is not None:
        parts = [f"{n}={_said(getattr(value, n, None), depth + 1)}" for n in fields]
        inside = f"{kind.__name__}()"
    else:
        return _printed(value)
    return f"{inside[:-1]}{', '.join(parts)}{',' * (parts[1:] == [] and kind is tuple)}{inside[-1]}"


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _printed(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"


def as_call(request: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A request of `map`: a tuple is positional arguments, a dict keywords, else one argument.

    A named tuple is one argument.
    """
    if isinstance(request, tuple) and not hasattr(request, "_fields"):
        return request, {}
    if isinstance(request, dict):
        return (), request
    return (request,), {}
