"""Tiles that were measured to be best on a device, kept on disk.

Duty: one JSON file a device in the cache folder: a kernel's text and name to its `Tiles`. Comes in:
a printed module; goes out: its kernels, tiled as measured where that is known. `triton_tune`
measures. A file that cannot be read counts as empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cellc import env
from cellc.kernels.triton_tiles import PrintedKernel, Tiles

if TYPE_CHECKING:
    from cellc.kernels.triton_printer import Printed


def tuned(printed: Printed, device: str) -> tuple[PrintedKernel, ...]:
    """The module's kernels with the tiles known for the device."""
    found = known(device)
    return tuple(
        kernel.tiled(found[key])
        if kernel.space is not None and (key := key_of(printed.source, kernel)) in found
        else kernel
        for kernel in printed.kernels
    )


def key_of(source: str, kernel: PrintedKernel) -> str:
    return f"{kernel.name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"


def known(device: str) -> Mapping[str, Tiles]:
    """All tiles measured on a device."""
    try:
        data = json.loads(_file(device).read_text())
        return {key: Tiles(**sizes) for key, sizes in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(device: str, found: Mapping[str, Tiles]) -> None:
    """Add to what is known; the file is replaced whole."""
    path = _file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {key: asdict(tiles) for key, tiles in {**known(device), **found}.items()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(data, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def _file(device: str) -> Path:
    return env.cache() / "tuned" / f"{re.sub('[^0-9A-Za-z]+', '-', device).strip('-')}.json"
