"""Overhearing: which values a model reads while it runs on true tensors.

Duty: list them in order, so that a trace of the same request can be given them. Used by
`cellc.pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, values: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            self._values.append(result)
        return result


class _Lists(TorchFunctionMode):
    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "tolist":
            self._values.append(result)
        return result


@contextmanager
def reading() -> Iterator[list[Any]]:
    """Inside, values that are read of true tensors are listed, in order."""
    values: list[Any] = []
    with _Reads(values), _Lists(values):
        yield values
