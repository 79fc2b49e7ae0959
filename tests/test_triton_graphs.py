"""Launches replayed as graphs: a recorder stands in for CUDA's, kernels run in the interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import gc
from collections.abc import Callable, Mapping, Sequence

import kernel_cells as kc
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellc.cells import Cell
from cellc.kernels import triton_graphs, triton_steps
from cellc.kernels.eager import EagerBackend
from cellc.kernels.tile import schedule
from cellc.kernels.triton_backend import BadRows, TritonBackend, TritonKernel, interpreting
from cellc.kernels.triton_graphs import Graphs, bucket
from cellc.kernels.triton_staging import Fetched
from cellc.kernels.triton_steps import MAX_STEPS, Head, pack
from cellc.launch import Launch, Ragged
from cellc.ops import RowType

interpreted = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
CPU = torch.device("cpu")
Arenas = Mapping[RowType, torch.Tensor]


def record(nodes: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """What a graph does: the same kernels with the same arguments, whatever happens outside."""
    kept = list(nodes)
    return lambda: [node() for node in kept]


class Fixed:
    """A kernel in arenas that stay where they are, as an engine's do."""

    def __init__(self, kernel: TritonKernel) -> None:
        self.source, self.kernel = kernel.source, kernel
        self.own: dict[RowType, torch.Tensor] = {}

    def __call__(self, launch: Launch, arenas: Arenas) -> Sequence[int]:
        for kind, arena in arenas.items():
            self.own.setdefault(kind, torch.empty((4000, *kind.shape), dtype=arena.dtype))
            self.own[kind][: len(arena)] = arena
        bad = list(self.kernel(launch, self.own))
        for kind, arena in arenas.items():
            arena.copy_(self.own[kind][: len(arena)])
        return bad


def make(cell: Cell, graphs: Graphs) -> Fixed:
    backend = TritonBackend("cpu")
    backend.graphs = graphs
    return Fixed(backend.kernel(cell, kc.random_params(cell)))


def check(kernel: Fixed, cell: Cell, run: kc.Run) -> None:
    kc.check(kernel, EagerBackend().kernel(cell, kc.random_params(cell)), run)


@interpreted
@pytest.mark.parametrize("name", kc.CELLS)
def test_a_captured_launch_serves_others(name: str) -> None:
    cell, graphs = kc.CELLS[name](), Graphs(CPU, record)
    kernel = make(cell, graphs)
    for seed, B in enumerate((7, 5, 8, 6)):
        check(kernel, cell, kc.make_run(cell, B, seed=seed))
    # scratch as long as vectors is sized launch by launch
    captured = all(b.over is None for b in schedule(cell).buffers)
    assert (graphs.captures, graphs.replays) == ((1, 3) if captured else (0, 0))


CHAINS = {
    "lstm": (kc.lstm_cell(5, 8), {0: 1, 1: 2}),
    "lstm_folded": (kc.lstm_folded(11, 17), {0: 1, 1: 2}),
    "layernorm_lstm": (kc.layernorm_lstm(6, 8), {0: 1, 1: 2}),
    "mv": (kc.mv_cell(5), {0: 0, 1: 2}),
}


@interpreted
@pytest.mark.parametrize("name", CHAINS)
def test_chains_that_shrink_in_one_graph(name: str) -> None:
    cell, feed = CHAINS[name]
    graphs = Graphs(CPU, record)
    kernel = make(cell, graphs)
    for seed, (B, K) in enumerate([(5, 5), (8, 6), (5, 5), (7, 6)]):
        check(kernel, cell, kc.make_run(cell, B, K, feed, seed=seed, shrink=True))
    assert (graphs.captures, graphs.replays) == (1, 3)


@interpreted
def test_more_steps_than_a_graph_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_steps, "MAX_STEPS", 8)
    cell = kc.lstm_cell(3, 4)
    graphs = Graphs(CPU, record)
    kernel = make(cell, graphs)
    run = kc.make_run(cell, 2, 21, {0: 1, 1: 2})
    check(kernel, cell, run)
    assert (graphs.captures, graphs.replays) == (1, 1)  # the second part of equal size
    check(kernel, cell, run)
    assert (graphs.captures, graphs.replays) == (2, 4)


@interpreted
def test_bad_rows_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_steps, "MAX_STEPS", 8)
    cell = kc.lstm_folded(11, 4)
    graphs = Graphs(CPU, record)
    kernel = make(cell, graphs)
    good, wrong = (kc.make_run(cell, 2, K=16, seed=s) for s in range(2))
    tokens, table = wrong.arenas[cell.inputs[0].type], wrong.slots(0)
    tokens[int(table[3])], tokens[int(table[31])] = -1, 11
    for run in (good, wrong, good, wrong):
        check(kernel, cell, run)
    assert list(kernel(wrong.launch, wrong.arenas)) == [3, 31]
    assert graphs.captures == 1 and graphs.replays > 4


@interpreted
def test_vectors_of_other_lengths_in_one_graph() -> None:
    cell = kc.ragged_cell(9)
    graphs = Graphs(CPU, record)
    kernel = make(cell, graphs)
    for seed in range(4):
        run = kc.make_run(cell, 4, seed=seed)
        vectors = run.launch.inputs[1]
        assert isinstance(vectors, Ragged)
        counts = np.random.default_rng(seed).integers(1, 30, 4)
        offsets = np.cumsum([0, *counts]).astype(np.int32)
        slots = np.resize(vectors.slots, offsets[-1]).astype(np.int32)
        launch = Launch(
            run.launch.steps, [run.launch.inputs[0], Ragged(offsets, slots)], run.launch.outputs
        )
        check(kernel, cell, kc.Run(cell, launch, run.arenas))
    assert graphs.captures == 1


@interpreted
def test_graphs_follow_memory_that_moves() -> None:
    cell = kc.layernorm_lstm(6, 8)
    graphs = Graphs(CPU, record)
    kernel = make(cell, graphs)
    for seed in range(3):
        check(kernel, cell, kc.make_run(cell, 4, seed=seed))
    assert graphs.captures == 1
    kernel.own = {kind: torch.cat([t, t]) for kind, t in kernel.own.items()}  # an arena grew
    for seed in range(3):
        check(kernel, cell, kc.make_run(cell, 4, seed=seed))
    assert graphs.captures == 2
    check(kernel, cell, kc.make_run(cell, 9))  # scratch rows grow
    for seed in range(3):
        check(kernel, cell, kc.make_run(cell, 4, seed=seed))
    assert graphs.captures == 3
    for seed in range(2):  # the flags of bad rows, and the tables
        check(kernel, cell, kc.make_run(cell, 64, K=8, seed=seed))
    graphs._ints = graphs._ints[:64]  # as if it had been small
    check(kernel, cell, kc.make_run(cell, 4))
    assert len(graphs) == 0 and len(graphs._ints) > 64


@interpreted
def test_graphs_of_a_kernel_that_is_gone() -> None:
    """After `refresh` there are new kernels, with weights elsewhere."""
    cell = kc.gru_cell(7, 3)
    graphs = Graphs(CPU, lambda nodes: lambda: None)  # keeps nothing, as a real graph does
    kernel, other = make(cell, graphs), make(cell, graphs)
    for one in (kernel, other):
        for _ in range(2):
            run = kc.make_run(cell, 3)
            one(run.launch, run.arenas)
    assert len(graphs) == 2
    del kernel, one
    gc.collect()
    assert len(graphs) == 1
    del other
    gc.collect()
    assert len(graphs) == 0


@interpreted
def test_least_recently_used_graphs_are_dropped() -> None:
    cell = kc.lstm_cell(3, 4)
    graphs = Graphs(CPU, record, most=2)
    kernel = make(cell, graphs)

    def use(B: int) -> None:
        check(kernel, cell, kc.make_run(cell, B))

    for B in (1, 1, 2, 2, 1, 4, 4):
        use(B)
    assert len(graphs) == 2 and graphs.captures == 3
    use(1)  # was used after 2
    assert graphs.captures == 3
    for _ in range(2):
        use(2)
    assert graphs.captures == 4


@interpreted
def test_where_nothing_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(triton_graphs.log, "info", lambda name, text: said.append(text))
    tried: list[int] = []

    def refuse(nodes: Sequence[object]) -> Callable[[], object]:
        tried.append(len(nodes))
        raise RuntimeError("operation not permitted when stream is capturing")

    cell = kc.lstm_cell(3, 4)
    for graphs in (Graphs(CPU, refuse), Graphs(CPU, None)):
        kernel = make(cell, graphs)
        for seed in range(4):
            check(kernel, cell, kc.make_run(cell, 3, 2, {0: 1, 1: 2}, seed=seed))
        assert graphs.captures == graphs.replays == len(graphs) == 0
    assert tried == [2] and len(said) == 1 and "not permitted" in said[0]


@interpreted
def test_a_bound_launch_runs_again() -> None:
    cell = kc.lstm_cell(3, 4)
    graphs = Graphs(CPU, record)
    kernel, run = make(cell, graphs).kernel, kc.make_run(cell, 3, 2, {0: 1, 1: 2})
    want, other = run.copy(), kc.make_run(cell, 2, 2, seed=1)
    EagerBackend().kernel(cell, kc.random_params(cell))(want.launch, want.arenas)
    bound = kernel.bind(run.launch, run.arenas)
    for _ in range(3):
        for kind in run.arenas:
            run.arenas[kind].copy_(want.arenas[kind])
        for rows in run.launch.outputs:
            run.arenas[cell.output_types[0]][torch.from_numpy(rows).long()] = 0
        bound()
        for got, expected in zip(run.outputs(), want.outputs(), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        kernel(other.launch, other.arenas)  # by the same tables
    assert graphs.captures > 0


# -- without kernels -------------------------------------------------------------------------------


def test_buckets() -> None:
    for n in range(1, 300):
        assert n <= bucket(n) < max(2, 1.5 * n) or bucket(n) == n
        assert bucket(bucket(n)) == bucket(n)
    assert len({bucket(n) for n in range(1, MAX_STEPS + 1)}) <= 12
    assert max(bucket(n) for n in range(1, MAX_STEPS + 1)) == MAX_STEPS


@given(st.lists(st.integers(0, 5), min_size=1, max_size=150))
def test_parts_of_a_launch(sizes: list[int]) -> None:
    cell = kc.ragged_cell(2)
    steps = np.cumsum([0, *sizes]).astype(np.int32)
    N = int(steps[-1])
    offsets = (np.arange(N + 1) * 2).astype(np.int32)
    tables = [np.arange(N, dtype=np.int32), Ragged(offsets, np.arange(2 * N, dtype=np.int32))]
    outputs = np.stack([np.arange(N, dtype=np.int32) + 1000 * (k + 1) for k in range(3)])
    head, at = Head.of(cell), 0
    assert head.size % 4 == 0
    for part in pack(Head.of(cell), Launch(steps, tables, outputs)):
        begin, rest = part.ints[: head.size], part.ints[head.size :]
        assert (begin[0], begin[1]) == (part.num_rows, part.num_steps)
        first = begin[head.steps :][: MAX_STEPS + 1]
        rows = np.diff(first)
        assert (rows[: part.num_steps] > 0).all() and (rows[part.num_steps :] == 0).all()
        assert part.most_rows == rows.max() and part.num_steps <= MAX_STEPS
        table = rest[: 5 * part.num_rows].reshape(5, -1)
        assert (table[0] == np.arange(at, at + part.num_rows)).all()
        assert (table[2:] == table[0] + 1000 * np.arange(1, 4)[:, None]).all()
        starts, slots = rest[begin[2] :], rest[begin[3] :]
        for j in range(part.num_rows):
            mine = slots[starts[j] : starts[j + 1]]
            assert mine.tolist() == [2 * (at + j), 2 * (at + j) + 1]
        at += part.num_rows
    assert at == N


@given(st.lists(st.integers(0, 5), min_size=1, max_size=150))
def test_parts_of_a_launch_without_ragged_inputs(sizes: list[int]) -> None:
    steps = np.cumsum([0, *sizes]).astype(np.int32)
    N, head = int(steps[-1]), Head(0)
    numbers = np.arange(3 * N, dtype=np.int32).reshape(3, N)
    at, parts = 0, list(pack(head, Launch(steps, [numbers[0], numbers[1]], numbers[2:])))
    for part in parts:
        assert (part.ints[0], part.ints[1]) == (part.num_rows, part.num_steps)
        rows = np.diff(part.ints[head.steps :][: MAX_STEPS + 1])
        assert rows.sum() == part.num_rows and part.most_rows == rows.max()
        assert (rows[: part.num_steps] > 0).all() and (rows[part.num_steps :] == 0).all()
        tables = part.ints[head.size :].reshape(3, part.num_rows)
        assert (tables == numbers[:, at : at + part.num_rows]).all()
        at += part.num_rows
    assert at == N and sum(part.num_steps for part in parts) == np.count_nonzero(sizes)


def test_flags_are_fetched_as_they_were() -> None:
    first, second = torch.tensor([0, 1, 0]), torch.tensor([1, 0])
    rows = BadRows([Fetched(first).numpy, Fetched(second).numpy])
    first.zero_()
    second.zero_()
    assert list(rows) == [1, 3] and len(rows) == 2 and rows[1] == 3
