"""Placeholders: tensors that have a shape and a dtype but no data.

Duty: what a user's forward works on while `frontends.tracing` traces it. A placeholder is a torch
tensor in all that Python and torch's own code ask of its shape; every operation on it goes to the
tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import overrides
from torch.utils import _python_dispatch

CPU = torch.device("cpu")
_dispatch_modes: Callable[[], list[Any]] = _python_dispatch._get_current_dispatch_mode_stack
_function_modes: Callable[[], list[Any]] = overrides._get_current_function_mode_stack
SHORT = 64  # elements of a tensor whose text is a value that is read


class Form(NamedTuple):
    """What is known of a tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Placeholder(torch.Tensor):
    """A tensor of one trace: `tracked` is the tracer's, `constant` what it holds where known.

    To torch's own code it is on the CPU, whose composite operations are the plain ones (a GPU's
    `gru_cell` is one fused kernel); the user's code sees the device of `form`.
    """

    form: Form
    tracked: Any
    constant: torch.Tensor | None

    @staticmethod
    def __new__(cls, form: Form) -> Placeholder:
        if torch.is_inference_mode_enabled():  # views of a tensor made in it are refused
            with torch.inference_mode(False):
                return cls.__new__(cls, form)
        made: Placeholder = torch.Tensor._make_wrapper_subclass(
            cls,
            form.shape,
            form.stride,
            0,
            None,
            form.dtype,
            torch.strided,
            CPU,
            storage_size=_extent(form) * form.dtype.itemsize,
        )
        made.form, made.tracked, made.constant = form, None, None
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.form.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.form.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self.form.device.type == "cpu"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError("a tensor of a traced forward was used after the trace")

    def change(self, func: Any, args: Sequence[Any], form: Form) -> None:
        """Become a view of itself: `func` is an operation like `squeeze_`."""
        with modes_off(), torch._C._DisableTorchDispatch():
            func(self, *args)
        self.form = form

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if torch._C._is_torch_function_mode_enabled() and self.numel() <= SHORT:
            shown: Any = Placeholder.__repr__
            return str(torch.overrides.handle_torch_function(shown, (self,), self))
        return f"Placeholder({list(self.form.shape)}, {self.form.dtype})"


def form_of(tensor: torch.Tensor | Form) -> Form:
    if isinstance(tensor, Form):
        return tensor
    if isinstance(tensor, Placeholder):
        return tensor.form
    return Form(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


def row_major(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Form:
    """The form of a contiguous tensor."""
    stride, size = [], 1
    for n in reversed(shape):
        stride.append(size)
        size *= max(n, 1)
    return Form(tuple(shape), tuple(reversed(stride)), dtype, device)


def _extent(form: Form) -> int:
    if 0 in form.shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(form.shape, form.stride, strict=True))


@contextmanager
def modes_kept() -> Iterator[None]:
    """Torch's modes are those before, however the block ends: where a signal's handler raises on
    the way into a mode or out of it, that stays on, and every operation of the thread goes to it.
    """
    dispatch, functions = _dispatch_modes(), _function_modes()
    try:
        yield
    finally:
        if _dispatch_modes() != dispatch:
            _restore(_dispatch_modes, dispatch, _python_dispatch)
        if _function_modes() != functions:
            _restore(_function_modes, functions, overrides)


def _restore(now: Callable[[], list[Any]], before: list[Any], modes: Any) -> None:
    while now():
        modes._pop_mode()
    for mode in before:
        modes._push_mode(mode)


@contextmanager
def modes_off() -> Iterator[None]:
    """No tracing inside."""
    with _python_dispatch._disable_current_modes():
        yield
