"""What many requests return: right, in memory of its own, and in few copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import cellc
from cellc.flight import Flight
from cellc.gathering import GATHERED
from cellc.state import SMALL_OUTPUT, Arenas
from cellc.waiting import Future
from tests.interruptions import Interruption

LENGTHS = [3, 40, 1, 17, 40, 2, 65, 9, 30, 12] * 5


@pytest.fixture(params=["cpu", "device"], autouse=True)
def views(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas read by numpy, and as those of a device are."""
    if request.param == "device":
        monkeypatch.setattr(
            Arenas, "_view", lambda self, type, number: self._views.__setitem__(number, None)
        )


def tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def ranges(given: list[Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in given:
        yield tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def assert_apart(compiled: cellc.Compiled, results: Any) -> None:
    """No two overlap, none lies in an arena."""
    arenas = list(compiled._engine._arenas.values())  # type: ignore[union-attr]
    taken = sorted([*ranges(tensors(results)), *ranges(arenas)])
    for (_, end), (start, _) in zip(taken, taken[1:], strict=False):
        assert end <= start


class LSTM(nn.Module):
    """All states, and (last h, last c): 64 floats a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(8, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        result: tuple[Tensor, tuple[Tensor, Tensor]] = self.rnn(x)
        return result


def requests(lengths: list[int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 8, generator=g) for n in lengths]


def test_results_of_a_map_share_little_memory() -> None:
    model = LSTM().eval().requires_grad_(False)
    given = requests([*LENGTHS, *[n + 100 for n in LENGTHS]])
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(given)
        results = compiled.map(given)
        for got, x in zip(results, given, strict=True):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
        assert_apart(compiled, results)
        pieces = {}
        for tensor in tensors(results):
            storage = tensor.untyped_storage()
            assert storage.nbytes() <= GATHERED
            pieces[storage.data_ptr()] = storage.nbytes()
        bytes_of = [t.numel() * t.element_size() for t in tensors(results)]
        assert sum(pieces.values()) == sum(bytes_of)  # nothing else is in them
        assert len(pieces) < len(given)
        states = {t.untyped_storage().data_ptr() for y, _ in results for t in [y]}
        last = {t.untyped_storage().data_ptr() for _, (h, c) in results for t in (h, c)}
        assert not states & last  # who keeps the last states keeps nothing else


def test_results_that_are_large_have_their_own_memory() -> None:
    rows = GATHERED // (4 * 64) + 1

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x)
        return y, y[-1]

    given = [torch.randn(n, 64) for n in (rows, 2, rows + 5, 3)]
    with cellc.compile(model, backend="eager") as compiled:
        results = compiled.map(given)
        assert_apart(compiled, results)
        for (y, last), x in zip(results, given, strict=True):
            torch.testing.assert_close((y, last), model(x))
            assert last.untyped_storage().nbytes() <= 4 * 4 * 64
            most = 4 * y.numel() if len(x) >= rows else 4 * 5 * 64
            assert y.untyped_storage().nbytes() <= most


def test_results_of_requests_submitted_one_by_one_are_not_kept_by_others() -> None:
    model = LSTM().eval().requires_grad_(False)
    given = requests([n + 50 for n in LENGTHS])
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(given)
        results = [f.result(30) for f in [compiled.submit(x) for x in given]]
        assert_apart(compiled, results)
        for got, x in zip(results, given, strict=True):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
            y, (h, c) = got
            own = 4 * y.numel()
            assert y.untyped_storage().nbytes() == own or own <= SMALL_OUTPUT
            for small in (h, c, y):
                assert small.untyped_storage().nbytes() <= GATHERED


def test_what_is_done_in_place_to_one_is_nothing_to_others() -> None:
    """Neither to their values nor to what autograd knows of them."""
    model = LSTM().eval().requires_grad_(False)
    given = requests(LENGTHS)
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(given)
        results = compiled.map(given)
        first, *others = tensors(results)
        before = [t.clone() for t in others]
        weight = torch.ones(64, requires_grad=True)
        loss = sum((t * weight).sum() for t in others)  # keeps them for its gradient
        first.add_(1e6)
        first.mul_(weight)  # as of a tensor that is nobody's view
        for got, want in zip(others, before, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert got._version == 0
        loss.backward()  # type: ignore[union-attr]
        torch.testing.assert_close(compiled.map(given[:1])[0], model(given[0]))


def returns_much(x: Tensor) -> dict[str, Any]:
    """Tensors of several forms: positions first, last, none; numbers; none at all."""
    y = torch.tanh(x)
    total = y.sum()
    return {
        "moved": y.t(),
        "rows": y,
        "row": y[-1],
        "total": total,
        "kept": 3,
        "twice": (y[0], x[:0]),
    }


def test_results_of_many_forms() -> None:
    given = [torch.randn(n, 6) for n in LENGTHS]
    with cellc.compile(returns_much, backend="eager") as compiled:
        for _ in range(2):
            results = compiled.map(given)
            for got, x in zip(results, given, strict=True):
                torch.testing.assert_close(got, returns_much(x), rtol=1e-4, atol=1e-5)
                assert all(t.is_contiguous() or t.shape == (6, len(x)) for t in tensors(got))
            assert_apart(compiled, [[t for t in tensors(r) if t.numel()] for r in results])


def test_results_of_requests_whose_structures_differ() -> None:
    """Some return more tensors than others, of other shapes."""

    def model(x: Tensor, parts: list[Tensor]) -> list[Tensor]:
        return [torch.tanh(x), *[part * 2 for part in parts]]

    g = torch.Generator().manual_seed(0)
    given = [
        (torch.randn(n, 4, generator=g), [torch.randn(n + k, generator=g) for k in range(n % 4)])
        for n in LENGTHS
    ]
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            results = compiled.map(given)
            assert [len(r) for r in results] == [1 + n % 4 for n in LENGTHS]
            for got, args in zip(results, given, strict=True):
                torch.testing.assert_close(got, model(*args))
            assert_apart(compiled, results)


class Copies(TorchDispatchMode):
    """Counts what copies."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::clone", "aten::index_select", "aten::copy_")
        return func(*args, **(kwargs or {}))


def test_few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output, or each GATHERED bytes of it, is one copy a launch that ends requests."""
    model = LSTM().eval().requires_grad_(False)
    given, delivered, copies = requests(LENGTHS), 0, Copies()
    deliver = Flight.deliver

    def counted(self: Flight, *args: Any, **kwargs: Any) -> None:
        nonlocal delivered
        delivered += 1
        with copies:
            deliver(self, *args, **kwargs)

    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(given)
        monkeypatch.setattr(Flight, "deliver", counted)
        compiled.map(given)
    assert copies.count <= 3 * delivered  # y, h and c


def test_an_interruption_while_many_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each point of it: those that others wait for end, and nothing is left behind."""
    model = LSTM().eval().requires_grad_(False)
    given = requests([3, 3, 3])
    finish_all, number, raised = Flight._finish_all, 0, False

    def interrupted(self: Flight, *args: Any) -> None:
        nonlocal raised
        monkeypatch.setattr(Flight, "_finish_all", finish_all)  # once
        with Interruption(number):
            try:
                finish_all(self, *args)
            except KeyboardInterrupt:
                raised = True
                raise

    with cellc.compile(model, backend="eager") as compiled:
        want = compiled.map(given)
        while True:
            number, raised = number + 1, False
            monkeypatch.setattr(Flight, "_finish_all", interrupted)
            other, *tickets = compiled._tickets([((x,), {}) for x in given])
            other.future = Future()
            engine = compiled._engine
            engine.enqueue([other])
            try:
                compiled._run_all(tickets)
            except KeyboardInterrupt:
                pass
            if not raised:
                break
            engine.run([other])
            torch.testing.assert_close(other.future.result(30), want[0])
            assert engine._arenas.live == engine.flight.live_bytes == engine.flight.futures == 0
            torch.testing.assert_close(compiled.map(given), want)
        assert number > 10
        torch.testing.assert_close([t.result for t in (other, *tickets)], want)
