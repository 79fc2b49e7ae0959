"""The C++ backend against the eager one: every operation, odd sizes, chains, bad rows, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import kernel_cells as kc
import numpy as np
import pytest
import torch

from cellc import ops
from cellc.cells import Cell
from cellc.kernels import cpp, cpp_build
from cellc.kernels.cpp import CppBackend, CppKernel
from cellc.kernels.eager import EagerBackend, EagerKernel
from cellc.launch import Kernel, Launch

pytestmark = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")
EAGER = EagerBackend()
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, -1e-4, 3.7, -7.9, 20.5, 88.0, -88.5, 1e5]
SPECIAL += [float("inf"), float("-inf"), float("nan")]


@pytest.fixture(scope="module")
def backend() -> Iterator[CppBackend]:
    with_threads = torch.get_num_threads()
    backend = CppBackend()
    yield backend
    backend.close()
    torch.set_num_threads(with_threads)


def pair(backend: CppBackend, cell: Cell, seed: int = 0) -> tuple[CppKernel, Kernel]:
    params = kc.random_params(cell, seed)
    kernel = backend.kernel(cell, params)
    assert isinstance(kernel, CppKernel)
    return kernel, EAGER.kernel(cell, params)


SIZED = {
    f"{name}-H{H}-{dtype}": make
    for H, dtype in ((17, "f32"), (64, "f32"), (17, "f64"))
    for name, make in {
        "lstm": lambda H=H, d=dtype: kc.lstm_cell(H + 4, H, d),
        "lstm_folded": lambda H=H, d=dtype: kc.lstm_folded(11, H, d),
        "gru": lambda H=H, d=dtype: kc.gru_cell(2 * H, H, d),
        "layernorm_lstm": lambda H=H, d=dtype: kc.layernorm_lstm(H, H, d),
        "softmax_head": lambda H=H, d=dtype: kc.softmax_head(H, 3 * H + 1, d),
        "attention": lambda H=H, d=dtype: kc.attention_cell(5, H, 2, d),
        "mv": lambda H=H, d=dtype: kc.mv_cell(min(H, 17), d),
        "ragged": lambda H=H, d=dtype: kc.ragged_cell(H, d),
    }.items()
}
EVERY = {k: v for k, v in kc.CELLS.items() if not k.startswith("zoo")} | SIZED
# Sizes beyond one vector and doubles; the other sizes of the same cells take a compiler's minute.
SIZED_AT_ONCE = {"lstm-H17-f32", "lstm-H64-f32", "layernorm_lstm-H17-f64", "ragged-H17-f64"}


def slow_where(slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if slow else []


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_where(n in SIZED.keys() - SIZED_AT_ONCE)) for n in EVERY],
)
def test_cell_is_eagers(backend: CppBackend, name: str) -> None:
    cell = EVERY[name]()
    kernel, reference = pair(backend, cell)
    for B in (1, 5, 64):
        kc.check(kernel, reference, kc.make_run(cell, B, seed=B))


@pytest.mark.parametrize("shrink", [False, True])
def test_chain(backend: CppBackend, shrink: bool) -> None:
    cell = kc.lstm_cell(5, 48)
    kernel, reference = pair(backend, cell)
    kc.check(kernel, reference, kc.make_run(cell, 70, 5, {0: 1, 1: 2}, shrink=shrink))


@pytest.mark.parametrize("B", [1, 3, 12, 40, 200])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_launches_use_threads(
    backend: CppBackend, B: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpp, "num_cores", lambda: threads)
    cell = kc.lstm_cell(130, 200)
    kernel, reference = pair(backend, cell)
    kc.check(kernel, reference, kc.make_run(cell, B, 4, {0: 1, 1: 2}))
    assert cpp.num_workers() >= threads - 1


def test_a_row_does_not_depend_on_its_neighbours(backend: CppBackend) -> None:
    cell = kc.layernorm_lstm(6, 8)
    kernel, _ = pair(backend, cell)
    run = kc.make_run(cell, 100)
    together = run.copy()
    kernel(together.launch, together.arenas)
    for i in (0, 50, 99):
        alone = run.rows([i])
        kernel(alone.launch, alone.arenas)
        for a, b in zip(alone.outputs(), together.outputs(), strict=True):
            assert torch.equal(a[0], b[i])


def test_deep_products_are_summed_in_blocks(backend: CppBackend) -> None:
    b = kc.Builder()
    x = b.input("x", 2500)
    cell = b.cell("deep", b("linear", x, b.param("w", 2500, 70), b.param("b", 70)))
    kernel, reference = pair(backend, cell)
    kc.check(kernel, reference, kc.make_run(cell, 9), rtol=1e-4, atol=1e-3)


# Operations one by one, on special values


def unary_cell(dtype: str) -> Cell:
    b = kc.Builder(dtype)
    x = b.input("x", len(SPECIAL) + 3)
    names = sorted(ops.UNARY - {"bitwise_not", "cast"})
    casts = [b("cast", b("maximum", b("minimum", x, 100.0), 0.0), dtype=d) for d in ("i64", "u8")]
    return b.cell("unary", *(b(n, x) for n in names), *casts, b("cast", x, dtype="bool"))


def binary_cell(dtype: str) -> Cell:
    b = kc.Builder(dtype)
    x, y = b.input("x", len(SPECIAL), 1), b.input("y", 1, len(SPECIAL))
    names = sorted((ops.BINARY | ops.COMPARE) - {f"bitwise_{n}" for n in ("and", "or", "xor")})
    powers = [b("pow", x, p) for p in (2.0, 3.0, -1.0, -2.0, 1.7)]
    powers += [b("pow", b("abs", x), p) for p in (0.5, -0.5)]
    return b.cell("binary", *(b(n, x, y) for n in names), *powers)


@pytest.mark.parametrize("dtype", ["f32", pytest.param("f64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [unary_cell, binary_cell])
def test_special_values(backend: CppBackend, dtype: str, make: kc.Callable[[str], Cell]) -> None:
    cell = make(dtype)
    kernel, reference = pair(backend, cell)
    run = kc.make_run(cell, 3)
    far = [1e-40, 1e-30, -1e30]  # torch's fmod of numbers so far apart is nan
    given = [*SPECIAL, *far] if make is unary_cell else SPECIAL
    for i in cell.inputs:
        values = torch.tensor(given).to(run.arenas[i.type].dtype)
        run.arenas[i.type][:] = values.reshape(i.type.shape)
    got, want = run.copy(), run.copy()
    kernel(got.launch, got.arenas)
    reference(want.launch, want.arenas)
    names = [cell.ops[o.index].op for o in cell.outputs]
    for name, x, y in zip(names, got.outputs(), want.outputs(), strict=True):
        wide = name in ("gelu_tanh", "tan", "pow")
        if name == "gelu":  # torch says nan
            y[y.isnan()] = x[y.isnan()]
        torch.testing.assert_close(
            x,
            y,
            rtol=2e-5 if wide else 1e-6,
            atol=1e-37,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid"])
def test_accuracy(backend: CppBackend, name: str) -> None:
    b = kc.Builder()
    cell = b.cell("one", b(name, b.input("x", 4096)))
    kernel, _ = pair(backend, cell)
    run = kc.make_run(cell, 16)
    kind = cell.inputs[0].type
    x = torch.linspace(-60, 60, run.arenas[kind].numel()).reshape(run.arenas[kind].shape)
    run.arenas[kind][:] = torch.where(torch.arange(len(x))[:, None] % 2 == 0, x, x / 200)
    given = run.arenas[kind][torch.from_numpy(run.launch.inputs[0].astype(np.int64))]
    kernel(run.launch, run.arenas)
    exact = getattr(torch, name)(given.double())
    error = ((run.outputs()[0].double() - exact) / exact.abs().clamp_min(1e-37)).abs().max()
    assert error < 3e-7


def test_reductions_of_nan_and_ties(backend: CppBackend) -> None:
    b = kc.Builder()
    x = b.input("x", 600)
    names = sorted(ops.REDUCE - {"any", "all"})
    flags = [b(n, b("gt", x, 0.0), dims=(0,)) for n in ("any", "all", "sum")[:2]]
    cell = b.cell("reductions", *(b(n, x, dims=(0,)) for n in names), *flags)
    kernel, reference = pair(backend, cell)
    run = kc.make_run(cell, 6)
    rows = run.arenas[cell.inputs[0].type]
    rows[:] = (rows * 2).round().clamp(-2, 2)
    rows[run.launch.inputs[0][1], 555] = float("nan")
    rows[run.launch.inputs[0][1], 570] = float("nan")
    rows[run.launch.inputs[0][2]] = float("-inf")
    rows[run.launch.inputs[0][3]] = 0.0
    kc.check(kernel, reference, run)


def random_cell(seed: int) -> Cell:
    """A dozen random operations on values of several ranks."""
    rng, b = np.random.default_rng(seed), kc.Builder()
    values = [b.input("x", 4), b.input("m", 3, 4), b.input("t", 2, 3, 4), b.input("s")]

    def shape(x: kc.Operand) -> ops.Shape:
        return b._shape(x)

    def grow() -> kc.Operand | None:
        x = values[rng.integers(len(values))]
        dims, kind = shape(x), rng.integers(13)
        d = int(rng.integers(len(dims))) if dims else 0
        if kind < 2:
            return b(str(rng.choice(["tanh", "sigmoid", "neg", "abs", "relu", "sin"])), x)
        if kind < 5:
            y = values[rng.integers(len(values))]
            try:
                ops.broadcast([dims, shape(y)])
            except ValueError:
                return None
            return b(str(rng.choice(["add", "mul", "sub", "maximum"])), x, y)
        if not dims:
            return None
        if kind == 5:
            return b("permute", x, dims=tuple(int(i) for i in rng.permutation(len(dims))))
        if kind == 6:
            n = int(np.prod(dims))
            options = [(n,), (1, n), (n // 2, 2) if n % 2 == 0 else (n, 1), (*dims, 1)]
            return b("reshape", x, shape=options[rng.integers(len(options))])
        if kind == 7:
            return b("flip", x, dims=(d,))
        if kind == 8 and dims[d] > 1:
            return b.slice(x, int(rng.integers(dims[d] - 1)), dims[d], d, int(rng.integers(1, 3)))
        if kind == 9:
            return b("cat", x, b("neg", x), x, dim=d)
        if kind == 12 and dims[d] > 2:
            step, spread = (int(n) for n in rng.integers(1, 3, 2))
            return b("window", x, dim=d, size=2, step=step, spread=spread)
        if kind == 10:
            name = str(rng.choice(["sum", "mean", "amax", "amin", "argmax"]))
            y = b(name, x, dims=(d,))
            return b("cast", y, dtype="f32") if name == "argmax" else y
        return b("linear", x, b.param(f"w{len(b.params)}", dims[-1], 5))

    for _ in range(14):
        value = grow()
        if value is not None and np.prod(shape(value)) < 400 and len(shape(value)) < 5:
            values.append(value)
    outputs = [v for v in values[4:] if v.kind == "op"][-4:] or [b("neg", values[0])]
    return b.cell(f"random{seed}", *outputs)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=slow_where(s > 4)) for s in range(16)])
def test_random_cell(backend: CppBackend, seed: int) -> None:
    cell = random_cell(seed)
    kernel, reference = pair(backend, cell)
    kc.check(kernel, reference, kc.make_run(cell, 5, seed=seed), rtol=1e-4, atol=1e-4)


# Launches


def test_rows_with_a_bad_index(backend: CppBackend) -> None:
    cell = kc.lstm_folded(11, 17)
    kernel, reference = pair(backend, cell)
    run = kc.make_run(cell, 30)
    tokens = run.arenas[cell.inputs[0].type]
    for row, value in ((3, 11), (7, -1), (29, 2**62)):
        tokens[run.launch.inputs[0][row]] = value
    kc.check(kernel, reference, run)
    assert kernel(run.launch, run.arenas) == [3, 7, 29]


def test_division_by_zero_is_a_bad_row(backend: CppBackend) -> None:
    b = kc.Builder("i64")
    x, y = b.input("x", 3), b.input("y", 3)
    cell = b.cell("ints", *(b(n, x, y) for n in ("floor_div", "remainder", "fmod")))
    kernel, _ = pair(backend, cell)
    run = kc.make_run(cell, 4)
    rows = run.arenas[cell.inputs[0].type]
    rows[run.launch.inputs[0]] = -(2**63)
    rows[run.launch.inputs[1]] = -1
    rows[run.launch.inputs[1][2], 1] = 0
    assert kernel(run.launch, run.arenas) == [2]
    assert run.outputs()[0][0].tolist() == [-(2**63)] * 3


def test_an_empty_ragged_vector(backend: CppBackend) -> None:
    cell = kc.ragged_cell(9)
    kernel, reference = pair(backend, cell)
    run = kc.make_run(cell, 6)
    rows = run.launch.inputs[1]
    offsets = rows.offsets.copy()
    offsets[3] = offsets[2]
    launch = Launch(
        run.launch.steps, [run.launch.inputs[0], kc.Ragged(offsets, rows.slots)], run.launch.outputs
    )
    kc.check(kernel, reference, kc.Run(cell, launch, run.arenas))
    assert list(kernel(launch, run.arenas)) == [2]


def test_no_rows(backend: CppBackend) -> None:
    cell = kc.lstm_cell(3, 4)
    kernel, _ = pair(backend, cell)
    none = np.zeros(0, np.int32)
    launch = Launch(np.zeros(1, np.int32), [none] * 3, np.zeros((2, 0), np.int32))
    assert list(kernel(launch, kc.make_run(cell, 1).arenas)) == []


def test_unsupported_cells_run_eagerly(backend: CppBackend) -> None:
    for cell in (kc.lstm_cell(3, 4, "bf16"), kc.fallback_cell(5)):
        assert isinstance(backend.kernel(cell, kc.random_params(cell)), EagerKernel)


def test_two_threads_call_at_once(backend: CppBackend) -> None:
    cell = kc.lstm_cell(100, 200)
    kernel, reference = pair(backend, cell)
    failures: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for i in range(5):
                kc.check(kernel, reference, kc.make_run(cell, 60, seed=10 * seed + i))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_source_is_deterministic_and_names_origins(backend: CppBackend) -> None:
    cell = kc.layernorm_lstm(6, 8)
    kernel, _ = pair(backend, cell)
    cpp._printed.cache_clear()
    again, _ = pair(backend, kc.layernorm_lstm(6, 8))
    assert kernel.source == again.source
    assert "// cells.py:1" in kernel.source and "tile layernorm_lstm(" in kernel.source


def test_last_close_joins_the_workers() -> None:
    first, second = CppBackend(), CppBackend()
    cell = kc.lstm_cell(130, 200)
    kernel, reference = pair(first, cell)
    opened = cpp._open_backends
    first.close()
    first.close()
    assert cpp._open_backends == opened - 1
    kc.check(kernel, reference, kc.make_run(cell, 64, 2))
    second.close()
    cpp.shutdown()
    assert cpp.num_workers() == 0
    kc.check(kernel, reference, kc.make_run(cell, 64, 2))


def in_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
    prelude = f"import sys; sys.path[:0] = {paths!r}\nimport kernel_cells as kc, os, torch\n"
    prelude += (
        "from cellc.kernels import cpp, cpp_build\nfrom cellc.kernels.eager import EagerBackend\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


CHECK = """
def check(cell, B=64, K=4):
    params = kc.random_params(cell)
    kernel = cpp.CppBackend().kernel(cell, params)
    kc.check(kernel, EagerBackend().kernel(cell, params), kc.make_run(cell, B, K))
torch.set_num_threads(2)
"""


def test_after_a_fork_and_at_exit() -> None:
    code = (
        CHECK
        + """
cell = kc.lstm_cell(130, 200)
check(cell)
kernel, run = cpp.CppBackend().kernel(cell, kc.random_params(cell)), kc.make_run(cell, 64, 4)
here, there = run.copy(), run.copy()
kernel(here.launch, here.arenas)
workers = cpp.num_workers()
if os.fork() == 0:
    kernel(there.launch, there.arenas)
    same = all((here.arenas[t].numpy() == there.arenas[t].numpy()).all() for t in here.arenas)
    os._exit(7 if same and cpp.num_workers() == workers else 8)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
check(cell)
"""
    )
    done = in_process(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_other_vector_units(march: str, tmp_path: Path) -> None:
    if cpp_build.platform.machine() != "x86_64":
        pytest.skip("not x86")
    code = (
        CHECK
        + f"""
cpp_build.flags = lambda: [*cpp_build.FLAGS, "-march={march}"]
attention = kc.attention_cell(5, 17, 2, "f64")
for cell in (kc.lstm_cell(13, 70), kc.softmax_head(8, 39), attention, kc.gru_cell(5, 33, "f64")):
    check(cell, 29, 1)
"""
    )
    done = in_process(code, CELLC_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
