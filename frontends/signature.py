"""Signatures: the form of a call's arguments, and the rows in them.

Duty: tell calls of one form from others; say what torch functions mean for stacks and for numbers
of the request, which need no operation. Used by `frontends.unfold`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cellc.frontends.stub import CannotUnfold, FloatNumber, IntNumber, Stack, Stub

STATIC = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
NUMBERS = (IntNumber, FloatNumber)
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
ARITHMETIC = frozenset(
    f"{prefix}{name}{suffix}"
    for name in "add radd sub rsub mul rmul truediv rtruediv".split()
    for prefix, suffix in (("__", "__"), ("", ""))
) | {"div"}


class Structural(Exception):
    """An argument that is neither tensors nor small values. `row`: the one that it is, if it is a
    number of the request.
    """

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what)
        self.row = row


def sign(x: Any, form: list[Any], rows: list[int], parts: Collection[int]) -> None:
    """Append the form of an argument, and the rows in it. `parts`: ids of the request's containers.

    Raises Structural for what is part of the request's structure, or no value at all.
    """
    kind = type(x)
    if kind is Stub:
        form.append(x.type)
        rows.append(x.id)
    elif kind is Stack:
        form.append(Stack)
        form.append(x.type)
        for item in x.items:
            if type(item) is not Stub:
                raise CannotUnfold("a stack of stacks")
            rows.append(item.id)
    elif kind in (tuple, list, torch.Size) or (
        issubclass(kind, tuple) and hasattr(kind, "_fields")
    ):
        if id(x) in parts:
            raise Structural("part of the request's structure")
        form.append((kind, len(x)))
        for y in x:
            sign(y, form, rows, parts)
    elif kind is dict:
        if id(x) in parts:
            raise Structural("part of the request's structure")
        form.append((dict, *x))
        for y in x.values():
            sign(y, form, rows, parts)
    elif kind is slice:
        for y in (x.start, x.stop, x.step):
            sign(y, form, rows, parts)
    elif kind in NUMBERS:
        raise Structural("a number", x.row)
    elif hasattr(kind, "known"):
        raise Structural("a number")
    elif kind in STATIC:
        form.append(kind)
        form.append(repr(x) if kind is float else x)
    elif isinstance(x, torch.Tensor):
        form.append(("weight", id(x)))
    elif x is Ellipsis or isinstance(x, STATIC):
        form.append(x)
    else:
        raise Structural(f"an object of {kind.__name__}")


def tensor_of(func: Any, args: Any, kwargs: Any) -> Any:
    """A tensor made of numbers of the request; None where there are none."""
    data = (
        args[-1] if func is torch.Tensor.new_tensor else (args[0] if args else kwargs.get("data"))
    )
    dtype = kwargs.get("dtype")
    if func is torch.Tensor.new_tensor and dtype is None:
        dtype = args[0].dtype
    if _is_number(data):
        made: Any = _as_tensor(data, dtype)
    elif isinstance(data, (list, tuple)) and data and _has_number(data):
        made = _nested(data, dtype)
    else:
        return None
    return made if dtype is None or made.dtype is dtype else made.to(dtype)


def _as_tensor(number: Any, dtype: torch.dtype | None) -> Any:
    """A number of the request as a tensor: a float goes to the wanted dtype from float64."""
    if number.kind is not float:
        return number.stub
    return number.stub.to(dtype or torch.get_default_dtype())


def _nested(data: Any, dtype: torch.dtype | None) -> Any:
    items: list[Any] = []
    for x in data:
        if _is_number(x):
            items.append(_as_tensor(x, dtype))
        elif isinstance(x, (list, tuple)):
            items.append(_nested(x, dtype))
        else:
            items.append(torch.tensor(x, dtype=dtype))
    return torch.stack(items)


def _has_number(data: Any) -> bool:
    return any(_is_number(x) or (isinstance(x, (list, tuple)) and _has_number(x)) for x in data)


def _is_number(x: Any) -> bool:
    """A number of the request, or one that was taken out of a tensor (`frontends.asking`)."""
    return type(x) in NUMBERS or hasattr(type(x), "known")


def holds_stub(x: Any) -> bool:
    return type(x) in (Stub, Stack) or (
        isinstance(x, (tuple, list)) and any(holds_stub(y) for y in x)
    )


def has_values(call: Any) -> bool:
    """Do its arguments hold Python numbers or strings?"""
    return any(
        isinstance(x, (int, float, str)) and not isinstance(x, bool)
        for x in pytree.tree_leaves(call)
    )


def tells_form(func: Any) -> bool:
    """A function that says something about a tensor of the model, and makes none."""
    return name_of(func) in _FORMS


_FORMS = frozenset(
    "__get__ size dim ndim numel nelement stride is_floating_point is_complex is_contiguous "
    "data_ptr element_size get_device type __len__ __repr__ __format__ is_tensor __hash__ "
    "result_type promote_types can_cast get_default_dtype is_grad_enabled".split()
)


def name_of(func: Any) -> str:
    return getattr(func, "__name__", None) or type(func).__name__


def line_of(frame: Any) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


ROW_BY_ROW = {torch.Tensor.__getitem__, torch.Tensor.unbind, torch.unbind, torch.select}


def _stack(args: Any, kwargs: Any) -> Any:
    items = args[0] if args else kwargs.get("tensors")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 0 or not isinstance(items, (list, tuple)) or not items:
        return None
    if all(type(x) is Stub and x.type is items[0].type for x in items):
        return Stack(items)
    return None


def _cat(args: Any, kwargs: Any) -> Any:
    items = args[0] if args else kwargs.get("tensors")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 0 or not isinstance(items, (list, tuple)) or not items:
        return None
    if all(type(x) is Stack and x.items[0].type is items[0].items[0].type for x in items):
        return Stack([y for x in items for y in x.items])
    return None


def _unbind(args: Any, kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return tuple(args[0].items) if type(args[0]) is Stack and dim == 0 else None


def _flip(args: Any, kwargs: Any) -> Any:
    if type(args[0]) is Stack and len(args) > 1:
        return args[0].flip(*args[1:]) if args[1:] in (((0,),), ([0],), (0,)) else None
    return None


STACKS: dict[Any, Callable[[Any, Any], Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.unbind: _unbind,
    torch.flip: _flip,
}
