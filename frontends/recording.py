"""Recording: what becomes of a call or a torch function that meets stubs.

Duty: find, for everything that a forward does, the operation that it is, and record it with the
rows that it reads: a call of a module, of a module's method or of a function marked `@cellc.cell`,
or its body where it is given more than tensors; a torch function, with what it writes, chooses,
reads or draws dealt with by the layers below. Stands between `frontends.learning` and
`frontends.unfold`.
"""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cellc import errors
from cellc.dtypes import DTYPE_NAMES
from cellc.frontends import stub as stubs
from cellc.frontends.callees import Callee, Callees, RefusedCell
from cellc.frontends.choosing import CHOOSING, has_bounds, is_number_tensor
from cellc.frontends.drawing import Draw, GeneratorStub, drawn
from cellc.frontends.learning import TRANSPARENT, Learner, ReadsValue, StudyAlone
from cellc.frontends.points import is_generated
from cellc.frontends.reads import holds_read
from cellc.frontends.signature import (
    ARITHMETIC,
    MAKERS,
    NUMBERS,
    ROW_BY_ROW,
    STACKS,
    Structural,
    line_of,
    name_of,
    sign,
    tells_form,
    tensor_of,
)
from cellc.frontends.stub import CannotUnfold, IntNumber, NumberSteers, Stack, Stub, StubType

_TORCH = os.path.dirname(torch.__file__)
_OURS = {os.path.dirname(os.path.abspath(file)) for file in (__file__, errors.__file__)}
_VARIES: Any = object()
_IN_PLACE = frozenset(name for name in vars(Stub) if name.startswith("__i")) & frozenset(
    f"__i{name}__"
    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
)


class Recording(Learner):
    """A recorder of what a forward does."""

    def __init__(self, study: StudyAlone, device: torch.device) -> None:
        super().__init__(study, device)
        self.draws: list[Draw] = []
        self._callees = Callees(self.call)
        self._numbers: dict[Any, Any] = {}  # by place in the code: the number met there
        self._user_code: dict[int, bool] = {}
        self.raised_in: Any = None  # a frame that an error left, while what it holds is asked for

    # -- calls --

    def call(self, callee: Callee, args: Any, kwargs: Any, frame: Any) -> Any:
        """A call of a callee: one operation, or its body."""
        if not self.on or self._thread != threading.get_ident():
            return callee.run(*args, **kwargs)
        if callee.transparent:
            return self._body(callee, args, kwargs)
        form: list[Any] = [id(frame.f_code), frame.f_lasti, callee]
        rows: list[int] = []
        add = form.append
        odd = False  # is there anything but stubs in tuples
        try:
            for x in args:
                kind = type(x)
                if kind is Stub:
                    add(x.type)
                    rows.append(x.id)
                elif kind is tuple or kind is list:
                    if id(x) in self.parts:
                        raise Structural("part of the request's structure")
                    add(len(x) if kind is tuple else ~len(x))
                    for y in x:
                        if type(y) is Stub:
                            add(y.type)
                            rows.append(y.id)
                        else:
                            odd = True
                            sign(y, form, rows, self.parts)
                else:
                    odd = True
                    sign(x, form, rows, self.parts)
            for name in sorted(kwargs):
                add(name)
                sign(kwargs[name], form, rows, self.parts)
        except Structural:
            if callee.marked:
                raise RefusedCell(
                    what=f"the cell {callee.name} called with Python structure",
                    remedy="give a cell tensors, tuples and lists of them, and plain values only",
                    origin=line_of(frame),
                ) from None
            callee.transparent = self.relearn = True
            return self._body(callee, args, kwargs)
        if odd and callee.row_arguments:
            changed = self._weights_as_rows(callee, args)
            if changed is not args:
                return self.call(callee, changed, kwargs, frame)
        if not rows and not callee.marked:
            return callee.run(*args, **kwargs)  # nothing of the request in it
        op = self.ops.get(tuple(form))
        if op is None:
            op = self._learn(callee.run, (args, kwargs), tuple(form), callee.name, frame, callee)
        if op is TRANSPARENT:
            return callee.run(*args, **kwargs)
        if op.study.constant is not None:
            made = self._constant(op)
        else:
            made = self._record(op, rows, frame)
        return self.watch(op, args, kwargs, made) if self.writing else made

    def marked(self, function: Callable[..., Any], args: Any, kwargs: Any, frame: Any) -> Any:
        """A call of a function or method marked `@cellc.cell`."""
        owner = args[0] if args and isinstance(args[0], nn.Module) else None
        run: Callable[..., Any] = function
        if owner is not None:
            run, args = types.MethodType(function, owner), args[1:]
        key = ("marked", id(function), id(owner))
        name = getattr(function, "__qualname__", "cell")
        return self.call(self._callees.of(key, name, run, True), args, kwargs, frame)

    # -- torch functions --

    def function(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        """A torch function that met stubs or numbers, or makes a tensor."""
        if not self.on or self._thread != threading.get_ident():
            raise CannotUnfold("a value of the request is used from outside")
        if stubs.current.ended is not None:  # and the forward went on all the same
            raise stubs.current.ended
        frame = self._user_frame_of(frame)
        if kwargs.get("out") is not None:
            raise CannotUnfold("out= writes in place; assign the result", line_of(frame))
        if name_of(func).startswith("as_strided"):
            raise CannotUnfold("as_strided depends on a tensor's memory", line_of(frame))
        if func in _TRUTHS:
            return _TRUTHS[func](*args, **kwargs)
        if type(kwargs.get("generator")) is GeneratorStub:
            return drawn(func, args, kwargs, self._draw)
        if func in MAKERS or func is torch.Tensor.new_tensor:
            made = tensor_of(func, args, kwargs)
            if made is not None:
                return self.fresh(made) if self.writing and type(made) is Stub else made
        if func is torch.Tensor.__getitem__ and has_bounds(args[1]):
            args = (args[0], self.bounds(args[1]))
            return args[0][args[1]]
        if func is torch.Tensor.__getitem__:
            index = args[1] if type(args[1]) is tuple else (args[1],)
            if any(map(is_number_tensor, index)):
                made = self.selected(*args)
                if made is not None:
                    return self.selected_view(made, *args) if self.writing else made
        if func in CHOOSING and args and type(args[0]) in (Stub, Stack):
            made = self.chosen(func, args, kwargs)
            if made is not None:
                return made
        if func in ROW_BY_ROW and type(args[0]) is Stub and len(args[0].type.shape) > 1:
            self._notice(args)
        special = STACKS.get(func)
        if special is not None:
            made = special(args, kwargs)
            if made is not None:
                return self.copied(made)
        site = (id(frame.f_code), frame.f_lasti, func)
        if name_of(func) in ARITHMETIC and not kwargs:
            args = self._scalars(site, args)
        form: list[Any] = [*site]
        rows: list[int] = []
        try:
            for x in args:
                sign(x, form, rows, self.parts)
            for name in sorted(kwargs):
                form.append(name)
                sign(kwargs[name], form, rows, self.parts)
        except Structural as error:
            known = self.without_reads(func, args, kwargs)
            if holds_read((args, kwargs)) and not holds_read(known):
                return self.function(func, *known, frame)
            if error.row is not None:
                raise NumberSteers(error.row) from None
            raise CannotUnfold(f"{name_of(func)} of {error}", line_of(frame)) from None
        if not rows and tells_form(func):
            return func(*args, **kwargs)
        writes = _writes(name_of(func))
        if func is torch.Tensor.__setitem__:
            raise CannotUnfold("a tensor of the model is written", line_of(frame))
        if writes:
            if (
                not args
                or not isinstance(args[0], Stub)
                or not hasattr(torch.Tensor, func.__name__)
            ):
                raise CannotUnfold(f"{func.__name__} writes in place", line_of(frame))
            return self.write(func.__name__, args[0], args[1:], kwargs, frame)
        if kwargs.get("inplace") is True:
            made = self.function(func, args, {**kwargs, "inplace": False}, frame)
            return self.write("copy_", args[0], (made,), {}, frame)
        key = tuple(form)
        op = self.ops.get(key)
        if op is None:
            op = self._learn(func, (args, kwargs), key, name_of(func), frame, None)
        if type(op) is ReadsValue:
            told = self.with_numbers(args, kwargs)
            if told is None:
                raise CannotUnfold(op.why, line_of(frame))
            return self.function(func, *told, frame)
        if op.study.constant is not None:
            made = self._constant(op)
            if not self.writing:
                return made
            return self.in_rows(func, op, self.watch(op, args, kwargs, made))
        made = self._record(op, rows, frame)
        return self.watch(op, args, kwargs, made) if self.writing else made

    def _notice(self, args: Any) -> None:
        """A tensor of the request is indexed along its first dimension: it is a list of rows."""
        row = args[0].id
        if self.data[2] <= row < self.data[3] and (len(args) < 2 or type(args[1]) in (int, slice)):
            self.take_apart.add(row)
            self.relearn = True

    def _scalars(self, site: Any, args: Any) -> Any:
        """A Python number that is data, or differs from call to call, is a value, not part of the
        operation.

        It becomes a tensor of no dimensions, which acts like it beside tensors that have some. Only
        a float beside whole numbers does not: there it must be of the default dtype already.
        """
        forms = [x.type for x in args if type(x) in (Stub, Stack)]
        if not all(form.shape for form in forms):
            return args
        floats = any(form.dtype.is_floating_point for form in forms)
        wide = torch.float64 if floats else torch.get_default_dtype()
        return tuple(self._as_operand(site, k, x, wide) for k, x in enumerate(args))

    def _as_operand(self, site: Any, k: int, x: Any, wide: torch.dtype) -> Any:
        """Argument `k`; floats become tensors of dtype `wide`."""
        kind = type(x)
        if kind in NUMBERS:
            return x.stub if kind is IntNumber or wide is x.type.dtype else x.stub.to(wide)
        if kind is not int and kind is not float:
            return x
        seen = self._numbers.setdefault((site, k), x)
        if seen is not _VARIES and seen != x:
            self._numbers[site, k] = seen = _VARIES
            self.relearn = True
        if seen is not _VARIES:
            return x
        dtype = torch.int64 if kind is int else wide
        form = StubType.of((), dtype, self.device)
        return Stub(self._constant_row(("full", (), DTYPE_NAMES[dtype], x), form), form)

    def _draw(self, kind: str, form: StubType, generator: int) -> Stub:
        """A row of numbers that the request will draw."""
        self._cut()
        row = self.next_row
        self.next_row = row + 1
        self.draws.append(Draw(row, kind, form, generator))
        made = Stub(row, form)
        if self.tracked is not None:
            self.tracked.append(made)
        return made

    @contextmanager
    def aside(self) -> Iterator[None]:
        target, learning = stubs.current.target, stubs.current.learning
        self.on, stubs.current.target, stubs.current.learning = False, None, True
        try:
            yield
        finally:
            self.on, stubs.current.target, stubs.current.learning = True, target, learning

    # -- whose code --

    def user_frame(self) -> Any:
        return self.raised_in or self._user_frame_of(sys._getframe(1))

    def _user_frame_of(self, innermost: Any) -> Any:
        frame = innermost
        while frame is not None and not self._is_user(frame.f_code):
            frame = frame.f_back
        return innermost if frame is None else frame  # a model of cellc's own

    def _is_user(self, code: Any) -> bool:
        known = self._user_code.get(id(code))
        if known is None:
            self._codes.append(code)
            path = code.co_filename
            ours = path.startswith(_TORCH) or os.path.dirname(path) in _OURS
            known = not (ours or is_generated(code))
            self._user_code[id(code)] = known
        return known


def _writes(name: str) -> bool:
    """Does a function of this name write its first argument?"""
    if name.endswith("__"):
        return name.startswith("__i") and name in _IN_PLACE
    return name.endswith("_")


def _equal(input: Any, other: Any) -> bool:
    return input.shape == other.shape and bool((input == other).all())


def _all_close(
    input: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    return bool(torch.isclose(input, other, rtol, atol, equal_nan).all())


def _is_nonzero(input: Any) -> bool:
    return bool(input)


_TRUTHS: dict[Any, Callable[..., bool]] = {  # torch functions that answer with a bool
    torch.equal: _equal,
    torch.Tensor.equal: _equal,
    torch.allclose: _all_close,
    torch.Tensor.allclose: _all_close,
    torch.is_nonzero: _is_nonzero,
    torch.Tensor.is_nonzero: _is_nonzero,
}
