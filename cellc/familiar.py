"""Familiar requests: those of `map` that are plain tensors, of forms whose plans are known.

Duty: make tickets of them without binding, flattening and keying each: what that comes to is looked
up once a form (the shapes and dtypes of a request's tensors). Used by `cellc.intake`, which makes
tickets of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cellc.compiler import Compiler
from cellc.legs import Entry
from cellc.ticket import Ticket


def familiar(compiler: Compiler, requests: Sequence[Any]) -> list[Ticket | None]:
    """A ticket of each request that is familiar: a tensor, a tuple or a dict of them."""
    if compiler.arguments.identity:  # which tensors are one is part of a form
        return [None] * len(requests)
    entries = _Entries(compiler)
    given: list[tuple[Any, ...] | None]
    if {*map(type, requests)} == {torch.Tensor}:  # as most are
        given = [(x,) for x in requests]
        found = [entries[((x.shape, x.dtype),)] for x in requests]
    else:
        names = _Names(compiler)
        given = [(x,) if type(x) is torch.Tensor else names.arguments(x) for x in requests]
        found = [entries[_form(args)] for args in given]
    compiler.counts["plan_hits"] += len(found) - found.count(None)
    for entry in entries.values():
        if entry is not None:
            compiler.plans.used(entry)
    return [
        None if entry is None else Ticket(entry, args)  # type: ignore[arg-type]
        for entry, args in zip(found, given, strict=True)
    ]


def _form(args: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Shapes and dtypes; None where not all are plain tensors."""
    if args is None or not all([type(x) is torch.Tensor for x in args]):
        return None
    return tuple([(x.shape, x.dtype) for x in args])


class _Entries(dict[tuple[Any, ...] | None, Entry | None]):
    """By form."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def __missing__(self, form: tuple[Any, ...] | None) -> Entry | None:
        fits = form is not None and self._compiler.arguments.fits(len(form))
        key = (len(form), *form) if form is not None else None
        entry = self[form] = self._compiler.plans.get(key) if fits else None
        return entry


class _Names(dict[tuple[Any, ...], tuple[str, ...] | None]):
    """Keywords in the order of positional arguments, by keywords as given."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def __missing__(self, given: tuple[Any, ...]) -> tuple[str, ...] | None:
        order = self[given] = self._compiler.arguments.in_order(given)
        return order

    def arguments(self, request: Any) -> tuple[Any, ...] | None:
        """Positional ones of a request that is a tuple or a dict."""
        if type(request) is tuple:
            return request
        order = self[tuple(request)] if type(request) is dict else None
        return None if order is None else tuple([request[name] for name in order])
