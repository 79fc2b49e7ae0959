"""Interruptions: KeyboardInterrupt at any point where CPython would raise it.

A signal's handler runs where the interpreter looks for signals: after a call, when a function
begins, and when a loop jumps back. `Interruption` raises at the n-th of these points of a block.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType, TracebackType
from typing import Any

LOOKS = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "RESUME")  # how those opcodes' names begin
_LOOKING = {
    code
    for name, code in {**dis.opmap, **getattr(dis, "_all_opmap", {})}.items()
    if name.startswith(LOOKS)
}


@functools.cache
def _blocks(code: CodeType) -> list[Any]:
    parse = getattr(dis, "_parse_exception_table", None)  # from Python 3.11 on
    return list(parse(code)) if parse is not None else []


def _same_block(frame: FrameType, last: int) -> bool:
    """Would the same `except` or `finally` catch what is raised at the end of the instruction
    before, as CPython does, and what is raised before this one, as a trace function does?
    """
    caught = [
        next((b.target for b in _blocks(frame.f_code) if b.start <= at < b.end), None)
        for at in (last, frame.f_lasti)
    ]
    return caught[0] == caught[1]


class Interruption:
    """`with Interruption(n) as points:` raises at the n-th point (0: at none) in this thread's
    Python functions called in the block; `points.count` says how many there were until then.
    """

    def __init__(self, number: int = 0) -> None:
        self._number, self.count = number, 0
        self._last: dict[int, int] = {}  # instruction before, by frame
        self._before: Any = None

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is Interruption.__exit__.__code__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._inside

    def _inside(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "return":
            self._last.pop(id(frame), None)
        elif event == "opcode":
            code, last = frame.f_code.co_code, self._last.get(id(frame))
            self._last[id(frame)] = frame.f_lasti
            if last is None or (code[last] in _LOOKING and _same_block(frame, last)):
                self.count += 1
                if self.count == self._number:
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return self._inside
