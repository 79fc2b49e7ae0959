"""Persistent kernels in the interpreter against single steps, and compiled for absent GPUs."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import kernel_cells as kc
import numpy as np
import pytest
import torch

from cellc.cells import Cell
from cellc.kernels import triton_tune_loop, triton_tuned
from cellc.kernels.eager import EagerBackend
from cellc.kernels.triton_backend import BadRows, TritonBackend, interpreting, print_cell
from cellc.kernels.triton_chains import apart
from cellc.kernels.triton_graphs import Graphs
from cellc.kernels.triton_persistent import Persistent, print_persistent
from cellc.launch import Launch, Ragged
from cellc.ops import RowType
from cellc.samples import narrowed

interpreted = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
CPU = torch.device("cpu")
SHARED = 232448
CELLS: Mapping[str, tuple[Cell, Mapping[int, int]]] = {
    "lstm": (kc.lstm_cell(5, 8), {0: 1, 1: 2}),
    "lstm-32": (kc.lstm_cell(16, 40), {0: 1, 1: 2}),
    "lstm-bf16": (kc.lstm_cell(5, 20, "bf16"), {0: 1, 1: 2}),
    "lstm_folded": (kc.lstm_folded(11, 17), {0: 1, 1: 2}),
    "gru": (kc.gru_cell(7, 33), {0: 1}),
}


def of(cell: Cell) -> Persistent:
    made = print_persistent(*print_cell(cell))
    assert made is not None
    return made


class Both:
    """A kernel's launches with and without its persistent kernel."""

    def __init__(self, cell: Cell, rows: int = 16, most_rows: int = 100) -> None:
        kernel = TritonBackend("cpu").kernel(cell, kc.random_params(cell))
        assert kernel.persistent is not None and kernel.launches is None
        self.source, self.single, self.cell = kernel.source, kernel, cell
        self.nodes: list[int] = []
        graphs = Graphs(CPU, self._record)
        self.looped = kernel.launched(graphs, (kernel.persistent.tiled(rows, 4), most_rows))

    def _record(self, nodes: Sequence[Callable[[], object]]) -> Callable[[], object]:
        self.nodes.append(len(nodes))
        return lambda: [node() for node in nodes]

    def __call__(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Sequence[int]:
        flags = self.looped.bind(launch, arenas)()
        return BadRows([part.numpy for part in flags])


@interpreted
@pytest.mark.parametrize("name", CELLS)
def test_equals_single_steps_bit_by_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products add up in the same order, where the machine's BLAS is not asked."""
    monkeypatch.setattr(np, "matmul", kc.product_in_order)
    cell, feed = CELLS[name]
    both = Both(cell)
    for B, K, shrink in ((3, 5, True), (20, 3, True), (33, 2, False)):
        run = kc.make_run(cell, B, K, feed, seed=B, shrink=shrink)
        got, want = run.copy(), run.copy()
        both(got.launch, got.arenas)
        both.single(want.launch, want.arenas)
        for kind in run.arenas:
            torch.testing.assert_close(got.arenas[kind], want.arenas[kind], rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("name", CELLS)
def test_equals_eager(name: str, rows: int) -> None:
    cell, feed = CELLS[name]
    both, eager = Both(cell, rows), EagerBackend().kernel(cell, kc.random_params(cell))
    kc.check(both, eager, kc.make_run(cell, 18, 4, feed, shrink=True))


@interpreted
def test_is_one_kernel_where_rows_stay_apart() -> None:
    cell, feed = CELLS["lstm"]
    both, eager = Both(cell, most_rows=8), EagerBackend().kernel(cell, kc.random_params(cell))

    def nodes(run: kc.Run) -> int:
        """Kernels that a graph of the launch has."""
        kc.check(both, eager, run)
        for _ in range(2):
            both(run.launch, run.arenas)
        return both.nodes[-1]

    assert nodes(kc.make_run(cell, 8, 6, feed)) == 1
    assert nodes(kc.make_run(cell, 9, 6, feed)) == 6  # more rows than it was faster for
    crossed = kc.make_run(cell, 4, 4, feed)
    table = crossed.slots(1)
    table[4:8] = table[4:8][::-1].copy()  # rows read what another position wrote
    assert nodes(crossed) == 4


@interpreted
def test_bad_rows() -> None:
    cell, feed = CELLS["lstm_folded"]
    run = kc.make_run(cell, 3, 4, feed)
    tokens, table = run.arenas[cell.inputs[0].type], run.slots(0)
    tokens[int(table[2])], tokens[int(table[7])] = -1, 11
    both = Both(cell)
    assert list(both(run.launch, run.arenas)) == [2, 7]


@interpreted
def test_a_graph_of_one_kernel() -> None:
    cell, feed = CELLS["gru"]
    both, run = Both(cell), kc.make_run(cell, 5, 6, feed)
    for _ in range(3):
        both(run.launch, run.arenas)
    tables = [run.slots(i)[:15] for i in range(2)]
    other = Launch(run.launch.steps[:4], tables, run.launch.outputs[:, :15])
    both(other, run.arenas)
    assert both.nodes == [1] and both.looped.graphs.replays == 3  # for any number of steps


# -- which launches --------------------------------------------------------------------------------


def launch_of(inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], *steps: int):  # type: ignore[no-untyped-def]
    tables = [np.array(t, np.int32) for t in inputs]
    return Launch(np.array([0, *steps], np.int32), tables, np.array(outputs, np.int32))


def test_rows_apart() -> None:
    b = kc.Builder()
    x, h = b.input("x", 3), b.input("h", 4)
    y = b("add", b("linear", h, b.param("w", 4, 4)), b("linear", x, b.param("v", 3, 4)))
    cell = b.cell("rnn", y, recurrent=True)
    x = [0, 0, 0, 0, 0]  # of another type: no row that is written
    assert apart(cell, launch_of([x, [1, 2, 3, 11, 12]], [[11, 12, 13, 21, 22]], 3, 5))
    assert apart(cell, launch_of([x, [1, 2, 3, 11, 12]], [[11, 12, 13, 1, 2]], 3, 5))  # in turns
    assert not apart(cell, launch_of([x, [1, 2, 3, 12, 11]], [[11, 12, 13, 21, 22]], 3, 5))
    assert not apart(cell, launch_of([x, [1, 2, 3, 13, 12]], [[11, 12, 13, 21, 22]], 3, 5))
    assert not apart(cell, launch_of([x, [1, 2, 3, 11, 12]], [[11, 12, 13, 12, 22]], 3, 5))
    assert not apart(cell, launch_of([x, [1, 2, 3, 11, 12]], [[11, 12, 13, 2, 22]], 3, 5))


def test_vectors_of_what_is_written_are_not_apart() -> None:
    cell = kc.ragged_cell(4)
    run = kc.make_run(cell, 3, 2)
    assert isinstance(run.launch.inputs[1], Ragged)
    assert not apart(cell, run.launch)


# -- which cells -----------------------------------------------------------------------------------


def test_cells_with_a_persistent_kernel() -> None:
    having = {name for name, make in kc.CELLS.items() if print_persistent(*print_cell(make()))}
    assert having == {
        "lstm-I5-H3", "lstm-I16-H32", "lstm_folded-V11-H17", "gru-I7-H17"
    }  # fmt: skip
    plain = replace(kc.lstm_cell(5, 8), recurrent=False)
    assert print_persistent(*print_cell(plain)) is None


def test_what_fits_on_chip() -> None:
    a100, h100 = 166912, 232448
    assert of(kc.lstm_folded(50, 128, "bf16")).fits(a100)
    assert of(kc.lstm_folded(50, 64)).fits(a100)
    for large in (kc.lstm_folded(50, 256, "bf16"), kc.lstm_folded(50, 128)):  # for every GPU
        assert print_persistent(*print_cell(large)) is None
    tight = of(kc.gru_cell(128, 128, "bf16"))
    assert tight.weight_bytes == 2 * 128 * 384 * 2 <= h100 and not tight.fits(a100)
    assert of(kc.lstm_cell(64, 64, "bf16")).weight_bytes == 2 * 64 * 256 * 2
    made = of(kc.lstm_folded(50, 128, "bf16"))
    choices = list(made.choices(h100))
    assert [(k.constants["BM"], k.num_warps) for k in choices] == [(16, 4), (16, 8), (32, 8)]
    assert all(k.num_stages == 1 and k.grid(100)[0] * k.grid.rows >= 100 for k in choices)
    assert not list(made.choices(made.weight_bytes))


def test_is_used_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))
    made, other = of(kc.lstm_folded(50, 64, "bf16")), of(kc.lstm_folded(50, 32, "bf16"))
    assert triton_tuned.known_loop(made, "Some GPU") is None
    triton_tuned.keep_loop("Some GPU", made, triton_tuned.Looped(32, 8, 64))
    triton_tuned.keep_loop("Some GPU", other, triton_tuned.Looped(16, 4, 512))
    assert triton_tuned.known_loop(made, "Some GPU") == (made.tiled(32, 8), 64)
    assert triton_tuned.known_loop(made, "Another GPU") is None
    triton_tuned.keep_loop("Some GPU", made, None)
    assert triton_tuned.known_loop(made, "Some GPU") is None
    assert triton_tuned.known_loop(other, "Some GPU") == (other.tiled(16, 4), 512)


COMPILE = """
import json
from dataclasses import replace
import kernel_cells as kc
from cellc.kernels.triton_backend import print_cell
from cellc.kernels.triton_devices import DEVICES
from cellc.kernels.triton_persistent import print_persistent
from cellc.kernels.triton_steps import print_stepped
from cellc.kernels.triton_targets import compile_kernel
CELLS = {
    "lstm-bf16": kc.lstm_folded(1000, 128, "bf16"),
    "gru-bf16": kc.gru_cell(64, 64, "bf16"),
    "lstm-f32": kc.lstm_folded(1000, 64),
}
found = []
for name, cell in CELLS.items():
    program, printed = print_cell(cell)
    loop = print_persistent(program, printed)
    for target in ("cuda:80", "cuda:90", "cuda:100"):
        limit = DEVICES[target].shared_limit
        kernels = [(loop.printed, "loop")]
        if name == "lstm-bf16":
            kernels.append((print_stepped(program, printed), "step"))
        if name == "gru-bf16":
            many = [k for k in loop.choices(limit) if k.constants["BM"] == 64]
            kernels.append((replace(loop.printed, kernels=tuple(many)), "loop"))
        for module, kind in kernels:
            r = compile_kernel(program, module, 0, target)
            found.append({
                "cell": name, "kind": kind, "target": target, "fits": r.fits,
                "spills": r.spill_bytes, "shared": r.shared_bytes, "weights": loop.weight_bytes,
                "most": loop.weight_bytes + r.tiles["BM"] * loop.row_bytes,
                "matrix": dict(r.matrix_instructions),
            })
print(json.dumps(found))
"""


def test_true_compilation_keeps_the_weights_on_chip() -> None:
    found = kc.compiled(COMPILE)
    assert len(found) == 15
    for r in found:
        assert r["fits"] and r["spills"] == 0, r
        if r["kind"] == "loop":
            assert r["weights"] <= r["shared"] <= r["most"], r
        assert r["matrix"] or r["cell"] == "lstm-f32", r


# -- what is measured ------------------------------------------------------------------------------


def tuned(
    cell: Cell, loop: Sequence[float], single: Sequence[float]
) -> list[triton_tune_loop.LoopTimed]:
    """By a clock that says how long one kernel, and a kernel a step, take with 2, 4, 6 rows."""
    kernel = TritonBackend("cpu").kernel(cell, kc.random_params(cell))
    run = kc.make_run(cell, 6, 4)
    sizes: list[int] = []

    def capture(nodes: Sequence[Callable[[], object]]) -> Callable[[], object]:
        sizes.append(len(nodes))
        return lambda: [node() for node in nodes]

    turn = {1: iter(list(loop) * 9), 4: iter(single)}

    def measure(call: Callable[[], object]) -> float:
        call()
        return next(turn[sizes[-1]])

    launches = [narrowed(run.launch, n) for n in (2, 4, 6)]
    shared = SHARED if kernel.persistent is None else few(kernel.persistent)
    return triton_tune_loop.tune_loop(kernel, launches, run.arenas, shared, measure, capture)


def few(made: Persistent) -> int:
    """Shared memory that leaves two choices."""
    return made.weight_bytes + 16 * made.row_bytes


@interpreted
def test_persistent_kernels_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))
    monkeypatch.setattr(np, "matmul", kc.product_in_order)
    cell, _ = CELLS["gru"]
    kernel = TritonBackend("cpu").kernel(cell, kc.random_params(cell))
    made = kernel.persistent
    assert made is not None
    for loop, most in (([1, 1, 3], 4), ([2, 1, 1], 0)):
        found = tuned(cell, loop, [2, 3, 3])
        assert len(found) == len(list(made.choices(few(made)))) == 2
        assert all(t.most_rows == most and not t.refusal for t in found)
        chosen = triton_tune_loop.keep_best_loop(kernel, found, "Some GPU")
        assert (chosen.most_rows if chosen else 0) == most
        known = triton_tuned.known_loop(made, "Some GPU")
        assert known == ((found[0].kernel, most) if most else None)


def test_up_to_how_many_rows_it_is_faster() -> None:
    kernel, single = of(kc.gru_cell(7, 33)).kernel, {2: 2.0, 4: 3.0, 6: 3.0}
    for loop, most in (([1, 1, 1], 6), ([1, 1, 3], 4), ([2, 1, 1], 0), ([1, 2.99, 1], 2)):
        timed = triton_tune_loop.LoopTimed(kernel, dict(zip(single, loop, strict=True)), single)
        assert timed.most_rows == most and (timed.gain > 0) == (most > 0)


@interpreted
def test_a_persistent_kernel_with_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "matmul", kc.product_in_order)
    cell, _ = CELLS["gru"]
    monkeypatch.setattr(triton_tune_loop.torch, "equal", lambda a, b: False)
    found = tuned(cell, [1, 1, 1], [2, 2, 2])
    assert found and all("differ" in t.refusal and t.most_rows == 0 for t in found)
    assert tuned(kc.layernorm_lstm(6, 8), [], []) == []
