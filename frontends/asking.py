"""Asking: values that a forward's Python code takes out of tensors while it runs on stubs.

Duty: what `bool(x)`, `x.item()`, `int(x)` or `x.tolist()` give. A number taken out stays a stand-in
(`Read`) as long as it is only computed with, put into tensors or returned; where Python has to know
it, the forward *asks*: the answer is given by a script of answers known, or guessed from what the
same place in the code was answered before; else the run ends there, with an open question. Stands
between `frontends.repeats` and `frontends.choosing`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cellc.dtypes import DTYPE_NAMES
from cellc.frontends.placeholder import SHORT
from cellc.frontends.reads import (
    COMPARISONS,
    INT64,
    OPEN,
    READS,
    SMALL,
    Answer,
    Read,
    ReadBool,
    ReadFloat,
    ReadInt,
)
from cellc.frontends.repeats import Repeats
from cellc.frontends.signature import ARITHMETIC, line_of, name_of
from cellc.frontends.stub import CannotUnfold, Stack, Stub, StubType, current


class Asks(BaseException):
    """The forward has to know a value that nobody knows yet.

    No Exception, so that no handler in the forward hides it.
    """


@dataclass
class Asked:
    """A question. Row `row` holds the negative of what is asked: an operation of its own, so that
    a question is answered after those before it, whatever it asks of.
    """

    row: int
    kind: type  # bool, int or float
    site: Hashable  # place in the code
    origin: str  # file:line
    until: int  # first row that is made after the answer
    answer: Any = OPEN
    guessed: bool = False
    live: frozenset[int] = frozenset()  # rows that the forward still holds here, where looked at

    def answer_of(self, value: Any) -> Answer:
        """What the forward is told where the row holds `value`."""
        if self.kind is bool:
            return not value
        if self.kind is int:
            return -value if value != INT64[0] else int(value)  # its negative is itself
        return -float(value) if value == value else math.nan


def is_tensor(x: Any) -> bool:
    return type(x) in (Stub, Stack) or isinstance(x, torch.Tensor)


class Asker(Repeats):
    """A recorder of what is asked. `function` records an operation; `constant_value` gives the
    value of a constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.habits: dict[Hashable, Answer] = {}  # by place in the code: its last answer
        self.constant_value: Callable[[Hashable, Any], Answer] | None = None
        self.script: Sequence[Answer] = ()  # answers that are known
        self.guesses = 0  # how many questions may be answered by habit
        self.asked: list[Asked] = []
        self.look_at = -1  # the question at which to see which rows are still held
        self.device: torch.device | None = None
        self.plain = False  # what is read is asked for at once, and no stand-in
        self.stands_in = False  # was a stand-in ever given
        self.small: set[int] = set()  # rows that count or index something
        self._answers: dict[int, Answer] = {}

    def begin(self, script: Sequence[Answer], guesses: int, look_at: int) -> None:
        """Before a run."""
        self.script, self.guesses, self.look_at = script, guesses, look_at
        self.asked, self._answers = [], {}
        self.small.clear()
        self.tracked = [] if look_at >= 0 else None

    def read(self, name: str, x: Stub, frame: Any) -> Any:
        """What a method of a tensor that gives Python values gives."""
        if current.ended is not None:
            raise current.ended
        if not self.on:
            raise CannotUnfold("a value of the request is used from outside")
        if name == "bool":
            return self._truth(x)
        if name == "tolist":
            return self._listed(x)
        if name == "numpy":
            raise CannotUnfold("numpy() takes values out of the forward", line_of(frame))
        number = self._number(x)
        if name == "item":
            return number
        if name == "float":
            return float(number)
        return int(number) if name == "int" else operator.index(number)

    def _scalar(self, x: Stub) -> Stub:
        if x.type.size.numel() != 1:
            raise RuntimeError(
                f"a Tensor with {x.type.size.numel()} elements cannot be converted to Scalar"
            )
        if type(x) is Stack:
            return self._scalar(x.items[0])
        return x if not x.type.shape else x.reshape(())

    def _truth(self, x: Stub) -> bool:
        if x.type.size.numel() > 1:
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
        x = self._scalar(x)
        truth: Any = x if x.dtype is torch.bool else torch.ne(x, 0)  # type: ignore[call-overload]
        return bool(self.ask(truth, bool))

    def _number(self, x: Stub) -> Any:
        read = self._read(x)
        if self.plain:
            return read._value()
        self.stands_in = True
        return read

    def _read(self, x: Stub) -> Read:
        x = self._scalar(x)
        x = self.snapshot(x)
        if x.dtype is torch.bool:
            return ReadBool(self._kept(x))
        if x.dtype.is_floating_point:
            return ReadFloat(self._kept(x) if x.dtype is torch.float64 else x.to(torch.float64))
        if x.dtype is not torch.int64:
            form = torch.iinfo(x.dtype)
            return ReadInt(x.to(torch.int64), form.min, form.max)
        return ReadInt(self._kept(x), *((-SMALL, SMALL) if x.id in self.small else INT64))

    def _kept(self, x: Stub) -> Stub:
        """A tensor as it is now, whatever is written into it later."""
        made = Stub(x.id, x.type)
        if self.tracked is not None:
            self.tracked.append(made)
        return made

    def number(self, value: Answer, dtype: torch.dtype) -> Stub:
        """A constant without dimensions."""
        form = StubType.of((), dtype, self.device)
        return Stub(self._constant_row(("full", (), DTYPE_NAMES[dtype], value), form), form)

    def is_small(self, x: Stub) -> bool:
        """Is an int64 one whose sums and products are of 64 bits?"""
        if x.id not in self.small:
            number: Any = x
            above = number >= self.number(-SMALL, torch.int64)
            below = number <= self.number(SMALL, torch.int64)
            if not self.ask(above.logical_and(below), bool):
                return False
            self.small.add(x.id)
        return True

    def text(self, x: Stub) -> str:
        """How a tensor prints: of a large one, its form."""
        if not self.on or x.type.size.numel() > SHORT:
            return f"<a tensor of the request: {x.type}>"
        return str(self._from_values(x, repr))

    def _from_values(self, x: Stub, use: Callable[[torch.Tensor], Any]) -> Any:
        """What is made of a tensor, all of whose elements are asked for."""
        whole: Any = x
        parts = whole.reshape(-1) if x.type.shape else [x]
        values = [self._read(y)._value() for y in parts]
        self.on = False
        try:
            return use(torch.tensor(values, dtype=x.dtype).reshape(x.type.shape))
        finally:
            self.on = True

    def _listed(self, x: Stub) -> Any:
        if not x.type.shape:
            return self._number(x)
        return [self._listed(y) for y in x]

    def ask(self, x: Any, kind: type) -> Answer:
        """The value of a tensor without dimensions, from here on known to the forward."""
        if current.ended is not None:  # and the forward went on all the same
            raise current.ended
        row = x.id
        if row in self._answers:
            return self._answers[row]
        if row < 0:
            return self._known_constant(x, kind)
        x = x.logical_not() if kind is bool else -x
        frame = self.user_frame()
        self._cut()
        site = (id(frame.f_code), frame.f_lasti)
        question = Asked(x.id, kind, site, line_of(frame), self.next_row)
        number = len(self.asked)
        self.asked.append(question)
        if number == self.look_at:
            question.live = self._held()
            self.tracked = None
        if number < len(self.script):
            question.answer = self.script[number]
        elif self.guesses > 0 and site in self.habits:
            self.guesses -= 1
            question.answer, question.guessed = self.habits[site], True
        else:
            current.ended = Asks()
            raise current.ended
        answer: Answer = question.answer
        self._answers[row] = answer
        return answer

    def function(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        """Record an operation."""
        raise NotImplementedError

    def without_reads(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of a torch function, with numbers taken out of tensors as tensors where that is
        the same, else as what they are.
        """
        name = name_of(func)
        like: Any = None
        if name in ARITHMETIC or name.strip("_") in COMPARISONS:
            like = next((x.dtype for x in args if is_tensor(x)), None)

        def plain(x: Any) -> Any:
            kind = type(x)
            if kind in READS:
                if func is torch.Tensor.__getitem__ and kind is ReadInt:
                    return x.stub
                if like is None or like.is_complex:
                    return x._value()
                if kind is ReadFloat:
                    floats = like if like.is_floating_point else torch.get_default_dtype()
                    return x.stub.to(floats)
                if like is torch.bool:
                    return x.stub
                if kind is ReadInt and not like.is_floating_point and like is not torch.int64:
                    return x._value()  # it may be too large
                return x.stub.to(like)
            if kind is slice:
                parts = (x.start, x.stop, x.step)
                return slice(*[y._value() if type(y) in READS else y for y in parts])
            if kind is tuple or kind is list:
                return kind([plain(y) for y in x])
            return x

        made = tuple(map(plain, args))
        like = None
        return made, {k: plain(v) for k, v in kwargs.items()}

    def with_numbers(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Arguments with numbers for tensors without dimensions, which PyTorch reads where it wants
        numbers: those with names, else those after the first; None where there are none.
        """
        asked = False

        def told(x: Any) -> Any:
            nonlocal asked
            if type(x) in (tuple, list):
                return type(x)(map(told, x))
            if type(x) is not Stub or x.type.shape:
                return x
            asked = True
            return self._read(x)._value()

        named = {k: told(v) for k, v in kwargs.items()}
        if asked:
            return args, named
        made = (*args[:1], *map(told, args[1:]))
        if not asked:
            made = tuple(map(told, args))
        return (made, kwargs) if asked else None

    def snapshot(self, x: Stub) -> Stub:
        """Another stub of the row that a stub is now."""
        made = Stub(x.id, x.type)
        if self.tracked is not None:
            self.tracked.append(made)
        return made

    def user_frame(self) -> Any:
        """The innermost frame of the user's code."""
        raise NotImplementedError

    def _known_constant(self, x: Stub, kind: type) -> Answer:
        if self.constant_value is None:
            raise CannotUnfold("the value of a constant is read")
        self.on = False  # what computes it is not part of the forward
        try:
            answer: Answer = kind(self.constant_value(self.constants[x.id], x.type))
        finally:
            self.on = True
        return answer

    def _held(self) -> frozenset[int]:
        """Rows whose stubs somebody else than this list still holds."""
        stubs, self.tracked = self.tracked or [], None
        held = set()
        while stubs:
            stub = stubs.pop()
            if sys.getrefcount(stub) > 2:  # this variable and the argument
                held.add(stub.id)
        return frozenset(held)
