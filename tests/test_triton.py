"""The Triton backend in its interpreter against eager; true compilation for GPUs not here."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from collections.abc import Mapping
from pathlib import Path

import kernel_cells as kc
import numpy as np
import pytest
import torch

from cellc import ops
from cellc.cells import Cell
from cellc.errors import BackendError, UnsupportedError, UsageError
from cellc.kernels import triton_math, triton_targets
from cellc.kernels.eager import EagerBackend
from cellc.kernels.tile import schedule
from cellc.kernels.triton_backend import TritonBackend, interpreting
from cellc.kernels.triton_body import HELPERS, TYPES
from cellc.kernels.triton_printer import print_program
from cellc.launch import Launch, Ragged

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
EAGER = EagerBackend()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))


def check(cell: Cell, run: kc.Run, seed: int = 0) -> None:
    params = kc.random_params(cell, seed)
    kc.check(TritonBackend("cpu").kernel(cell, params), EAGER.kernel(cell, params), run)


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("name", kc.CELLS)
def test_cell_equals_eager(name: str, B: int) -> None:
    cell = kc.CELLS[name]()
    check(cell, kc.make_run(cell, B, seed=B))


HALVES: Mapping[str, Cell] = {
    "lstm-bf16": kc.lstm_cell(5, 8, "bf16"),
    "lstm-f16": kc.lstm_cell(5, 8, "f16"),
    "lstm_folded-bf16": kc.lstm_folded(11, 17, "bf16"),
    "layernorm_lstm-bf16": kc.layernorm_lstm(6, 8, "bf16"),
    "softmax_head-f16": kc.softmax_head(8, 19, "f16"),
    "attention-bf16": kc.attention_cell(5, 8, 2, "bf16"),
    "ragged-bf16": kc.ragged_cell(9, "bf16"),
    "dot-bf16": kc.dot_cell(9, "bf16"),
    "additive-f16": kc.additive_cell(9, "f16"),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_precision(name: str) -> None:
    check(HALVES[name], kc.make_run(HALVES[name], 7))


CHAINS = {
    "lstm": (kc.lstm_cell(5, 8), {0: 1, 1: 2}),
    "lstm_folded": (kc.lstm_folded(11, 17), {0: 1, 1: 2}),
    "gru": (kc.gru_cell(7, 3), {0: 1}),
    "layernorm_lstm": (kc.layernorm_lstm(6, 8), {0: 1, 1: 2}),
    "mv": (kc.mv_cell(5), {0: 0, 1: 2}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_of_three_steps_that_shrink(name: str) -> None:
    cell, feed = CHAINS[name]
    check(cell, kc.make_run(cell, 5, K=3, feed=feed, shrink=True))


@pytest.mark.parametrize("name", kc.CELLS)
def test_row_is_bitwise_the_same_in_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which this machine's BLAS, which the interpreter uses, adds."""
    monkeypatch.setattr(np, "matmul", kc.product_in_order)
    cell = kc.CELLS[name]()
    kernel, made = TritonBackend("cpu").kernel(cell, kc.random_params(cell)), kc.make_run(cell, 20)
    together = made.copy()
    kernel(together.launch, together.arenas)
    for rows in ([3], [0, 3, 5, 19, 7, 11, 2]):
        some = made.rows(rows)
        kernel(some.launch, some.arenas)
        for a, b in zip(some.outputs(), together.outputs(), strict=True):
            torch.testing.assert_close(a, b[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(70, 40), (1, 130), (130, 1)], ids=str)
def test_sizes_beyond_one_tile(shape: tuple[int, int]) -> None:
    cell = kc.lstm_cell(*shape)
    check(cell, kc.make_run(cell, 3))


def test_more_rows_than_one_tile() -> None:
    cell = kc.lstm_cell(3, 5)
    check(cell, kc.make_run(cell, 70))


def test_reduction_longer_than_one_chunk() -> None:
    b = kc.Builder()
    x = b.input("x", 2500)
    names = "sum mean amax amin argmax argmin".split()
    cell = b.cell("long", *[b(n, x, dims=(0,)) for n in names])
    run = kc.make_run(cell, 3)
    slots = run.slots(0)
    x_rows = run.arenas[cell.inputs[0].type]
    x_rows[slots[1], 1700] = x_rows[slots[1], 2300] = float("nan")
    x_rows[slots[2], 100] = x_rows[slots[2], 2400] = 99.0
    check(cell, run)


def test_bad_rows_are_reported_and_spoil_no_other() -> None:
    for cell, slot in ((kc.lstm_folded(11, 4), ()), (kc.embedding_cell(11, 4), (1,))):
        run = kc.make_run(cell, 5, K=2)
        tokens, table = run.arenas[cell.inputs[0].type], run.slots(0)
        tokens[(int(table[2]), *slot)], tokens[(int(table[8]), *slot)] = -1, 11
        check(cell, run)
        bad = TritonBackend("cpu").kernel(cell, kc.random_params(cell))(run.launch, run.arenas)
        assert (list(bad), len(bad), bad[0], bad[1:]) == ([2, 8], 2, 2, [8])


def test_a_bound_launch_reports_what_this_run_found() -> None:
    cell = kc.embedding_cell(6, 7)
    run = kc.make_run(cell, 10)
    tokens, table = run.arenas[cell.inputs[0].type], run.slots(0)
    bound = TritonBackend("cpu").kernel(cell, kc.random_params(cell)).bind(run.launch, run.arenas)
    good = tokens[int(table[3])].clone()
    assert list(bound()) == []
    tokens[int(table[3])] = 99
    assert list(bound()) == [3]
    tokens[int(table[3])] = good
    assert list(bound()) == []


def test_ragged_vectors_empty_and_long() -> None:
    b = kc.Builder()
    rows, flags = b.input("rows", 3, ragged=True), b.input("flags", 2, dtype="bool", ragged=True)
    outs = [b(f"ragged_{n}", rows) for n in "sum mean prod amax amin".split()]
    outs += [b("ragged_any", flags), b("ragged_all", flags)]
    cell = b.cell("r", *outs)
    run = kc.make_run(cell, 4)
    offsets = np.array([0, 0, 5, 6, 6], np.int32)
    slots = np.array([3, 1, 4, 1, 5, 0], np.int32)
    launch = Launch(run.launch.steps, [Ragged(offsets, slots)] * 2, run.launch.outputs)
    check(cell, kc.Run(cell, launch, run.arenas))


UNARY = (
    "neg exp log log1p expm1 sqrt rsqrt abs sin cos tan atan tanh sigmoid relu erf reciprocal sign "
    "floor ceil round trunc silu gelu gelu_tanh softplus"
).split()
EXTREME = [0.0, -0.0, 1e-30, 1e-6, -1e-4, 0.24, -0.26, 0.5, 1.0, -1.0, 2.5, -3.5, 19.0, 21.0]
EXTREME += [88.0, -88.0, 120.0, -200.0, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("name", UNARY)
def test_unary_at_extremes(name: str) -> None:
    finite = name in ("tan", "sin", "cos", "gelu")  # torch's own gelu of inf is nan
    values = [v for v in EXTREME if not (finite and np.isinf(v))]
    extremes([values], name, rtol=2e-6)


@pytest.mark.parametrize("name", "pow maximum minimum fmod remainder floor_div atan2 div".split())
def test_binary_at_extremes(name: str) -> None:
    some = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, -3.0, 7.5, -88.0, float("inf"), float("nan")]
    pairs = [(x, y) for x in some for y in some]
    if name in ("fmod", "remainder", "floor_div"):
        pairs = [(x, y) for x, y in pairs if np.isfinite([x, y]).all() and y]
    extremes([[x for x, _ in pairs], [y for _, y in pairs]], name, rtol=1e-5)


def extremes(columns: list[list[float]], name: str, rtol: float) -> None:
    b = kc.Builder()
    args = [b.input(f"x{i}", len(c)) for i, c in enumerate(columns)]
    cell = b.cell("extremes", b(name, *args))
    run = kc.make_run(cell, 1)
    for i, column in enumerate(columns):
        run.arenas[cell.inputs[0].type][int(run.slots(i)[0])] = torch.tensor(column)
    kernels = TritonBackend("cpu").kernel(cell, {}), EAGER.kernel(cell, {})
    kc.check(*kernels, run, rtol=rtol, atol={"tanh": 1e-9, "gelu": 5e-7}.get(name, 1e-7))


def test_integer_powers() -> None:
    b = kc.Builder("i64")
    x, y = b.input("x", 5), b.input("y", 5)
    y = b("sub", y, 2)
    cell = b.cell("powers", b("pow", b("sub", x, 2), b("maximum", y, 0)), b("pow", x, 2))
    check(cell, kc.make_run(cell, 4))


def test_source_is_readable_and_deterministic() -> None:
    cell = kc.lstm_cell(64, 128)
    text = print_program(schedule(cell)).source
    assert text == print_program(schedule(cell)).source
    assert "def lstm_0_fused(" in text and text.count("dot(a, b, acc_") == 8
    assert "# cells.py:8" in text and "out0_ptr" in text
    assert print_program(schedule(cell), "tf32").source.count('"tf32"') == 8
    assert max(map(len, text.splitlines())) <= 120


def test_wrong_use() -> None:
    with pytest.raises(UnsupportedError, match="aten:cumsum"):
        TritonBackend("cpu").kernel(kc.fallback_cell(3), {})
    with pytest.raises(UsageError, match="tf32x3"):
        TritonBackend("cpu", {"input_precision": "fast"})
    with pytest.raises(UsageError, match="cuda:90"):
        triton_targets.compile_for(kc.lstm_cell(3, 5), "cuda:91")
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        triton_targets.compile_for(kc.lstm_cell(3, 5), "cuda:90")


def test_every_helper_exists() -> None:
    assert all(hasattr(triton_math, name) for name in HELPERS)
    assert set(TYPES) == set(triton_targets.POINTERS) <= set(ops.DTYPES)


COMPILE = """
import json, sys
import kernel_cells as kc
from cellc.kernels.triton_backend import TritonBackend
from cellc.kernels.narrow import narrowed
from cellc.kernels.triton_targets import compile_for, retyped
from cellc.errors import BackendError
reports = []
for target in ("cuda:80", "cuda:90", "cuda:100"):
    for cell, dtype in ((kc.lstm_cell(64, 64), "bf16"), (kc.gru_cell(64, 64), "bf16")):
        reports += compile_for(cell, target, dtype)
reports += compile_for(kc.lstm_cell(64, 64), "hip:gfx942", "bf16")
reports += compile_for(narrowed(retyped(kc.lstm_cell(64, 64), "bf16"), "int8").cell, "cuda:90")
reports += compile_for(kc.lstm_folded(50, 64), "cuda:90")
for cell in (kc.dot_cell(256), kc.additive_cell(256), kc.heads_cell(4, 64), kc.pool_cell(256)):
    reports += compile_for(cell, "cuda:90")
reports += compile_for(kc.softmax_head(8, 19), "cuda:90", "f16")
if not __import__("torch").cuda.is_available():
    try:
        TritonBackend()
    except BackendError as error:
        assert "TRITON_INTERPRET=1" in str(error), error
    else:
        raise AssertionError("no error without a GPU")
keys = "target kernel binary_bytes fits registers spill_bytes".split()
print(json.dumps([
    {k: getattr(r, k) for k in keys} | {"matrix": dict(r.matrix_instructions)} for r in reports
]))
"""


def test_true_compilation_for_absent_gpus() -> None:
    reports = kc.compiled(COMPILE)
    assert all(r["binary_bytes"] > 1000 and r["fits"] for r in reports)
    assert all(r["registers"] and r["spill_bytes"] == 0 for r in reports), reports
    expected = {
        "cuda:80": "mma.sync", "cuda:90": "wgmma.mma_async", "cuda:100": "tcgen05.mma",
        "hip:gfx942": "v_mfma",
    }  # fmt: skip
    products = [r for r in reports if r["kernel"] in ("lstm_0_fused", "gru_0_fused")]
    assert len(products) == 8
    for report in products:
        assert report["matrix"].get(expected[report["target"]]), report
