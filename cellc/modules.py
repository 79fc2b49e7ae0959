"""The model's modules: which there are, their weights by name, their mode.

Duty: look at a user's nn.Module or function from outside. Used by `cellc.compiler` and
`cellc.compiled`.
"""

from __future__ import annotations

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


def module_names(model: Any) -> dict[int, str]:
    return {
        id(module): f"{prefix}.{name}" if prefix else name
        for prefix, root in modules_of(model).items()
        for name, module in root.named_modules()
    }


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Modules in eval mode inside; afterwards their mode and attributes are as they were before."""
    modules = [m for root in modules_of(model).values() for m in root.modules()]
    before = [dict(vars(m)) for m in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            now = vars(module)
            for name in set(now) - set(kept):
                del now[name]
            now.update({name: v for name, v in kept.items() if now.get(name) is not v})
