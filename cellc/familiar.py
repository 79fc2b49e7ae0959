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
    entries, names = _Entries(compiler), _Names(compiler)
    tensor = torch.Tensor
    out: list[Ticket | None] = []
    for x in requests:
        given: tuple[Any, ...] | None
        if type(x) is tensor:
            entry, given = entries[((x.shape, x.dtype),)], (x,)
        else:
            given = x if type(x) is tuple else names.arguments(x) if type(x) is dict else None
            plain = given is not None and all([type(one) is tensor for one in given])
            entry = entries[tuple([(one.shape, one.dtype) for one in given])] if plain else None  # type: ignore[union-attr]
        out.append(None if entry is None else Ticket(entry, given))  # type: ignore[arg-type]
    compiler.counts["plan_hits"] += len(out) - out.count(None)
    for entry in entries.values():
        if entry is not None:
            compiler.plans.used(entry)
    return out


class _Entries(dict[tuple[Any, ...], Entry | None]):
    """By form."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def __missing__(self, form: tuple[Any, ...]) -> Entry | None:
        compiler = self._compiler
        fits = compiler.arguments.fits(len(form))
        entry = self[form] = compiler.plans.get((len(form), *form)) if fits else None
        return entry


class _Names(dict[tuple[Any, ...], tuple[str, ...] | None]):
    """Keywords in the order of positional arguments, by keywords as given."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def __missing__(self, given: tuple[Any, ...]) -> tuple[str, ...] | None:
        order = self[given] = self._compiler.arguments.in_order(given)
        return order

    def arguments(self, keywords: dict[Any, Any]) -> tuple[Any, ...] | None:
        order = self[tuple(keywords)]
        return None if order is None else tuple([keywords[name] for name in order])
