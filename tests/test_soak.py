"""A soak: mixed models under load, with everything that goes wrong, for SOAK_SECONDS.

Every result is compared with eager PyTorch; afterwards nothing may be left: no rows, no slots, no
threads, no growth of memory. The short form runs with the others; the long one takes 10 minutes, or
what the environment variable SOAK_SECONDS says (`pytest --slow tests/test_soak.py -s`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc import plan_cache
from cellc.launch import Concurrent

MAX_PLANS = 60  # kept of a model: fewer than its requests have structures
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(30, 8), nn.LSTM(8, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0][-1])  # type: ignore[no-any-return]


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.merge = nn.Sequential(nn.Linear(16, 8), nn.Tanh())

    def forward(self, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return self.embedding(torch.tensor(tree))  # type: ignore[no-any-return]
        return self.merge(torch.cat([self(tree[0]), self(tree[1])]))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Greedy: reads what it says, until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(9, 8), nn.GRUCell(8, 8), nn.Linear(8, 9)

    def said(self, tokens: Tensor) -> Iterator[Tensor]:
        h = torch.zeros(8)
        for token in tokens:
            h = self.cell(self.embedding(token), h)
        token = tokens[0]
        for _ in range(12):
            h = self.cell(self.embedding(token), h)
            token = self.head(h).argmax()
            if token == 3:
                return
            yield token

    def forward(self, tokens: Tensor) -> list[Tensor]:
        h = torch.zeros(8)
        for token in tokens:
            h = self.cell(self.embedding(token), h)
        said, token = [], tokens[0]
        for _ in range(12):
            h = self.cell(self.embedding(token), h)
            token = self.head(h).argmax()
            if token == 3:
                break
            said.append(token)
        return said


class Speaker(Decoder):
    def forward(self, tokens: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        yield from self.said(tokens)


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, state)
        return self.head(h), h


class Injected(RuntimeError):
    """What kernels raise on purpose."""


class Flaky:
    """A kernel that raises now and then."""

    def __init__(self, kernel: Any, share: list[float]) -> None:
        self.kernel, self.share, self.generator = kernel, share, random.Random(1)
        self.source = kernel.source

    def __call__(self, *args: Any) -> Any:
        self._perhaps()
        return self.kernel(*args)

    def _perhaps(self) -> None:
        if self.generator.random() < self.share[0]:
            raise Injected


class FlakyBeside(Flaky):
    """One whose launches can run beside the host's work."""

    def prepare(self, *args: Any) -> Any:
        self._perhaps()
        return self.kernel.prepare(*args)


def flaky(kernel: Any, share: list[float]) -> Flaky:
    return (FlakyBeside if isinstance(kernel, Concurrent) else Flaky)(kernel, share)


def words(generator: random.Random, most: int, vocabulary: int) -> Tensor:
    count = generator.randrange(1, most)
    return torch.tensor([generator.randrange(vocabulary) for _ in range(count)])


def tree(generator: random.Random, leaves: int) -> Any:
    if leaves == 1:
        return generator.randrange(30)
    left = generator.randrange(1, leaves)
    return tree(generator, left), tree(generator, leaves - left)


EXPECTED = (Injected, CancelledError, asyncio.CancelledError, cellc.Overloaded)


class Soak:
    """Compiled models, and what was seen of them."""

    def __init__(self, backend: Any) -> None:
        self.share = [0.0]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.compiled: dict[str, cellc.Compiled] = {}
        self.models: dict[str, nn.Module] = {}
        for kind in (Classifier, Tree, Decoder, Speaker, Listener):
            torch.manual_seed(1)
            name, model = kind.__name__, kind().eval()
            carry = {"state": "1"} if kind is Listener else None
            options = {"timeout": 20.0, "max_steps": 100}
            self.models[name] = model
            self.compiled[name] = cellc.compile(
                model, backend=backend, carry=carry, max_queue=400, max_batch=32, options=options
            )
            self._make_flaky(self.compiled[name])

    def _make_flaky(self, compiled: cellc.Compiled) -> None:
        store = compiled._compiler.store
        make = store._make_kernel
        store._make_kernel = lambda cell: flaky(make(cell), self.share)  # type: ignore[method-assign]

    def want(self, name: str, *args: Any) -> Any:
        with torch.no_grad():
            made = self.models[name](*args)
            return list(made) if name == "Speaker" else made

    def same(self, name: str, got: Any, args: tuple[Any, ...]) -> None:
        self.counts["compared"] += 1
        try:
            torch.testing.assert_close(got, self.want(name, *args), **CLOSE)
        except AssertionError as error:
            self.wrong.append(f"{name}{args}: {error}")

    def _request(self, name: str, generator: random.Random) -> tuple[Any, ...]:
        if name == "Tree":
            return (tree(generator, generator.randrange(1, 8)),)  # of 196 shapes
        return (words(generator, 40, 30) if name == "Classifier" else words(generator, 8, 9),)

    # -- what threads do, a round at a time

    def map(self, generator: random.Random) -> None:
        name = generator.choice(["Classifier", "Tree", "Decoder", "Speaker"])
        given = [self._request(name, generator) for _ in range(generator.randrange(1, 24))]
        for args, got in zip(
            given, self.compiled[name].map(given, return_exceptions=True), strict=True
        ):
            self._judge(name, args, got)

    def call(self, generator: random.Random) -> None:
        name = generator.choice(["Classifier", "Tree", "Decoder"])
        args = self._request(name, generator)
        try:
            got: Any = self.compiled[name](*args)
        except Exception as error:
            got = error
        self._judge(name, args, got)

    def _judge(self, name: str, args: tuple[Any, ...], got: Any) -> None:
        if isinstance(got, BaseException):
            self.counts[type(got).__name__] += 1
            if not isinstance(got, EXPECTED):
                self.wrong.append(f"{name}: {got!r}")
        else:
            self.same(name, got, args)

    def submit(self, generator: random.Random) -> None:
        """Futures, some of them cancelled."""
        name = generator.choice(["Classifier", "Tree", "Decoder", "Speaker"])
        futures = []
        for _ in range(generator.randrange(1, 40)):
            args = self._request(name, generator)
            try:
                futures.append((args, self.compiled[name].submit(*args)))
            except cellc.Overloaded:
                self.counts["Overloaded"] += 1
        for _, future in futures:
            if generator.random() < 0.2:
                future.cancel()
        for args, future in futures:
            try:
                got: Any = future.result(60)
            except BaseException as error:
                got = error
            self._judge(name, args, got)

    def stream(self, generator: random.Random) -> None:
        """Streams, some closed early or dropped."""
        args = self._request("Speaker", generator)
        stop = generator.randrange(1, 16)
        got: list[Tensor] = []
        want = self.want("Speaker", *args)
        try:
            with self.compiled["Speaker"].stream(*args) as pieces:
                for piece in pieces:
                    got.append(piece)
                    if len(got) == stop:
                        break
        except Injected:
            self.counts["Injected"] += 1
            want = want[: len(got)]
        self.counts["streams"] += 1
        if [int(x) for x in got] != [int(x) for x in want[:stop]]:
            self.wrong.append(f"stream of {args}: {got}, not {want}")

    def tasks(self, generator: random.Random) -> None:
        """asyncio tasks, some cancelled."""

        async def one(args: tuple[Any, ...]) -> Any:
            if generator.random() < 0.5:
                return await self.compiled["Speaker"].submit_async(*args)
            return [piece async for piece in self.compiled["Speaker"].astream(*args)]

        async def some() -> None:
            given = [self._request("Speaker", generator) for _ in range(8)]
            made = [asyncio.create_task(one(args)) for args in given]
            await asyncio.sleep(generator.random() * 0.02)
            for task in made[::3]:
                task.cancel()
            done = await asyncio.gather(*made, return_exceptions=True)
            for args, got in zip(given, done, strict=True):
                self._judge("Speaker", args, got)

        asyncio.run(some())

    def sessions(self, generator: random.Random) -> None:
        """Sessions that come and go; some are left for their lifetime to end."""
        model, compiled = self.models["Listener"], self.compiled["Listener"]
        tensors = torch.Generator().manual_seed(generator.randrange(1 << 30))
        members = [
            [compiled.session({"state": torch.zeros(8)}, lifetime=5.0), torch.zeros(8)]
            for _ in range(generator.randrange(1, 12))
        ]
        for _ in range(generator.randrange(1, 10)):
            steps = [(member, torch.randn(4, generator=tensors)) for member in members]
            results = compiled.step_all(
                [(member[0], (x,)) for member, x in steps], return_exceptions=True
            )
            for (member, x), got in zip(steps, results, strict=True):
                if isinstance(got, BaseException):  # its state is as before
                    self._judge("Listener", (), got)
                else:
                    self.same("Listener", got, (x, member[1]))
                    with torch.no_grad():
                        _, member[1] = model(x, member[1])
        for session, _ in members:
            if generator.random() < 0.7:
                session.close()

    def impatient(self, generator: random.Random) -> None:
        """Nobody waits for the answers."""
        for name in ("Classifier", "Decoder"):
            with contextlib.suppress(cellc.Overloaded):
                self.compiled[name].submit(*self._request(name, generator))
        pieces = iter(self.compiled["Speaker"].stream(*self._request("Speaker", generator)))
        with contextlib.suppress(StopIteration, Injected):
            next(pieces)

    # -- afterwards

    def settle(self) -> None:
        """Wait until nothing runs; check that nothing is left."""
        for name, compiled in self.compiled.items():
            engine = compiled._engine
            for _ in range(600):
                if not (engine.num_running or engine.num_waiting):
                    break
                time.sleep(0.05)
            with engine._loop.holding():
                found = {
                    "live rows": engine._arenas.live,
                    "live bytes": engine.flight.live_bytes,
                    "futures": engine.flight.futures,
                    "waiting": engine.num_waiting,
                    "running": engine.num_running,
                    "scheduled": engine._scheduler.num_requests,
                    "ready": engine._scheduler.num_ready,
                    "held": len(engine._onward.held),
                    "numbers": engine.flight._next_number - len(engine.flight._numbers),
                }
            assert not any(found.values()), (name, found)
            caches = compiled.stats()["caches"]
            assert caches["plans"] <= MAX_PLANS and caches["branches"] <= 1 << 10
            assert caches["kernels"] <= caches["cells"] < 100 and caches["constants"] < 1000


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(
    seconds: float, backend: Any, told: Callable[[str], None], enough: int = 0
) -> tuple[Soak, list[int]]:
    """Run, on a slow machine longer until `enough` results were compared; returns what was seen,
    and resident bytes after every tenth of the time.
    """
    test = Soak(backend)
    kinds = [test.map, test.call, test.submit, test.stream, test.tasks, test.sessions]
    kinds += [test.impatient]
    ends, memory = time.monotonic() + seconds, []
    stop = threading.Event()

    def work(number: int) -> None:
        generator = random.Random(number)
        while not stop.is_set():
            kind = generator.choice(kinds)
            try:
                kind(generator)
            except cellc.Overloaded:
                test.counts["Overloaded"] += 1
            except BaseException as error:
                test.wrong.append(f"{kind.__name__}: {error!r}")
                raise
            test.counts["rounds"] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    for part in range(1, 11):
        while time.monotonic() < start + part * seconds / 10 and not stop.wait(0.05):
            test.share[0] = 0.02 if int(time.monotonic()) % 2 else 0.0
        gc.collect()
        memory.append(resident() if sys.platform == "linux" else 0)
        told(f"{part * seconds / 10:.0f} s: {memory[-1] >> 20} MB, {dict(test.counts)}")
    while test.counts["compared"] < enough and time.monotonic() < start + 120:
        ends = time.monotonic()
        stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a request never ends"
    assert time.monotonic() < ends + 130
    test.share[0] = 0.0
    test.settle()
    return test, memory


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "seconds",
    [20, pytest.param(float(os.environ.get("SOAK_SECONDS", 600)), marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_soak(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MAX_PLANS", MAX_PLANS)
    gc.collect()
    before = {thread.ident for thread in threading.enumerate()}
    backend = "eager" if seconds < 60 else "auto"
    test, memory = soak(seconds, backend, lambda text: print(text, flush=True))
    assert test.wrong == [], test.wrong[:10]
    assert test.counts["compared"] > 10 * seconds and test.counts["Injected"] > 0
    assert test.counts["CancelledError"] > 0
    generator = random.Random(0)
    for name in ("Classifier", "Tree", "Decoder", "Speaker"):
        given = [test._request(name, generator) for _ in range(20)]
        for args, got in zip(given, test.compiled[name].map(given), strict=True):
            test.same(name, got, args)
    for compiled in test.compiled.values():
        print({k: v for k, v in compiled.stats().items() if not isinstance(v, dict)})
        print(compiled.stats()["caches"])
        compiled.close()
    assert test.wrong == []
    gc.collect()
    left = [t for t in threading.enumerate() if t.ident not in before]
    assert left == []
    if seconds >= 60 and sys.platform == "linux":  # after half of the time it is warm
        warm = memory[len(memory) // 2 :]
        assert max(warm) - min(warm) <= 0.04 * min(warm), memory
