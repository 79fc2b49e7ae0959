"""The eager backend: equal to torch's modules; chains, ragged vectors, bad rows, fallback."""

from __future__ import annotations

import math
from pathlib import Path

import kernel_cells as kc
import numpy as np
import pytest
import torch

from cellc import ops
from cellc.cells import Cell
from cellc.kernels.eager import DTYPES, FUNCTIONS, EagerBackend
from cellc.launch import Launch, Ragged

BACKEND = EagerBackend()


def run(cell: Cell, made: kc.Run, params: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    assert list(BACKEND.kernel(cell, params)(made.launch, made.arenas)) == []
    return made.outputs()


def test_lstm_is_torchs_over_a_chain() -> None:
    cell, K, B = kc.lstm_cell(5, 8), 3, 4
    params = kc.random_params(cell)
    made = kc.make_run(cell, B, K, feed={0: 1, 1: 2})
    (h, c), torchs = run(cell, made, params), torch.nn.LSTMCell(5, 8)
    xs, hs, cs = made.input_rows()
    with torch.no_grad():
        torchs.weight_ih.copy_(params["wx"].t())
        torchs.weight_hh.copy_(params["wh"].t())
        torchs.bias_ih.copy_(params["b"])
        torchs.bias_hh.zero_()
        state = (hs[:B], cs[:B])
        for k in range(K):
            state = torchs(xs[k * B : (k + 1) * B], state)
            torch.testing.assert_close(h[k * B : (k + 1) * B], state[0])
            torch.testing.assert_close(c[k * B : (k + 1) * B], state[1])


def test_softmax_head() -> None:
    cell = kc.softmax_head(8, 19)
    params, made = kc.random_params(cell), kc.make_run(cell, 6)
    p, logp, best = run(cell, made, params)
    (rows,) = made.input_rows()
    scores = rows @ params["w"] + params["b"]
    torch.testing.assert_close(p, scores.softmax(1))
    torch.testing.assert_close(logp, scores.log_softmax(1))
    assert torch.equal(best, scores.argmax(1))


@pytest.mark.parametrize("name", [*kc.CELLS, "fallback"])
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    cell = kc.CELLS[name]() if name in kc.CELLS else kc.fallback_cell(6)
    kernel, made = BACKEND.kernel(cell, kc.random_params(cell)), kc.make_run(cell, 7)
    together = made.copy()
    assert list(kernel(together.launch, together.arenas)) == []
    for i in (0, 6):
        alone = made.rows([i])
        kernel(alone.launch, alone.arenas)
        for a, b, t in zip(alone.outputs(), together.outputs(), cell.output_types, strict=True):
            assert a.dtype == DTYPES[t.dtype] and a.shape[1:] == t.shape
            torch.testing.assert_close(a[0], b[i], equal_nan=True)


def test_fallback() -> None:
    cell = kc.fallback_cell(6)
    made = kc.make_run(cell, 3)
    scaled, values, where, pair = run(cell, made, {})
    x, y = made.input_rows()
    torch.testing.assert_close(scaled, x.cumsum(1) * y)
    assert torch.equal(values, x.cumsum(1).sort(1, descending=True).values)
    assert torch.equal(where, x.cumsum(1).argsort(1, descending=True))
    assert torch.equal(pair, torch.stack([x, y], 1))


def test_bad_index_is_reported_and_spoils_no_other_row() -> None:
    cell = kc.lstm_folded(11, 4)
    kernel, made = BACKEND.kernel(cell, kc.random_params(cell)), kc.make_run(cell, 5, K=2)
    good = made.copy()
    kernel(good.launch, good.arenas)
    tokens, slots = made.arenas[cell.inputs[0].type], made.slots(0)
    tokens[int(slots[2])], tokens[int(slots[8])] = -1, 11
    assert list(kernel(made.launch, made.arenas)) == [2, 8]
    rest = [i for i in range(10) if i not in (2, 8)]
    assert torch.equal(made.outputs()[0][rest], good.outputs()[0][rest])


def test_empty_ragged_vector() -> None:
    b = kc.Builder()
    rows = b.input("rows", 2, ragged=True)
    names = "sum mean prod amax".split()
    cell = b.cell("r", *[b(f"ragged_{n}", rows) for n in names])
    arenas = {cell.inputs[0].type: torch.tensor([[1.0, 2], [3, 5], [7, 7], *[[0, 0]] * 8])}
    offsets, slots = np.array([0, 0, 2], np.int32), np.array([1, 0], np.int32)
    outputs = np.arange(3, 11, dtype=np.int32).reshape(4, 2)
    launch = Launch(np.array([0, 2], np.int32), [Ragged(offsets, slots)], outputs)
    assert list(BACKEND.kernel(cell, {})(launch, arenas)) == [0]
    got = kc.Run(cell, launch, arenas).outputs()
    assert got[0].tolist() == [[0, 0], [4, 7]] and got[2].tolist() == [[1, 1], [3, 10]]
    assert all(map(math.isnan, got[1][0].tolist())) and got[1][1].tolist() == [2, 3.5]
    assert got[3][1].tolist() == [3, 5]


def test_every_operation_has_a_function() -> None:
    every = ops.POINTWISE | ops.REDUCE | ops.VIEWS | {"cat", "linear", "matmul"}
    assert every <= FUNCTIONS.keys()


def test_source_reads_as_python() -> None:
    cell = kc.lstm_cell(5, 8)
    text = BACKEND.kernel(cell, kc.random_params(cell)).source
    assert text.startswith("def lstm(x: f32[5], h: f32[8], c: f32[8]):")
    assert "linear(x, @wx, @b)" in text and "# cells.py:1" in text


def test_rows_of_lower_rank_broadcast() -> None:
    b = kc.Builder()
    m, s = b.input("m", 2, 3), b.input("s", 3)
    cell = b.cell("broadcast", b("add", m, s))
    made = kc.make_run(cell, 4)
    (out,) = run(cell, made, {})
    x, y = made.input_rows()
    torch.testing.assert_close(out, x + y[:, None])


def test_the_folder_is_no_top_level_package() -> None:
    text = (Path(__file__).parent.parent / "kernels" / "__init__.py").read_text()
    with pytest.raises(ImportError, match=r"import cellc\.kernels"):
        exec(compile(text, "kernels/__init__.py", "exec"), {"__name__": "kernels"})
