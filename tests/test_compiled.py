"""What `cellc.compile` promises: forms of calls, errors, threads, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cellc
from cellc.kernels.eager import EagerBackend
from cellc.ops import RowType
from cellc.options import BackendName
from cellc.plan import Tables
from cellc.state import Arenas

I, H, V = 5, 8, 11  # noqa: E741 - input size, hidden size, vocabulary


class Words(nn.Module):
    """Tokens in, a score a class out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, I)
        self.cell = nn.GRUCell(I, H)
        self.out = nn.Linear(H, 3)

    def forward(self, words: Tensor, scale: float = 1.0) -> Tensor:
        h = torch.zeros(H)
        for word in self.embedding(words):
            h = self.cell(word, h)
        return self.out(h) * scale


def words(n: int) -> Tensor:
    return torch.randint(V, (n,))


def eager(model: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a call returns or raises; fails, rather than hangs, where it does not end in time."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def in_threads(count: int, function: Callable[[int], None]) -> list[BaseException]:
    """Run `function(k)` in `count` threads at once; what they raised."""
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            function(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.fixture
def model() -> Words:
    return Words().eval()


@pytest.fixture
def compiled(model: Words) -> Any:
    made = cellc.compile(model, backend="eager")
    yield made
    made.close()


# -- calls -------------------------------------------------------------------------------------


def test_call_forms(model: Words, compiled: cellc.Compiled) -> None:
    x = words(4)
    same(compiled(x), eager(model, x))
    same(compiled(words=x), eager(model, x))
    same(compiled(x, 2.0), eager(model, x, 2.0))
    same(compiled(scale=2.0, words=x), eager(model, x, 2.0))


def test_map_forms(model: Words, compiled: cellc.Compiled) -> None:
    x = [words(n) for n in (3, 1, 5)]
    results = compiled.map([x[0], (x[1], 2.0), {"words": x[2], "scale": 0.5}])
    for got, args in zip(results, [(x[0],), (x[1], 2.0), (x[2], 0.5)], strict=True):
        same(got, eager(model, *args))
    assert compiled.map([]) == []
    same(compiled.map(iter([x[0]]))[0], eager(model, x[0]))


def test_submit(model: Words, compiled: cellc.Compiled) -> None:
    requests = [words(1 + n % 7) for n in range(40)]
    futures = [compiled.submit(x) for x in requests]
    for x, future in zip(requests, futures, strict=True):
        same(future.result(30), eager(model, x))


def test_submit_async(model: Words, compiled: cellc.Compiled) -> None:
    requests = [words(1 + n % 7) for n in range(20)]

    async def run() -> list[Tensor]:
        return await asyncio.gather(*(compiled.submit_async(x) for x in requests))

    for x, got in zip(requests, asyncio.run(run()), strict=True):
        same(got, eager(model, x))


def test_warmup_and_stats(compiled: cellc.Compiled) -> None:
    assert compiled.stats()["requests"] == 0
    assert compiled.warmup(words(3)) is compiled
    compiled(words(3))
    stats = compiled.stats()
    assert stats["requests"] == 2 and stats["failed"] == 0
    assert stats["plans_traced"] == 1 and stats["plan_hits"] == 1
    assert stats["launches"] > 0 and stats["rows"] >= 6
    assert stats["waiting"] == stats["running"] == 0
    assert stats["arena_bytes"] > 0 and stats["latency_ms"]["p50"] > 0


def test_cells_graph_stages(compiled: cellc.Compiled) -> None:
    with pytest.raises(cellc.CellcError):
        _ = compiled.graph
    compiled(words(4))
    assert set(compiled.cells) and compiled.graph.number_of_nodes() > 10
    assert [s.name for s in compiled.stages] == ["graph", "rows", "extract", "passes", "plan"]
    assert all(str(stage) for stage in compiled.stages)
    with pytest.raises(KeyError):
        _ = compiled.cells["no such cell"]


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_refresh(model: Words, backend: BackendName) -> None:
    try:
        compiled = cellc.compile(model, backend=backend)
    except cellc.BackendError as error:
        pytest.skip(str(error))
    x = words(5)
    with compiled:
        before = compiled(x)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.5)
        compiled.refresh()
        same(compiled(x), eager(model, x))
        assert not torch.allclose(compiled(x), before)


def test_refresh_of_another_shape() -> None:
    model = nn.Sequential(nn.Linear(I, H)).eval()
    with cellc.compile(model, backend="eager") as compiled:
        x = torch.randn(2, I)
        compiled(x)
        model[0] = nn.Linear(I, H + 1)
        with pytest.raises(cellc.UnsupportedError, match="compile again"):
            compiled.refresh()


def test_a_cell_that_falls_back_says_so() -> None:
    with cellc.compile(lambda x: torch.cumsum(x, 0), backend="eager") as reference:
        reference(torch.randn(3, 2))
        assert all(list(cell.kernels) == ["eager"] for cell in reference.cells.values())
    try:
        compiled = cellc.compile(lambda x: torch.cumsum(x, 0), backend="cpp")
    except cellc.BackendError as error:
        pytest.skip(str(error))
    with compiled:
        compiled(torch.randn(3, 2))
        assert any("eager" in cell.kernels for cell in compiled.cells.values())


def test_results_are_the_callers(compiled: cellc.Compiled) -> None:
    """A result may be changed, kept, and is no part of a later one."""
    x, y = words(3), words(3)
    first = compiled(x)
    kept = first.clone()
    compiled(y)
    same(first, kept)
    first.zero_()
    same(compiled(x), kept)
    assert not first.requires_grad


# -- what a structure is -----------------------------------------------------------------------


def test_none_and_value_change_places() -> None:
    def model(x: Tensor, a: int | None, b: int | None) -> Tensor:
        return x * (a or 10) + (b or 20)

    with cellc.compile(model, backend="eager") as compiled:
        x = torch.randn(3)
        same(compiled(x, None, 3), model(x, None, 3))
        same(compiled(x, 3, None), model(x, 3, None))


@pytest.mark.parametrize(
    "a, b", [(0.0, -0.0), (1, True), (1, 1.0), ("1", 1), (float("inf"), 1e308)]
)
def test_values_that_look_alike(a: Any, b: Any) -> None:
    def model(x: Tensor, value: Any) -> Tensor:
        return x + (math.copysign(2.0, value) if isinstance(value, float) else len(repr(value)))

    with cellc.compile(model, backend="eager") as compiled:
        for value in (a, b):
            same(compiled(torch.ones(2), value), model(torch.ones(2), value))


def test_both_sizes_vary() -> None:
    """Counts that are products of two sizes look affine on few samples."""
    linear = nn.Linear(I, H).eval()

    def model(x: Tensor) -> Tensor:
        return torch.tanh(linear(x))

    with cellc.compile(model, backend="eager") as compiled:
        for sizes in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (3, 3), (2, 3)]:
            x = torch.randn(*sizes, I)
            same(compiled(x), eager(model, x))


@pytest.mark.parametrize("branch", ["parity", "inside"])
def test_structure_changes_between_traced_lengths(branch: str) -> None:
    cell = nn.GRUCell(I, H).eval()

    def model(x: Tensor) -> Tensor:
        h = torch.zeros(H)
        for row in x:
            h = cell(row, h)
        special = len(x) % 2 == 1 if branch == "parity" else len(x) == 5
        return h * 2 if special else h

    with cellc.compile(model, backend="eager") as compiled:
        for n in (1, 16, 8, 2, 3, 5, 7):
            x = torch.randn(n, I)
            same(compiled(x), eager(model, x))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float64])
def test_scalar_results(dtype: torch.dtype) -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum().to(dtype), x.argmax()

    with cellc.compile(model, backend="eager") as compiled:
        x = torch.randn(3, 4)
        for got, expected in zip(compiled(x), model(x), strict=True):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            same(got, expected)


def test_arguments_returned_as_they_are() -> None:
    with cellc.compile(lambda x, y: {"x": x, "y": [y, x[0]]}, backend="eager") as compiled:
        x, y = torch.randn(3, 4), torch.randint(9, (2,))
        got = compiled(x, y)
        same(got["x"], x)
        same(got["y"][0], y)
        same(got["y"][1], x[0])


def test_strides_and_gradients_of_arguments() -> None:
    model = nn.LSTM(I, H).eval()
    with cellc.compile(model, backend="eager") as compiled:
        plain = torch.randn(4, I)
        for x in (
            plain.t().contiguous().t(),
            torch.randn(4, 2 * I)[:, ::2],
            torch.randn(1, I).expand(4, I),
            plain.clone().requires_grad_(),
        ):
            same(compiled(x)[0], eager(model, x)[0])


def test_empty_sequences() -> None:
    model = Words().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for n in (0, 3, 0, 1):
            x = words(n)
            same(compiled(x), eager(model, x))


@pytest.mark.parametrize("backend", ["eager", "cpp", "triton"])
def test_transposed_weights(backend: BackendName) -> None:
    """nn.Linear's weight reaches kernels as a transposed view."""
    model = nn.Linear(I, H).eval()
    try:
        compiled = cellc.compile(model, backend=backend)
    except cellc.BackendError as error:
        pytest.skip(str(error))
    with compiled:
        x = torch.randn(3, I)
        same(compiled(x), eager(model, x))


class Namesakes(nn.Module):
    """Parameters are called as an argument, and as operations that run before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.x, self.t, self.add = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + 1
        return y * self.t + self.add - self.x  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_parameters_with_names_of_others(backend: BackendName) -> None:
    torch.manual_seed(0)
    model, x = Namesakes().eval(), torch.randn(4)
    with cellc.compile(model, backend=backend) as compiled:
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_two_pairs_of_products_in_one_cell() -> None:
    a, b, c, d = (nn.Linear(I, H).eval() for _ in range(4))

    def model(x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(a(x)) + b(y) * torch.sigmoid(c(x)) + d(y)

    with cellc.compile(model, backend="eager") as compiled:
        x, y = torch.randn(4, I), torch.randn(4, I)
        same(compiled(x, y), eager(model, x, y))


# -- wrong use ---------------------------------------------------------------------------------


def test_unknown_keywords() -> None:
    with pytest.raises(TypeError, match="max_bacth"):
        cellc.compile(Words(), max_bacth=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="fold"):
        cellc.compile(Words(), options={"fold": 3})
    with pytest.raises(cellc.CellcError, match="bogus"):
        cellc.compile(Words(), backend="bogus")  # type: ignore[arg-type]
    with pytest.raises(cellc.CellcError):
        cellc.compile(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_batch": -3},
        {"max_queue": 0},
        {"max_queue": True},
        {"batch_dim": True},
        {"options": {"policy": "none"}},
        {"options": {"workers": True}},
        {"options": {"timeout": True}},
        {"options": {"fold_bytes": -1}},
        {"options": {"tf32": "no"}},
    ],
)
def test_nonsense_options(options: dict[str, Any]) -> None:
    with pytest.raises((cellc.CellcError, ValueError)):
        cellc.compile(Words(), backend="eager", **options)


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "float tokens": ((torch.rand(4),), {}, r"words.*f32\[4\].*i64"),
    "rank": ((torch.zeros(2, 3, 4, dtype=torch.long),), {}, r"words.*i64\[2, 3, 4\].*1 dim"),
    "too large": ((torch.tensor([1, V, 2]),), {}, rf"words.*{V} at position 1.*\[0, {V}\)"),
    "negative": ((torch.tensor([1, 2, -3]),), {}, rf"words.*-3 at position 2.*\[0, {V}\)"),
    "a string": (("text",), {}, "words.*'text'.*tensor"),
    "a list": (([torch.tensor([1])],), {}, "words.*list|words.*tensor"),
    "missing": ((), {}, "words.*nothing.*forward"),
    "extra": ((torch.tensor([1]), 1.0, 2), {}, "too many.*forward"),
    "unknown keyword": ((torch.tensor([1]),), {"speed": 2}, "speed.*forward"),
    "twice": ((torch.tensor([1]),), {"words": torch.tensor([1])}, "words.*multiple.*forward"),
    "no value": ((torch.tensor([1]), {1, 2}), {}, "scale.*set"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_request(model: Words, compiled: cellc.Compiled, kind: str) -> None:
    """Named argument, value and expectation; before any launch; later requests are right."""
    args, kwargs, message = WRONG[kind]
    compiled(words(3))
    launches = compiled.stats()["launches"]
    with pytest.raises(cellc.CellcError, match=f"(?s){message}"):
        compiled(*args, **kwargs)
    assert compiled.stats()["launches"] == launches
    x = words(4)
    same(compiled(x), eager(model, x))


def test_wrong_requests_fail_alone(model: Words, compiled: cellc.Compiled) -> None:
    """Wrong ones from some threads while others send 100 right ones."""
    kinds = list(WRONG.values())

    def work(k: int) -> None:
        if k % 2:
            for args, kwargs, _ in kinds:
                with pytest.raises(cellc.CellcError):
                    compiled(*args, **kwargs)
        else:
            for n in range(25):
                x = torch.arange(1 + (n + k) % 9) % V
                same(compiled(x), eager(model, x))

    assert in_threads(8, work) == []


def test_wrong_request_in_a_map(model: Words, compiled: cellc.Compiled) -> None:
    good = [words(n) for n in (1, 2, 3)]
    with pytest.raises(cellc.RequestError, match="words"):
        compiled.map([good[0], torch.tensor([V]), good[1]])
    with pytest.raises(cellc.CellcError, match="words"):
        compiled.map([good[0], torch.rand(3), good[1]])
    for x, got in zip(good, compiled.map(good), strict=True):
        same(got, eager(model, x))
    assert compiled.stats()["running"] == 0


def test_errors_in_place_of_results(model: Words, compiled: cellc.Compiled) -> None:
    """A map goes on past wrong requests, whether planning or data shows that they are wrong."""
    good = words(3)
    requests: list[Any] = [good, torch.tensor([V]), torch.rand(3), (good, good, good), good]
    got = compiled.map(requests, return_exceptions=True)
    assert [isinstance(r, cellc.CellcError) for r in got] == [False, True, True, True, False]
    same(got[0], eager(model, good))
    same(got[4], eager(model, good))
    with pytest.raises(cellc.CellcError) as error:
        compiled.map(requests)
    if sys.version_info >= (3, 11):
        assert error.value.__notes__ == ["in request 1 of the 5 given at once"]


def test_errors_in_place_of_batches() -> None:
    model = Words().eval()
    with cellc.compile(lambda x: model(x[0]), backend="eager", batch_dim=0) as compiled:
        requests = [words(6).view(2, 3), torch.full((2, 3), V), words(0).view(0, 3)]
        got = compiled.map(requests, return_exceptions=True)
        assert [isinstance(r, cellc.CellcError) for r in got] == [False, True, True]
        with pytest.raises(cellc.CellcError):
            compiled.map(requests)


def test_submitted_tensors_may_be_used_again(model: Words, compiled: cellc.Compiled) -> None:
    sent, buffer = [words(4) for _ in range(50)], torch.zeros(4, dtype=torch.long)
    futures = []
    for x in sent:
        futures.append(compiled.submit(buffer.copy_(x)))
        buffer.fill_(V + 1)
    for x, future in zip(sent, futures, strict=True):
        same(future.result(30), eager(model, x))


@dataclass(eq=False)
class Box:
    value: Any


@dataclass(frozen=True)
class Frozen:
    value: Any


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_objects_in_requests() -> None:
    """An object is what its attributes are; a named tuple is one argument."""
    with cellc.compile(lambda box: torch.ones(I) * box.value, backend="eager") as compiled:
        for value in (2.0, torch.ones(I), torch.full((I,), 3.0), 3.0):
            for box in (Box(value), Frozen(value)):
                same(compiled(box), torch.ones(I) * value)
        for value in (object(), {torch.ones(I)}, iter([1])):
            with pytest.raises(cellc.RequestError, match=r"box.*register_pytree_node"):
                compiled(Box(value))
    pairs = [Pair(torch.randn(n, I), torch.randn(n, I)) for n in (1, 2)]
    with cellc.compile(lambda pair: pair.left + pair.right, backend="eager") as compiled:
        for pair, got in zip(pairs, compiled.map(pairs), strict=True):
            same(got, pair.left + pair.right)


def test_compile_takes_instances() -> None:
    with pytest.raises(cellc.UnsupportedError, match=r"class Words.*Words\(\.\.\.\)"):
        cellc.compile(Words)
    with pytest.raises(cellc.UnsupportedError, match="batch_dim='a'"):
        cellc.compile(Words(), batch_dim="a")  # type: ignore[arg-type]


def test_tensors_that_cannot_be_copied_fail_alone() -> None:
    x = torch.randn(3)
    with cellc.compile(lambda x: x + 1, backend="eager") as compiled:
        got = compiled.map([x, torch.complex(x, x).conj().imag, x])
        for one, want in zip(got, (x, -x, x), strict=True):
            same(one, want + 1)
        got = compiled.map([x, x.to_sparse(), x], return_exceptions=True)
        assert [isinstance(r, Exception) for r in got] == [False, True, False]
        same(compiled(x), x + 1)


def _set_data(x: Tensor) -> Tensor:
    y = x.clone()
    y.data = x + 1
    return y


@pytest.mark.parametrize(
    "what", [torch.fft.rfft, _set_data, lambda x: Box(x + 1), lambda x: {x + 1}]
)
def test_results_that_are_refused(what: Any) -> None:
    with cellc.compile(lambda x: what(x), backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError):
            compiled(torch.randn(3))


def test_contexts_of_the_caller() -> None:
    """What was learned under one default dtype is not used under another; autocast is ignored."""
    model = nn.Linear(I, H).eval()
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            with cellc.compile(lambda x: x / 2, backend="eager") as compiled:
                assert compiled(torch.tensor([3])).dtype == default
        finally:
            torch.set_default_dtype(torch.float32)
    x = torch.randn(I)
    with cellc.compile(model, backend="eager") as compiled:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = compiled(x)
            assert model(x).dtype == torch.bfloat16
        same(got, eager(model, x))


class Remembering(nn.Module):
    """Sets attributes of every kind that a module has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(I))
        self.plain: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.plain = self.last = x * 2
        self.fresh = 1
        return self.last + self.plain


def test_modules_are_as_before() -> None:
    model = Remembering().eval()
    last = model.last
    with cellc.compile(model, backend="eager") as compiled:
        with pytest.warns(UserWarning, match=r"sets self\.\w+ of a Remembering") as caught:
            same(compiled(torch.ones(I)), torch.full((I,), 4.0))
        names = {str(w.message).split("self.")[1].split()[0] for w in caught}
        assert names == {"last", "plain", "fresh"}
        assert model.last is last and model.plain is None and not hasattr(model, "fresh")
        compiled(torch.ones(2, I))  # warned once


def _branch(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


READS = {
    "if": _branch,
    "item": lambda x: x * x.sum().item(),
    "int": lambda x: x * int(x[0] * 3),
    "mask": lambda x: x[x > 0],
    "tolist": lambda x: x.tolist(),
    "slice": lambda x: x[: (x.abs().sum() + 1).long()],
    "nonzero": lambda x: (x > 0).nonzero(),
}


@pytest.mark.parametrize("name", READS)
def test_reading_values(name: str) -> None:
    model = READS[name]
    with cellc.compile(model, backend="eager") as compiled:
        for x in (torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.5, 2.0, 0.5])):
            same(compiled(x), model(x))


REFUSED = {
    "numpy": lambda x: torch.from_numpy(np.sort(x.numpy())),
    "unique": lambda x: torch.unique(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reading_what_cannot_be_asked(name: str) -> None:
    with cellc.compile(REFUSED[name], backend="eager") as compiled:
        with pytest.raises(cellc.CellcError, match=r"test_compiled\.py:"):
            compiled(torch.randn(3))


@pytest.mark.parametrize("lengths", [[3, 1], torch.tensor([3, 1])])
def test_packed_sequences_are_refused(lengths: Any) -> None:
    lstm = nn.LSTM(I, H, batch_first=True).eval()

    def model(x: Tensor, lengths: Any) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return lstm(packed)[1][0]

    with cellc.compile(model, backend="eager") as compiled:
        match = r"(?s)PackedSequence.*request of its own.*test_compiled\.py:"
        with pytest.raises(cellc.UnsupportedError, match=match):
            compiled(torch.randn(2, 3, I), lengths)


def test_numpy_arrays_are_refused() -> None:
    with cellc.compile(lambda x: x + 1, backend="eager") as compiled:
        with pytest.raises(cellc.RequestError, match="'x'.*ndarray.*torch.as_tensor"):
            compiled(np.zeros(3))


RANDOM = {
    "randn": lambda x: x + torch.randn(3),
    "rand_like": lambda x: torch.rand_like(x),
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal_": lambda x: x + torch.empty(3).normal_(),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 1),
    "poisson": lambda x: torch.poisson(x.abs()),
    "cauchy_": lambda x: x + torch.empty(3).cauchy_(),
    "geometric_": lambda x: x + torch.empty(3).geometric_(0.5),
    "log_normal_": lambda x: x + torch.empty(3).log_normal_(),
    "random_": lambda x: x + torch.empty(3).random_(4),
    "rrelu": lambda x: F.rrelu(x, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_drawing_random_numbers(name: str) -> None:
    with cellc.compile(RANDOM[name], backend="eager") as compiled:
        with pytest.raises(
            cellc.UnsupportedError, match="(?s)random.*Generator in the request.*test_compiled.py:"
        ):
            compiled(torch.randn(3))


def _add(x: Tensor) -> Tensor:
    x += 1
    return x


def _set(x: Tensor) -> Tensor:
    x[0] = 5.0
    return x


def _view(x: Tensor) -> Tensor:
    x.view(-1)[1:].mul_(2)
    return x


@pytest.mark.parametrize("write", [_add, _set, _view, F.relu_])
def test_changing_an_argument(write: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3)
    kept = x.clone()
    with cellc.compile(write, backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError, match="(?s)in place.*clone"):
            compiled(x)
    same(x, kept)


def test_changing_a_copy() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x.clone()
        y += 1
        z = y[1:]
        z.mul_(3)
        y[0] = 7
        y.view(-1)[2] = 9
        y.masked_fill_(x > 1, 0.0)
        return y, z, y.t()

    with cellc.compile(model, backend="eager") as compiled:
        x = torch.randn(4, 4)
        for got, expected in zip(compiled(x), model(x), strict=True):
            same(got, expected)


def test_training_mode_is_restored() -> None:
    model = nn.Sequential(nn.Linear(I, H), nn.Dropout(0.5), nn.BatchNorm1d(H))
    model.train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    with cellc.compile(model, backend="eager") as compiled:
        x = torch.randn(3, I)
        got = compiled(x)
        with pytest.raises(cellc.CellcError):
            compiled(torch.randn(3, I + 1))
        assert [m.training for m in model.modules()] == flags
    same(got, eager(model.eval(), x))


def test_two_compilations_of_a_training_model() -> None:
    """Both trace at once: neither sees the other's flags."""
    model = nn.Sequential(nn.Linear(I, H), nn.Dropout(0.5))
    model.train()
    several = [cellc.compile(model, backend="eager") for _ in range(4)]

    def work(k: int) -> None:
        for n in range(1, 40):
            several[k](torch.randn(n, I) if n % 2 else torch.randn(n, 2, I))

    assert in_threads(4, work) == []
    assert all(m.training for m in model.modules())
    for compiled in several:
        compiled.close()


def test_parameters_are_not_copied() -> None:
    model = nn.Embedding(2000, 64).eval()
    with cellc.compile(model, backend="eager") as compiled:
        compiled(torch.tensor([3]))
        base = compiled._compiler.params.base
        assert [p.data_ptr() for p in base.values()] == [model.weight.data_ptr()]


# -- end, threads and queues -------------------------------------------------------------------


def test_use_after_close(model: Words) -> None:
    with cellc.compile(model, backend="eager") as compiled:
        compiled(words(2))
    compiled.close()
    for use in (
        lambda: compiled(words(2)),
        lambda: compiled.map([words(2)]),
        lambda: compiled.submit(words(2)),
        lambda: compiled.warmup(words(2)),
        compiled.refresh,
        lambda: asyncio.run(compiled.submit_async(words(2))),
    ):
        with pytest.raises(cellc.ClosedError):
            use()


def test_close_finishes_what_is_queued(model: Words) -> None:
    compiled = cellc.compile(model, backend="eager").warmup(words(3))
    requests = [words(1 + n % 9) for n in range(60)]
    futures = [compiled.submit(x) for x in requests]
    compiled.close()
    for x, future in zip(requests, futures, strict=True):
        same(future.result(0), eager(model, x))


def test_close_while_used(model: Words) -> None:
    compiled = cellc.compile(model, backend="eager").warmup(words(3))
    started = threading.Barrier(5)

    def work(k: int) -> None:
        if k == 4:
            started.wait()
            compiled.close()
            return
        started.wait()
        with pytest.raises(cellc.ClosedError):
            for n in range(100_000):
                compiled(words(1 + n % 9))

    assert in_threads(5, work) == []


def test_many_threads(model: Words, compiled: cellc.Compiled) -> None:
    """New lengths, traced and derived, from many threads at once, blocking and not."""

    def work(k: int) -> None:
        for n in range(1 + k % 3, 24, 3):
            x = torch.arange(n) * (k + 1) % V
            got = compiled.submit(x).result(30) if k % 2 else compiled(x)
            same(got, eager(model, x))

    assert in_threads(12, work) == []


def test_types_that_others_add_meanwhile() -> None:
    """Another thread plans with a new row type while this one prepares arenas."""
    tables, other = Tables(), RowType((3,), "f32")
    tables.constant(RowType((2,), "f32"), ("full", (2,), "f32", 1.0))

    class Counts(dict[int, int]):
        def items(self) -> Any:
            if other not in tables.types:
                tables.constant(other, ("full", (3,), "f32", 2.0))
            return super().items()

    tables.constant_counts = Counts(tables.constant_counts)
    arenas = Arenas(tables, {}, torch.device("cpu"))
    plan: Any = None  # what it holds is not looked at
    assert arenas.prepare(plan) and arenas.prepare(plan)
    assert arenas[other][0].tolist() == [2.0] * 3


def test_a_plan_that_cannot_be_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3)
    with cellc.compile(lambda x: x + 1, backend="eager") as compiled:
        same(compiled(x), x + 1)
        with monkeypatch.context() as patch:
            patch.setattr(Arenas, "prepare", lambda self, plan: 1 // 0)
            for call in (lambda: compiled(x), lambda: compiled.submit(x).result(30)):
                with pytest.raises(ZeroDivisionError):
                    call()
        same(compiled(x), x + 1)


def test_constants_of_new_lengths_while_running() -> None:
    """Every length brings constant rows of its own, while others run."""
    cell = nn.RNNCell(I, H).eval()

    def model(x: Tensor) -> Tensor:
        h = total = torch.zeros(H)
        for t, row in enumerate(x):
            h = cell(row, h)
            total = total + h * (1.0 / (t + 1.5 + len(x)))
        return total

    with cellc.compile(model, backend="eager") as compiled:

        def work(k: int) -> None:
            for n in range(1 + k, 30, 6):
                x = torch.randn(n, I)
                same(compiled(x), eager(model, x))

        assert in_threads(6, work) == []


def test_cancelled_futures(model: Words) -> None:
    compiled = cellc.compile(model, backend="eager").warmup(words(3))
    requests = [words(1 + n % 9) for n in range(200)]
    futures = [compiled.submit(x) for x in requests]
    for future in futures[::2]:
        future.cancel()
    for x, future in zip(requests, futures, strict=True):
        if not future.cancelled():
            same(future.result(30), eager(model, x))
    compiled.close()
    assert compiled._engine._arenas.idle()
    assert compiled.stats()["waiting"] == compiled.stats()["running"] == 0


def test_overloaded(model: Words) -> None:
    compiled = cellc.compile(model, backend="eager", max_queue=4).warmup(words(3))
    release = threading.Event()
    kernels = compiled._compiler.kernels

    def blocked(kernel: Any) -> Any:
        def run(*args: Any) -> Any:
            release.wait(30)
            return kernel(*args)

        return run

    for number, kernel in list(kernels.items()):
        kernels[number] = blocked(kernel)
    accepted = []
    with pytest.raises(cellc.Overloaded, match="4"):
        for _ in range(50):
            accepted.append(compiled.submit(words(3)))
    release.set()
    for future in accepted:
        future.result(30)
    compiled.close()


class _Flaky(EagerBackend):
    """A backend whose kernels cannot be made, or fail when they run, until it is repaired."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def kernel(self, cell: Any, params: Any) -> Any:
        if self.when == "made":
            raise cellc.BackendError("no compiler", backend="flaky")
        return _FlakyKernel(super().kernel(cell, params), self)


class _FlakyKernel:
    def __init__(self, kernel: Any, backend: _Flaky) -> None:
        self.kernel, self.backend, self.source = kernel, backend, kernel.source

    def __call__(self, *args: Any) -> Any:
        if self.backend.when == "run":
            raise RuntimeError("kernel failed")
        return self.kernel(*args)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["made", "run"])
@pytest.mark.parametrize("how", ["call", "map", "submit"])
def test_kernels_that_fail(model: Words, when: str, how: str) -> None:
    """Every request that needed the kernel fails, none waits for ever, and the engine goes on."""
    compiled = cellc.compile(model, backend="eager")
    backend = _Flaky(when)
    compiled._compiler.store.backend = backend
    expected = cellc.BackendError if when == "made" else RuntimeError
    if how == "submit":
        for n in (3, 3, 2):
            with pytest.raises(expected):
                compiled.submit(words(n)).result(10)
    else:
        calls = {"call": lambda: compiled(words(3)), "map": lambda: compiled.map([words(3)] * 3)}
        with pytest.raises(expected):
            within(10, calls[how])
    assert compiled.stats()["running"] == compiled.stats()["waiting"] == 0
    backend.when = "never"
    for _ in range(3):
        x = words(3)
        same(within(10, lambda x=x: compiled(x)), eager(model, x))
    within(10, compiled.close)
    assert compiled._engine._arenas.idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["call", "map", "submit"])
def test_kernels_that_cannot_be_made_again(model: Words, how: str) -> None:
    """The compiler is gone when weights change: requests of a known structure fail, none hangs."""
    compiled = cellc.compile(model, backend="eager")
    backend = _Flaky("never")
    compiled._compiler.store.backend = backend
    compiled(words(3))
    backend.when = "made"
    calls = {
        "call": lambda: compiled(words(3)),
        "map": lambda: compiled.map([words(3)] * 3),
        "submit": lambda: compiled.submit(words(3)).result(5),
    }
    with pytest.raises(cellc.BackendError):
        within(10, lambda: (compiled.refresh(), calls[how]()))
    backend.when = "never"
    x = words(3)
    same(within(10, lambda: compiled(x)), eager(model, x))
    within(10, compiled.close)


def test_memory_limit() -> None:
    """Requests wait instead of arenas growing past the limit."""
    model = nn.GRU(I, 64).eval()
    limit = 1 << 20
    with cellc.compile(model, backend="eager", options={"memory_limit": limit}) as compiled:
        requests = [torch.randn(20, I) for _ in range(200)]
        for x, (got, _) in zip(requests, compiled.map(requests), strict=True):
            same(got, eager(model, x)[0])
        assert compiled.stats()["arena_bytes"] <= 2 * limit


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_nothing_left_behind(backend: BackendName) -> None:
    """200 compile and close cycles: no thread, no file, at most 40 MB."""
    model = nn.GRU(I, H).eval()

    def cycle() -> None:
        with cellc.compile(model, backend=backend) as compiled:
            compiled(torch.randn(2, I))
            compiled.submit(torch.randn(2, I)).result(30)

    try:
        for _ in range(10):
            cycle()
    except cellc.BackendError as error:
        pytest.skip(str(error))
    gc.collect()
    threads, files, memory = threading.active_count(), _open_files(), _resident()
    for _ in range(200):
        cycle()
    gc.collect()
    assert threading.active_count() == threads
    assert _open_files() <= files
    assert _resident() - memory < 40 << 20


def test_forgotten_without_close() -> None:
    """A compiled model that is dropped takes its thread with it."""
    gc.collect()
    before = threading.active_count()
    for _ in range(3):
        compiled = cellc.compile(nn.GRU(I, H).eval(), backend="eager")
        compiled.submit(torch.randn(2, I)).result(30)
        del compiled
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "cellc-engine":
            thread.join(5)
    assert threading.active_count() <= before


def test_no_warnings_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cellc.compile(Words().eval(), backend="eager") as compiled:
            compiled.map([words(n) for n in range(1, 12)])


def test_callbacks_of_futures() -> None:
    model, results = nn.Linear(3, 2).eval(), []
    x = torch.randn(3)
    with cellc.compile(model, backend="eager") as compiled:
        ended = threading.Event()

        def call_back(_: Any) -> None:
            for use in (lambda: compiled(x), compiled.close, compiled.refresh):
                with pytest.raises(cellc.UnsupportedError, match="callback"):
                    use()
            compiled.submit(x).add_done_callback(lambda f: (results.append(f), ended.set()))

        compiled(x)
        compiled.submit(x).add_done_callback(call_back)
        assert ended.wait(30)
        torch.testing.assert_close(results[0].result(), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.stats()["running"] == compiled.stats()["waiting"] == 0


def test_an_arena_that_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.GRU(3, 5).eval()
    small, large = torch.randn(2, 3), torch.randn(900, 3)
    with torch.no_grad(), cellc.compile(model, backend="eager") as compiled:
        compiled.map([small, torch.randn(3, 3)])
        arenas = compiled._engine._arenas
        grow, last = arenas._grow, len(arenas._regions) - 1

        def limited(number: int, capacity: int) -> None:
            if number == last:
                raise MemoryError("no more")
            grow(number, capacity)

        with monkeypatch.context() as patched:
            patched.setattr(arenas, "_grow", limited)
            for run in (
                compiled,
                lambda x: compiled.map([x, x]),
                lambda x: compiled.submit(x).result(30),
            ):
                with pytest.raises(MemoryError):
                    run(large)
                assert arenas.idle()
                torch.testing.assert_close(compiled(small), model(small))
        torch.testing.assert_close(compiled(large), model(large))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"device": "gpu"}, "device='gpu' is not supported; use 'cpu'"),
        ({"device": ["cpu", 1.5]}, "device=1.5 is not supported"),
        ({"dtype": "f32"}, "dtype='f32' is not supported; give one of torch's"),
        ({"carry": "state"}, "carry='state' is not supported; name the argument"),
    ],
)
def test_arguments_of_the_wrong_kind(given: Any, what: str) -> None:
    with pytest.raises(cellc.UnsupportedError, match=re.escape(what)):
        cellc.compile(nn.GRU(2, 3), backend="eager", **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(cellc.UnsupportedError, match="finds no GPU is not supported; use"):
        cellc.compile(nn.GRU(2, 3), device="cuda:0")


def test_models_that_are_none() -> None:
    with cellc.compile(nn.GRU(2, 3), backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError, match="compiling a compiled model"):
            cellc.compile(compiled)
    scripted = torch.jit.trace(nn.Linear(2, 3), torch.zeros(2))
    with pytest.raises(cellc.UnsupportedError, match="pass the nn.Module that it was scripted"):
        cellc.compile(scripted)


def test_steps_that_are_none() -> None:
    model = nn.GRUCell(2, 3).eval()
    with cellc.compile(model, carry={"hx": "0"}, backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError, match="by name, as {'state': tensor}"):
            compiled.session(torch.zeros(3))  # type: ignore[arg-type]
        session = compiled.session()
        for wrong in (session, (torch.zeros(2), session), (session,)):
            with pytest.raises(cellc.UnsupportedError, match="pairs of a session and its arg"):
                compiled.step_all([wrong])  # type: ignore[list-item]


def test_compiled_models_in_forwards_are_refused_and_stay_whole() -> None:
    inner = nn.Linear(4, 4).eval()
    for calls in (lambda c, x: c(x), lambda c, x: c.map([x])[0], lambda c, x: c.submit(x).result()):
        with cellc.compile(inner, backend="eager") as compiled:

            def outer(x: Tensor, calls: Any = calls, compiled: Any = compiled) -> Tensor:
                return calls(compiled, x) + 1  # type: ignore[no-any-return]

            with cellc.compile(outer, backend="eager") as other:
                with pytest.raises(cellc.UnsupportedError, match="call the model that it was"):
                    other(torch.randn(4))
            x = torch.randn(4)
            torch.testing.assert_close(compiled(x), inner(x))


def test_a_compiled_tree_model_that_calls_itself_is_refused() -> None:
    class Recursive(nn.Module):
        def forward(self, tree: Any) -> Tensor:
            return tree if isinstance(tree, Tensor) else compiled(tree[0]) + compiled(tree[1])

    with cellc.compile(Recursive().eval(), backend="eager") as compiled:
        one = torch.randn(3)
        torch.testing.assert_close(compiled(one), one)
        with pytest.raises(cellc.UnsupportedError, match="call the model that it was"):
            compiled.map([(((one, one), one),)])
        torch.testing.assert_close(compiled(one), one)
