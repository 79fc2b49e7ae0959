"""Branching: may a forward's Python code take another path at another size?

Duty: decide whether what was learned at some sizes may be used between them (`cellc.family`). Sizes
are plain Python integers while tracing, so that a branch on one leaves no trace. Comes in: every
Python code object that ran while a request was traced; goes out: yes or no. A conservative look at
bytecode: comparisons, remainders, look-ups in tables of Python's and truth tests of computed values
and of arguments may branch on a size; tests of attributes, of other names and of `is`, `isinstance`
and `hasattr`, and comparisons with words or of a number of dimensions, do not.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

_INTEGER_OPERATORS = ("%", "//", "&", "|", "^", "<<", ">>")
_OLD_OPERATORS = frozenset(  # up to Python 3.10
    f"{kind}_{name}"
    for kind in ("BINARY", "INPLACE")
    for name in ("MODULO", "FLOOR_DIVIDE", "AND", "OR", "XOR", "LSHIFT", "RSHIFT")
)
_HARMLESS_CALLS = frozenset(["isinstance", "hasattr", "callable", "issubclass"])
# Names through which a size may be rounded, looked up or tested.
_ROUNDING = frozenset(
    "int round divmod bool any all math get bisect bisect_left bisect_right gcd lcm isqrt log log2 "
    "log10 sqrt ceil floor count index bin hex oct bit_length bit_count pow".split()
)
_SKIPPED = frozenset(["CACHE", "NOP", "TO_BOOL", "EXTENDED_ARG", "UNARY_NOT", "PRECALL", "COPY"])
_SUBSCRIPTS = ("BINARY_SUBSCR",)
_TABLES = (
    "LOAD_GLOBAL",
    "LOAD_DEREF",
    "LOAD_CONST",
    "LOAD_ATTR",
    "LOAD_METHOD",
    "BUILD_",
    "LIST_",
    "MAP_ADD",
)
_FORWARDS = ("forward", "__call__", "<lambda>")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_HANDLERS = ("CHECK_EXC_MATCH", "WITH_EXCEPT_START", "JUMP_IF_NOT_EXC_MATCH")
_TESTED = ("LOAD_FAST", "LOAD_ATTR", "LOAD_DEREF", "LOAD_NAME", "LOAD_GLOBAL", "LOAD_CONST")


class CodesSeen:
    """Collects the code objects of Python functions that run inside `watching`."""

    def __init__(self, trusted: tuple[str, ...]) -> None:
        self._trusted = trusted
        self._seen: set[CodeType] = set()
        self._unknown = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch calls in this thread; where nobody can watch, nothing is known."""
        seen = self._seen
        root = sys._getframe(2)  # whose `with` this is

        def note(frame: FrameType) -> None:
            if frame.f_code not in seen and not _importing(frame, root):
                seen.add(frame.f_code)

        with _calls(note) as watched:
            self._unknown = self._unknown or not watched
            yield

    def may_branch(self) -> bool:
        """Does any function outside the trusted folders have a test that a size may decide?"""
        return self._unknown or any(
            _may_branch(code) for code in self._seen if not self._is_trusted(code.co_filename)
        )

    def _is_trusted(self, path: str) -> bool:
        """In a trusted folder, packages installed below it aside."""
        return any(
            path.startswith(folder) and "-packages" not in path[len(folder) :]
            for folder in self._trusted
        )


Note = Callable[[FrameType], None]

if sys.version_info >= (3, 12):

    @contextmanager
    def _calls(note: Note) -> Iterator[bool]:
        """Tell of every Python call in this thread; False where all tools are taken."""
        monitoring, thread = sys.monitoring, threading.get_ident()
        tool = next((i for i in (4, 3) if monitoring.get_tool(i) is None), None)
        if tool is None:
            yield False
            return

        def started(code: CodeType, offset: int) -> None:
            if threading.get_ident() == thread:
                note(sys._getframe(1))

        start = monitoring.events.PY_START
        monitoring.use_tool_id(tool, "cellc")
        monitoring.register_callback(tool, start, started)
        monitoring.set_events(tool, start)
        try:
            yield True
        finally:
            monitoring.set_events(tool, 0)
            monitoring.register_callback(tool, start, None)
            monitoring.free_tool_id(tool)

    def look_away() -> Any:
        """Nothing to stop: watching costs little here."""
        return None

else:

    @contextmanager
    def _calls(note: Note) -> Iterator[bool]:
        """Tell of every Python call in this thread; False where a profiler is at work."""
        if sys.getprofile() is not None:
            yield False
            return

        def watcher(frame: FrameType, event: str, _: Any) -> None:
            if event == "call":
                note(frame)

        watcher.ours = True  # type: ignore[attr-defined]
        sys.setprofile(watcher)
        try:
            yield True
        finally:
            sys.setprofile(None)

    def look_away() -> Any:
        """Stop watching while no code of the user's runs; returns what `sys.setprofile` takes
        again, or None where nobody watches.
        """
        watcher = sys.getprofile()
        if watcher is None or not hasattr(watcher, "ours"):
            return None
        sys.setprofile(None)
        return watcher


def _importing(frame: FrameType | None, root: FrameType) -> bool:
    """Does it run because code below `root` imports a module?"""
    while frame is not None and frame is not root:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=4096)
def _may_branch(code: CodeType) -> bool:
    instructions = list(dis.get_instructions(code))
    kept = [i for i in instructions if i.opname not in _SKIPPED]
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    arguments = frozenset(() if code.co_name in _FORWARDS else names)
    computed = _computed_names(kept)
    for k, instruction in enumerate(kept):
        name = instruction.opname
        if name in _OLD_OPERATORS:
            return True
        if name in ("COMPARE_OP", "CONTAINS_OP") and not _harmless_comparison(kept[:k]):
            return True
        if name == "BINARY_OP" and instruction.argrepr.rstrip("=") in _INTEGER_OPERATORS:
            return True
        if name.startswith("LOAD") and instruction.argval in _ROUNDING:
            return True
        if name in _SUBSCRIPTS and _looks_up(instructions[: instructions.index(instruction)]):
            return True
        jumps = "JUMP" in name and "_IF_" in name and "NONE" not in name
        if jumps and not _harmless_test(kept[:k], arguments, computed):
            return True
    return False


def _computed_names(kept: list[dis.Instruction]) -> frozenset[str]:
    """Local names that are given the result of a computation or a call."""
    return frozenset(
        str(after.argval)
        for before, after in zip(kept, kept[1:], strict=False)
        if after.opname.startswith("STORE_FAST")
        and before.opname.startswith(("CALL", "BINARY_", "INPLACE_", "UNARY_"))
    )


def _looks_up(before: list[dis.Instruction]) -> bool:
    """Is it a computed place in something that is no local name: a table of Python's?"""
    before = [i for i in before if i.opname not in ("CACHE", "EXTENDED_ARG")]
    if not before or not before[-1].opname.startswith(("CALL", "BINARY_", "INPLACE_")):
        return False
    effect = 0
    for k in range(len(before) - 1, 0, -1):
        instruction = before[k]
        argument = instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None
        effect += dis.stack_effect(instruction.opcode, argument, jump=False)
        if effect >= 1:  # the index begins here: what it is looked up in was made before, or here
            return before[k - (effect == 1)].opname.startswith(_TABLES)
    return True


def _harmless_comparison(before: list[dis.Instruction]) -> bool:
    """Is it with words, or of a number of dimensions with a number: not of a size?"""
    if not before or before[-1].opname != "LOAD_CONST":
        return False
    constant = before[-1].argval
    words = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
    if words and all(isinstance(word, str) for word in words):
        return True
    for instruction in reversed(before[:-1]):
        if not instruction.opname.startswith("CALL"):
            return instruction.opname in _ATTRIBUTES and instruction.argval in ("dim", "ndim")
    return False


def _harmless_test(
    before: list[dis.Instruction], arguments: frozenset[str], computed: frozenset[str]
) -> bool:
    """Is what a jump tests (the value made last) an attribute, a name, or a check of a type?

    A name that is computed may be a size; so may an argument, but for those of a forward, which are
    part of what requests have in common.
    """
    if not before:
        return False
    last = before[-1]
    if last.opname in ("COMPARE_OP", "CONTAINS_OP"):
        return True  # looked at already
    if last.opname.startswith("LOAD_FAST") and last.argval in (arguments | computed):
        return False
    if last.opname.startswith(("IS_OP", *_TESTED)) or last.opname in _HANDLERS:
        return True
    if not last.opname.startswith("CALL"):
        return False
    for instruction in reversed(before[:-1]):
        if instruction.opname.startswith(("CALL", "STORE", "POP", "RETURN")):
            return False
        if instruction.opname.startswith("LOAD") and instruction.argval in _HARMLESS_CALLS:
            return True
    return False
