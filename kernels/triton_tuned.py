"""Tiles that were measured to be best on a device, kept on disk.

Duty: one JSON file a device in the cache folder: a kernel's text and name to its `Tiles`; another
of persistent kernels that were faster. Comes in: a printed module; goes out: its kernels, tiled as
measured where that is known. `triton_tune` measures. A file that cannot be read counts as empty.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellc import env, files
from cellc.kernels.triton_tiles import PrintedKernel, Tiles

if TYPE_CHECKING:
    from cellc.kernels.triton_persistent import Persistent
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
        return {key: Tiles(**sizes) for key, sizes in _read(_file(device)).items()}
    except (TypeError, AttributeError):
        return {}


def keep(device: str, found: Mapping[str, Tiles]) -> None:
    """Add to what is known; the file is replaced whole."""
    _write(_file(device), {key: asdict(tiles) for key, tiles in {**known(device), **found}.items()})


# -- persistent kernels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Looped:
    """Rows of a program and warps of a persistent kernel that was measured to be faster than a
    kernel a step, with up to `most_rows` rows a step.
    """

    rows: int
    num_warps: int
    most_rows: int


def known_loops(device: str) -> Mapping[str, Looped]:
    """All that were faster on a device."""
    try:
        return {key: Looped(**sizes) for key, sizes in _read(_file(device, "-loops")).items()}
    except (TypeError, AttributeError):
        return {}


def known_loop(persistent: Persistent, device: str) -> tuple[PrintedKernel, int] | None:
    """The persistent kernel, tiled as measured, and for how many rows; None where it was not
    measured to be faster.
    """
    found = known_loops(device).get(key_of(persistent.printed.source, persistent.kernel))
    return (persistent.tiled(found.rows, found.num_warps), found.most_rows) if found else None


def keep_loop(device: str, persistent: Persistent, found: Looped | None) -> None:
    """Note that a persistent kernel is faster, or (None) that it is not."""
    key = key_of(persistent.printed.source, persistent.kernel)
    kept = {k: v for k, v in known_loops(device).items() if k != key}
    if found is not None:
        kept[key] = found
    _write(_file(device, "-loops"), {k: asdict(v) for k, v in kept.items()})


# -- files -----------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    files.write(path, json.dumps(data, indent=1, sort_keys=True))


def _file(device: str, kind: str = "") -> Path:
    name = re.sub("[^0-9A-Za-z]+", "-", device).strip("-")
    return env.cache() / "tuned" / f"{name}{kind}.json"
