"""Copies of requests: the same Python structure with other leaves.

Duty: copy what a request is made of (`cellc.skeleton`) with something else in place of its tensors
and numbers: placeholders and stubs for tracing and unfolding, which give the forward a copy, or
tensors on another device. Shared parts stay shared, circles stay circles.

Iterative, so that depth costs no recursion; classes of the user's are filled without their
`__init__`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cellc.skeleton import VALUES, NotFlat, Place, attributes, children


def filler(x: Any) -> tuple[Callable[[list[Any]], Any], Any]:
    """(what makes or fills a copy from its items, the empty copy where there can be one)."""
    kind = type(x)
    if kind is list:
        shell: Any = []
        return lambda items: (shell.extend(items), shell)[1], shell
    if kind in (dict, OrderedDict):
        shell = kind()
        keys = list(x)
        return lambda items: (shell.update(zip(keys, items, strict=True)), shell)[1], shell
    if kind is tuple:
        return tuple, None
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return lambda items: kind(*items), None
    if kind in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[kind]
        context = node.flatten_fn(x)[1]
        return lambda items: node.unflatten_fn(items, context), None
    names = attributes(x)
    if isinstance(x, (list, dict, tuple)):
        return _subclass_filler(x, names)
    try:
        shell = object.__new__(kind)
    except TypeError:
        shell = kind.__new__(kind)  # type: ignore[call-overload]

    def fill(items: list[Any]) -> Any:
        for name, item in zip(names, items, strict=True):
            object.__setattr__(shell, name, item)
        return shell

    return fill, shell


def _subclass_filler(x: Any, names: list[str]) -> tuple[Callable[[list[Any]], Any], Any]:
    kind: Any = type(x)
    size, keys = len(x), list(x)

    def fill(items: list[Any]) -> Any:
        made = tuple.__new__(kind, items[:size]) if isinstance(x, tuple) else shell
        if isinstance(x, list):
            list.extend(made, items[:size])
        elif isinstance(x, dict):
            dict.update(made, zip(keys, items[:size], strict=True))
        for name, item in zip(names, items[size:], strict=True):
            object.__setattr__(made, name, item)
        return made

    shell: Any = None if isinstance(x, tuple) else kind.__new__(kind)
    return fill, shell


class Copier:
    """Copies a request with `tensor(leaf, place)` in place of its tensors and `number(value,
    place)` of its numbers, called in walking order.

    Iterative, so that depth costs no recursion.
    """

    def __init__(
        self,
        tensor: Callable[[torch.Tensor, Place], Any],
        number: Callable[[Any, Place], Any] | None = None,
    ) -> None:
        self._tensor, self._number = tensor, number
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._open: set[int] = set()

    def call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        roots = [*enumerate(args), *kwargs.items()]
        made = [self._copy(x, ("argument", k)) for k, x in roots]
        return tuple(made[: len(args)]), dict(zip(kwargs, made[len(args) :], strict=True))

    def _copy(self, x: Any, place: Place) -> Any:
        """Children before parents; what can be filled later is known before its children, so that
        circles close.
        """
        root: list[Any] = [None]
        stack: list[Any] = [(x, place, root, 0)]
        while stack:
            x, place, target, at = stack.pop()
            if target is None:  # the items of a container are there
                original, items, finish, (target, at) = x
                target[at] = self._made[id(original)] = finish(items)
                self._open.discard(id(original))
                continue
            kind = type(x)
            if (kind is int or kind is float) and self._number is not None:
                target[at] = self._number(x, place)
            elif isinstance(x, torch.Tensor):
                target[at] = self._tensor(x, place)
            elif kind is torch.Generator:
                target[at] = x.clone_state()  # whoever draws from the copy leaves the original
            elif id(x) in self._made:
                target[at] = self._made[id(x)]
            elif (parts := None if kind in VALUES else children(x)) is None:
                target[at] = x
            elif id(x) in self._open:
                raise NotFlat(x)  # a circle that no copy can close
            else:
                _, values, places = parts
                finish, shell = filler(x)
                items = [None] * len(values)
                self._kept += [values, x]
                if shell is not None:
                    self._made[id(x)] = target[at] = shell
                self._open.add(id(x))
                stack.append(((x, items, finish, (target, at)), None, None, 0))
                for i in range(len(values) - 1, -1, -1):
                    stack.append((values[i], places[i], items, i))
        return root[0]
