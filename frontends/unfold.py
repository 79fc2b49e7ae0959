"""Unfolding: a forward run on stubs, which records calls of cells only.

Duty: run the user's Python on `Stub`s and write down, for every stretch of operations that one
activation of a user's function does in a row, which stretch it is and which values it reads and
makes. A call of a module, of a module's method or of a function marked `@cellc.cell` that has
nothing but tensors for arguments and no recurrence inside is one operation: its body never runs
again. Comes in: a forward and a request; goes out, to `cellc.unfolder`: segments with their
instances as flat lists of numbers, from which plans are made by numpy.

What one operation gives (shapes, structure of its results) is learned once, by tracing it alone.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cellc.dtypes import DTYPE_NAMES
from cellc.errors import CellcError, ForwardError, ValueReadError
from cellc.frontends import stub as stubs
from cellc.frontends.asking import CHOOSING, Asks, has_bounds, is_number_tensor
from cellc.frontends.callees import Callee, Callees, RefusedCell, loop_of, refusal
from cellc.frontends.drawing import Draw, GeneratorStub, drawn
from cellc.frontends.effects import Holdings, sets_attributes, setting_refused
from cellc.frontends.inplace import InPlace
from cellc.frontends.reads import OPEN, READS, holds_read
from cellc.frontends.segments import LEAF, Op, OutType, Study, fill, input_rows, template_of
from cellc.frontends.signature import (
    ARITHMETIC,
    MAKERS,
    NUMBERS,
    ROW_BY_ROW,
    STACKS,
    STATIC,
    Structural,
    has_values,
    holds_stub,
    line_of,
    name_of,
    sign,
    tells_form,
    tensor_of,
)
from cellc.frontends.stub import CannotUnfold, NumberSteers, Stack, Stub, StubType
from cellc.frontends.traced_writes import was_written

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MANY_VALUES = 64  # variants of one call site by Python values: more, and its body runs instead

_TRANSPARENT: Any = object()
_VARIES: Any = object()


@dataclass
class Returned:
    """What a forward gave: (rows of each tensor, its form), and the other leaves."""

    tensors: list[tuple[list[int], OutType]]
    leaves: list[tuple[str, Any]]
    spec: Any


class Recorder(InPlace):
    """Runs forwards on stubs. One a model; `study` traces an operation alone."""

    def __init__(
        self,
        study: Callable[
            [Callable[..., Any], Sequence[tuple[StubType, int]], bool, bool, bool], Study | None
        ],
        device: torch.device,
    ) -> None:
        super().__init__()
        self._study, self.device = study, None if device.type == "cpu" else device
        self.ops: dict[Any, Any] = {}
        self.all_ops: list[Op] = []
        self.components: dict[int, int] = {}  # by place in the code
        self._callees = Callees(self.call)
        self._sites: dict[Any, int] = {}
        self._sets_attributes: bool | None = None  # may the model's code
        self._numbers: dict[Any, Any] = {}  # by place in the code: the number met there
        self._variants: dict[Hashable, int] = {}
        self._user_code: dict[int, bool] = {}
        self._codes: list[Any] = []  # kept alive: they are known by id

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, requests can be run, in this thread."""
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            if self._sets_attributes is None:
                self._sets_attributes = sets_attributes(modules.values())
            if self._sets_attributes:
                stack.enter_context(setting_refused(self._runs))
            self.holdings = Holdings(modules.values())
            stack.enter_context(self._callees.watching(modules))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Functions(self))
            yield

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Returned | None:
        """One request on stubs; the caller is inside `watching` and called `begin`. None where the
        forward asked what nobody knows.
        """
        self.on, stubs.current.target, stubs.current.ended = True, self, None
        self.generates = False
        self.draws: list[Draw] = []
        self.yields: list[tuple[int, Returned]] = []  # (questions asked before, what was yielded)
        returned = None
        try:
            returned = self._forward(forward, args, kwargs)
        except (Exception, Asks, CannotUnfold, NumberSteers):
            if stubs.current.ended is None:
                raise
        finally:
            self.on, stubs.current.target = False, None
            self._cut()
            self._frame = None
        ended, stubs.current.ended = stubs.current.ended, None
        if ended is None:
            return returned
        if isinstance(ended, Asks):
            return None
        raise ended

    def _forward(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Returned | None:
        result = forward(*args, **kwargs)
        if not inspect.isgenerator(result):
            return self._returned(result)
        self.generates = True
        for piece in result:
            if stubs.current.ended is not None:
                return None
            self.yields.append((len(self.asked), self._returned(piece)))
        return self._returned(None)

    def _returned(self, result: Any) -> Returned:
        if type(result) is Stub:
            return Returned([([result.id], OutType(result.type, -1))], [("t", 0)], LEAF)
        leaves, spec = pytree.tree_flatten(_with_plain_keys(result))
        tensors: list[tuple[list[int], OutType]] = []
        kept: list[tuple[str, Any]] = []
        for leaf in leaves:
            if _is_weight(leaf):
                leaf = self._as_row(leaf)
            kind = type(leaf)
            if kind is Stub:
                kept.append(("t", len(tensors)))
                tensors.append(([leaf.id], OutType(leaf.type, -1)))
            elif kind is Stack:
                kept.append(("t", len(tensors)))
                rows = [self._row(x) for x in leaf.items]
                tensors.append((rows, OutType(leaf.type, len(rows))))
            elif kind in NUMBERS:
                raise NumberSteers(leaf.row)
            elif kind in READS:
                if leaf.stub.id < 0 or leaf.known is not OPEN:
                    kept.append(("v", leaf._value()))
                    continue
                kept.append(("n", len(tensors)))
                tensors.append(([leaf.stub.id], OutType(leaf.stub.type, -1)))
            elif isinstance(leaf, (torch.Tensor, *STATIC)) and not isinstance(leaf, STATIC):
                raise CannotUnfold("a weight is returned as it is")
            elif isinstance(leaf, STATIC):
                kept.append(("v", leaf))
            else:
                raise CannotUnfold(f"an object of {kind.__name__} is returned")
        return Returned(tensors, kept, spec)

    def _row(self, x: Any) -> int:
        if type(x) is not Stub:
            raise CannotUnfold("a stack of stacks is returned")
        return x.id

    def num_decided(self) -> int:
        return len(self.asked) + len(self.draws) + len(self.yields)

    def _runs(self) -> bool:
        return self.on or stubs.current.learning

    # -- what the forward does --

    def call(self, callee: Callee, args: Any, kwargs: Any, frame: Any) -> Any:
        """A call of a callee: one operation, or its body."""
        if not self.on or self._thread != threading.get_ident():
            return callee.run(*args, **kwargs)
        if callee.transparent:
            return self._body(callee, args, kwargs)
        form: list[Any] = [id(frame.f_code), frame.f_lasti, callee]
        rows: list[int] = []
        add = form.append
        try:
            if callee.row_arguments:
                args = self._weights_as_rows(callee, args)
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
                            sign(y, form, rows, self.parts)
                else:
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
        if not rows and not callee.marked:
            return callee.run(*args, **kwargs)  # nothing of the request in it
        op = self.ops.get(tuple(form))
        if op is None:
            op = self._learn(callee.run, (args, kwargs), tuple(form), callee.name, frame, callee)
        if op is _TRANSPARENT:
            return callee.run(*args, **kwargs)
        if op.study.constant is not None:
            made = self._constant(op)
        else:
            made = self._record(op, rows, frame)
        return self.watch(op, args, kwargs, made) if self.writing else made

    def _weights_as_rows(self, callee: Callee, args: Any) -> Any:
        """A weight where other calls have a value of the request (a learned first state) is a row
        like theirs.
        """
        for k in callee.row_arguments:
            if k < len(args) and _is_weight(args[k]):
                args = (*args[:k], self._row_of(args[k]), *args[k + 1 :])
        return args

    def _row_of(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)([self._row_of(y) for y in x])
        return self._as_row(x) if _is_weight(x) else x

    def _as_row(self, tensor: torch.Tensor) -> Any:
        key = ("weight", id(tensor))
        op = self.ops.get(key)
        if op is None:
            op = self._learn(_Given(tensor), ((), {}), key, "weight", None, None)
        made = self._constant(op) if op.study.constant is not None else self._record(op, [], None)
        return self.watch(op, (), {}, made) if self.writing else made

    def function(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        """A torch function that met stubs or numbers, or makes a tensor."""
        if not self.on or self._thread != threading.get_ident():
            raise CannotUnfold("a value of the request is used from outside")
        if stubs.current.ended is not None:  # and the forward went on all the same
            raise stubs.current.ended
        while not self._is_user(frame.f_code):
            frame = frame.f_back
        if kwargs.get("out") is not None:
            raise CannotUnfold("out= writes in place; assign the result", line_of(frame))
        if name_of(func).startswith("as_strided"):
            raise CannotUnfold("as_strided depends on a tensor's memory", line_of(frame))
        if func is torch.equal:
            return self._equal(*args, **kwargs)
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
        if type(op) is _Reads:
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

    @contextmanager
    def aside(self) -> Iterator[None]:
        target, learning = stubs.current.target, stubs.current.learning
        self.on, stubs.current.target, stubs.current.learning = False, None, True
        try:
            yield
        finally:
            self.on, stubs.current.target, stubs.current.learning = True, target, learning

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

    def _equal(self, a: Any, b: Any) -> bool:
        return a.shape == b.shape and bool((a == b).all())

    def user_frame(self) -> Any:
        frame: Any = sys._getframe(1)
        while not self._is_user(frame.f_code):
            frame = frame.f_back
        return frame

    def _notice(self, args: Any) -> None:
        """A tensor of the request is indexed along its first dimension: it is a list of rows."""
        row = args[0].id
        if self.data[2] <= row < self.data[3] and (len(args) < 2 or type(args[1]) in (int, slice)):
            self.take_apart.add(row)
            self.relearn = True

    def _scalars(self, site: Any, args: Any) -> Any:
        """A Python number that differs from call to call is a value, not part of the operation.

        It becomes a tensor of no dimensions, which acts like it beside tensors that have some.
        """
        if not all(x.type.shape for x in args if type(x) in (Stub, Stack)):
            return args
        for k, x in enumerate(args):
            kind = type(x)
            if kind is int or kind is float:
                seen = self._numbers.setdefault((site, k), x)
                if seen is not _VARIES and seen != x:
                    self._numbers[site, k] = _VARIES
                    self.relearn = True
                    seen = _VARIES
                if seen is _VARIES:
                    dtype = torch.int64 if kind is int else torch.float64
                    name = DTYPE_NAMES[dtype]
                    form = StubType.of((), dtype, self.device)
                    row = self._constant_row(("full", (), name, x), form)
                    args = (*args[:k], Stub(row, form), *args[k + 1 :])
        return args

    # -- learning --

    def _learn(
        self,
        run: Callable[..., Any],
        call: tuple[Any, Any],
        key: Any,
        name: str,
        frame: Any,
        callee: Callee | None,
    ) -> Any:
        """Trace an operation alone; `_TRANSPARENT` for a call whose body has to run instead."""
        inputs: list[tuple[StubType, int]] = []
        args, kwargs = call
        slots = [0]
        template = (
            template_of(args, inputs, slots),
            {k: template_of(kwargs[k], inputs, slots) for k in sorted(kwargs)},
        )
        if callee is not None:
            for k, x in enumerate(call[0]):
                if holds_stub(x) and k not in callee.row_arguments:
                    callee.row_arguments.add(k)
                    self.relearn = True
            variants = self._variants[callee.key] = self._variants.get(callee.key, 0) + 1
            if variants > MANY_VALUES and not callee.marked and has_values(call):
                self.ops[key] = _TRANSPARENT
                return _TRANSPARENT
        rows = list(input_rows(inputs))

        def alone(*tensors: Any) -> Any:
            args, kwargs = fill(template, tensors)
            result = run(*args, **kwargs)
            if any(map(was_written, pytree.tree_leaves((args, kwargs)))):
                raise CannotUnfold("an argument is written in place")
            return result

        self.on, target = False, stubs.current.target
        stubs.current.target, stubs.current.learning = None, True
        marked_calls = stubs.current.marked_calls
        try:
            lists = any(count == 1 for _, count in inputs)
            called = callee is not None
            own = callee is not None and callee.own
            study = self._study(alone, rows, own, lists, called)
            if study is None and callee is not None and callee.marked:
                holds_cells = callee.holds_cells or stubs.current.marked_calls > marked_calls
                if not holds_cells:  # it is a cell because the user says so, loops and all
                    study = self._study(alone, rows, False, lists, called)
        except (CannotUnfold, CellcError) as error:
            if callee is None and isinstance(error, ValueReadError):
                self.ops[key] = _Reads(f"{name} reads a value")
                return self.ops[key]
            if callee is None and isinstance(error, ForwardError) and error.__cause__ is not None:
                raise error.__cause__ from None  # as PyTorch raises it
            if callee is None:
                raise CannotUnfold(f"{name}: {error}", line_of(frame) if frame else "") from error
            if callee.marked:
                raise refusal(callee, error, frame) from error
            study = None
        finally:
            self.on, stubs.current.target, stubs.current.learning = True, target, False
        if study is None:
            if callee is None:
                raise CannotUnfold(f"{name} has no fixed result", line_of(frame) if frame else "")
            self.ops[key] = _TRANSPARENT
            return _TRANSPARENT
        origin = line_of(frame) if frame is not None else ""
        if frame is not None:
            self._codes.append(frame.f_code)
        op = Op(
            run,
            template,
            inputs,
            study,
            name,
            origin,
            len(self.all_ops),
            callee is not None,
            callee is not None and callee.own,
            self._sites.setdefault(key[:3], len(self._sites)),
            frame.f_lasti if frame is not None else -1,
            loop_of(frame) if frame is not None else 0,
        )
        op.component = self.components.get(op.site, 0)
        self.ops[key] = op
        self.all_ops.append(op)
        return op

    def _is_user(self, code: Any) -> bool:
        known = self._user_code.get(id(code))
        if known is None:
            self._codes.append(code)
            known = not code.co_filename.startswith((_TORCH, _HERE, "<string>"))
            self._user_code[id(code)] = known
        return known

    def marked(self, function: Callable[..., Any], args: Any, kwargs: Any, frame: Any) -> Any:
        """A call of a function or method marked `@cellc.cell`."""
        owner = args[0] if args and isinstance(args[0], nn.Module) else None
        run: Callable[..., Any] = function
        if owner is not None:
            run, args = types.MethodType(function, owner), args[1:]
        key = ("marked", id(function), id(owner))
        name = getattr(function, "__qualname__", "cell")
        return self.call(self._callees.of(key, name, run, True), args, kwargs, frame)


def _writes(name: str) -> bool:
    """Does a function of this name write its first argument?"""
    if name.endswith("__"):
        return name.startswith("__i") and name in _IN_PLACE
    return name.endswith("_")


_IN_PLACE = frozenset(name for name in vars(Stub) if name.startswith("__i")) & frozenset(
    f"__i{name}__"
    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
)


def _with_plain_keys(x: Any) -> Any:
    """A result whose dicts have no number read from a tensor for a key."""
    kind = type(x)
    if kind is dict:
        return {k._value() if type(k) in READS else k: _with_plain_keys(v) for k, v in x.items()}
    return kind([_with_plain_keys(y) for y in x]) if kind is list or kind is tuple else x


def _is_weight(x: Any) -> bool:
    """A tensor of the model, or a tuple or list that holds one."""
    kind = type(x)
    if kind is tuple or kind is list:
        return any(map(_is_weight, x))
    return kind is not Stub and kind is not Stack and isinstance(x, torch.Tensor)


@dataclass
class _Reads:
    """A torch function that reads a value of a tensor; `why` it cannot be an operation."""

    why: str


class _Given:
    """A callable that gives one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


class _Functions(TorchFunctionMode):
    """Sees every torch function of a run, those without stubs too: they make constants."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.on or self._recorder._thread != threading.get_ident():
            return func(*args, **(kwargs or {}))
        return self._recorder.function(func, args, kwargs or {}, sys._getframe(1))
