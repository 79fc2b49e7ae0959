"""Callees: what in a model can be called as one operation.

Duty: find a model's modules and their methods and have their calls come to the recorder while a
request is unfolded; say where in a function's code a call is. Used by `frontends.unfold`.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from cellc.errors import CellcError, UnsupportedError
from cellc.frontends.signature import line_of

_NOTHING: Any = object()


class RefusedCell(UnsupportedError):
    """A marked cell that cannot be one."""


class Callee:
    """Something whose calls may be operations: a module, a bound method, a marked function."""

    def __init__(
        self, name: str, run: Callable[..., Any], marked: bool, key: Hashable, own: bool
    ) -> None:
        self.name, self.run, self.marked, self.key = name, run, marked, key
        module = getattr(run, "__self__", None)
        inner = list(module.modules())[1:] if isinstance(module, nn.Module) else []
        self.holds_cells = any(is_marked(m) for m in inner)
        self.own = own  # code of the user's, not of torch's
        self.transparent = False  # met arguments that are structure: its body runs
        self.repeats = True  # what its body does depends on its arguments alone
        self.compared = self.looked_into = 0  # calls for which that was looked at
        self.row_arguments: set[int] = set()  # positions where a call had a value of the request


def refusal(callee: Callee, error: BaseException, frame: Any) -> CellcError:
    """Why a marked cell is none, with the line of its call."""
    if isinstance(error, CellcError):
        reason = str(error).splitlines()[0]
    else:
        reason = "it uses a value of the request that is none of its arguments"
    return RefusedCell(
        what=f"the cell {callee.name}: {reason}",
        remedy="a cell takes all it needs as arguments and reads no values",
        origin=line_of(frame) if frame is not None else None,
    )


@functools.cache
def _methods(kind: type) -> dict[str, Any]:
    """Methods that a module's class defines outside torch."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.split(".")[0] == "torch" or base is object:
            continue
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                found[name] = value
    found.pop("forward", None)
    return {n: f for n, f in found.items() if not getattr(f, "_cellc_cell", False)}


def is_marked(module: nn.Module) -> bool:
    return bool(getattr(type(module), "_cellc_cell", False))


def loop_of(frame: Any) -> int:
    """The innermost loop of a function that its frame is in, by where its body begins; 0: none."""
    at = frame.f_lasti
    around = [(end - start, start) for start, end in _loops(frame.f_code) if start <= at <= end]
    return min(around)[1] if around else 0


@functools.lru_cache(maxsize=4096)
def _loops(code: types.CodeType) -> list[tuple[int, int]]:
    """Stretches of bytecode that jumps backward repeat."""
    return [
        (i.argval, i.offset)
        for i in dis.get_instructions(code)
        if "JUMP" in i.opname and isinstance(i.argval, int) and i.argval < i.offset
    ]


class Callees:
    """The callees of one model, and their interception. `call(callee, args, kwargs, frame)` is told
    of their calls.
    """

    def __init__(self, call: Callable[[Callee, Any, Any, Any], Any]) -> None:
        self._call = call
        self._known: dict[Hashable, Callee] = {}

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, calls of these modules and of their own methods come to `call` (in this thread,
        while a request is run).
        """
        placed: list[tuple[dict[str, Any], str, Any]] = []
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit * 4 + 200)  # our frames are on the stack, too
        try:
            for name, module in modules.items():
                self._watch(name, module, placed)
            yield
        finally:
            sys.setrecursionlimit(limit)
            for place, attribute, before in reversed(placed):
                if before is _NOTHING:
                    place.pop(attribute, None)
                else:
                    place[attribute] = before

    def _watch(
        self, name: str, module: nn.Module, placed: list[tuple[dict[str, Any], str, Any]]
    ) -> None:
        place = vars(module)

        def put(attribute: str, value: Any) -> None:
            placed.append((place, attribute, place.get(attribute, _NOTHING)))
            place[attribute] = value

        for child, value in module._modules.items():
            if value is not None and child not in place and not hasattr(type(module), child):
                put(child, value)  # found without nn.Module.__getattr__
        if name and module._compiled_call_impl is None:
            callee = self.of(("module", name), name, module._call_impl, is_marked(module))
            put("_compiled_call_impl", self._interceptor(callee, 2))
        for method, function in _methods(type(module)).items():  # type: ignore[arg-type]
            callee = self.of(
                ("method", name, method),
                f"{name}.{method}" if name else method,
                types.MethodType(function, module),
                False,
            )
            if method not in place and not (callee.transparent and not callee.repeats):
                put(method, self._interceptor(callee, 1))

    def of(self, key: Hashable, name: str, run: Callable[..., Any], marked: bool) -> Callee:
        callee = self._known.get(key)
        if callee is None:
            own = not isinstance(getattr(run, "__self__", None), nn.Module) or not type(
                run.__self__  # type: ignore[attr-defined]
            ).__module__.startswith("torch.")
            callee = self._known[key] = Callee(name, run, marked, key, own)
        callee.run = run
        return callee

    def _interceptor(self, callee: Callee, depth: int) -> Callable[..., Any]:
        record, frame_of = self._call, sys._getframe

        def called(*args: Any, **kwargs: Any) -> Any:
            return record(callee, args, kwargs, frame_of(depth))

        called.callee = callee  # type: ignore[attr-defined]
        return called
