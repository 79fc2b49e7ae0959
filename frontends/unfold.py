"""Unfolding: a forward run on stubs, which records calls of cells only.

Duty: run the user's Python on `Stub`s and write down, for every stretch of operations that one
activation of a user's function does in a row, which stretch it is and which values it reads and
makes. A call of a module, of a module's method or of a function marked `@cellc.cell` that has
nothing but tensors for arguments and no recurrence inside is one operation: its body never runs
again. Comes in: a forward and a request; goes out, to `cellc.unfolder`: segments with their
instances as flat lists of numbers, from which plans are made by numpy.

A `Recorder` is built in layers, each a module that says what it adds, from the lowest: `writer`
(rows and segments), `repeats` (what is copied), `asking` (values that Python takes out),
`choosing` (indices and masks by value), `sharing` (memory), `inplace` (writes), `learning`
(operations never met), `recording` (calls and torch functions), and this one: whole runs.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cellc.frontends import stub as stubs
from cellc.frontends.asking import Asks
from cellc.frontends.effects import Holdings, sets_attributes, setting_refused
from cellc.frontends.learning import StudyAlone, is_weight
from cellc.frontends.placeholder import SHORT
from cellc.frontends.reads import OPEN, READS
from cellc.frontends.recording import Recording
from cellc.frontends.segments import LEAF, OutType
from cellc.frontends.signature import NUMBERS, STATIC, line_of
from cellc.frontends.stub import CannotUnfold, NumberSteers, Stack, Stub

MAX_PIECES = 1 << 13  # yielded with no value read in between


@dataclass
class Returned:
    """What a forward gave: (rows of each tensor, its form), and the other leaves."""

    tensors: list[tuple[list[int], OutType]]
    leaves: list[tuple[str, Any]]
    spec: Any


class Recorder(Recording):
    """Runs forwards on stubs. One a model; `study` traces an operation alone."""

    def __init__(self, study: StudyAlone, device: torch.device) -> None:
        super().__init__(study, device)
        self.generates = False  # does the forward yield
        self.yields: list[tuple[int, int, Returned]] = []
        # ^ (questions asked before, first row that is made after, what was yielded)
        self._sets_attributes: bool | None = None  # may the model's code

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
        self.draws, self.yields = [], []
        returned = None
        try:
            returned = self._forward(forward, args, kwargs)
        except (Exception, Asks, CannotUnfold, NumberSteers) as error:
            if stubs.current.ended is None and isinstance(error, Exception):
                with suppress(Asks):
                    self._settle(error)
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
            at = self.next_row
            self.yields.append((len(self.asked), at, self._returned(piece)))
            pieces = self.yields
            if len(pieces) > MAX_PIECES and pieces[-MAX_PIECES][0] == len(self.asked):
                raise CannotUnfold(f"{MAX_PIECES:,} pieces are yielded in a row: it may never end")
        return self._returned(None)

    def _returned(self, result: Any) -> Returned:
        if type(result) is Stub:
            return Returned([([result.id], OutType(result.type, -1))], [("t", 0)], LEAF)
        leaves, spec = pytree.tree_flatten(_with_plain_keys(result))
        tensors: list[tuple[list[int], OutType]] = []
        kept: list[tuple[str, Any]] = []
        for leaf in leaves:
            if is_weight(leaf):
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

    def _settle(self, error: Exception) -> None:
        """An error of the user's leaves the forward: what it holds of the request is asked for."""
        seen: set[int] = set()
        following: list[BaseException | None] = [error]
        try:
            while following:
                one = following.pop()
                if one is None or id(one) in seen:
                    continue
                seen.add(id(one))
                following += [one.__cause__, one.__context__]
                self.raised_in = self._frame_of(one) or self.raised_in
                if any(map(_stands_in, pytree.tree_leaves(one.args))):
                    base = next(b for b in type(one).__mro__ if b.__module__ == "builtins")
                    base.__init__(one, *pytree.tree_map(self._settled, one.args))  # type: ignore[misc]
                for name, value in vars(one).items():
                    if any(map(_stands_in, pytree.tree_leaves(value))):
                        vars(one)[name] = pytree.tree_map(self._settled, value)
        finally:
            self.raised_in = None

    def _frame_of(self, error: BaseException) -> Any:
        """The innermost frame of the user's that an error went through."""
        tb, found = error.__traceback__, None
        while tb is not None:
            if self._is_user(tb.tb_frame.f_code):
                found = tb.tb_frame
            tb = tb.tb_next
        return found

    def _settled(self, leaf: Any) -> Any:
        kind = type(leaf)
        if kind in NUMBERS:
            raise NumberSteers(leaf.row)
        if kind in READS:
            return leaf._value()
        if kind is not Stub and kind is not Stack:
            return leaf
        if leaf.type.size.numel() > SHORT:
            raise CannotUnfold(
                f"an exception holds a tensor of over {SHORT} elements", line_of(self.raised_in)
            )
        return self._from_values(leaf, torch.clone)

    def _row(self, x: Any) -> int:
        if type(x) is not Stub:
            raise CannotUnfold("a stack of stacks is returned")
        return x.id

    def num_decided(self) -> int:
        return len(self.asked) + len(self.draws) + len(self.yields)

    def _runs(self) -> bool:
        return self.on or stubs.current.learning


def _stands_in(leaf: Any) -> bool:
    kind = type(leaf)
    return kind is Stub or kind is Stack or kind in READS or kind in NUMBERS


def _with_plain_keys(x: Any) -> Any:
    """A result whose dicts have no number read from a tensor for a key."""
    kind = type(x)
    if kind is dict:
        return {k._value() if type(k) in READS else k: _with_plain_keys(v) for k, v in x.items()}
    return kind([_with_plain_keys(y) for y in x]) if kind is list or kind is tuple else x


class _Functions(TorchFunctionMode):
    """Sees every torch function of a run, those without stubs too: they make constants."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.on or self._recorder._thread != threading.get_ident():
            return func(*args, **(kwargs or {}))
        return self._recorder.function(func, args, kwargs or {}, sys._getframe(1))
