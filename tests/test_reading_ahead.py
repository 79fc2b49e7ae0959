"""Indices outside tables on paths that are run ahead and not taken: nobody fails for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comparing import alike
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beside import Chance
from torch import Tensor, nn

import cellc
from cellc import launcher, pacing
from cellc.errors import RequestError
from cellc.kernels import cpp, cpp_build

H, END = 8, 9
BACKENDS = ["eager"] if cpp_build.find_compiler() is None else ["eager", "cpp"]
OUTSIDE = "an index outside its table"  # what an outcome is where PyTorch raises IndexError


class Speaker(nn.Module):
    """Its table has no row for the word that ends what it says, nor for the one before."""

    def __init__(self, rows: int = END) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(rows, H), nn.Linear(H, END + 1)
        self.cell = nn.GRUCell(H, H)

    def forward(self, word: Tensor, h: Tensor) -> Any:
        said = []
        for _ in range(8):
            h = self.cell(self.table(word), h)
            word = self.out(h).argmax()
            said.append(word)
            if word == END:
                break
        return torch.stack(said)


class Streaming(Speaker):
    def forward(self, word: Tensor, h: Tensor) -> Any:
        for _ in range(8):
            h = self.cell(self.table(word), h)
            word = self.out(h).argmax()
            if word == END:
                break
            yield word
        yield h


class Reader(Speaker):
    """What it reads is outside the table once it does not look."""

    def forward(self, words: Tensor, h: Tensor) -> Any:
        for word in words:
            h = self.cell(self.table(word), h)
            if self.out(h).argmax() == END:
                break
        return h


class Chains(nn.Module):
    """Two chains beside each other, questions of both, and look-ups that hang on the answers."""

    def __init__(self, sizes: tuple[int, int], bounds: tuple[float, float]) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(12, H), nn.GRUCell(H, H), nn.GRUCell(H, H)
        self.small, self.smaller = nn.Embedding(sizes[0], H), nn.Embedding(sizes[1], H)
        self.out, self.gate, self.bounds = nn.Linear(H, 12), nn.Linear(H, 1), bounds

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(words, [])

    def run(self, words: Tensor, said: list[Tensor]) -> tuple[Tensor, Tensor]:
        a = b = torch.zeros(H, dtype=torch.float64)
        for word in words:
            x = self.table(word)
            a, b = self.one(x, a), self.two(x, b)
            best, gate = self.out(a).argmax(), self.gate(b)
            if gate.item() > self.bounds[0]:
                a = torch.tanh(a + self.small(best))
            if self.gate(a).item() > self.bounds[1]:
                b = b * 0.5 + self.smaller(self.out(b).argmax())
            said.append(best)
            if self.gate(a + b).item() < -1:
                break
        return torch.stack(said), a + b


class Pieces(Chains):
    def forward(self, words: Tensor) -> Any:
        a = b = torch.zeros(H, dtype=torch.float64)
        for word in words:
            a = self.one(self.table(word), a + b)
            if self.gate(a).item() > self.bounds[0]:
                yield a
                a = torch.tanh(a + self.small(self.out(a).argmax()))
            b = self.two(a, b)
            if self.gate(b).item() > self.bounds[1]:
                yield b
                b = b * 0.5 + self.smaller(self.out(b).argmax())
        yield a + b


def make(model: nn.Module, scale: float = 2.5) -> Any:
    for parameter in model.parameters():
        parameter.data.mul_(scale)  # decisions that differ
    return model.eval().requires_grad_(False).double()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives: a result, or the pieces of a stream; and whether it ends outside."""
    pieces: list[Any] = []
    try:
        result = call()
        if not isinstance(result, Iterator):
            return result, False
        for piece in result:
            pieces.append(piece)
        return pieces, False
    except IndexError:
        return pieces, True
    except RequestError as error:
        assert OUTSIDE in str(error) or "expected indices in" in str(error), error
        return pieces, True


@contextmanager
def running_ahead(steps: int, beside: bool = False) -> Iterator[None]:
    """So many steps, beside the host's work by chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.Launcher, "ahead", lambda *_: steps)
        if beside:
            patch.setattr(cpp, "CppLaunch", Chance)
            patch.setattr(pacing, "BESIDE", -1.0)
            patch.setattr(pacing, "ROWS_BESIDE", 1)
            patch.setattr(launcher.Launcher, "concurrent", True)
            patch.setattr(
                launcher.Launcher,
                "worth_beside",
                lambda self: self._scheduler.peek() is not None and Chance.random.random() < 0.8,
            )
        yield


def left_nothing(compiled: cellc.Compiled) -> None:
    stats = compiled.stats()
    assert stats["running"] == stats["live_bytes"] == stats["waiting"] == 0
    assert not compiled._engine._onward.held


def starts(count: int, rows: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randint(0, rows, ()), torch.randn(H).double()) for _ in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_of_what_is_said_is_in_no_table(backend: Any) -> None:
    torch.manual_seed(3)
    model, requests = make(Speaker()), starts(60, END)
    want = [model(*x) for x in requests]
    assert 10 < sum(len(w) < 8 for w in want) < 50
    with running_ahead(8), cellc.compile(model, backend=backend) as compiled:
        for _ in range(3):
            alike(compiled.map(requests), want)
            alike([compiled(*x) for x in requests], want)
        assert compiled.stats()["failed"] == 0
        left_nothing(compiled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Speaker, Streaming])
def test_who_comes_there_fails(kind: type[Speaker], backend: Any) -> None:
    """The error names the model's own line; what was yielded before comes before it."""
    torch.manual_seed(3)
    model, requests = make(kind(END - 1)), starts(60, END - 1)
    want = [outcome(lambda x=x: model(*x)) for x in requests]  # type: ignore[misc]
    assert 5 < sum(fails for _, fails in want) < 55
    line = kind.forward.__code__.co_firstlineno + 2 + (kind is Speaker)
    with running_ahead(8), cellc.compile(model, backend=backend) as compiled:
        for _ in range(2):
            if kind is Speaker:
                found = compiled.map(requests, return_exceptions=True)
                got = [(None, True) if isinstance(g, RequestError) else (g, False) for g in found]
                for error in found:
                    if isinstance(error, RequestError):
                        assert OUTSIDE in str(error) and error.origin is not None
                        assert error.origin == f"test_reading_ahead.py:{line}"
                alike([g for g, fails in got if not fails], [w for w, fails in want if not fails])
            else:
                got = [outcome(lambda x=x: compiled.stream(*x)) for x in requests]  # type: ignore[misc]
                alike([g for g, _ in got], [w for w, _ in want])
            assert [fails for _, fails in got] == [fails for _, fails in want]
        left_nothing(compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_that_is_not_looked_at_may_be_anything(backend: Any) -> None:
    torch.manual_seed(3)
    model = make(Reader())
    draw = random.Random(0)
    requests = [
        (torch.tensor([draw.randrange(END) if draw.random() < 0.85 else 99 for _ in range(8)]), h)
        for _, h in starts(80, END)
    ]
    want = [outcome(lambda x=x: model(*x)) for x in requests]  # type: ignore[misc]
    unread = [99 in x and not fails for (x, _), (_, fails) in zip(requests, want, strict=True)]
    assert sum(unread) > 5 and sum(fails for _, fails in want) > 5
    with running_ahead(8), cellc.compile(model, backend=backend) as compiled:
        for _ in range(2):
            found = compiled.map(requests, return_exceptions=True)
            for (words, _), got, (result, fails) in zip(requests, found, want, strict=True):
                if fails:
                    at = words.tolist().index(99)
                    assert isinstance(got, RequestError), got
                    assert f"'words': got 99 at position {at}, expected indices in [0, 9)" in str(
                        got
                    )
                else:
                    alike(got, result)
        left_nothing(compiled)


def test_by_several_workers() -> None:
    torch.manual_seed(3)
    model, requests = make(Speaker(END - 1)), starts(200, END - 1)
    want = [outcome(lambda x=x: model(*x)) for x in requests]  # type: ignore[misc]
    with (
        running_ahead(8),
        cellc.compile(model, backend=BACKENDS[-1], options={"workers": 2}) as compiled,
    ):
        for _ in range(3):
            futures = [compiled.submit(*x) for x in requests]
            got = [outcome(lambda f=f: f.result(60)) for f in futures]  # type: ignore[misc]
            assert [fails for _, fails in got] == [fails for _, fails in want]
            alike([g for g, fails in got if not fails], [w for w, fails in want if not fails])


class Step(Speaker):
    def forward(self, word: Tensor, h: Tensor) -> Any:
        for _ in range(3):
            h = self.cell(self.table(word), h)
            word = self.out(h).argmax()
            if word == END:
                break
        return word, h


def test_sessions_are_left_as_they_were_by_steps_that_fail() -> None:
    torch.manual_seed(3)
    model, requests = make(Step(END - 2)), starts(20, END - 2)
    options = {"carry": {"h": "1"}, "backend": BACKENDS[-1]}
    with running_ahead(4), cellc.compile(model, **options) as compiled:  # type: ignore[arg-type]
        sessions = [compiled.session({"h": h}) for _, h in requests]
        states = [h for _, h in requests]
        failed = 0
        for turn in range(6):
            words = [(word + turn) % (END - 2) for word, _ in requests]
            calls = zip(sessions, [(word,) for word in words], strict=True)
            found = compiled.step_all(list(calls), return_exceptions=True)
            for i, (got, word) in enumerate(zip(found, words, strict=True)):
                (want, fails) = outcome(lambda w=word, h=states[i]: model(w, h))  # type: ignore[misc]
                assert isinstance(got, RequestError) == fails
                failed += fails
                if not fails:
                    alike(got, want)
                    states[i] = want[1]
        assert 3 < failed < 100


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)),
    st.sampled_from([Chains, Pieces]),
    st.sampled_from(BACKENDS),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 999),
)
def test_as_in_pytorch(
    sizes: tuple[int, int],
    bounds: tuple[float, float],
    kind: type[Chains],
    backend: Any,
    steps: int,
    beside: bool,
    seed: int,
) -> None:
    """Whoever PyTorch gives a result gets that; whom it refuses, after the same pieces."""
    torch.manual_seed(seed)
    model, draw = make(kind(sizes, bounds)), random.Random(seed)
    requests = [torch.randint(0, 12, (draw.randint(1, 7),)) for _ in range(24)]
    want = [outcome(lambda x=x: model(x)) for x in requests]  # type: ignore[misc]
    with (
        running_ahead(steps, beside and backend == "cpp"),
        cellc.compile(model, backend=backend) as compiled,
    ):
        for _ in range(2):
            if kind is Pieces:
                streams = [compiled.stream(x) for x in requests]
                got = [outcome(lambda s=s: s) for s in streams]  # type: ignore[misc]
                alike([g for g, _ in got], [w for w, _ in want])
            else:
                futures = [compiled.submit(x) for x in requests]
                got = [outcome(lambda f=f: f.result(60)) for f in futures]  # type: ignore[misc]
                alike([g for g, fails in got if not fails], [w for w, fails in want if not fails])
            assert [fails for _, fails in got] == [fails for _, fails in want]
        left_nothing(compiled)
