"""`@cellc.cell`: a cell marked by hand.

Duty: the mark, and whether a model has one. Calls of what is marked are cells wherever a model is
unfolded (`frontends.unfold`), which checks that they can be; elsewhere the mark does nothing.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from cellc.errors import UnsupportedError
from cellc.frontends import stub as stubs
from cellc.modules import modules_of

T = TypeVar("T", bound=Callable[..., Any])


def cell(target: T) -> T:
    """Mark a function, a method or a Module class: each of its calls is one cell call.

    A marked cell takes everything it works on as arguments (tensors, tuples and lists of them, and
    plain values) and reads no value of a tensor; a model that breaks this is refused, with the line
    of the call. Where a marked cell runs marked cells in a loop, those are the cells.

    Raises UnsupportedError for anything else than a function or a Module class.

    >>> import torch, cellc
    >>> @cellc.cell
    ... def step(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    ...     return torch.tanh(x + h)
    >>> step(torch.zeros(1), torch.zeros(1))
    tensor([0.])
    """
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise UnsupportedError(
                what=f"@cellc.cell on the class {target.__name__}",
                remedy="mark an nn.Module class, a method or a function",
            )
        target._cellc_cell = True  # type: ignore[attr-defined]
        return target
    if not isinstance(target, types.FunctionType):
        raise UnsupportedError(
            what=f"@cellc.cell on a {type(target).__name__}",
            remedy="mark a function, a method (inside @staticmethod), or a Module class",
        )

    @functools.wraps(target)
    def marked(*args: Any, **kwargs: Any) -> Any:
        stubs.current.marked_calls += 1
        recorder: Any = stubs.current.target
        if recorder is None:
            return target(*args, **kwargs)
        return recorder.marked(target, args, kwargs, sys._getframe(1))

    marked._cellc_cell = True  # type: ignore[attr-defined]
    return marked  # type: ignore[return-value]


def is_marked(thing: Any) -> bool:
    return bool(getattr(thing, "_cellc_cell", False))


def has_marks(model: Any) -> bool:
    """Does a model use anything marked: a module's class, a method, or a function that the files
    of its modules know?
    """
    kinds = {type(m) for root in modules_of(model).values() for m in root.modules()}
    spaces = [vars(sys.modules[k.__module__]) for k in kinds if k.__module__ in sys.modules]
    spaces.append(getattr(model, "__globals__", {}))
    for kind in kinds:
        if not kind.__module__.startswith("torch."):
            if is_marked(kind) or any(is_marked(v) for b in kind.__mro__ for v in vars(b).values()):
                return True
    own = [s for s in spaces if not str(s.get("__name__", "")).startswith("torch.")]
    return any(
        isinstance(v, types.FunctionType) and is_marked(v) for space in own for v in space.values()
    )
