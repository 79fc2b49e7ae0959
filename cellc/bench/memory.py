"""Memory: what a process grows by when cellc runs a workload, beyond its weights and live rows.

Each workload runs in a process of its own. There requests, the model and PyTorch's own way come
first; from then on the peak of resident memory is counted (Linux only), while cellc's ways run
twice. Taken off are one copy of the weights, and the arenas of rows at their largest: whole, with
rows that are no longer live, and pages never written, so that less than nothing may be left.
`python -m cellc.bench.memory` is that process: settings by its input, figures by its output.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cellc.bench.case import Case
from cellc.bench.place import Place
from cellc.bench.workloads import BATCHED, Settings, cases_of
from cellc.errors import CellcError
from cellc.modules import named_tensors

MB = 2**20
BEYOND, ROWS = "MB beyond weights and rows, {}", "MB of rows, {}"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_case(settings: Settings) -> Case:
    """Facts of every workload that batches requests."""
    if not _RESET.exists():
        return Case("Memory", missing={"memory": "not known: this system has no /proc"})

    def facts() -> dict[str, float]:
        found: dict[str, float] = {}
        for name in BATCHED:
            for number in range(len(cases_of(name, settings))):
                found |= _in_process(name, number, settings)
        return found

    title = f"Memory that a process grows by, {settings.count} requests at once"
    return Case(title, facts=facts, timed=False)


def _in_process(name: str, number: int, settings: Settings) -> dict[str, float]:
    given = {
        "name": name,
        "number": number,
        "lengths": list(settings.lengths),
        "backend": settings.place.backend,
        "units": settings.units,
        "trees": str(settings.trees) if settings.trees else None,
    }
    done = subprocess.run(
        [sys.executable, "-m", "cellc.bench.memory"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CellcError(f"memory of {name}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _resident(field: str) -> int:
    """VmRSS or VmHWM (the peak since it was reset) in bytes: proc(5)."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(name: str, case: Case) -> dict[str, float]:
    """Growth of this process while cellc's ways run."""
    case.ways[0].run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    _RESET.write_text("5")
    rows = 0
    for way in (w for w in case.ways if w.name.startswith("cellc")):
        for _ in range(2):
            if way.fresh:
                way.fresh()
            way.run()
            rows = max(rows, sum(c.stats()["arena_bytes"] for c in case.compiled))
    grown = _resident("VmHWM") - before
    weights = sum(_weights(c._compiler.model) for c in case.compiled)
    label = f"{name} {case.name}".strip()
    return {
        BEYOND.format(label): (grown - weights - rows) / MB,
        ROWS.format(label): rows / MB,
    }


def _weights(model: Any) -> int:
    tensors: Mapping[str, torch.Tensor] = named_tensors(model)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def main() -> None:
    given = json.loads(sys.stdin.read())
    name, number = given.pop("name"), given.pop("number")
    given["place"] = Place(given.pop("backend"))
    given["trees"] = Path(given["trees"]) if given["trees"] else None
    with torch.no_grad():
        case = cases_of(name, Settings(**given))[number]()
        found = measure_memory(name, case)
        case.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
