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
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kernel_cells as kc
import numpy as np
import pytest
import torch
from test_zoo import NAMES
from zoo_cells import ZooCell, cells_of, error, fresh, launch_of

from cellc.cells import Cell
from cellc.check_cells import may_change, own_dtype
from cellc.errors import UnsupportedError
from cellc.kernels import cpp_build
from cellc.kernels.cpp import CppBackend, CppKernel
from cellc.kernels.tile_ir import TileProgram
from cellc.kernels.triton_backend import TritonBackend, interpreting, print_cell
from cellc.kernels.triton_body import HELPERS
from cellc.kernels.triton_devices import DEVICES
from cellc.kernels.triton_persistent import print_persistent
from cellc.kernels.triton_pool import Job, compile_all
from cellc.kernels.triton_printer import Printed
from cellc.kernels.triton_targets import Report, signature
from cellc.kernels.triton_tiles import compile_options
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

PIECES = 8  # of models, each a minute or two
FOR_WARPS = 8
"""Bytes a thread that a kernel may spill, where the assembler does so to have a device full of
warps. One along vectors does, for cuda:90: 4 bytes stored and loaded again, with 32 registers; of
two warps it would have 48 registers and spill nothing.
"""

Text = Hashable


@dataclass
class Compiled:
    """Reports of all kernels so far, by their texts: models share many, by other names."""

    target: str
    reports: dict[Text, Report] = field(default_factory=dict)

    def of(self, names: Iterable[str]) -> dict[str, list[Report]]:
        """Reports of all kernels of each model."""
        jobs = {
            name: dict(pair for one in cells_of(name) for pair in _jobs(one.cell, self.target))
            for name in names
        }
        every = {text: job for found in jobs.values() for text, job in found.items()}
        new = [text for text in every if text not in self.reports]
        self.reports.update(zip(new, compile_all([every[t] for t in new]), strict=True))
        return {name: [self.reports[t] for t in found] for name, found in jobs.items()}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """What was compiled for a target."""
    return Compiled(request.param)


def _jobs(cell: Cell, target: str) -> Iterator[tuple[Text, Job]]:
    """A cell's kernels by their texts; its persistent one, where the weights fit on chip."""
    try:
        program, printed = print_cell(cell)
    except UnsupportedError:
        return
    for i, text in enumerate(_texts(program, printed)):
        yield text, Job(cell, i, target)
    persistent = print_persistent(program, printed)
    if persistent is not None and persistent.fits(DEVICES[target].shared_limit):
        yield _texts(program, persistent.printed)[0], Job(cell, 0, target, persistent=True)


def _texts(program: TileProgram, printed: Printed) -> list[Text]:
    """All that a kernel is compiled from, but for names."""
    texts = re.split(r"(?m)^@triton\.jit", printed.source)[1:]
    return [
        (
            _anonymous(text),
            *signature(program, kernel).values(),
            *kernel.constants.items(),
            *compile_options(kernel).items(),
        )
        for kernel, text in zip(printed.kernels, texts, strict=True)
    ]


def _anonymous(text: str) -> str:
    """Python without its comments, names numbered as they come."""
    names: dict[str, str] = {}
    words, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        word = token.string
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        known = keyword.iskeyword(word) or word in HELPERS or word in ("tl", "triton", "range")
        if token.type == tokenize.NAME and not known and before != ".":
            word = names.setdefault(word, f"name{len(names)}")
        words.append(word)
        before = token.string
    return " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("compiled", ["cuda:80", "cuda:90", "cuda:100"], indirect=True)
def test_the_zoo_compiles_without_spills(
    compiled: Compiled, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))  # no report from before
    of_models = compiled.of(NAMES[piece::PIECES])
    assert not [name for name, found in of_models.items() if not found]
    reports = [(n, r) for n, found in of_models.items() for r in found]
    assert not [(n, r) for n, r in reports if not r.good or r.registers is None]
    spilling = [(n, r, r.spill_bytes) for n, r in reports if r.spill_bytes]
    unwanted = [(n, r) for n, r, size in spilling if not fills_device(r) or size > FOR_WARPS]
    assert not [(n, r, spill_reason(r)) for n, r in unwanted]
