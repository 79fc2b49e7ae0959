"""What calls of C++ need that come a few times a launch: addresses of arrays, and brief functions.

Duty: the address of an array's data by the fastest way that there is (0.2 us; `ndarray.ctypes.data`
takes 1); functions that keep Python's lock. Used by `cpp.py` and `native.py`.
"""

from __future__ import annotations

import ctypes
from typing import Any


def brief(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of a library that takes microseconds. It keeps Python from other threads: one that
    took it meanwhile would be waited for longer than that.
    """
    return ctypes.PYFUNCTYPE(result, *arguments)((name, library))


def address(array: Any) -> int:
    """Of its first element; the array must be kept for as long as somebody goes there."""
    try:
        return ctypes.addressof(_BYTE.from_buffer(array))
    except (TypeError, ValueError):  # read-only, or empty
        return int(array.__array_interface__["data"][0])


_BYTE = ctypes.c_char
