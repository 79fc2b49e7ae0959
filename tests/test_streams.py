"""Streams: forwards that are generators."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc

H = 4


class Speaks(nn.Module):
    """Yields a state at a time, until one is large or there are no more inputs."""

    def __init__(self, bound: float = 0.6) -> None:
        super().__init__()
        self.cell, self.bound = nn.GRUCell(3, H), bound

    def forward(self, x: Tensor) -> Iterator[Any]:
        h = torch.zeros(H)
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            yield {"h": h * 2, "t": t}
            if h.abs().max() > self.bound:
                yield h.abs().max().item()
                return


class Fails(Speaks):
    def forward(self, x: Tensor) -> Iterator[Any]:
        yield x + 1
        if x.sum() > 0:
            raise KeyError("after a piece")
        yield x + 2


class Stops(Speaks):
    """Yields states, and returns at one that is large."""

    def forward(self, x: Tensor) -> Iterator[Any]:
        h = torch.zeros(H)
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            if h.abs().max() > self.bound:
                return
            yield h


class Raises(Speaks):
    """Yields states, and raises after one that is large."""

    def forward(self, x: Tensor) -> Iterator[Any]:
        h = torch.zeros(H)
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            yield h
            if h.abs().max() > self.bound:
                yield h * 2
                raise KeyError(t)


class Breaks(Speaks):
    """Raises whatever it is given, after a piece."""

    def forward(self, x: Tensor) -> Iterator[Any]:
        yield x + 1
        yield x.sum()
        raise LookupError("always")


def make(kind: type[Speaks] = Speaks) -> Speaks:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def requests() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3) for n in (1, 5, 9, 3, 12, 7, 9, 2)]


def test_pieces_equal_those_of_the_model() -> None:
    model = make()
    with cellc.compile(model, backend="eager") as compiled:
        lengths = set()
        for _ in range(2):
            for x in requests():
                got, want = list(compiled.stream(x)), list(model(x))
                lengths.add(len(want))
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(list(compiled(x)), want)
        wanted = [list(model(x)) for x in requests()]
        torch.testing.assert_close(compiled.map(requests()), wanted)
        torch.testing.assert_close(compiled.submit(requests()[1]).result(30), wanted[1])
        assert len(lengths) > 2


def test_pieces_come_before_the_end() -> None:
    x = torch.randn(9, 3) * 0.01
    with cellc.compile(make(), backend="eager") as compiled:
        list(compiled.stream(x))
        compiled._engine.launcher.ahead = lambda seconds: 1  # type: ignore[method-assign,assignment]
        stream = compiled.stream(x)
        next(stream)
        assert compiled.stats()["running"] == 1
        assert len(list(stream)) == 8


def idle(compiled: cellc.Compiled) -> bool:
    stats = compiled.stats()
    return (
        stats["running"] == stats["waiting"] == 0
        and compiled._engine._arenas.idle()
        and compiled._engine._scheduler.num_requests == 0
    )


@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize("kind", [Speaks, Stops])
def test_what_is_run_ahead_is_not_yielded(kind: type[Speaks], steps: int) -> None:
    model = make(kind)
    with cellc.compile(model, backend="eager") as compiled:
        compiled._engine.launcher.ahead = lambda seconds: steps  # type: ignore[method-assign,assignment]
        for _ in range(3):
            list(compiled.stream(torch.randn(12, 3) * 0.01))  # guesses that go far
            for x in requests():
                torch.testing.assert_close(list(compiled.stream(x)), list(model(x)))
        torch.testing.assert_close(compiled.map(requests()), [list(model(x)) for x in requests()])
        assert idle(compiled)


def taken(pieces: Iterator[Any]) -> tuple[list[Any], str]:
    """What an iterator gives until it raises, and what it raises."""
    given = []
    try:
        for piece in pieces:
            given.append(piece)
    except Exception as error:
        return given, repr(error)
    return given, ""


@pytest.mark.parametrize("steps", [1, 32])
@pytest.mark.parametrize("kind", [Raises, Breaks, Fails])
def test_pieces_before_an_error_are_given(kind: type[Speaks], steps: int) -> None:
    model = make(kind)
    with cellc.compile(model, backend="eager") as compiled:
        compiled._engine.launcher.ahead = lambda seconds: steps  # type: ignore[method-assign,assignment]
        for _ in range(3):
            for x in [torch.randn(12, 3) * 0.01, *requests()]:
                (got, error), (want, reason) = taken(compiled.stream(x)), taken(model(x))
                torch.testing.assert_close(got, want)
                assert error == reason
        results = compiled.map(requests(), return_exceptions=True)
        for x, got in zip(requests(), results, strict=True):
            pieces, error = taken(model(x))
            assert repr(got) == error if error else len(got) == len(pieces)
        errors = [id(x) for x in results if isinstance(x, Exception)]
        assert len(set(errors)) == len(errors)
        assert idle(compiled)


def test_a_stream_that_was_closed_gives_nothing_more() -> None:
    with cellc.compile(make(), backend="eager") as compiled:
        x = torch.randn(9, 3) * 0.01
        stream = compiled.stream(x)
        next(stream)
        with compiled._engine._loop.holding():  # somebody runs the loop
            stream.close()
            stream.close()
        assert next(stream, None) is None
        compiled(torch.randn(1, 3)).close()
        assert idle(compiled)


@pytest.mark.parametrize("how", ["close", "del", "with"])
def test_closing_frees_the_rows(how: str) -> None:
    x = torch.randn(9, 3) * 0.01
    with cellc.compile(make(), backend="eager") as compiled:
        stream = compiled.stream(x)
        next(stream)
        if how == "close":
            stream.close()
            stream.close()
            with pytest.raises(StopIteration):
                next(stream)
        elif how == "del":
            del stream
        else:
            with stream:
                pass
        assert idle(compiled)
        assert len(list(compiled.stream(x))) == 9


def test_an_error_comes_after_the_pieces_before_it() -> None:
    with cellc.compile(make(Fails), backend="eager") as compiled:
        stream = compiled.stream(torch.ones(3))
        torch.testing.assert_close(next(stream), torch.full((3,), 2.0))
        with pytest.raises(KeyError, match="after a piece"):
            next(stream)
        assert len(list(compiled.stream(-torch.ones(3)))) == 2
        assert idle(compiled)


def test_in_asyncio() -> None:
    model = make()

    async def pieces(compiled: cellc.Compiled, x: Tensor) -> list[Any]:
        return [piece async for piece in compiled.astream(x)]

    async def first(compiled: cellc.Compiled, x: Tensor) -> Any:
        stream = compiled.astream(x)
        async for piece in stream:
            await stream.aclose()  # type: ignore[attr-defined]
            return piece

    async def all_at_once(compiled: cellc.Compiled) -> list[Any]:
        return await asyncio.gather(*[pieces(compiled, x) for x in requests()])

    with cellc.compile(model, backend="eager") as compiled:
        torch.testing.assert_close(
            asyncio.run(all_at_once(compiled)), [list(model(x)) for x in requests()]
        )
        x = torch.randn(9, 3) * 0.01
        torch.testing.assert_close(asyncio.run(first(compiled, x)), next(iter(model(x))))
        list(compiled.stream(x))
        assert idle(compiled)


@pytest.mark.parametrize("after", [0.0, 0.002, 0.02])
def test_cancelled_tasks_free_their_rows(after: float) -> None:
    async def some(compiled: cellc.Compiled) -> None:
        async def pieces(x: Tensor) -> None:
            async for _ in compiled.astream(x):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(pieces(torch.randn(40, 3) * 0.01)) for _ in range(5)]
        await asyncio.sleep(after)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with cellc.compile(make(), backend="eager") as compiled:
        compiled._engine.launcher.ahead = lambda seconds: 1  # type: ignore[method-assign,assignment]
        asyncio.run(some(compiled))
        list(compiled.stream(torch.randn(2, 3)))
        assert idle(compiled)


def interrupting(
    function: Callable[..., Any], after: int, patched: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A function that interrupts the main thread once, after some calls."""
    left = [after]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and threading.current_thread() is threading.main_thread():
            patched.undo()
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["kernel", "_complete", "deliver", "_move", "free", "finish"])
def test_an_interrupted_turn_leaves_others_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    with cellc.compile(model, backend="eager") as compiled:
        engine = compiled._engine
        engine.launcher.ahead = lambda seconds: 2  # type: ignore[method-assign,assignment]
        x = torch.randn(9, 3) * 0.01
        compiled.map([x, *requests()])
        for after in (0, 1, 2, 4, 8):
            with engine._loop.holding():
                streams = [compiled.stream(y) for y in requests()]
                futures = [compiled.submit(y) for y in requests()]
            owners: list[Any] = [
                engine.compiler,
                engine._turns,
                engine._turns._moves,
                engine.flight,
            ]
            owner = next(x for x in owners if hasattr(x, name))
            monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), after, monkeypatch))
            with contextlib.suppress(KeyboardInterrupt):
                compiled.map([x] * 3)
            monkeypatch.undo()
            for y, stream, future in zip(requests(), streams, futures, strict=True):
                want = list(model(y))
                torch.testing.assert_close(list(stream), want)
                torch.testing.assert_close(future.result(30), want)
            assert idle(compiled) and engine.flight.live_bytes == engine.flight.futures == 0


def then_interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        raise KeyboardInterrupt

    return call


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


def test_an_interrupted_lone_request_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Plain().eval(), torch.randn(4, 3)
    with torch.no_grad():
        want = model(x)
    with cellc.compile(model, backend="eager", max_queue=1) as compiled:
        compiled(x)
        engine = compiled._engine
        for owner, name in (
            (engine, "enqueue"),
            (engine._scheduler, "add"),
            (engine.flight, "copy_in"),
            *((regions, "take") for regions in engine._arenas._regions),
        ):
            engine._replays.clear()
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, then_interrupted(getattr(owner, name)))
                with contextlib.suppress(KeyboardInterrupt):
                    compiled(x)
            assert idle(compiled) and compiled.stats()["waiting"] == 0, name
            assert engine._scheduler.num_requests == 0, name
            torch.testing.assert_close(compiled(x), want)
        engine._replays.clear()
        with monkeypatch.context() as patched:  # midway in what is interrupted
            patched.setattr(engine._scheduler, "next", then_interrupted(lambda *_, **__: None))
            patched.setattr(
                engine._scheduler, "cancel", lambda n: n and pytest.fail("it is not whole")
            )
            with pytest.raises(KeyboardInterrupt):
                compiled(x)
        assert idle(compiled) and engine._scheduler.num_requests == 0
        torch.testing.assert_close(compiled(x), want)


def test_a_forward_that_returns_is_no_stream() -> None:
    with cellc.compile(nn.Linear(3, 2).eval(), backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError, match="yield"):
            compiled.stream(torch.randn(3))


def test_a_piece_that_the_generator_changes_later() -> None:
    def growing(x: Tensor) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []
        while len(found) < 4:
            x = torch.sin(x) * 2
            found.append(x)
            yield found
            if x.sum() > 0.5:
                return

    generator = torch.Generator().manual_seed(0)
    requests = [torch.randn(3, generator=generator) for _ in range(10)]
    with cellc.compile(growing, backend="eager") as compiled:
        for x in requests:
            for count, (piece, want) in enumerate(
                zip(compiled.stream(x), growing(x), strict=True), 1
            ):
                assert len(piece) == count
                torch.testing.assert_close(piece, want)
