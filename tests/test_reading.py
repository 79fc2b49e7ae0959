"""Forwards that read values: questions, guesses, paths, and what ends them."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from comparing import alike
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cells import product_in_order
from torch import Tensor, nn

import cellc
from cellc import paths
from cellc.errors import RequestTimeout, StepsError

V, H, EOS = 12, 16, 3
RUNS: list[int] = []  # of the forward's Python


class Decoder(nn.Module):
    """A GRU that reads tokens, and one that says some until it says EOS."""

    def __init__(self, limit: int = 20) -> None:
        super().__init__()
        self.limit = limit
        self.embedding = nn.Embedding(V, H)
        self.encoder, self.decoder = nn.GRUCell(H, H), nn.GRUCell(H, H)
        self.out = nn.Linear(H, V)

    def forward(self, tokens: Tensor) -> Tensor:
        RUNS.append(len(tokens))
        h = torch.zeros(H)
        for token in tokens:
            h = self.encoder(self.embedding(token), h)
        token, said = torch.tensor(0), []
        for _ in range(self.limit):
            h = self.decoder(self.embedding(token), h)
            token = self.out(h).argmax(-1)
            if token == EOS:
                break
            said.append(token)
        return torch.stack(said) if said else torch.zeros(0, dtype=torch.int64)


def make(kind: Callable[..., nn.Module] = Decoder, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = kind(**options).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)  # decisions that differ
    return model


def sentences(count: int, seed: int = 0) -> list[Tensor]:
    draw = random.Random(seed)
    return [
        torch.tensor([draw.randrange(V) for _ in range(draw.randint(1, 9))]) for _ in range(count)
    ]


def same(got: Any, want: Any) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_company_does_not_matter(backend: Any) -> None:
    model, requests = make(), sentences(200)
    want = [model(x) for x in requests]
    assert len({len(x) for x in want}) > 2
    with cellc.compile(model, backend=backend) as compiled:
        same(compiled.map(requests), want)
        same([compiled(x) for x in requests], want)
        order = list(range(len(requests)))
        random.Random(1).shuffle(order)
        futures = {i: compiled.submit(requests[i]) for i in order}
        same([futures[i].result(60) for i in range(len(requests))], want)


class Scores(Decoder):
    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        h, steps = torch.zeros(H), 0
        for token in tokens:
            h = self.encoder(self.embedding(token), h)
        while h.max() > 0.2 and steps < 4:
            h, steps = self.decoder(h, h) * 0.5, steps + 1
        return self.out(h), steps


def test_company_does_not_matter_bit_for_bit_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "matmul", product_in_order)  # BLAS, in the interpreter, need not
    requests = sentences(12)
    with cellc.compile(make(Scores), backend="triton") as compiled:
        together = compiled.map(requests)
        alone = [compiled(x) for x in requests]
        order = random.Random(2).sample(range(12), 12)
        shuffled = dict(zip(order, compiled.map([requests[i] for i in order]), strict=True))
        for i, (scores, steps) in enumerate(together):
            for other in (alone[i], shuffled[i]):
                assert torch.equal(scores, other[0]) and steps == other[1]


def test_from_many_threads() -> None:
    model, requests = make(), sentences(60)
    want = [model(x) for x in requests]
    results: dict[int, Tensor] = {}
    with cellc.compile(model, backend="eager") as compiled:

        def work(part: int) -> None:
            for i in range(part, len(requests), 4):
                results[i] = compiled(requests[i])

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    same([results[i] for i in range(len(requests))], want)


def test_paths_seen_run_no_python_of_the_user() -> None:
    model, requests = make(), sentences(80)
    with cellc.compile(model, backend="eager") as compiled:
        want = compiled.map(requests)
        compiled.map(requests)  # the engine may run ahead further than it did
        before, learned = len(RUNS), compiled._compiler.paths.learned
        same(compiled.map(requests), want)
        assert len(RUNS) == before
        assert compiled._compiler.paths.learned == learned


def test_few_paths_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MAX_BRANCHES", 4)
    model, requests = make(), sentences(60)
    want = [model(x) for x in requests]
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            same(compiled.map(requests), want)
        assert len(compiled._compiler.paths) <= 4


class Dictionary(Decoder):
    """A token is a dictionary key: as many outcomes as there are tokens."""

    def forward(self, tokens: Tensor) -> list[int]:  # type: ignore[override]
        names = {i: i * i for i in range(V)}
        h, found = torch.zeros(H), []
        for token in tokens:
            h = self.encoder(self.embedding(token), h)
            found.append(names[int(self.out(h).argmax())])
        return found


def test_many_outcomes_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MAX_OUTCOMES", 2)
    model, requests = make(Dictionary), sentences(40)
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            assert compiled.map(requests) == [model(x) for x in requests]


def _numbers(x: Tensor) -> Any:
    a, b = x[0].item(), x.abs().sum().item()
    best = max(a, b) if a > 0 else min(a, -b)
    return {"sum": a + b, "ratio": a / (b + 1), "less": a < b, "best": best, "text": f"{a:.2f}"}


def _mask(x: Tensor) -> Tensor:
    return x[x > 0] * 2


def _bounds(x: Tensor) -> Tensor:
    n = (x.abs().sum() % 3).long()
    return x[: n + 1]


def _whole(x: Tensor) -> Any:
    n = int(x.abs().sum()) % 4
    names = ["a", "b", "c", "d"]
    return names[n], [i * 2 for i in range(n)], torch.zeros(n + 1) + x[0]


def _nothing(x: Tensor) -> Tensor:
    return x[x > 1e6]


def _equal(x: Tensor) -> Tensor:
    return x + 1 if torch.equal(x.sort().values, x) else x - 1


def _converges(x: Tensor) -> tuple[Tensor, int]:
    steps = 0
    while steps < 30:
        new = torch.tanh(x * 0.3)
        if torch.allclose(new, x, atol=1e-2) or x.equal(new):
            break
        x, steps = new, steps + 1
    return x, steps


def _close(x: Tensor) -> list[bool]:
    return [
        x.allclose(x + 0.1, atol=0.2, rtol=0),
        torch.allclose(input=x, other=x[:1], rtol=0.5),
        torch.allclose(x / 0, x / 0, equal_nan=True),
        torch.is_nonzero(x[0] > 0),
        x[:1].is_nonzero(),
    ]


def _tries(x: Tensor) -> Tensor:
    try:
        if x.sum() > 0:
            raise ValueError("positive")
        return x
    except ValueError:
        return x * 3


def _buffer(x: Tensor) -> Tensor:
    out = torch.zeros(4, 3)
    for i in range(4):
        if x.sum() * (i - 1) > 0:
            out[i] = x * i
        out[i] += 1
    out[1].fill_(7)
    return out


def _loop(x: Tensor) -> tuple[Tensor, int]:
    steps = 0
    while x.norm() > 0.1 and steps < 30:
        x = x * 0.5
        steps += 1
    return x, steps


IDIOMS = [
    _numbers,
    _mask,
    _bounds,
    _whole,
    _nothing,
    _equal,
    _converges,
    _close,
    _tries,
    _loop,
]


@pytest.mark.parametrize("function", IDIOMS)
def test_idioms(function: Callable[[Tensor], Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randn(3, generator=generator) * 2 for _ in range(12)]
    with cellc.compile(function, backend="eager") as compiled:
        for _ in range(2):
            for x, got in zip(requests, compiled.map(requests), strict=True):
                alike(got, function(x))


def test_writes_through_views_are_right_or_refused() -> None:
    x = torch.randn(3)
    with cellc.compile(_buffer, backend="eager") as compiled:
        try:
            got = compiled(x)
        except cellc.CellcError as error:
            assert "test_reading.py" in str(error)
        else:
            torch.testing.assert_close(got, _buffer(x))


class Endless(Decoder):
    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.zeros(H)
        while (h < 2).all():  # a GRU's state is never outside [-1, 1]
            h = self.encoder(self.embedding(tokens[0]), h)
        return h


@pytest.mark.parametrize(
    ("options", "error"), [({"max_steps": 40}, StepsError), ({"timeout": 0.5}, RequestTimeout)]
)
def test_an_endless_forward_is_stopped(options: Any, error: type[Exception]) -> None:
    with cellc.compile(make(Endless), backend="eager", options=options) as compiled:
        with pytest.raises(error, match="options="):
            compiled(torch.tensor([1]))
        assert compiled.stats()["running"] == 0 and compiled._engine._arenas.idle()


class Raises(Decoder):
    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.zeros(H)
        for token in tokens:
            h = self.encoder(self.embedding(token), h)
            if h[0] > 0.9:
                raise KeyError("too much")
        return h


def test_an_error_reaches_its_own_caller() -> None:
    model, requests = make(Raises), sentences(40)
    with cellc.compile(model, backend="eager") as compiled:
        results = compiled.map(requests, return_exceptions=True)
        failed = 0
        for x, got in zip(requests, results, strict=True):
            try:
                want = model(x)
            except KeyError:
                failed += 1
                assert isinstance(got, KeyError)
                frames, tb = [], got.__traceback__
                while tb is not None:
                    frames.append(tb.tb_frame.f_code)
                    tb = tb.tb_next
                assert Raises.forward.__code__ in frames
            else:
                torch.testing.assert_close(got, want)
        assert 0 < failed < len(requests)
        assert compiled._engine._arenas.idle()


class Odd(Exception):
    """Cannot be made of its arguments."""

    def __init__(self, step: int, *, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step


class RaisesAlike(Decoder):
    def forward(self, tokens: Tensor) -> Tensor:
        if self.embedding(tokens[0]).sum() > 0:
            raise Odd(3, why="too much")
        return tokens


def test_each_request_has_an_error_of_its_own() -> None:
    model = make(RaisesAlike)
    requests = [torch.tensor([i % V]) for i in range(3 * V)]
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            results = compiled.map(requests, return_exceptions=True)
            errors = [x for x in results if isinstance(x, Exception)]
            assert len(set(map(id, errors))) == len(errors) > 3
            assert {(type(x), str(x), x.step) for x in errors} == {(Odd, "3: too much", 3)}  # type: ignore[attr-defined]
            with pytest.raises(Odd, match="too much"):
                compiled.map(requests)
        futures = [compiled.submit(x) for x in requests]
        errors = [f.exception(30) for f in futures if f.exception(30) is not None]  # type: ignore[misc]
        assert len(set(map(id, errors))) == len(errors) > 3
        assert not any(getattr(x, "__notes__", []) for x in errors)


def test_trials_are_not_counted() -> None:
    with cellc.compile(make(RaisesAlike), backend="eager") as compiled:
        requests = [torch.tensor([i % V]) for i in range(V)]
        results = compiled.map(requests, return_exceptions=True)
        stats = compiled.stats()
        assert stats["requests"] == V
        assert stats["failed"] == sum(isinstance(x, Exception) for x in results)


class Moody(Decoder):
    """What it does depends on more than its request."""

    def __init__(self) -> None:
        super().__init__()
        self.moods: Any = iter(())

    def forward(self, tokens: Tensor) -> Any:
        mood = next(self.moods, "")
        if mood == "raises":
            raise KeyError("moody")
        if mood == "returns":
            return tokens
        h = self.embedding(tokens[0])
        for k in range(4):
            if h[k] > 0:
                h = h * 2
        return h


@pytest.mark.parametrize("mood", ["raises", "returns"])
def test_a_forward_that_runs_otherwise_the_next_time(mood: str) -> None:
    model, error = make(Moody), {"raises": KeyError, "returns": cellc.UnsupportedError}[mood]
    requests = [torch.tensor([i]) for i in range(V)]
    with cellc.compile(model, backend="eager") as compiled:
        compiled(requests[0])
        compiled(requests[0])
        futures = []
        model.moods = iter([mood] * 1000)
        for x in requests:
            futures.append(compiled.submit(x))
        errors = [f.exception(30) for f in futures]
        assert any(type(e) is error for e in errors)
        assert all(e is None or type(e) is error for e in errors)
        model.moods = iter(())
        for x in requests:
            torch.testing.assert_close(compiled(x), model(x))
        assert compiled._engine._arenas.idle()


def test_an_argument_is_not_written() -> None:
    def add(x: Tensor) -> Tensor:
        positive = bool(x.sum() > 0)
        x += 1
        return x * 2 if positive else x

    with cellc.compile(add, backend="eager") as compiled:
        for value in (1.0, -5.0, 2.0):
            given = torch.full((3,), value)
            with pytest.raises(cellc.UnsupportedError, match=r"x = x\.clone\(\)"):
                compiled(given)
            assert given[0] == value


def _in_slots(x: Tensor) -> Tensor:
    """Writes in place, with views that are dropped, before and after it reads."""
    out = x * 1.0
    for i in range(3):
        out[i] = out[i] * 2 + out[:2].sum()
        if out[i] > 1:
            out[0:1] -= out[2:3] * 0.5
        out += out[i : i + 1].sum()
    return out


def test_writes_after_reads() -> None:
    generator = torch.Generator().manual_seed(3)
    requests = [torch.randn(3, generator=generator) for _ in range(20)]
    with cellc.compile(_in_slots, backend="eager") as compiled:
        for _ in range(2):
            for x, got in zip(requests, compiled.map(requests), strict=True):
                torch.testing.assert_close(got, _in_slots(x.clone()), rtol=1e-4, atol=1e-5)


def test_random_paths_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MAX_BRANCHES", 40)
    monkeypatch.setattr(paths, "MAX_OUTCOMES", 3)
    torch.manual_seed(0)
    model = Machine([-0.3, 0.0, 0.1, 0.2], 9).eval().requires_grad_(False)

    def numbers(x: Tensor) -> tuple[int, ...]:
        return tuple([int(y * 3) for y in x])

    for forward, size in ((model, (4, 2)), (numbers, (4,))):
        with cellc.compile(forward, backend="eager") as compiled:
            known = compiled._compiler.paths
            for _ in range(30):
                requests = [torch.randn(size) for _ in range(10)]
                for x, got in zip(requests, compiled.map(requests), strict=True):
                    alike(got, forward(x))
                reached = {ask.leg for ask in known._branches if not ask.leg.script}
                reached |= {branch.leg for branch in known._branches.values()}
                assert all(ask.leg in reached for ask in known._branches)
                assert len(known) <= 40
                assert len(known._onward) <= 2 * len(known)
            known.forget()
            assert not len(known) and not known._onward


class Sampler(Decoder):
    def forward(self, token: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        h, said = torch.zeros(H), []
        while len(said) < self.limit:
            h = self.decoder(self.embedding(token), h)
            scores = torch.softmax(self.out(h) / 4, -1)
            token = torch.multinomial(scores, 1, generator=generator)[0]
            if token.item() == EOS:
                break
            said.append(token)
        return torch.stack(said) if said else torch.zeros(0, dtype=torch.int64)


def test_sampling_depends_on_the_seed_alone() -> None:
    model = make(Sampler)

    def requests() -> list[tuple[Tensor, torch.Generator]]:
        return [(torch.tensor(i % V), torch.Generator().manual_seed(i)) for i in range(40)]

    first, others = requests(), requests()
    want = [model(*request) for request in first]
    with cellc.compile(model, backend="eager") as compiled:
        same(compiled.map(others), want)
        for (_, a), (_, b) in zip(first, others, strict=True):
            assert torch.equal(a.get_state(), b.get_state())  # it goes on where eager's would
        same([compiled(*request) for request in requests()[::-1]][::-1], want)


def test_several_samples() -> None:
    def forward(x: Tensor, generator: torch.Generator) -> Tensor:
        total = torch.zeros(())
        for row in x:
            total = total + row[torch.multinomial(row.softmax(-1), 2, generator=generator)].sum()
        return total + torch.multinomial(x.softmax(-1), 3, generator=generator)

    x = torch.randn(3, 6)
    want = [forward(x, torch.Generator().manual_seed(seed)) for seed in range(20)]
    with cellc.compile(forward, backend="eager") as compiled:
        same(compiled.map([(x, torch.Generator().manual_seed(s)) for s in range(20)]), want)


class Machine(nn.Module):
    """A little program: states by thresholds on a random recurrence."""

    def __init__(self, bounds: list[float], most: int) -> None:
        super().__init__()
        self.cell, self.bounds, self.most = nn.GRUCell(2, 4), bounds, most

    def forward(self, x: Tensor) -> tuple[Tensor, list[int]]:
        h, trail = torch.zeros(4), []
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            for k, bound in enumerate(self.bounds):
                if h[k % 4] > bound:
                    h = h * 0.5 if k % 2 else h + x[t].sum()
                    trail.append(k)
                    if len(trail) >= self.most:
                        return h, trail
        return h, trail


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.floats(-0.8, 0.8), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99)
)
def test_little_programs(bounds: list[float], most: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Machine(bounds, most).eval().requires_grad_(False)
    requests = [torch.randn(n, 2) for n in (1, 4, 2, 6, 3, 4)]
    with cellc.compile(model, backend="eager") as compiled:
        for x, (h, trail) in zip(requests, compiled.map(requests), strict=True):
            want, steps = model(x)
            torch.testing.assert_close(h, want, rtol=1e-4, atol=1e-5)
            assert trail == steps


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_a_weight_is_returned(shape: tuple[int, ...]) -> None:
    class Default(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.default = nn.Linear(4, 3), nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Any:
            n = self.linear(x).sum()
            return (self.default, n.item()) if n > 0 else (self.default + n, 1.0)

    torch.manual_seed(0)
    model = Default().eval()
    requests = [torch.randn(4) for _ in range(8)]
    with cellc.compile(model, backend="eager") as compiled, torch.no_grad():
        for _ in range(2):
            for x, got in zip(requests, compiled.map(requests), strict=True):
                torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
                got[0].zero_()  # no weight's memory


TYPED = """
import torch, cellc
from torch import nn

class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x):
        h, told = x.new_zeros(4), []
        for _ in range(9):
            h = self.cell(x, h)
            told.append(int(h.argmax()))
            if h.sum() > 0.5: break
        return told

model = Greedy().eval()
with torch.no_grad(), cellc.compile(model, backend="eager") as compiled:
    for _ in range(5):
        x = torch.randn(4)
        assert compiled(x) == model(x)
print(cellc.errors.__name__, compiled.stats()["failed"])
"""


def test_a_model_that_is_in_no_file() -> None:
    """As typed at a prompt: the innermost line of the user's is still told from generated code."""
    done = subprocess.run(
        [sys.executable, "-c", TYPED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cellc.errors", "0"]


class Pointing(nn.Module):
    """Attends to its tokens, and reads at which it points."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(V, H), nn.GRUCell(H, H)

    def forward(self, tokens: Tensor) -> Tensor:
        h, memory, said = torch.zeros(H), self.embedding(tokens), []
        for _ in range(4):
            at = (memory @ h).argmax()
            h = self.cell(self.embedding(tokens[at]), h)
            said.append(at)
            if at == 0:
                break
        return torch.stack(said)


def test_cells_that_came_later_have_other_names() -> None:
    """Every length makes cells, and lets those of the lengths before go."""
    model = make(Pointing, seed=1)
    with cellc.compile(model, backend="eager") as compiled:
        for n in (5, 1, 9, 3):
            tokens = torch.arange(n) % V
            assert torch.equal(compiled(tokens), model(tokens))
            names = list(compiled.cells)
            assert len(set(names)) == len(names)
            assert all(compiled.cells[name].name == name for name in names)
