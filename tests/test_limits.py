"""Limits: of one request, of all, and of what is kept."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc import batches, cell_store, plan_cache, templates
from cellc.frontends import unfold
from cellc.limits import usual_memory


def decode(x: Tensor) -> Tensor:
    while x.sum() < 20:
        x = x + 1
    return x


def grow(x: Tensor, name: str) -> dict[str, Tensor]:
    return {name: x.cumsum(0) + 1}


@pytest.mark.parametrize(
    ("options", "error"),
    [({"max_calls": 30}, cellc.CallsError), ({"memory_limit": 4000}, cellc.TooLarge)],
    ids=["calls", "memory"],
)
def test_a_request_that_is_too_large_fails_alone_and_at_once(options: Any, error: Any) -> None:
    model = nn.GRU(4, 8).eval()
    small, large = torch.randn(3, 4), torch.randn(90, 4)
    with torch.no_grad(), cellc.compile(model, backend="eager", options=options) as compiled:
        compiled(small)
        with pytest.raises(error, match="limit is"):
            compiled(large)
        launches = compiled.stats()["launches"]
        with compiled._engine._loop.holding():  # nobody can run it
            future = compiled.submit(large)
            assert future.done() and isinstance(future.exception(), error)
        assert compiled.stats()["launches"] == launches
        results = compiled.map([small, large, small, large], return_exceptions=True)
        assert [type(r) for r in results[1::2]] == [error] * 2 and results[1] is not results[3]
        for got in results[::2]:
            torch.testing.assert_close(got, model(small))
        assert compiled.stats()["live_bytes"] == 0 and compiled._engine._arenas.live == 0


def test_what_is_run_ahead_is_not_limited() -> None:
    with cellc.compile(decode, backend="eager", options={"max_calls": 4}) as compiled:
        for n in (0.0, 5.0, 9.5, 0.0, 9.5):
            x = torch.zeros(2) + n
            torch.testing.assert_close(compiled(x), decode(x))


def test_sessions_go_on_after_a_step_that_is_too_large() -> None:
    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        for row in x:
            state = torch.tanh(state + row)
        return state, state

    options = {"max_calls": 20}
    with cellc.compile(step, backend="eager", carry={"state": "1"}, options=options) as compiled:
        session, state = compiled.session({"state": torch.zeros(4)}), torch.zeros(4)
        for count in (3, 90, 4, 80, 5):
            x = torch.randn(count, 4)
            if count > 20:
                with pytest.raises(cellc.CallsError):
                    session.step(x)
            else:
                got, _ = session.step(x)
                state, _ = step(x, state)
                torch.testing.assert_close(got, state)


def test_a_generator_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfold, "MAX_PIECES", 20)

    def endless(x: Tensor, steps: int) -> Iterator[Tensor]:
        while steps:
            x, steps = x + 1, steps - 1
            yield x

    with cellc.compile(endless, backend="eager") as compiled:
        assert len(list(compiled.stream(torch.zeros(2), 20))) == 20
        with pytest.raises(cellc.CellcError, match="never end"):
            compiled.stream(torch.zeros(2), -1)
        assert len(list(compiled.stream(torch.zeros(2), 20))) == 20


def test_memory_is_never_past_its_limit() -> None:
    """Requests wait; those that read values as well, whose legs take turns."""
    model = nn.GRU(4, 32).eval()
    limit = 100_000
    options = {"memory_limit": limit}
    with torch.no_grad(), cellc.compile(model, backend="eager", options=options) as compiled:
        flight, most = compiled._engine.flight, [0]
        begin = compiled._engine.launcher.begin

        def noting(*args: Any, **kwargs: Any) -> Any:
            most[0] = max(most[0], flight.live_bytes)
            return begin(*args, **kwargs)

        compiled._engine.launcher.begin = noting  # type: ignore[method-assign]
        given = [torch.randn(1 + n % 20, 4) for n in range(100)]
        for x, got in zip(given, compiled.map(given), strict=True):
            torch.testing.assert_close(got, model(x))
        assert limit / 4 < most[0] <= limit
    with cellc.compile(decode, backend="eager", options={"memory_limit": 3000}) as compiled:
        given = [torch.full((2,), float(n)) for n in range(20)] * 3
        for x, got in zip(given, compiled.map(given), strict=True):
            torch.testing.assert_close(got, decode(x))
        assert compiled._engine.flight.live_bytes == 0


def test_the_usual_limit_fits_the_machine() -> None:
    assert 0 < usual_memory(torch.device("cpu")) <= 8 << 30


def test_refused_requests_are_counted() -> None:
    with cellc.compile(nn.GRU(4, 8).eval(), backend="eager", max_queue=2) as compiled:
        compiled(torch.randn(3, 4))
        with compiled._engine._loop.holding():
            accepted = [compiled.submit(torch.randn(3, 4)) for _ in range(2)]
            for _ in range(3):
                with pytest.raises(cellc.Overloaded):
                    compiled.submit(torch.randn(3, 4))
        for future in accepted:
            future.result(30)
        assert compiled.stats()["refused"] == 3


# -- what is kept


def test_plans_and_families_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MAX_PLANS", 8)
    monkeypatch.setattr(plan_cache, "MAX_FAMILIES", 4)
    monkeypatch.setattr(plan_cache, "MAX_SAMPLES", 6)
    with cellc.compile(grow, backend="eager") as compiled:
        usual = torch.randn(3, 2)
        for n in range(30):
            x = torch.randn(1 + n % 11, 2)
            torch.testing.assert_close(compiled(x, str(n)), grow(x, str(n)))
            torch.testing.assert_close(compiled(usual, "usual"), grow(usual, "usual"))
            torch.testing.assert_close(compiled(x, "sizes"), grow(x, "sizes"))
            caches = compiled.stats()["caches"]
            assert caches["plans"] <= 8 and caches["families"] <= 4
            assert all(len(s.family) <= 6 for s in compiled._compiler.plans._families.values())
        before = compiled.stats()["plans_traced"]
        compiled(usual, "usual")  # it was asked for all the time, and is kept
        assert compiled.stats()["plans_traced"] == before


def test_plans_are_bounded_by_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MAX_CALLS", 200)
    model = nn.GRU(4, 8).eval()
    with torch.no_grad(), cellc.compile(model, backend="eager") as compiled:
        for n in [*range(1, 40), 300, *range(1, 40)]:
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), model(x))
            plans = compiled._compiler.plans
            assert plans._calls == sum(entry.plan.num_calls for entry in plans.values())
            assert plans._calls <= 200 or len(plans) == 1


def test_kernels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_store, "MAX_KERNELS", 3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def sized(x: Tensor) -> Tensor:
        return model(x[:, :4]).sum() + (x * 2).tanh().sum(1)  # type: ignore[no-any-return]

    with torch.no_grad(), cellc.compile(sized, backend="eager") as compiled:
        for width in [*range(4, 16), *range(4, 16)]:
            x = torch.randn(3, width)
            torch.testing.assert_close(compiled(x), sized(x))
            assert compiled.stats()["caches"]["kernels"] <= 3
        assert compiled.stats()["caches"]["cells"] > 3


def _tree(generator: random.Random, leaves: int) -> Any:
    if leaves == 1:
        return generator.randrange(20)
    left = generator.randrange(1, leaves)
    return _tree(generator, left), _tree(generator, leaves - left)


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.merge = nn.Embedding(20, 4), nn.Linear(8, 4)

    def forward(self, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return self.embedding(torch.tensor(tree))  # type: ignore[no-any-return]
        return self.merge(torch.cat([self(tree[0]), self(tree[1])])).tanh()  # type: ignore[no-any-return]


def test_templates_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_TEMPLATES", 1)
    model, generator = Tree().eval(), random.Random(0)
    with torch.no_grad(), cellc.compile(model, backend="eager") as compiled:
        for _ in range(10):
            trees = [_tree(generator, generator.randrange(1, 9)) for _ in range(5)]
            for tree, got in zip(trees, compiled.map([(t,) for t in trees]), strict=True):
                torch.testing.assert_close(got, model(tree))
        assert compiled.stats()["caches"]["cells"] < 12  # those made again are the same


def test_batches_keep_few_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_FORMS", 2)
    with cellc.compile(lambda xs: [x + 1 for x in xs], backend="eager", batch_dim=0) as compiled:
        for count in (1, 2, 3, 4, 1, 2):
            xs = [torch.randn(3, 2) for _ in range(count)]
            torch.testing.assert_close(compiled(xs), [x + 1 for x in xs])
            assert compiled._batches is not None and len(compiled._batches._outputs) <= 2


def test_nothing_is_left_of_many_requests() -> None:
    """Of requests that end in every way."""
    with cellc.compile(decode, backend="eager", options={"max_steps": 15}) as compiled:
        for n in range(60):
            x = torch.full((2,), float(n % 12))
            threads = [threading.Thread(target=compiled.submit, args=(x,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            compiled.map([x, x - 90, torch.randn(3, 2)], return_exceptions=True)
            compiled.submit(x).cancel()
        compiled.submit(torch.zeros(2) + 11).result(30)
    engine = compiled._engine
    assert engine._arenas.live == engine.flight.live_bytes == engine.flight.futures == 0
    assert engine._scheduler.num_requests == 0 and not engine._onward.held
    assert len(engine.flight._numbers) == engine.flight._next_number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_larger_than_the_queue_runs_in_portions(workers: int) -> None:
    model, x = nn.GRU(4, 8, batch_first=True).eval(), torch.randn(7, 5, 4)
    options = {"workers": workers}
    with (
        cellc.compile(
            model, backend="eager", batch_dim=0, max_queue=2, options=options
        ) as compiled,
        torch.no_grad(),
    ):
        for got in (compiled(x), *compiled.map([x, x])):
            torch.testing.assert_close(got[0], model(x)[0])
