"""Program points: where in the user's code an operation stands.

Duty: name the place of an operation that is being traced, from the Python frames that led to it.
Used by `frontends.tracer`.

A program point (method: design by roles, see ARCHITECTURE.md) is the chain of Python frames from
the operation outwards, recursion collapsed to the innermost frame of each function and module, with
each frame's instruction offset, and the ordinal of the operation within its outermost torch call:
one Python call makes several operations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import torch

from cellc.errors import CellcError, ForwardError

TORCH = os.path.dirname(torch.__file__)
HERE = os.path.dirname(os.path.abspath(__file__))
_MACHINERY = {  # files whose frames are no part of a program point
    *(os.path.join(TORCH, f) for f in ("_ops.py", "overrides.py", "_tensor.py")),
    *(os.path.join(TORCH, "utils", f) for f in ("_python_dispatch.py", "_stats.py")),
    *(
        os.path.join(HERE, f"{module}.py")
        for module in (
            "placeholder",
            "points",
            "shapes",
            "traced_values",
            "traced_writes",
            "tracer",
            "tracing",
        )
    ),
}

_REPLAYING = ("cellc.pipeline", "cellc.templates")  # run the operations of a forward once more


class Points:
    """The place where a trace is now."""

    def __init__(self, modules: dict[int, str]) -> None:
        self.root: FrameType | None = None  # the outermost frame that is looked at
        self.ordinal = 0  # operations of the outermost torch call so far
        self._modules = modules  # names, by id
        self._scopes: list[Hashable] = []
        self._origin = ""  # of operations that no frame of the user's is behind

    def _frames(self) -> Iterator[FrameType]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.root:
            if frame.f_code.co_filename not in _MACHINERY:
                yield frame
            frame = frame.f_back

    def point(self) -> tuple[Hashable, ...]:
        chain: list[Hashable] = []
        seen = set()
        for frame in self._frames():
            code = frame.f_code
            module = None
            if code.co_varnames[:1] == ("self",):
                module = self._modules.get(id(frame.f_locals.get("self")))
            key = (id(code), module)
            if key not in seen:
                seen.add(key)
                chain.append((code.co_name, code.co_firstlineno, module, frame.f_lasti))
        return (*chain, *self._scopes, self.ordinal)

    @contextmanager
    def scope(self, tag: Hashable) -> Iterator[None]:
        """Operations traced inside belong to program points of their own."""
        self._scopes.append(tag)
        try:
            yield
        finally:
            self._scopes.pop()

    @contextmanager
    def replaying(self, tag: Hashable, origin: str) -> Iterator[None]:
        """Operations inside stand at another place of the user's code."""
        before, self._origin = self._origin, origin
        try:
            with self.scope(tag):
                yield
        finally:
            self._origin = before

    def origin(self) -> str:
        """file:line of the innermost frame that is neither torch's nor ours."""
        last = ""
        for frame in self._frames():
            path = frame.f_code.co_filename
            if not path.startswith(TORCH):
                last = last or f"{os.path.basename(path)}:{frame.f_lineno}"
                if not _is_ours(frame):
                    return f"{os.path.basename(path)}:{frame.f_lineno}"
        return self._origin or last


def where(error: BaseException) -> str:
    """file:line of the user's innermost frame in a traceback."""
    found, tb = "", error.__traceback__
    while tb is not None:
        path = tb.tb_frame.f_code.co_filename
        ours = path.startswith(TORCH) or _is_ours(tb.tb_frame)
        if not (ours or is_generated(tb.tb_frame.f_code)):
            found = f"{os.path.basename(path)}:{tb.tb_lineno}"
        tb = tb.tb_next
    return found


def told(error: Exception) -> Exception:
    """What the caller of a forward gets: what the forward's own code raised, as it is; of what
    torch refused, an error that names the forward's line.
    """
    last, tb = None, error.__traceback__
    while tb is not None:
        last, tb = tb.tb_frame, tb.tb_next
    if last is None or isinstance(error, CellcError):
        return error
    origin, module = where(error), last.f_globals.get("__name__")
    if not origin or module == "cellc.frontends.reads":  # a number of Python's
        return error
    if not (last.f_code.co_filename.startswith(TORCH) or _is_ours(last)):
        return error
    made = ForwardError(str(error), kind=type(error).__name__, origin=origin)
    made.__cause__ = error
    return made.with_traceback(error.__traceback__)


def _is_ours(frame: FrameType) -> bool:
    """Does it trace or replay code of the user's?"""
    path = frame.f_code.co_filename
    return path.startswith(HERE) or frame.f_globals.get("__name__") in _REPLAYING


def is_generated(code: CodeType) -> bool:
    """Was it made from text by `dataclasses` or `collections`? A user's own has other names."""
    return code.co_filename == "<string>" and code.co_name.startswith("__")
