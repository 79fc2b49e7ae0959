"""Kernels of the zoo's cells: near float64, the same in any batch, compiled for GPUs.

All of them with --slow; without, those of a few models.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_cells as kc
import numpy as np
import pytest
import torch
from test_zoo import NAMES
from zoo_cells import ZooCell, cells_of, error, form_of, fresh, launch_of

from cellc.cells import Cell
from cellc.check_cells import may_change, own_dtype
from cellc.errors import UnsupportedError
from cellc.kernels import cpp_build
from cellc.kernels.cpp import CppBackend, CppKernel
from cellc.kernels.triton_backend import TritonBackend, interpreting, print_cell
from cellc.kernels.triton_body import HELPERS
from cellc.kernels.triton_pool import Job, compile_all
from cellc.kernels.triton_targets import signature
from cellc.kernels_command import fills_device, spill_reason
from cellc.samples import outputs, part

AT_ONCE = ("conv_lstm", "mgu", "slstm", "tree_lstm_child_sum")
MODELS = [n if n in AT_ONCE else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
STEPS = 100
compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")
interpreted = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")


def generated(name: str, backend: Any, dtype: str = "f32") -> Iterator[tuple[ZooCell, Any, Any]]:
    """Cells of a model that the backend has kernels for: with fresh rows, and the kernel."""
    for seed, one in enumerate(cells_of(name)):
        if dtype != "f32" and (own_dtype(one.cell) != "f32" or not may_change(one.cell, dtype)):
            continue
        sample = fresh(one.sample, seed, dtype)
        try:
            kernel = backend.kernel(sample.cell, sample.params)
        except UnsupportedError:
            continue
        if isinstance(kernel, CppKernel) or backend.name == "triton":
            yield one, sample, kernel


def check_near(name: str, backend: Any, dtype: str, B: int, bound: float) -> None:
    """One step, and where a cell feeds itself, 100, within ten times as much."""
    count, off = 0, {}
    for one, sample, kernel in generated(name, backend, dtype):
        count += 1
        found = [error(kernel, one.cell, sample, B) / bound]
        if one.cell.recurrent and one.feed:
            found.append(error(kernel, one.cell, sample, 2, STEPS, one.feed) / (10 * bound))
        if not max(found) <= 1:
            off[one.cell.name] = found
    assert count and not off


@compiler
@pytest.mark.parametrize("name", MODELS)
def test_near_float64_on_cpp(name: str) -> None:
    backend = CppBackend()
    check_near(name, backend, "f32", 33, 1e-6)
    backend.close()


@interpreted
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-5), ("bf16", 1e-2)])
def test_near_float64_interpreted(name: str, dtype: str, bound: float) -> None:
    check_near(name, TritonBackend("cpu"), dtype, 5, bound)


@interpreted
@pytest.mark.parametrize("name", MODELS)
def test_bitwise_the_same_in_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of 1, 7, 64 and 200 rows, in whatever order this machine's BLAS adds."""
    monkeypatch.setattr(np, "matmul", kc.product_in_order)
    for one, sample, kernel in generated(name, TritonBackend("cpu")):
        launch, arenas = launch_of(sample, 200)
        poisoned = {kind: arena.clone() for kind, arena in arenas.items()}
        bad = list(kernel(launch, arenas))
        together = outputs(sample, launch, arenas)
        for start, stop in ((3, 4), (190, 197), (101, 165)):
            some = part(launch, start, stop)
            alone = {kind: arena.clone() for kind, arena in poisoned.items()}
            assert [start + r for r in kernel(some, alone)] == [r for r in bad if start <= r < stop]
            for a, b in zip(outputs(sample, some, alone), together, strict=True):
                same = torch.equal(a, b[start:stop]) or _same_bits(a, b[start:stop])
                assert same, one.cell.name


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, nan for nan."""
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


# -- compiled --------------------------------------------------------------------------------------

PARTS = 4  # each a few minutes
FOR_WARPS = 16
"""Bytes a thread that may be spilled in all kernels of a part together, where the assembler does so
to have a device full of warps. A vector kernel does, for cuda:90: 4 bytes stored and loaded again,
with 32 registers; it would need 45, with which five eighths of the warps fit.
"""


@pytest.fixture(scope="module")
def zoo_kernels() -> list[tuple[Cell, int]]:
    """One kernel of every text that the zoo's cells give, whatever its names; the largest where
    only its numbers differ.
    """
    cells: dict[Any, Cell] = {}
    for name in NAMES:
        for one in cells_of(name):
            form = form_of(one.cell)
            if form not in cells or cells[form].flops_per_row < one.cell.flops_per_row:
                cells[form] = one.cell
    found: dict[Any, tuple[int, Cell, int]] = {}
    for cell in cells.values():
        try:
            program, printed = print_cell(cell)
        except UnsupportedError:
            continue
        texts = re.split(r"(?m)^@triton\.jit", printed.source)[1:]
        for i, (kernel, text) in enumerate(zip(printed.kernels, texts, strict=True)):
            types = tuple(signature(program, kernel).values())
            tiles = (*kernel.constants.items(), kernel.num_warps, kernel.num_stages)
            key = (_anonymous(text), types, tiles)
            size = max(map(int, re.findall(r"\b\d+\b", text)))
            if key not in found or found[key][0] < size:
                found[key] = (size, cell, i)
    return [(cell, i) for _, cell, i in found.values()]


def _anonymous(text: str) -> str:
    """Python without its comments, names numbered as they come, numbers alike."""
    names: dict[str, str] = {}
    words, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        word = token.string
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        known = keyword.iskeyword(word) or word in HELPERS or word in ("tl", "triton", "range")
        if token.type == tokenize.NAME and not known and before != ".":
            word = names.setdefault(word, f"name{len(names)}")
        words.append("0" if token.type == tokenize.NUMBER else word)
        before = token.string
    return " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PARTS))
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_the_zoo_compiles_without_spills(
    target: str,
    piece: int,
    zoo_kernels: list[tuple[Cell, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))
    assert len(zoo_kernels) > 500
    reports = compile_all([Job(cell, i, target) for cell, i in zoo_kernels[piece::PARTS]])
    assert not [r for r in reports if not r.good or r.registers is None]
    spilling = [r for r in reports if r.spill_bytes]
    assert not [(r, spill_reason(r)) for r in spilling if not fills_device(r)]
    assert sum(r.spill_bytes or 0 for r in spilling) <= FOR_WARPS
