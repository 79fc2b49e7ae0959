"""Askers: who asks an object for its class.

Duty: tell `isinstance` in Python code, for which a stub is a tensor, from PyTorch's parser of
arguments, which would take a stub that says so for a tensor of its own and read its memory. Both
ask for `__class__` in the frame of the caller; what it calls there says which. Used by
`frontends.stub`.
"""

from __future__ import annotations

import builtins
import dis
import types
from typing import Any

_known: dict[tuple[int, int], bool | None] = {}  # by code and instruction
_codes: list[types.CodeType] = []  # kept alive: they are known by id
_JUMPS = frozenset([*dis.hasjrel, *dis.hasjabs])
_SKIPPED = frozenset("CACHE EXTENDED_ARG PRECALL KW_NAMES NOP RESUME".split())
_OPERATORS = ("BINARY_", "INPLACE_", "UNARY_", "COMPARE_", "STORE_SUBSCR", "DELETE_SUBSCR")
_CALLS = ("CALL", "PRECALL")


def asks_for_class(frame: types.FrameType) -> bool | None:
    """Does Python code ask? False where a function written in C is called; None if unclear."""
    key = (id(frame.f_code), frame.f_lasti)
    if key not in _known:
        _codes.append(frame.f_code)
        _known[key] = _asks(frame)
    return _known[key]


def _asks(frame: types.FrameType) -> bool | None:
    code = frame.f_code
    steps = list(dis.get_instructions(code))
    at = next((k for k, step in enumerate(steps) if step.offset == frame.f_lasti), None)
    if at is None:
        return None
    step = steps[at]
    if step.opname.startswith(_OPERATORS):
        return False
    if not step.opname.startswith(_CALLS) or step.opname.startswith("CALL_INTRINSIC"):
        return True
    before = [s for s in steps[:at] if s.opname not in _SKIPPED]
    loaded = _callee(before, _arguments(step)) or _beginning(before, step)
    if loaded is None:
        return None if "isinstance" in code.co_names else False
    if loaded.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF"):
        names = {**vars(builtins), **frame.f_globals, **frame.f_locals}
        return names.get(loaded.argval) is isinstance
    return bool(loaded.argval == "isinstance")


def _beginning(before: list[dis.Instruction], call: dis.Instruction) -> Any:
    """The name that a call begins with in the source, where Python (from 3.11 on) knows that."""
    where = getattr(call, "positions", None)
    if where is None or where.col_offset is None:
        return None
    for step in before:
        place: Any = getattr(step, "positions", None)
        begins = (place.lineno, place.col_offset) == (where.lineno, where.col_offset)
        if begins and step.opname.startswith("LOAD_"):
            return step
    return None


def _arguments(call: dis.Instruction) -> int:
    """What lies above the callee on the stack."""
    count = call.arg or 0
    if call.opname == "CALL_FUNCTION_EX":
        return 1 + (count & 1)
    return count + (call.opname in ("CALL_KW", "CALL_FUNCTION_KW"))


def _callee(before: list[dis.Instruction], above: int) -> Any:
    """The instruction that put a callee below so many arguments; None across jumps."""
    height = 0
    for step in reversed(before):
        if step.opcode in _JUMPS or step.is_jump_target:
            return None
        height += dis.stack_effect(step.opcode, step.arg, jump=False)
        if height > above:
            return step
    return None
