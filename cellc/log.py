"""Logs and dumps: what each stage made, for a person to read.

Duty: print to stderr what CELLC_LOGS asks for, and write to the folder CELLC_DUMP what every stage
hands over. Called by every stage. Costs one look-up in a set where nothing was asked for; guard
texts that are dear to make with `enabled`.
"""

from __future__ import annotations

import itertools
import re
import sys

from cellc import env
from cellc.errors import UsageError

_LEVELS = env.logs()
_INFO = frozenset(_LEVELS)
_MORE = frozenset(name for name, level in _LEVELS.items() if level > 1)
_dumps = itertools.count()


def enabled(name: str, *, more: bool = False) -> bool:
    """Whether `info` (or `more`) of this log prints anything."""
    assert name in env.LOG_NAMES, name
    return name in (_MORE if more else _INFO)


def info(name: str, text: str) -> None:
    """Print `text` where CELLC_LOGS holds `name`."""
    if name in _INFO:
        _print(name, text)


def more(name: str, text: str) -> None:
    """Print `text` where CELLC_LOGS holds `+name`."""
    if name in _MORE:
        _print(name, text)


def dump(stage: str, text: str, suffix: str = ".txt") -> None:
    """Write `text` to `NNN-stage.suffix` in the folder CELLC_DUMP, if any, numbered by call."""
    folder = env.dump()
    if folder is None:
        return
    name = re.sub(r"[^\w.-]+", "_", stage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{next(_dumps):03}-{name}{suffix}").write_text(text.rstrip("\n") + "\n")
    except OSError as error:
        raise UsageError(f"CELLC_DUMP: cannot write to {folder}: {error.strerror}") from None


def _print(name: str, text: str) -> None:
    lines = text.splitlines() or [""]
    sys.stderr.write("".join(f"[cellc {name}] {line}\n" for line in lines))
