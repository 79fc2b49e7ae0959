"""The model's modules: which there are, their weights by name, their mode.

Duty: look at a user's nn.Module or function from outside. Used by `cellc.compiler` and
`cellc.compiled`.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def modules_of(model: Any) -> dict[str, nn.Module]:
    """A model's modules: itself, or those that a function's closure or globals hold."""
    if isinstance(model, nn.Module):
        return {"": model}
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return {"": owner}
    function = getattr(model, "__wrapped__", model)
    found: dict[str, nn.Module] = {}
    code = getattr(function, "__code__", None)
    if code is None:
        return found
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    for name, cell in cells:
        if isinstance(cell.cell_contents, nn.Module):
            found[name] = cell.cell_contents
    for name in code.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module):
            found[name] = value
    return found


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers by qualified name."""
    out: dict[str, torch.Tensor] = {}
    for prefix, module in modules_of(model).items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            out[f"{prefix}.{name}" if prefix else name] = tensor
    return out


def named_modules(model: Any) -> dict[str, nn.Module]:
    """Modules by qualified name."""
    return {
        f"{prefix}.{name}" if prefix and name else prefix or name: module
        for prefix, root in modules_of(model).items()
        for name, module in root.named_modules()
    }


def module_names(model: Any) -> dict[int, str]:
    return {
        id(module): f"{prefix}.{name}" if prefix else name
        for prefix, root in modules_of(model).items()
        for name, module in root.named_modules()
    }


MANY = 10_000  # objects made while nothing was collected
_TABLES = ("_buffers", "_parameters", "_modules")  # where nn.Module keeps some attributes
_warned: set[tuple[type, str]] = set()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Modules in eval mode inside; afterwards their mode and attributes are as they were before.

    Warns where the forward set an attribute: the next request does not see it.
    """
    modules = [m for root in modules_of(model).values() for m in root.modules()]
    places = [(m, p) for m in modules for p in (vars(m), *(vars(m)[t] for t in _TABLES))]
    before = [dict(place) for _, place in places]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for (module, place), kept in zip(places, before, strict=True):
            for name in _restore(place, kept) - {"training"}:
                _warn_of_state(type(module), name)


def _restore(place: dict[str, Any], kept: dict[str, Any]) -> set[str]:
    """Make a dict what it was; returns the names that differed."""
    changed = {n for n in place.keys() | kept.keys() if place.get(n) is not kept.get(n)}
    for name in changed:
        if name in kept:
            place[name] = kept[name]
        else:
            del place[name]
    return changed


def _warn_of_state(kind: type, name: str) -> None:
    if (kind, name) not in _warned:
        _warned.add((kind, name))
        warnings.warn(
            f"the forward sets self.{name} of a {kind.__name__}: a request does not see what "
            "another set; return the value, or pass it in as an argument",
            stacklevel=2,
        )


@contextmanager
def without_collecting() -> Iterator[None]:
    """No garbage collection inside: much is made, and all of it is needed to the end."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if gc.get_count()[0] > MANY and not gc.get_freeze_count():
                gc.freeze()  # to the old generation: a collection of the young one would look
                gc.unfreeze()  # through all that was made, and find that it is needed
            gc.enable()
