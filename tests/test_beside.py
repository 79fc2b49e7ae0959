"""Launches beside the host's work: results, order and rows are as if each ran at once.

Kernels are made to run at the earliest or at the latest moment, by chance, whatever they cost.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_soak import (
    MAX_PLANS,
    Classifier,
    Decoder,
    Flaky,
    FlakyBeside,
    Injected,
    Speaker,
    Tree,
    flaky,
    soak,
    tree,
    words,
)
from torch import Tensor, nn

import cellc
from cellc import intake, launcher, pacing, plan_cache
from cellc.kernels import cpp, cpp_build

pytestmark = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")


class Chance(cpp.CppLaunch):
    """Runs when it begins, or when it is waited for."""

    __slots__ = ("_done",)
    random = random.Random(0)
    begun = late = 0

    def begin(self) -> None:
        early = self.random.random() < 0.5
        self._done = self() if early else None
        Chance.begun += 1
        Chance.late += not early

    def end(self) -> tuple[Sequence[int], float]:
        return (self() if self._done is None else self._done), 1e-5


@pytest.fixture(autouse=True)
def chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "CppLaunch", Chance)
    monkeypatch.setattr(pacing, "BESIDE", -1.0)
    monkeypatch.setattr(pacing, "ROWS_BESIDE", 1)
    monkeypatch.setattr(pacing, "ADMITTED", 3)
    monkeypatch.setattr(launcher.Launcher, "concurrent", True)
    monkeypatch.setattr(
        launcher.Launcher,
        "worth_beside",
        lambda self: self._scheduler.peek() is not None and Chance.random.random() < 0.8,
    )
    Chance.begun = Chance.late = 0


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def failures(compiled: cellc.Compiled, model: nn.Module, generator: random.Random) -> int:
    """How many of 480 requests meet a fault; the others' results are the model's."""
    failed = 0
    for _ in range(12):
        given = [words(generator, 9, 9) for _ in range(40)]
        for x, got in zip(given, compiled.map(given, return_exceptions=True), strict=True):
            if isinstance(got, Exception):
                assert isinstance(got, Injected)
                failed += 1
            else:
                same(got, model(x))
    return failed


@torch.no_grad()
def test_arenas_grow_while_launches_run() -> None:
    """More rows than there is room for at first, in requests that come while others run."""
    model, generator = Classifier().eval(), random.Random(1)
    with cellc.compile(model, backend="cpp") as compiled:
        for count in (3, 60, 200):
            given = [words(generator, 40, 30) for _ in range(count)]
            for x, got in zip(given, compiled.map(given), strict=True):
                same(got, model(x))
    assert Chance.late > 20 and Chance.begun - Chance.late > 20


@pytest.mark.parametrize("make", [Decoder, Speaker])
@torch.no_grad()
def test_answers_of_one_half_are_read_while_the_other_runs(make: Any) -> None:
    """What a request leaves is used again only after its last launch."""
    model, generator = make().eval(), random.Random(2)
    whole = make is Decoder
    with cellc.compile(model, backend="cpp", max_batch=16) as compiled:
        for _ in range(4):
            given = [words(generator, 9, 9) for _ in range(80)]
            for x, got in zip(given, compiled.map(given), strict=True):
                same(got, model(x) if whole else list(model(x)))
    assert Chance.late > 20


@torch.no_grad()
def test_what_follows_is_made_while_a_launch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where all answers are as expected, and is never run where one is not; others come
    meanwhile, and arenas grow.
    """
    torch.manual_seed(8)
    model, generator = Decoder().eval(), random.Random(7)
    for parameter in model.parameters():
        parameter.mul_(2.5)  # decisions that differ
    assert len({len(model(words(generator, 9, 9))) for _ in range(30)}) > 3
    monkeypatch.setattr(pacing, "ROWS_BESIDE", 1 << 20)
    monkeypatch.setattr(launcher.Launcher, "ahead", lambda *_: generator.choice((1, 1, 2)))
    follow, tried = launcher.Launcher.follow, {True: 0, False: 0}

    def counted(self: Any, before: Any, foreseen: Any) -> Any:
        running = follow(self, before, foreseen)
        tried[running is not None] += 1
        return running

    monkeypatch.setattr(launcher.Launcher, "follow", counted)
    with cellc.compile(model, backend="cpp") as compiled:
        for count in (2, 5, 40, 300):
            given = [words(generator, 9, 9) for _ in range(count)]
            for x, got in zip(given, compiled.map(given), strict=True):
                same(got, model(x))
            futures = []
            for x in given:
                futures.append(compiled.submit(x))
                if generator.random() < 0.1:
                    time.sleep(1e-3)
            for x, future in zip(given, futures, strict=True):
                same(future.result(60), model(x))
        stats = compiled.stats()
        assert stats["running"] == stats["live_bytes"] == stats["failed"] == 0
    assert min(tried.values()) >= 5, tried


class Stacked(nn.Module):
    """What the lower cell gives is an answer, and is read by both cells."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)
        self.lower, self.upper = nn.GRUCell(8, 8), nn.RNNCell(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        state, top, token = torch.zeros(8), torch.zeros(8), tokens[0]
        for _ in range(12):
            state = self.lower(self.embedding(token), state)
            token = self.head(state).argmax()
            if token.item() < 8:
                break
            top = self.upper(state, top)
        return top


@torch.no_grad()
def test_calls_of_several_cells_follow_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(9)
    model, generator = Stacked().eval(), random.Random(8)
    monkeypatch.setattr(pacing, "ROWS_BESIDE", 1 << 20)
    foresee, mixed = launcher.Launcher.foresee, 0

    def counted(self: Any, running: Any, *, shared: bool) -> Any:
        nonlocal mixed
        mixed += len(running.batch.held) > 0 and running.batch.held_cell < 0
        return foresee(self, running, shared=shared)

    monkeypatch.setattr(launcher.Launcher, "foresee", counted)
    with cellc.compile(model, backend="cpp") as compiled:
        for _ in range(8):
            given = [words(generator, 9, 9) for _ in range(60)]
            for x, got in zip(given, compiled.map(given), strict=True):
                same(got, model(x))
    assert mixed > 0


@torch.no_grad()
def test_what_follows_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom a launch that ran ends has a result, though what follows it fails."""
    torch.manual_seed(8)
    model, generator = Decoder().eval(), random.Random(3)
    for parameter in model.parameters():
        parameter.mul_(2.5)  # decisions that differ
    monkeypatch.setattr(pacing, "ROWS_BESIDE", 1 << 20)
    monkeypatch.setattr(launcher.Launcher, "ahead", lambda *_: 1)
    foresee, inside, refused = launcher.Launcher.foresee, [False], [0]

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside[0] = True
        try:
            return foresee(self, *args, **kwargs)
        finally:
            inside[0] = False

    class Refusing(FlakyBeside):
        """Foreseen launches cannot be made."""

        def _perhaps(self) -> None:
            if inside[0]:
                refused[0] += 1
                raise Injected

    monkeypatch.setattr(launcher.Launcher, "foresee", noting)
    with cellc.compile(model, backend="cpp") as compiled:
        compiled.map([words(generator, 9, 9) for _ in range(40)])
        kernels = compiled._compiler.kernels
        for number, kernel in list(kernels.items()):
            kernels[number] = Refusing(kernel, [0.0])
        for _ in range(6):
            given = [words(generator, 9, 9) for _ in range(40)]
            for x, got in zip(given, compiled.map(given), strict=True):
                same(got, model(x))
    assert refused[0] > 5


@torch.no_grad()
def test_trees_that_come_and_go() -> None:
    model, generator = Tree().eval(), random.Random(3)
    with cellc.compile(model, backend="cpp", max_batch=7) as compiled:
        given = [tree(generator, generator.randint(1, 12)) for _ in range(60)]
        futures = [compiled.submit(x) for x in given]
        dropped = {n for n in range(len(given)) if n % 7 == 0 and futures[n].cancel()}
        for n, future in enumerate(futures):
            if n not in dropped:
                same(future.result(30), model(given[n]))
    assert Chance.begun > 5


@torch.no_grad()
def test_a_failure_while_another_launch_runs() -> None:
    """It fails the requests of its own launch; no others, and nobody gets another's answer."""
    model, generator = Decoder().eval(), random.Random(4)
    with cellc.compile(model, backend="cpp", max_batch=8) as compiled:
        warm = [words(generator, 9, 9) for _ in range(40)]
        compiled.map(warm)
        kernels = compiled._compiler.kernels
        for number, kernel in list(kernels.items()):
            kernels[number] = flaky(kernel, [0.02])
        failed = failures(compiled, model, generator)
        assert 0 < failed < 400
        assert compiled.stats()["running"] == compiled.stats()["live_bytes"] == 0


class TwoChains(nn.Module):
    """Two chains of calls beside each other, of which both are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.one, self.two = nn.GRUCell(8, 8), nn.GRUCell(8, 8)
        self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        a = b = torch.zeros(8)
        said = []
        for token in tokens:
            x = self.table(token)
            a, b = self.one(x, a), self.two(x, b)
            p, q = self.first(a).argmax(), self.second(b).argmax()
            if p == 1:
                a = torch.tanh(a + b)
            if q == 2:
                b = b * 0.5
            said += [p, q]
            if p == q:
                break
        return torch.stack(said), a + b


class Sometimes(Flaky):
    """A kernel whose launches run beside the host's work, or at once, by chance."""

    @property
    def prepare(self) -> Any:
        if Chance.random.random() < 0.5:
            raise AttributeError("prepare")
        return self.kernel.prepare


@pytest.mark.parametrize("fault", [0.02, 0.0])
@torch.no_grad()
def test_requests_of_two_launches_at_once(fault: float) -> None:
    """Where the first of them fails, or the second is run at once, nobody goes on before both are
    read: what is known of the second stands in the table until then.
    """
    torch.manual_seed(0)
    model, generator = TwoChains().eval(), random.Random(4)
    with cellc.compile(model, backend="cpp", max_batch=8) as compiled:
        compiled.map([words(generator, 9, 9) for _ in range(40)])
        kernels = compiled._compiler.kernels
        for number, kernel in list(kernels.items()):
            kernels[number] = flaky(kernel, [fault]) if fault else Sometimes(kernel, [0.0])
        failed = failures(compiled, model, generator)
        assert bool(failed) == bool(fault) and failed < 400
        assert compiled.stats()["running"] == compiled.stats()["live_bytes"] == 0


def test_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak, with launches by chance."""
    monkeypatch.setattr(plan_cache, "MAX_PLANS", MAX_PLANS)
    run, _ = soak(4.0, "cpp", lambda line: None, enough=200)
    for compiled in run.compiled.values():
        compiled.close()
    assert run.wrong == [], run.wrong[:10]
    assert run.counts["compared"] >= 200 and Chance.late > 100


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def test_threads_run_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the library: launches of many rows, begun and ended, twice, dropped, two at once."""
    monkeypatch.undo()
    monkeypatch.setattr(pacing, "BESIDE", -1.0)
    began: list[Any] = []
    begin = cpp.CppLaunch.begin

    def noting(self: Any) -> None:
        began.append(self)
        begin(self)

    monkeypatch.setattr(cpp.CppLaunch, "begin", noting)
    model = Wide().eval()
    with cellc.compile(model, backend="cpp") as compiled:
        given = [torch.randn(n % 30 + 1, 64) for n in range(300)]
        for x, got in zip(given, compiled.map(given), strict=True):
            same(got, model(x))
        assert began and all(launch.end() == ((), 0.0) for launch in began)  # ended, each
        one, other = began[0], began[-1]
        one.begin()
        other.begin()  # the team works for the first: the caller does this alone
        assert other.end()[1] > 0 and one.end()[1] > 0
        one.begin()
        del one, other
        began.clear()
        gc.collect()  # a launch that nobody ended is ended before its memory goes
        for x, got in zip(given, compiled.map(given), strict=True):
            same(got, model(x))


@torch.no_grad()
def test_nobodys_time_runs_while_others_are_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timeout, requests of a map are queued when all are known."""
    monkeypatch.setattr(intake, "TOGETHER", 4)
    model, generator = Tree().eval(), random.Random(6)
    with cellc.compile(model, backend="cpp", options={"timeout": 100.0}) as compiled:
        compiled.map([(tree(generator, n),) for n in (1, 2, 3, 4)])  # compared with the model
        given = [(tree(generator, generator.randint(1, 12)),) for _ in range(30)]
        queued: list[int] = []
        enqueue = compiled._serving.enqueue

        def noting(tickets: Any, **kwargs: Any) -> None:
            queued.append(len(tickets))
            enqueue(tickets, **kwargs)

        monkeypatch.setattr(compiled._serving, "enqueue", noting)
        for (x,), got in zip(given, compiled.map(given), strict=True):
            same(got, model(x))
        assert queued == [len(given)]


@torch.no_grad()
def test_new_structures_run_while_others_are_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, whatever comes twice, fails, or is no structure at all."""
    monkeypatch.setattr(intake, "TOGETHER", 4)
    model, generator = Tree().eval(), random.Random(5)
    with cellc.compile(model, backend="cpp", max_batch=300) as compiled:
        compiled.map([(tree(generator, n),) for n in (1, 2, 3, 4)])  # compared with the model
        given: list[Any] = [tree(generator, generator.randint(1, 12)) for _ in range(90)]
        given[40], given[50], given[60] = given[3], given[41], (1, (2, 99))
        ran = compiled.stats()["rows"]
        seen: list[int] = []
        enqueue = compiled._serving.enqueue

        def noting(tickets: Any, **kwargs: Any) -> None:
            seen.append(compiled.stats()["rows"] - ran)
            enqueue(tickets, **kwargs)

        monkeypatch.setattr(compiled._serving, "enqueue", noting)
        made = compiled.map([(x,) for x in given], return_exceptions=True)
        assert len(seen) > 10 and 0 < seen[-1]  # some ran before the last were known
        assert isinstance(made[60], cellc.CellcError)
        for n, (x, got) in enumerate(zip(given, made, strict=True)):
            if n != 60:
                same(got, model(x))

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        more = [tree(generator, generator.randint(9, 15)) for _ in range(40)]
        with monkeypatch.context() as patched:
            patched.setattr(compiled._serving, "nudge", interrupted)
            with pytest.raises(KeyboardInterrupt):
                compiled.map([(x,) for x in more])
        stats = compiled.stats()
        assert stats["running"] == stats["waiting"] == stats["live_bytes"] == 0
        for x, got in zip(more, compiled.map([(x,) for x in more]), strict=True):
            same(got, model(x))
