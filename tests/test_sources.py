"""The text of generated kernels: golden files, and the same in every process.

After a change that is meant to change kernels: `pytest tests/test_sources.py --update-golden`, and
read the difference.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import kernel_cells as kc
import pytest

from cellc.cells import Cell
from cellc.kernels import cpp_build
from cellc.kernels.cpp_printer import print_cpp
from cellc.kernels.tile import schedule
from cellc.kernels.triton_backend import print_cell

CELLS: Mapping[str, Callable[[], Cell]] = {
    "lstm": lambda: kc.lstm_cell(64, 128),
    "gru": lambda: kc.gru_cell(64, 128),
    "child_sum": lambda: kc.child_sum_cell(64, 128),
    "layernorm_lstm": lambda: kc.layernorm_lstm(64, 128),
    "attention": lambda: kc.attention_cell(10, 64, 4),
    "decoder": lambda: kc.decoder_cell(1000, 128),
}
PRINTERS: Mapping[str, Callable[[Cell], str]] = {
    "cpp": lambda cell: print_cpp(schedule(cell)).text,
    "py": lambda cell: print_cell(cell)[1].source,
}
DIGESTS = """
import hashlib, os
from cellc.kernels import cpp
cpp.num_cores = os.cpu_count = lambda: 77
from test_sources import digests
print(digests())
"""


def digests() -> dict[str, str]:
    """Of every source: short, so that a difference is found by name."""
    return {
        f"{name}.{end}": hashlib.sha256(source(make()).encode()).hexdigest()
        for name, make in CELLS.items()
        for end, source in PRINTERS.items()
    }


@pytest.mark.parametrize("end", PRINTERS)
@pytest.mark.parametrize("name", CELLS)
def test_golden(name: str, end: str, golden: Callable[[str, str], None]) -> None:
    golden(f"kernel_{name}.{end}.txt", PRINTERS[end](CELLS[name]()))


def test_the_same_in_another_process_and_on_another_machine(tmp_path: Path) -> None:
    """Other hash seeds, folders, users, numbers of cores, and no compiler."""
    here = Path(__file__).parent
    environ = {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        "PYTHONHASHSEED": "12345",
        "HOME": str(tmp_path),
        "USER": "nobody",
        "PATH": str(tmp_path),
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS], cwd=tmp_path, env=environ, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(digests())


@pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["child_sum", "decoder"])
def test_cells_of_no_other_test_equal_eager(name: str) -> None:
    from cellc.kernels.cpp import CppBackend
    from cellc.kernels.eager import EagerBackend
    from cellc.kernels.triton_backend import TritonBackend

    cell = {"child_sum": kc.child_sum_cell(7, 9), "decoder": kc.decoder_cell(11, 9)}[name]
    params = kc.random_params(cell)
    reference = EagerBackend().kernel(cell, params)
    for backend in (CppBackend(), TritonBackend("cpu")):
        kc.check(backend.kernel(cell, params), reference, kc.make_run(cell, 20))
