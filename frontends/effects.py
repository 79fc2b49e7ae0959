"""Effects: what a forward does besides returning.

Duty: see that a forward sets attributes of modules, changes lists or dicts that modules or the
request hold, or caches what it returns. Such a forward cannot be unfolded by calls, since a call
that is copied does none of it; it is traced by operators, or its recursion is not copied. Used by
`frontends.unfold` and `cellc.unfolder`.
"""

from __future__ import annotations

import dis
import functools
import os
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from cellc.frontends.stub import CannotUnfold

_KNOWN = frozenset(vars(nn.Module()))  # what torch keeps in every module
_SETS = frozenset(["setattr", "__setattr__", "__dict__", "vars"])
_LOADS = frozenset("LOAD_GLOBAL LOAD_NAME LOAD_ATTR LOAD_METHOD".split())
_IDENTITY = {"type": "type", "__class__": "type", "id": "identity"}
_MADE_ONCE = frozenset(["__init__", "__setstate__", "__deepcopy__", "reset_parameters"])


@functools.cache
def codes_of(kind: Any) -> tuple[types.CodeType, ...]:
    """Code that calls of a module's class may run, with the functions inside; not torch's."""
    found: list[types.CodeType] = []
    for base in kind.__mro__:
        if base.__module__.split(".")[0] != "torch" and base is not object:
            for name, value in vars(base).items():
                if name not in _MADE_ONCE:
                    found += _codes(value)
    return tuple(found)


def _class_of(module: nn.Module) -> Any:
    return type(module)


def _codes(value: Any) -> list[types.CodeType]:
    if isinstance(value, property):
        return [c for f in (value.fget, value.fset) if f is not None for c in _codes(f)]
    value = getattr(value, "__func__", value)
    value = getattr(value, "__wrapped__", value)
    code = getattr(value, "__code__", None) if isinstance(value, types.FunctionType) else None
    found = [code] if code is not None else []
    for one in found:
        found += [c for c in one.co_consts if isinstance(c, types.CodeType)]
    return found


@functools.lru_cache(maxsize=4096)
def _stores(code: types.CodeType) -> frozenset[str]:
    """Names of the instructions of a function that store outside of it, and of what may."""
    found = {i.opname for i in dis.get_instructions(code) if i.opname.startswith("STORE_")}
    found &= {"STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR"}
    return frozenset(found | (_SETS & {*code.co_names}))


def why_not(modules: Iterable[nn.Module]) -> str | None:
    """Why a model's code can be unfolded at no time, if it cannot."""
    for kind in {_class_of(m) for m in modules}:
        for base in kind.__mro__:
            for name, value in vars(base).items():
                if isinstance(value, functools._lru_cache_wrapper):
                    return f"{kind.__name__}.{name} keeps its results (functools.lru_cache)"
        for code in codes_of(kind):
            if "STORE_GLOBAL" in _stores(code):
                return f"{kind.__name__}.{code.co_name} sets a global variable"
    return None


def asks_for_types(modules: Iterable[nn.Module]) -> bool:
    """Does a model's code call `type`? Numbers then stay numbers: no stand-in has their type."""
    return any("type" in code.co_names for m in modules for code in codes_of(_class_of(m)))


def asks_what_it_is(forward: Callable[..., Any], modules: Iterable[nn.Module]) -> bool:
    """Does a forward ask for a number's very type, or whether a value is True itself? Numbers that
    it reads are then told at once.
    """
    codes = [c for m in modules for c in codes_of(_class_of(m))]
    return any(map(_asks_what_it_is, [*codes, *_reached([forward])]))


class Asks(NamedTuple):
    """file:line where a forward asks for the very type of a value, or whether two are one."""

    type: str | None
    identity: str | None

    @property
    def any(self) -> str | None:
        """Where it may tell a stand-in from a tensor."""
        return self.type or self.identity


def asks_for_identity(forward: Callable[..., Any], modules: Iterable[nn.Module]) -> Asks:
    """What a forward, or what it calls, may ask of its arguments themselves."""
    kinds = dict.fromkeys(map(_class_of, modules))
    codes = [c for kind in kinds for c in codes_of(kind)]
    methods = [f for kind in kinds for f in _methods(kind)]
    found = [_asks_for_identity(code) for code in (*codes, *_reached([forward, *methods]))]
    return Asks(
        next((one.type for one in found if one.type), None),
        next((one.identity for one in found if one.identity), None),
    )


def _methods(kind: Any) -> list[Any]:
    own = [b for b in kind.__mro__ if b.__module__.split(".")[0] != "torch" and b is not object]
    return [getattr(f, "__func__", f) for b in own for f in vars(b).values()]


def _reached(functions: Iterable[Any]) -> list[types.CodeType]:
    """Code of functions, and of those that they name, alone or in a module."""
    codes: list[types.CodeType] = []
    left, seen = [getattr(f, "__func__", f) for f in functions], set()
    while left:
        function = left.pop()
        if not isinstance(function, types.FunctionType) or function in seen or _is_torchs(function):
            continue
        seen.add(function)
        made = _codes(function)
        codes += made
        names = {name for code in made for name in code.co_names}
        known = [function.__globals__.get(name) for name in names]
        packages = [m for m in known if isinstance(m, types.ModuleType)]
        left += [*known, *[vars(m).get(name) for m in packages for name in names]]
    return codes


def _is_torchs(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] == "torch"


@functools.lru_cache(maxsize=4096)
def _asks_what_it_is(code: types.CodeType) -> bool:
    before = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "type":
            return True
        if step.opname == "IS_OP" and before is not None and isinstance(before.argval, bool):
            return True
        before = step
    return False


@functools.lru_cache(maxsize=4096)
def _asks_for_identity(code: types.CodeType) -> Asks:
    before, line = "", code.co_firstlineno
    lines: dict[str, str] = {}
    for step in dis.get_instructions(code):
        at = getattr(step, "line_number", step.starts_line)  # Python 3.13 has the former
        line = at if at is not None else line
        what = _IDENTITY.get(step.argval) if step.opname in _LOADS else None
        if step.opname == "IS_OP" and before != "LOAD_CONST":
            what = "identity"
        if what is not None:
            lines.setdefault(what, f"{os.path.basename(code.co_filename)}:{line}")
        before = step.opname
    return Asks(lines.get("type"), lines.get("identity"))


def sets_attributes(modules: Iterable[nn.Module]) -> bool:
    """May a model's code set attributes?"""
    return any(_stores(code) for m in modules for code in codes_of(_class_of(m)))


@contextmanager
def setting_refused(running: Callable[[], bool]) -> Iterator[None]:
    """Inside, setting a module's attribute in this thread raises CannotUnfold while `running()`."""
    original, thread = nn.Module.__setattr__, threading.get_ident()

    def refuse(self: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == thread and running():
            raise CannotUnfold(f"the forward sets self.{name} of a {type(self).__name__}")
        original(self, name, value)

    nn.Module.__setattr__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


class Holdings:
    """Lists, dicts and sets that modules hold, as they were."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept: list[tuple[str, Any, Any]] = [
            (f"self.{name} of a {type(m).__name__}", value, value.copy())
            for m in modules
            for name, value in vars(m).items()
            if type(value) in (list, dict, set) and name not in _KNOWN
        ]

    def check(self) -> None:
        """Raises CannotUnfold where one changed; it is as before then."""
        for name, value, before in self._kept:
            if not unchanged(value, before):
                value.clear()
                if isinstance(value, list):
                    value.extend(before)
                else:
                    value.update(before)
                raise CannotUnfold(f"the forward changes {name}")


def unchanged(value: Any, before: Any) -> bool:
    """Does a container hold the very same items?"""
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(k in value and value[k] is v for k, v in before.items())
    if isinstance(value, set):
        return bool(value == before)
    return all(a is b for a, b in zip(value, before, strict=True))


def holds(shell: Any, items: Sequence[Any]) -> bool:
    """Does a copied part of a request still hold what it was made of?"""
    kind = type(shell)
    now = shell if kind is list else list(shell.values() if kind is dict else vars(shell).values())
    return len(now) == len(items) and all(a is b for a, b in zip(now, items, strict=True))
