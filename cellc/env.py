"""Environment variables: all of them, typed, and none misspelt.

Duty: the only reader of `CELLC_*`. A name or value that cellc does not know raises UsageError
listing the right ones. Values are read when asked for, so that a test or a notebook may change
them; `cellc.log` reads its own once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cellc.errors import UsageError

LOG_NAMES = ("graph", "cells", "plan", "kernel", "schedule")
VARIABLES = {
    "CELLC_LOGS": f"names out of {','.join(LOG_NAMES)}, comma-separated, + before one for more",
    "CELLC_DUMP": "a folder for every stage and every kernel",
    "CELLC_VERIFY": "1 checks the IR after every pass",
    "CELLC_CACHE": "the folder of compiled kernels (default ~/.cache/cellc)",
}


def check() -> None:
    """Raise UsageError for a misspelt CELLC_* variable or a bad value."""
    unknown = sorted(v for v in os.environ if v.startswith("CELLC_") and v not in VARIABLES)
    if unknown:
        known = "".join(f"\n  {name}: {meaning}" for name, meaning in VARIABLES.items())
        raise UsageError(f"unknown environment variable {', '.join(unknown)}; there are{known}")
    logs()
    verify()


def logs() -> Mapping[str, int]:
    """Level of each log asked for by CELLC_LOGS: 1, or 2 where the name has a +."""
    levels: dict[str, int] = {}
    for word in os.environ.get("CELLC_LOGS", "").replace(" ", "").split(","):
        name = word.removeprefix("+")
        if name in LOG_NAMES:
            levels[name] = max(levels.get(name, 0), 1 + (name != word))
        elif word:
            raise UsageError(f"CELLC_LOGS: unknown log {name!r}; there are {', '.join(LOG_NAMES)}")
    return levels


def dump() -> Path | None:
    """Folder named by CELLC_DUMP, if any; it need not exist yet."""
    folder = os.environ.get("CELLC_DUMP", "")
    return Path(folder).expanduser() if folder else None


def verify() -> bool:
    """Whether CELLC_VERIFY asks for the IR to be checked after every pass."""
    value = os.environ.get("CELLC_VERIFY", "")
    if value not in ("", "0", "1"):
        raise UsageError(f"CELLC_VERIFY: got {value!r}, expected 0 or 1")
    return value == "1"


def cache() -> Path:
    """Folder of compiled kernels, which need not exist yet; by default in the user's cache."""
    if folder := os.environ.get("CELLC_CACHE", ""):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cellc"
