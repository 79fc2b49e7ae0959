"""Reads: Python numbers that a forward took out of tensors.

Duty: a `Read` is computed with as Python computes with its value. Where that is the same as an
operation on tensors without dimensions, in int64 or float64, it stays a stand-in; where it is not,
or may not be (an int that may leave 64 bits, a divisor of zero), the value is asked for. An int
knows between which bounds it is, so that most sums are not asked for. Used by `frontends.asking`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from cellc.frontends.stub import CannotUnfold, FloatNumber, IntNumber, Stack, Stub, current

Answer: TypeAlias = bool | int | float
OPEN: Any = type("Open", (), {"__repr__": lambda _: "open"})()  # no answer yet
INT64 = (-(1 << 63), (1 << 63) - 1)
SMALL = 1 << 31  # what an int is usually below
EXACT = 1 << 53  # ints up to here are floats


class Read:
    """A Python number that the forward took out of a tensor, known only where it was asked for."""

    __slots__ = ("high", "known", "low", "stub")
    kind: type = int

    def __init__(self, stub: Stub, low: int = INT64[0], high: int = INT64[1]) -> None:
        self.stub, self.low, self.high = stub, low, high
        self.known: Any = OPEN

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.kind

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = current.target
        if target is None:
            raise CannotUnfold("a number of the request is used outside of its forward")
        return target.function(func, args, kwargs or {}, sys._getframe(1))

    def _value(self) -> Any:
        if self.known is OPEN:
            target: Any = current.target
            if target is None:
                raise CannotUnfold("a number of the request is used outside of its forward")
            self.known = target.ask(self.stub, self.kind)
        return self.known

    def __bool__(self) -> bool:
        asked = self.known is OPEN and self.kind is not bool
        return bool(self.__ne__(0)) if asked else bool(self._value())

    def __int__(self) -> int:
        return int(self._value())

    def __float__(self) -> float:
        return float(self._value())

    def __index__(self) -> int:
        return operator.index(self._value())

    def __hash__(self) -> int:
        return hash(self._value())

    def __repr__(self) -> str:
        return repr(self._value())

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self._value(), spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._value(), dtype=dtype)

    def __deepcopy__(self, memo: Any) -> Read:
        return self

    def __copy__(self) -> Read:
        return self

    def __reduce__(self) -> Any:
        return self.kind, (self._value(),)

    def __getattr__(self, name: str) -> Any:
        getattr(self.kind, name)  # AttributeError where such numbers have none
        return getattr(self._value(), name)


class ReadInt(Read):
    """An int."""

    __slots__ = ()


class ReadFloat(Read):
    """A float."""

    __slots__ = ()
    kind = float


class ReadBool(Read):
    """A bool."""

    __slots__ = ()
    kind = bool


READS: tuple[type, ...] = (ReadInt, ReadFloat, ReadBool)
COMPARISONS = frozenset("eq ne lt le gt ge".split())
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_FUNCTIONS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.true_divide,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    **{name: getattr(torch, name) for name in COMPARISONS},
}


def holds_read(x: Any) -> bool:
    """Is there a number taken out of a tensor among arguments?"""
    kind = type(x)
    if kind is tuple or kind is list:
        return any(map(holds_read, x))
    if kind is dict:
        return any(map(holds_read, x.values()))
    return holds_read((x.start, x.stop, x.step)) if kind is slice else kind in READS


# -- operations --


def _operation(name: str, swapped: bool) -> Callable[..., Any]:
    plain = getattr(operator, name)

    def compute(self: Read, other: Any, *modulo: Any) -> Any:
        kind = type(other)
        if kind in (Stub, Stack, IntNumber, FloatNumber) or isinstance(other, torch.Tensor):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        if name in _FUNCTIONS and current.target is not None:
            a, b = _seen(a), _seen(b)
            numbers = all(type(x) in READS or isinstance(x, (int, float)) for x in (a, b))
            if numbers and (type(a) in READS or type(b) in READS):
                made = _compared(name, a, b) if name in COMPARISONS else _computed(name, a, b)
                if made is not OPEN:
                    return made
        a, b = (x._value() if type(x) in READS else x for x in (a, b))
        return pow(a, b, *modulo) if modulo else plain(a, b)

    return compute


def _seen(x: Any) -> Any:
    return x.known if type(x) in READS and x.known is not OPEN else x


def _unknown(x: Any) -> bool:
    return type(x) in READS


def _is_float(x: Any) -> bool:
    return (x.kind is float) if _unknown(x) else isinstance(x, float)


def _record(func: Callable[..., Any], *args: Any) -> Any:
    target: Any = current.target
    return target.function(func, args, {}, sys._getframe(1))


def _as(dtype: torch.dtype, x: Any) -> Stub:
    """A number as a tensor without dimensions."""
    target: Any = current.target
    if not _unknown(x):
        made: Stub = target.number(float(x) if dtype is torch.float64 else int(x), dtype)
    else:
        made = x.stub if x.stub.dtype is dtype else x.stub.to(dtype)
    return made


def _bounds(x: Any) -> tuple[int, int]:
    if not _unknown(x):
        return int(x), int(x)
    return (0, 1) if x.kind is bool else (x.low, x.high)


def _tight(x: Any, limit: int = SMALL) -> Any:
    """An int that is within the limit, or its value."""
    low, high = _bounds(x)
    if not _unknown(x) or max(-low, high) <= limit:
        return x
    target: Any = current.target
    if not target.is_small(x.stub):
        return x._value()
    x.low, x.high = max(low, -SMALL), min(high, SMALL)
    return x


def _is_odd(x: Any) -> bool:
    """A float that is not equal to itself, or to one that prints otherwise: no constant."""
    return (
        not _unknown(x)
        and isinstance(x, float)
        and (x != x or (x == 0 and math.copysign(1, x) < 0))
    )


def _computed(name: str, a: Any, b: Any) -> Any:
    """An operation on numbers as one on tensors without dimensions; OPEN where it is none."""
    floats = _is_float(a) or _is_float(b)
    if _is_odd(a) or _is_odd(b) or (floats and name in ("floordiv", "mod")):
        return OPEN
    if name in ("truediv", "floordiv", "mod"):
        b = _divisor(name, a, b)
    if floats:
        return ReadFloat(_record(_FUNCTIONS[name], *(_as(torch.float64, x) for x in (a, b))))
    if name == "truediv":
        a, b = _tight(a, EXACT), _tight(b, EXACT)
        if not any(map(_unknown, (a, b))) or max(map(abs, (*_bounds(a), *_bounds(b)))) > EXACT:
            return OPEN
        return ReadFloat(_record(_FUNCTIONS[name], *(_as(torch.float64, x) for x in (a, b))))
    for x, y in ((a, b), (None, None)):
        if x is None:
            x, y = _tight(a), _tight(b)
        if not (_unknown(x) or _unknown(y)):
            return OPEN
        low, high = _range(name, _bounds(x), _bounds(y))
        bounds = (low, high, *_bounds(x), *_bounds(y))
        if INT64[0] <= min(bounds) and max(bounds) <= INT64[1]:
            made = _record(_FUNCTIONS[name], *(_as(torch.int64, z) for z in (x, y)))
            return ReadInt(made, low, high)
    return OPEN


def _range(name: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Between what an operation on ints is."""
    if name == "mod" and b[0] == b[1]:
        return (0, b[0] - 1) if b[0] > 0 else (b[0] + 1, 0)
    if name == "mod":
        most = max(-b[0], b[1])
        return -most, most
    if name == "floordiv" and b[0] != b[1]:
        most = max(-a[0], a[1])
        return -most, most
    found = [getattr(operator, name)(x, y) for x in a for y in b]
    return min(found), max(found)


def _divisor(name: str, a: Any, b: Any) -> Any:
    """A divisor that is not zero; else ZeroDivisionError as Python raises it."""
    if _unknown(b):
        low, high = (-1, 1) if _is_float(b) else _bounds(b)
        if low > 0 or high < 0:
            return b
        stub = _as(torch.float64 if _is_float(b) else torch.int64, b)
        target: Any = current.target
        zero, one = (target.number(x, stub.dtype) for x in (0, 1))
        other = _record(torch.ne, stub, zero)
        if target.ask(other, bool):
            kind = ReadFloat if _is_float(b) else ReadInt
            return kind(_record(torch.where, other, stub, one), low, high)
    elif b:
        return b
    numbers = (1.0 if _is_float(a) else 1, 0.0 if _is_float(b) else 0)
    return getattr(operator, name)(*numbers)  # raises


def _compared(name: str, a: Any, b: Any) -> Any:
    if not _unknown(a):
        a, b, name = b, a, _MIRRORED[name]
    if not _is_float(a) and not _unknown(b):
        return _compared_to(name, a, b)
    if not (_is_float(a) or _is_float(b)):
        return ReadBool(_record(_FUNCTIONS[name], *(_as(torch.int64, x) for x in (a, b))))
    exact = [x if _is_float(x) else _tight(x, EXACT) for x in (a, b)]
    known = [x for x in exact if not (_unknown(x) or _is_float(x))]
    if len(known) == 2 or any(abs(x) > EXACT for x in known) or any(map(_is_odd, exact)):
        return OPEN
    return ReadBool(_record(_FUNCTIONS[name], *(_as(torch.float64, x) for x in exact)))


def _compared_to(name: str, a: Any, b: Any) -> Any:
    """An int compared to a number that is known: exact, whatever its size."""
    if isinstance(b, float):
        if b != b:
            return name == "ne"
        if math.isinf(b):
            return getattr(operator, name)(0, b)
        if not b.is_integer():
            if name in ("eq", "ne"):
                return name == "ne"
            b = math.ceil(b) if name in ("lt", "ge") else math.floor(b)
    b = int(b)
    low, high = _bounds(a)
    test = getattr(operator, name)
    if b < low or b > high:
        return test(low, b)
    return ReadBool(_record(_FUNCTIONS[name], _as(torch.int64, a), _as(torch.int64, b)))


for _name in [*_FUNCTIONS, "pow", "and_", "or_", "xor", "lshift", "rshift"]:
    _dunder = _name.strip("_")
    setattr(Read, f"__{_dunder}__", _operation(_name, False))
    if _name not in COMPARISONS:
        setattr(Read, f"__r{_dunder}__", _operation(_name, True))


def _divmod(self: Read, other: Any) -> Any:
    return self // other, self % other


def _rdivmod(self: Read, other: Any) -> Any:
    return other // self, other % self


for _name, _function in {"divmod": _divmod, "rdivmod": _rdivmod}.items():
    setattr(Read, f"__{_name}__", _function)


def _unary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def compute(self: Read) -> Any:
        x = _seen(self)
        if not _unknown(x) or name == "invert" or current.target is None:
            return function(self._value())
        if x.kind is float:
            return x if name == "pos" else ReadFloat(_record(getattr(torch, name), x.stub))
        low, high = _bounds(x)
        if low == INT64[0] and name != "pos":
            x = _tight(x)
            if not _unknown(x):
                return function(x)
            low, high = _bounds(x)
        if name == "pos":
            return ReadInt(_as(torch.int64, x), low, high)
        low, high = (-high, -low) if name == "neg" else (0, max(-low, high))
        return ReadInt(_record(getattr(torch, name), _as(torch.int64, x)), low, high)

    return compute


for _name in "neg pos abs invert".split():
    setattr(Read, f"__{_name}__", _unary(_name))


def _rounding(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(self: Read, *digits: Any) -> Any:
        if self.kind is not float and not digits:
            return operator.pos(self)
        return function(self._value(), *digits)

    return compute


for _name in "round trunc floor ceil".split():
    setattr(Read, f"__{_name}__", _rounding(round if _name == "round" else getattr(math, _name)))
