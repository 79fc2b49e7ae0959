"""Who runs a loop: one thread at a time, and none after an interruption wherever it came."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import InvalidStateError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.frontends.placeholder import modes_kept
from cellc.kernels import cpp_build
from cellc.loop import Loop
from cellc.turns import Turns
from cellc.waiting import Condition, Future
from tests.interruptions import Interruption


def make() -> Loop:
    return Loop(Condition())


def test_one_thread_at_a_time() -> None:
    loop, inside, most = make(), 0, 0

    def work() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.0005)
        inside -= 1

    def several() -> None:
        for _ in range(20):
            assert loop.run(work, wait=True)

    threads = [threading.Thread(target=several) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1 and not loop.held


def test_who_does_not_wait_is_told() -> None:
    loop, there, go = make(), threading.Event(), threading.Event()

    def work() -> None:
        there.set()
        go.wait(30)

    thread = threading.Thread(target=lambda: loop.run(work, wait=True))
    thread.start()
    assert there.wait(30)
    assert loop.held and not loop.mine
    assert not loop.run(lambda: pytest.fail("another thread holds it"), wait=False)
    go.set()
    thread.join(30)
    assert loop.run(lambda: None, wait=False)


def test_who_holds_it_does_not_get_it_again() -> None:
    loop = make()

    def work() -> None:
        assert loop.mine
        assert not loop.run(lambda: pytest.fail("it is held"), wait=False)
        assert loop.mine

    assert loop.run(work, wait=True) and not loop.held
    with loop.holding():
        work()
    assert not loop.held


@pytest.mark.parametrize("wait", [False, True])
def test_an_interruption_anywhere_leaves_it_free(wait: bool) -> None:
    loop, number = make(), 0
    while True:
        number += 1
        ran = []

        def work(ran: list[int] = ran) -> None:
            ran.append(1)
            ran.append(len(ran))

        try:
            with Interruption(number) as points:
                loop.run(work, wait=wait)
        except KeyboardInterrupt:
            assert not loop.held
        else:
            break
    assert points.count > 4 and ran == [1, 1]
    other: list[bool] = []  # the guard is free, too
    thread = threading.Thread(target=lambda: other.append(loop.run(lambda: None, wait=False)))
    thread.start()
    thread.join(30)
    assert other == [True]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


def _blocking(compiled: cellc.Compiled, x: Tensor) -> Any:
    return compiled.map([x, x[:1], x])


def _streaming(compiled: cellc.Compiled, x: Tensor) -> Any:
    with cellc.compile(_twice, backend="eager") as streams:
        return list(streams.stream(x))


def _twice(x: Tensor) -> Any:
    yield x + 1
    yield x + 2


# one that comes in a `__del__` is printed, not raised
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("use", [_blocking, _streaming], ids=lambda f: f.__name__)
def test_interruptions_in_calls_leave_others_right(use: Any) -> None:
    """At each of 40 points, spread over all of a call of a new model's: other requests end."""
    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(3, 4)
    with torch.no_grad():
        want = model(x)
    with cellc.compile(model, backend="eager") as compiled, Interruption() as points:
        use(compiled, x)
    assert points.count > 1000
    for number in range(1, points.count, points.count // 40):
        compiled = cellc.compile(model, backend="eager")
        future = compiled.submit(x)
        try:
            with Interruption(number):
                use(compiled, x)
        except KeyboardInterrupt:
            pass
        torch.testing.assert_close(future.result(30), want)
        torch.testing.assert_close(compiled(x), want)
        engine = compiled._engine
        assert engine._arenas.live == engine.flight.live_bytes == engine.flight.futures == 0
        compiled.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruptions_of_what_follows_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C twice: the second comes while requests in flight are put back. None is lost, none has
    another's rows.
    """
    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(3, 4)
    longer = torch.randn(9, 4)
    with torch.no_grad():
        want, want_longer = model(x), model(longer)
    restart, complete = Turns.restart, Turns._complete

    def points_of(number: int) -> int:
        """Interrupt `number` points after the first interruption; how many there were until then,
        or until it was over.
        """
        with cellc.compile(model, backend="eager") as compiled, monkeypatch.context() as patch:
            compiled(x), compiled(longer)
            engine, passed, counts = compiled._engine, [0], [0]

            def leaves(self: Any, *given: Any) -> Any:
                passed[0] += 1
                if passed[0] == 2:  # some launches were completed, some requests are in flight
                    raise KeyboardInterrupt
                return complete(self, *given)

            def interrupted(self: Any, cause: Any = None) -> None:
                patch.setattr(Turns, "restart", restart)
                points = Interruption(number)
                try:
                    with points:
                        restart(self, cause)
                finally:
                    counts[0] = points.count

            patch.setattr(Turns, "_complete", leaves)
            patch.setattr(Turns, "restart", interrupted)
            others = [compiled._ticket((y,), {}) for y in (x, longer, x)]
            engine.enqueue(others)
            with pytest.raises(KeyboardInterrupt):
                compiled.map([x, longer, x])
            for _ in range(20):  # turns: a request that is lost never ends
                engine.step()
            for ticket, result in zip(others, (want, want_longer, want), strict=True):
                torch.testing.assert_close(ticket.result, result)
            for _ in range(2):
                got = compiled.map([longer, x, longer])
                for one, result in zip(got, (want_longer, want, want_longer), strict=True):
                    torch.testing.assert_close(one, result)
            assert engine._arenas.live == engine.flight.live_bytes == engine.flight.futures == 0
            assert not engine._inbox
            return counts[0]

    count = points_of(0)
    assert count > 30
    numbers = list(range(1, count, 3))
    assert [points_of(n) for n in numbers] == numbers


def test_modes_that_an_interruption_leaves_on_are_taken_off() -> None:
    """Torch's own exit from a mode can be interrupted before it takes the mode off."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    outer, kept = Mode(), 0
    with outer:
        number = 0
        while True:
            number += 1
            try:
                with modes_kept(), Interruption(number), Mode():
                    torch.ones(2).add(1)
            except KeyboardInterrupt:
                pass
            else:
                break
            assert torch.overrides._get_current_function_mode_stack() == [outer]
            kept += 1
    assert kept > 8


def _others_get_in(enter: Any) -> bool:
    """Does another thread get what may be held?"""
    done = threading.Event()

    def other() -> None:
        enter()
        done.set()

    threading.Thread(target=other, daemon=True).start()
    return done.wait(30)


def _tell(condition: Condition) -> None:
    with condition:
        condition.notify_all()


def test_an_interruption_anywhere_in_a_wait_leaves_the_condition_as_it_was() -> None:
    condition, number = Condition(), 0
    while True:
        number += 1
        try:
            with Interruption(number), condition:
                with condition:
                    condition.wait(0.001)
                assert condition._is_owned()
        except KeyboardInterrupt:
            assert not condition._is_owned()
        else:
            break
        assert _others_get_in(functools.partial(_tell, condition))
        assert not condition._waiters
    assert number > 8


def test_a_condition_wakes_those_that_wait() -> None:
    condition, come, woken = Condition(), [], []

    def wait() -> None:
        with condition:
            come.append(1)
            woken.append(condition.wait(30))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(come) < 3:
        time.sleep(0.001)
    with condition:
        condition.notify_all()
    for thread in threads:
        thread.join(30)
    assert woken == [True] * 3
    with condition:
        assert not condition.wait(0.001)


def _note(told: list[int], k: int, _: Any) -> None:
    told.append(k)


def test_an_interruption_anywhere_in_telling_a_future() -> None:
    """Told again, it has told everybody, each callback once."""
    number = 0
    while True:
        number += 1
        future: Future[int] = Future()
        told: list[int] = []
        for k in range(3):
            future.add_done_callback(functools.partial(_note, told, k))
        waiting = threading.Thread(target=future.result, args=(30,))
        waiting.start()
        try:
            with Interruption(number):
                future.set_result(3)
        except KeyboardInterrupt:
            try:
                future.set_result(3)
            except InvalidStateError:
                future.tell()
        else:
            break
        waiting.join(30)
        assert not waiting.is_alive() and _others_get_in(future.done)
        assert len(told) == len(set(told)) and len(told) >= 2  # one may be what was interrupted
    assert number > 8


def test_a_build_that_is_interrupted_is_made_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpp_build, "require_compiler", lambda: "g++")
    monkeypatch.setattr(cpp_build, "_key", lambda source, compiler: source + compiler)
    monkeypatch.setattr(cpp_build, "_from_disk", lambda source, name, compiler: source + name)
    number = 0
    while True:
        number += 1
        source = f"// {number}"
        try:
            with Interruption(number):
                made = cpp_build.load(source, "some")
        except KeyboardInterrupt:
            made = None
        assert _others_get_in(lambda source=source: cpp_build.load(source, "some"))  # type: ignore[misc]
        if made is not None:
            break
    assert number > 8
    for key in [k for k, f in cpp_build._loaded.items() if isinstance(f.result(), str)]:
        del cpp_build._loaded[key]
