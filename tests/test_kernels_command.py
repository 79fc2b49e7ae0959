"""`cellc kernels`: true compilation by workers, bounds from data sheets, standalone files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernel_cells as kc
import pytest
import torch
from torch import nn

import cellc
from cellc.bench.tree_models import TreeLSTM
from cellc.cells import Cell
from cellc.cli import main
from cellc.kernels import triton_pool, triton_repro
from cellc.kernels.triton_backend import print_cell
from cellc.kernels.triton_devices import DEVICES, launch_bytes, occupancy, roofline
from cellc.kernels.triton_persistent import print_persistent
from cellc.kernels.triton_pool import Job, compile_all
from cellc.kernels.triton_targets import Report, retyped
from cellc.kernels.triton_tiles import pointwise_tile

MATRIX = {"cuda:90": "wgmma.mma_async", "cuda:100": "tcgen05.mma"}
FILE = """
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(64, 64), nn.Linear(64, 5)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def summing(x):
    return x.cumsum(-1) * 2


torch.manual_seed(0)
model = Tagger()
doubles = nn.Linear(64, 3).double()
double_inputs = [torch.randn(3, 64, dtype=torch.float64)]


def example_inputs():
    return [torch.randn(n, 64) for n in (3, 5)]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tagger.py").write_text(FILE)
    return tmp_path


def refuse(*_: object) -> None:
    raise AssertionError("it should have been in the cache")


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["kernels", "tagger.py:model", "--target", "cuda:90", "--dtype", "bf16"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "Tagger" and list(found["targets"]) == ["cuda:90"]
    cells = {c["name"]: c for c in found["cells"]}
    recurrent = next(c for c in cells.values() if c["recurrent"])
    kernel, persistent = recurrent["kernels"]
    assert persistent["kernel"].endswith("_persistent") and persistent["spill_bytes"] == 0
    assert persistent["shared_bytes"] > 64 * 256 * 2  # the weights
    assert kernel["matrix_instructions"]["wgmma.mma_async"] > 0
    assert kernel["spill_bytes"] == 0 and 30 < kernel["registers"] <= 255
    assert kernel["binary_bytes"] > 1000 and 0 < kernel["shared_bytes"] <= kernel["shared_limit"]
    assert 0 < kernel["occupancy"] <= 1 and kernel["tiles"]["BM"] == 64
    assert recurrent["flops_per_row"] > 2 * 64 * 256 and recurrent["roofline"]["cuda:90"]["seconds"]
    monkeypatch.setattr(triton_pool._Worker, "ask", refuse)  # compiled once
    assert main(argv) == 0
    out = capsys.readouterr().out
    for text in (
        "cuda:90, NVIDIA H100 SXM",
        "wgmma.mma_async x",
        "0 failed, 0 spill",
        "data sheet",
    ):
        assert text in out


def test_what_is_left_to_torch_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["kernels", "tagger.py:summing", "--target", "cuda:80"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "left to torch: cumsum" in out and "2 of 2 cells left to torch" in out
    argv = ["kernels", "tagger.py:doubles", "--input", "tagger.py:double_inputs", "--json"]
    assert main(argv) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert "f64" in cell["left_to_torch"] and not cell["kernels"]


@pytest.mark.parametrize(
    "argv",
    [
        ["kernels"],
        ["kernels", "nowhere.py:model"],
        ["kernels", "tagger.py:model", "--target", "cuda:91"],
        ["kernels", "tagger.py:model", "--dtype", "f64"],
        ["kernels", "tagger.py:model", "--batch", "0"],
        ["kernels", "tagger.py:model", "--target", "cuda:90", "--repro", "nothing"],
        ["kernels", "tagger.py:model", "--json", "--repro", "nothing"],
    ],
)
def test_wrong_use(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err and "Traceback" not in said.err and not said.out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--help"]) == 0
    assert "--target cuda:90" in capsys.readouterr().out


def test_a_compiler_that_dies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_pool.sys, "executable", "/bin/false")
    assert main(["kernels", "tagger.py:model", "--target", "cuda:90", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    kernels = [k for c in found["cells"] for k in c["kernels"]]
    assert kernels and all("ended with" in k["problem"] for k in kernels)
    assert all(k["occupancy"] is None for k in kernels)


# -- standalone files ------------------------------------------------------------------------------


def run_file(path: Path, **environ: str) -> str:
    plain = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=path.parent, env=plain | environ, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_repro(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["kernels", "tagger.py:model", "--target", "cuda:90", "--dtype", "bf16"]
    assert main([*argv, "--repro", "out_0_product", "--batch", "5", "--output", "a/b.py"]) == 0
    assert capsys.readouterr().out == "wrote a/b.py\n"
    path = folder / "a" / "b.py"
    assert "import cellc" not in path.read_text() and "from cellc" not in path.read_text()
    assert "out0 was written: [5, 5]" in run_file(path, TRITON_INTERPRET="1")
    if not torch.cuda.is_available():
        assert "compiled for GPUTarget(backend='cuda', arch=90" in run_file(path)


@pytest.mark.parametrize("name", ["ragged-H9", "dot-H9", "embedding-V6-D7", "zoo-H13"])
def test_repro_of_every_kind(name: str, folder: Path) -> None:
    program, printed = print_cell(kc.CELLS[name]())
    for i, kernel in enumerate(printed.kernels):
        path = folder / f"{kernel.name}.py"
        path.write_text(triton_repro.repro(program, printed, i, "cuda:80", num_rows=3))
        if i in (0, len(printed.kernels) - 1):
            assert "was written" in run_file(path, TRITON_INTERPRET="1")


def test_repro_of_a_persistent_kernel(folder: Path) -> None:
    program, printed = print_cell(kc.CELLS["lstm_folded-V11-H17"]())
    persistent = print_persistent(program, printed)
    assert persistent is not None
    path = folder / "persistent.py"
    path.write_text(triton_repro.repro(program, persistent.printed, 0, "cuda:80", num_rows=3))
    assert run_file(path, TRITON_INTERPRET="1").count("was written") == 2


# -- bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "tmem", "share", "limit"),
    [
        ("cuda:80", 8, 64, 0, 0, 0.5, "registers"),
        ("cuda:80", 4, 32, 0, 0, 1.0, "warps"),
        ("cuda:80", 1, 16, 0, 0, 0.5, "programs"),
        ("cuda:90", 4, 168, 0, 0, 12 / 64, "registers"),
        ("cuda:90", 4, 32, 100 * 1024, 0, 8 / 64, "shared memory"),
        ("cuda:100", 4, 32, 1024, 256, 8 / 64, "tensor memory"),
        ("hip:gfx942", 4, 141, 0, 0, 12 / 32, "registers"),
        ("hip:gfx942", 4, 64, 32768, 0, 8 / 32, "shared memory"),
    ],
)
def test_occupancy(
    target: str, num_warps: int, registers: int, shared: int, tmem: int, share: float, limit: str
) -> None:
    found = occupancy(DEVICES[target], num_warps, registers, shared, tmem)
    assert (found.share, found.limit) == (share, limit)


def test_roofline() -> None:
    cell, device = kc.lstm_cell(1024, 1024, "bf16"), DEVICES["cuda:90"]
    small, large = roofline(cell, device, 1), roofline(cell, device, 4096)
    weights = 2 * (2 * 1024 * 4096 + 4096)
    assert small.bound == "memory" and large.bound == "arithmetic"
    assert small.seconds == pytest.approx((weights + 2 * 5 * 1024) / 3.35e12, rel=1e-3)
    products = 4096 * 2 * 2 * 1024 * 4096 / 989.4e12
    assert products < large.seconds < 1.3 * products
    exact = roofline(kc.lstm_cell(1024, 1024), device, 4096).seconds
    assert 4 < exact / roofline(kc.lstm_cell(1024, 1024), device, 4096, "tf32").seconds < 8


def test_tables_that_are_looked_up_are_not_read_whole() -> None:
    cell = kc.lstm_folded(1000, 8)
    weight, row, table_row = 4 * 8 * 32, 8 + 4 * 4 * 8, 4 * 32
    assert launch_bytes(cell, 1) == weight + row + table_row
    assert launch_bytes(cell, 5000) == weight + 5000 * row + 1000 * table_row


# -- what comes out --------------------------------------------------------------------------------


def recurrent_cells(model: nn.Module, request: Any) -> list[Cell]:
    with cellc.compile(model.eval(), backend="eager") as compiled:
        compiled.map([request])
        return [v.cell for v in compiled.cells.values() if v.recurrent]


def kernels_of(cells: Sequence[Cell], targets: Sequence[str]) -> list[Report]:
    jobs = [
        Job(cell, i, target)
        for cell in cells
        for target in targets
        for i in range(len(print_cell(cell)[1].kernels))
    ]
    return compile_all(jobs)


@pytest.mark.parametrize("target", MATRIX)
def test_recurrences_use_the_matrix_instructions_of_their_gpu(target: str) -> None:
    """In halves, where a launch has as many rows as the tensor cores take at a time."""
    H = 256
    cells = recurrent_cells(nn.LSTM(H, H), torch.randn(3, H))
    cells += recurrent_cells(nn.GRU(H, H), torch.randn(3, H))
    cells += recurrent_cells(TreeLSTM(H), (((1, 2), 3),))
    assert len(cells) == 3
    reports = kernels_of([retyped(cell, "bf16") for cell in cells], [target])
    fused = [r for r in reports if r.kernel.endswith(("fused", "product"))]
    assert len(fused) >= 3
    for report in reports:
        assert report.good and report.spill_bytes == 0, report
    for report in fused:
        assert report.matrix_instructions.get(MATRIX[target]), report
        assert report.tiles["BM"] == 64


def test_a_map_of_many_rows_has_fewer_lanes() -> None:
    """16 rows gathered into one: with 8 lanes a thread, their addresses alone would spill."""
    b = kc.Builder()
    cell = b.cell("wide", b("cat", *[b.input(f"x{i}", 1) for i in range(16)], dim=0))
    (kernel,) = print_cell(cell)[1].kernels
    assert kernel.constants["BM"] < pointwise_tile(1, 3)["BM"] == 1024
    (report,) = kernels_of([cell], ["cuda:90"])
    assert report.good and report.spill_bytes == 0
