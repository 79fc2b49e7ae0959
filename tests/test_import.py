"""`import cellc` is light: what only some users need is loaded when they need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in (str(ROOT), os.environ.get("PYTHONPATH")) if entry)
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["triton", "networkx", "rich", "matplotlib", "onnxruntime"])
def test_import_leaves_out(module: str) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import cellc;"
        f"print({module!r} in set(sys.modules) - before)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_a_first_request_leaves_out_what_torch_compile_needs() -> None:
    """torch's meta kernels of softmax, layer norm or argmax import it: seconds, and memory."""
    code = """
import sys, torch, cellc
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.norm = torch.nn.GRUCell(4, 4), torch.nn.LayerNorm(4)
        self.table = torch.nn.Embedding(4, 4)
    def forward(self, memory):
        h, said = memory[0], []
        for _ in range(3):
            weights = torch.softmax(memory @ h, 0)
            h = self.norm(self.cell(self.table(h.argmax()), (weights[:, None] * memory).sum(0)))
            said.append(h)
        return torch.stack(said)
with torch.no_grad(), cellc.compile(Net().eval(), backend="eager") as compiled:
    compiled.map([(torch.ones(n, 4),) for n in (2, 3)])
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_environment_is_checked() -> None:
    done = run("import cellc; cellc.compile(len)", CELLC_LOG="plan")
    assert done.returncode != 0
    assert "CELLC_LOG" in done.stderr and "CELLC_LOGS" in done.stderr
    done = run("from cellc.cli import main; raise SystemExit(main(['demo']))", CELLC_LOG="plan")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "CELLC_LOG" in done.stderr and "CELLC_LOGS" in done.stderr
