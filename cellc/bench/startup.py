"""What it takes until cellc answers: its import, and the first request with and without a cache of
kernels. Each in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from cellc.bench.case import Case
from cellc.errors import CellcError

TORCH = "s to import torch"
IMPORT = "ms that importing cellc adds"
COLD, WARM = "s to the first result, no kernel cached", "s to the first result, kernels cached"
_IMPORTS = """
import json, time
start = time.perf_counter()
import torch
there = time.perf_counter()
import cellc
print(json.dumps([there - start, time.perf_counter() - there]))
"""
_FIRST = """
import json, sys, time, torch, cellc
from cellc.demo_text import make_model
model = make_model(1000, int(sys.argv[1]))
tokens = torch.arange(24)
start = time.perf_counter()
with cellc.compile(model, backend=sys.argv[2]) as compiled, torch.no_grad():
    scores = compiled(tokens)
    seconds = time.perf_counter() - start
    torch.testing.assert_close(scores, model(tokens), rtol=1e-4, atol=1e-4)
print(json.dumps([seconds]))
"""


def startup_case(hidden: int, backend: str = "auto") -> Case:
    """Facts of an LSTM classifier."""

    def facts() -> dict[str, float]:
        torch_seconds, more = _python(_IMPORTS)
        with tempfile.TemporaryDirectory() as folder:
            first = [str(hidden), backend]
            (cold,), (warm,) = (_python(_FIRST, *first, CELLC_CACHE=folder) for _ in range(2))
        return {TORCH: torch_seconds, IMPORT: more * 1e3, COLD: cold, WARM: warm}

    return Case(f"Start, LSTM classifier, {hidden} units", facts=facts)


def _python(code: str, *args: str, **env: str) -> list[float]:
    """What the code prints in a fresh interpreter, which keeps its bytecode, as Python does."""
    full: Mapping[str, str] = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **env}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=full
    )
    if done.returncode:
        raise CellcError(f"startup: {done.stderr.strip()}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found
