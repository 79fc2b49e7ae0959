"""Weights in fewer bits: what kernels make of them, and how far that is from the f32 model."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from collections.abc import Callable, Mapping
from pathlib import Path

import kernel_cells as kc
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.cells import Cell
from cellc.cli import main
from cellc.errors import UnsupportedError
from cellc.kernels import cpp_build
from cellc.kernels.cpp import CppBackend, CppKernel
from cellc.kernels.eager import EagerBackend
from cellc.kernels.narrow import CLOSE, narrowed
from cellc.kernels.triton_backend import TritonBackend, interpreting
from cellc.kernels.triton_targets import retyped
from cellc.launch import Backend

compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")
interpreted = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
BACKENDS = [pytest.param("cpp", marks=compiler), pytest.param("triton", marks=interpreted)]
D, H = 40, 72  # 4 H is no whole number of panels
CELLS = {
    "lstm": kc.lstm_cell(D, H),
    "gru": kc.gru_cell(D, H),
    "tree_lstm": kc.child_sum_cell(D, H),
    "attention-dot": kc.dot_cell(H),
    "attention-heads": kc.heads_cell(4, 18),
    "layer_norm_lstm": kc.layernorm_lstm(D, H),
}
FEEDS = {"lstm": {0: 1, 1: 2}, "gru": {0: 1}, "layer_norm_lstm": {0: 1, 1: 2}}
EXACT = {"cpp": 1e-6, "triton": 1e-5}
"""Against float64 with the narrower weights, as kernels with f32 ones are held to."""
# CLOSE: against the f32 model, what the option says of itself; twice that after 100 steps


def make(backend: str, weights: str | None = None) -> Backend:
    return CppBackend(weights) if backend == "cpp" else TritonBackend("cpu", {"weights": weights})


def weights_of(cell: Cell) -> dict[str, Tensor]:
    """As torch draws them: up to 1 / sqrt(depth)."""
    rng = torch.Generator().manual_seed(1)
    made = {}
    for p in cell.params:
        bound = p.type.shape[0] ** -0.5 if len(p.type.shape) == 2 else 0.1
        made[p.name] = (2 * torch.rand(p.type.shape, generator=rng) - 1) * bound
    return made


def widened(cell: Cell, params: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The numbers that a kernel multiplies with, as f64."""
    made = narrowed(cell, kind).params(params)
    return {
        p.name: made[p.name].double() * made.get(f"{p.name}.scale", torch.ones(1))
        for p in cell.params
    }


def run(kernel: Callable[..., object], made: kc.Run) -> list[Tensor]:
    mine = made.copy()
    for slots, kind in zip(mine.launch.outputs, mine.cell.output_types, strict=True):
        mine.arenas[kind][torch.from_numpy(slots.astype(np.int64))] = float("nan")
    kernel(mine.launch, mine.arenas)
    return mine.outputs()


def exact(cell: Cell, params: Mapping[str, Tensor], made: kc.Run) -> list[Tensor]:
    """The same launch in float64."""
    wide = retyped(cell, "f64")
    types = zip([*cell.inputs, *cell.output_types], [*wide.inputs, *wide.output_types], strict=True)
    arenas = {getattr(b, "type", b): made.arenas[getattr(a, "type", a)] for a, b in types}
    arenas = {k: v.double() if v.dtype == torch.float32 else v.clone() for k, v in arenas.items()}
    double = {name: p.double() for name, p in params.items()}
    return run(EagerBackend().kernel(wide, double), kc.Run(wide, made.launch, arenas))


def off(got: list[Tensor], want: list[Tensor]) -> float:
    pairs = zip(got, want, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", CELLS)
def test_near_float64(name: str, weights: str, backend: str) -> None:
    cell, feed = CELLS[name], FEEDS.get(name)
    params = weights_of(cell)
    kernel = make(backend, weights).kernel(cell, params)
    sizes = (1, 5, 7, 50) if backend == "cpp" else (1, 7)
    chains = bool(feed) and (backend == "cpp" or name == "lstm")
    for B, K in [*((B, 1) for B in sizes), *[(2, 100)] * chains]:
        made = kc.make_run(cell, B, K, feed if K > 1 else None, seed=B)
        got = run(kernel, made)
        near = off(got, exact(cell, widened(cell, params, weights), made))
        far = off(got, exact(cell, params, made))
        print(f"{name} {weights} {backend} B {B} K {K}: {far:.1e} from the f32 model")
        assert near <= EXACT[backend] * (10 if K > 1 else 1)
        assert near < far <= CLOSE[weights] * (2 if K > 1 else 1)


@compiler
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", CELLS)
def test_a_row_is_the_same_in_any_batch(name: str, weights: str) -> None:
    """Few rows widen weights as they read them, more rows before."""
    cell = CELLS[name]
    kernel = CppBackend(weights).kernel(cell, weights_of(cell))
    made = kc.make_run(cell, 200)
    together = run(kernel, made)
    for picked in ([3], range(190, 197), range(100, 164)):
        for a, b in zip(run(kernel, made.rows(list(picked))), together, strict=True):
            assert torch.equal(a, b[list(picked)])


def halves_and_mixed() -> Cell:
    """A weight in two products, one that is also added, one along a vector, one of f64."""
    b = kc.Builder()
    x, rows, y = b.input("x", 8), b.input("rows", 8, ragged=True), b.input("y", 8, dtype="f64")
    twice, added, along = b.param("twice", 8, 8), b.param("added", 8, 8), b.param("along", 8, 8)
    double = b.param("double", 8, 8, dtype="f64")
    z = b("linear", b("linear", x, twice), twice)
    more = b("sum", b("mul", added, 2.0), dims=(0,))
    z = b("add", b("add", z, b("linear", x, added)), more)
    total = b("ragged_sum", b("linear", rows, along))
    return b.cell("mixed", z, total, b("linear", y, double))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_only_weights_of_products_of_rows(kind: str) -> None:
    found = narrowed(halves_and_mixed(), kind)
    assert found.names == {"twice"}
    dtypes = {p.name: p.type.dtype for p in found.cell.params}
    assert dtypes.pop("twice") == ("bf16" if kind == "bf16" else "i8")
    assert dtypes.pop("twice.scale", "f32") == "f32"
    assert dtypes == {"added": "f32", "along": "f32", "double": "f64"}


def test_int8_columns() -> None:
    """Rounded to the nearest of 255 numbers; a column of zeros has no scale."""
    cell = kc.lstm_cell(D, H)
    params = weights_of(cell)
    params["wx"][:, 3] = 0
    made = narrowed(cell, "int8").params(params)
    assert made["wx"].abs().amax(0).unique().tolist() == [0, 127]
    off = (made["wx"] * made["wx.scale"] - params["wx"]).abs()
    assert (off <= made["wx.scale"] * 0.5001).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_weights_of_bf16_states(backend: str) -> None:
    """Rows in bf16 have kernels in Triton alone."""
    cell = retyped(kc.lstm_cell(8, 8), "bf16")
    params = {name: p.to(torch.bfloat16) for name, p in weights_of(cell).items()}
    kernel = make(backend, "int8").kernel(cell, params)
    if backend == "cpp":
        assert not isinstance(kernel, CppKernel)
        return
    made = kc.make_run(cell, 5)
    plain = run(make(backend).kernel(cell, params), made)
    got = run(kernel, made)
    assert 0 < off(got, [p.double() for p in plain]) < 2e-2


# -- for users -------------------------------------------------------------------------------------


@compiler
@pytest.mark.parametrize(("weights", "share"), [("bf16", 1 / 2), ("int8", 1 / 4)])
def test_compiled_with_narrower_weights(weights: str, share: float) -> None:
    model, x = nn.LSTM(64, 64, 2), torch.randn(9, 64)
    sizes: list[int] = []
    for options in ({}, {"weights": weights}):
        with cellc.compile(model, options=options, backend="cpp") as compiled:
            y, _ = compiled(x)
            kernels = [k for c in compiled.cells.values() for k in c.kernels.values()]
            sizes.append(sum(k.packed_bytes for k in kernels if isinstance(k, CppKernel)))
    assert sizes[1] == sizes[0] * share
    want = model(x)[0].detach()
    assert 0 < float((y - want).norm() / want.norm()) <= 2 * CLOSE[weights]


@compiler
def test_refresh_narrows_again() -> None:
    model, x = nn.GRU(8, 8), torch.randn(3, 8)
    with cellc.compile(model, options={"weights": "int8"}, backend="cpp") as compiled:
        compiled(x)
        with torch.no_grad():
            model.weight_hh_l0.mul_(-3)
        compiled.refresh()
        want = model(x)[0].detach()
        assert float((compiled(x)[0] - want).norm() / want.norm()) <= 3e-2


def test_what_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match="weights='int4'.*'bf16' or 'int8'"):
        cellc.compile(nn.GRU(2, 2), options={"weights": "int4"})
    with pytest.raises(UnsupportedError, match="weights='int8' on the eager backend.*cpp"):
        cellc.compile(nn.GRU(2, 2), backend="eager", options={"weights": "int8"})


@compiler
def test_inspect_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nmodel = torch.nn.GRU(8, 8)\ndef example_inputs(): return [torch.randn(3, 8)]"
    )
    target = f"{file}:model"
    assert main(["inspect", target, "--weights", "int8", "--backend", "cpp"]) == 0
    assert "cpp, int8" in capsys.readouterr().out
    assert main(["inspect", target, "--weights", "bf16", "--code"]) == 0
    printed = capsys.readouterr().out
    assert "product<float, bf16>" in printed and ".to(tl.float32)" in printed
    assert main(["inspect", target, "--weights", "bf16", "--backend", "eager"]) == 1
    assert "eager backend" in capsys.readouterr().err
