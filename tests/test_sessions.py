"""Sessions: state carried from step to step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc
from cellc import sessions
from cellc.errors import (
    ClosedError,
    Overloaded,
    RequestError,
    SessionBusy,
    SessionClosed,
    UnsupportedError,
)

H = 4


class State(NamedTuple):
    h: Tensor
    count: Tensor


class Steps(nn.Module):
    """A GRU cell; the state comes back in the form it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, H)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if state is None:
            state = torch.zeros(H)
        if isinstance(state, State):
            h = self.cell(x, state.h)
            return {"y": h * 2, "state": State(h, state.count + 1)}
        if isinstance(state, dict):
            h = self.cell(x, state["h"])
            return h * 2, {"h": h, "more": [state["more"][0] + h]}
        h = self.cell(x, state)
        return h * 2, h


def make() -> Steps:
    torch.manual_seed(0)
    return Steps().eval().requires_grad_(False)


INITIAL = {
    "tensor": (torch.zeros(H), "1"),
    "dict": ({"h": torch.ones(H), "more": [torch.zeros(H)]}, "1"),
    "named": (State(torch.ones(H), torch.tensor(0)), "state"),
}


@pytest.mark.parametrize("form", INITIAL)
def test_steps_are_those_of_the_model(form: str) -> None:
    model, (state, path) = make(), INITIAL[form]
    with cellc.compile(model, carry={"state": path}, backend="eager") as compiled:
        with compiled.session({"state": state}) as session:
            for x in torch.randn(5, 3):
                got, want = session.step(x), model(x, state)
                torch.testing.assert_close(got, want)
                state = want["state"] if path == "state" else want[1]


def test_defaults_reset_and_what_callers_do() -> None:
    model = make()
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        session, x = compiled.session(), torch.randn(3)
        first, state = session.step(x)
        state.zero_()  # the caller's own copy
        second = session.step(x)[0]
        torch.testing.assert_close(second, model(x, model(x)[1])[0])
        session.reset()
        torch.testing.assert_close(session.step(x)[0], first)
        torch.testing.assert_close(session.state["state"], model(x)[1])


def test_wrong_use() -> None:
    model, x = make(), torch.randn(3)
    with pytest.raises(UnsupportedError, match="x, state"):
        cellc.compile(model, carry={"stat": "1"}, backend="eager")
    with cellc.compile(model, backend="eager") as compiled:
        with pytest.raises(UnsupportedError, match="carry="):
            compiled.session()
    with cellc.compile(model, carry={"state": "2"}, backend="eager") as compiled:
        with pytest.raises(RequestError, match="carried: state"):
            compiled.session({"h": x})
        with pytest.raises(UnsupportedError, match="no '2'.*there is: 2 items"):
            compiled.session().step(x)
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        session = compiled.session()
        with pytest.raises(RequestError, match=r"a step of \(x\)"):
            session.step(x, x)
        with pytest.raises(cellc.CellcError):
            session.step(torch.randn(7))
        torch.testing.assert_close(session.step(x)[0], model(x)[0])  # as before the errors
        session.close()
        session.close()
        with pytest.raises(SessionClosed, match="open another"):
            session.step(x)
        left = compiled.session()
    with pytest.raises(cellc.ClosedError):
        left.step(x)


def test_idle_sessions_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        mortal, lasting = compiled.session(lifetime=5), compiled.session()
        for moment in (4.0, 8.0):
            now[0] = moment
            mortal.step(torch.randn(3))
        now[0] = 20.0
        with pytest.raises(SessionClosed, match="idle"):
            mortal.step(torch.randn(3))
        lasting.step(torch.randn(3))


def test_one_step_at_a_time() -> None:
    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        session, x = compiled.session(), torch.randn(3)
        ticket = session.begin((x,), {})
        with pytest.raises(SessionBusy):
            session.step(x)
        compiled._engine.enqueue([ticket])
        compiled._engine.run([ticket])
        assert session.submit(x).result(30)[0].shape == (H,)
        assert asyncio.run(session.step_async(x))[0].shape == (H,)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=40))
def test_state_never_crosses_sessions(moves: list[tuple[int, int]]) -> None:
    model = make()
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        opened: dict[int, Any] = {}
        states: dict[int, Tensor] = {}

        def check(number: int, x: Tensor, got: Any) -> None:
            want, states[number] = model(x, states[number])
            torch.testing.assert_close(got[0], want)

        for number, move in moves:
            x = torch.randn(3)
            if number not in opened:
                start = torch.full((H,), float(number))
                opened[number], states[number] = compiled.session({"state": start}), start
            if move == 0:
                opened.pop(number).close()
            elif move == 1:
                opened[number].reset()
                states[number] = torch.full((H,), float(number))
            elif move == 2:
                check(number, x, opened[number].step(x))
            elif move == 3:
                check(number, x, opened[number].submit(x).result(30))
            else:
                xs = {n: torch.randn(3) for n in opened}
                results = compiled.step_all([(opened[n], (xs[n],)) for n in opened])
                for n, got in zip(opened, results, strict=True):
                    check(n, xs[n], got)


def test_steps_share_launches() -> None:
    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        many = [compiled.session() for _ in range(50)]
        compiled.step_all([(s, (torch.randn(3),)) for s in many])
        before = compiled.stats()
        compiled.step_all([(s, (torch.randn(3),)) for s in many])
        after = compiled.stats()
        assert after["rows"] - before["rows"] >= 50
        assert after["launches"] - before["launches"] < 10


def goes_on(session: Any, model: Steps, state: Tensor) -> None:
    """A session steps on from a state."""
    x = torch.randn(3)
    got, want = session.step(x), model(x, state)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(session.state["state"], want[1])


def test_steps_that_never_run_leave_the_session_as_it_was() -> None:
    model = make()
    with cellc.compile(model, carry={"state": "1"}, backend="eager", max_queue=2) as compiled:
        engine = compiled._engine
        opened = [compiled.session({"state": torch.full((H,), float(i))}) for i in range(4)]
        compiled.warmup(torch.randn(3), torch.zeros(H))
        with engine._loop.holding():  # nobody runs the loop
            futures = [s.submit(torch.randn(3)) for s in opened[:2]]
            with pytest.raises(Overloaded):
                opened[2].submit(torch.randn(3))
            with pytest.raises(Overloaded):
                opened[2].step(torch.randn(3))
            with pytest.raises(Overloaded):
                compiled.step_all([(s, (torch.randn(3),)) for s in opened[2:]])
            with pytest.raises(SessionBusy):
                opened[0].step(torch.randn(3))
            assert all(f.cancel() for f in futures)
            assert not any(s._busy for s in opened)
        engine._hand_over()
        for i, session in enumerate(opened):
            goes_on(session, model, torch.full((H,), float(i)))
        assert compiled.stats()["running"] == 0 and engine._arenas.idle()
        assert engine.flight.futures == 0


def test_an_iterable_that_raises_midway() -> None:
    model = make()
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        opened = [compiled.session({"state": torch.full((H,), float(i))}) for i in range(3)]

        def steps(error: BaseException) -> Iterator[Any]:
            for session in opened[:2]:
                yield session, (torch.randn(3),)
            raise error

        for error in (KeyError("midway"), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                compiled.step_all(steps(error))
        results = compiled.step_all(
            [(opened[0], (torch.randn(3),)), (opened[2], {"y": 1}), (opened[0], (torch.randn(3),))],
            return_exceptions=True,
        )
        assert [type(x) for x in results] == [tuple, RequestError, SessionBusy]
        opened[0].reset()
        for i, session in enumerate(opened):
            goes_on(session, model, torch.full((H,), float(i)))


def test_an_interrupted_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        session, other = compiled.session(), compiled.session()
        compiled.step_all([(session, (torch.randn(3),)), (other, (torch.randn(3),))])
        states = [s.state["state"] for s in (session, other)]

        def interrupted(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        engine = compiled._engine
        for owner, name in (
            (engine.launcher, "begin"),
            (engine.launcher, "end"),
            (engine.launcher, "schedule"),
            (engine._admission, "admit"),
            (engine.flight, "copy_in"),
            (engine.flight, "add"),
            (engine.flight, "_keep"),
            (engine.flight, "retire"),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    compiled.step_all([(s, (torch.randn(3),)) for s in (session, other)])
            assert compiled.stats()["running"] == compiled.stats()["waiting"] == 0
            assert compiled._engine.flight.live_bytes == 0, name
        for s, state in zip((session, other), states, strict=True):
            goes_on(s, model, state)
        assert compiled._engine._scheduler.num_requests == 0


@dataclass
class Held:
    h: Tensor


class OfObjects(Steps):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        h = self.cell(x, state.h)
        return h * 2, h


def test_a_state_is_its_own() -> None:
    model, start = make(), torch.ones(H)
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        session = compiled.session({"state": start})
        start.zero_()
        session.state["state"].zero_()
        goes_on(session, model, torch.ones(H))
        state = session.state["state"].clone()
        session.state["state"].zero_()
        goes_on(session, model, state)
        session.reset()
        session.state["state"].zero_()
        session.reset()
        goes_on(session, model, torch.ones(H))
    held = Held(torch.ones(H))
    with cellc.compile(OfObjects().eval(), carry={"state": "1"}, backend="eager") as compiled:
        session = compiled.session({"state": held})
        held.h.zero_()
        assert session.state["state"].h.sum() == H


def test_closing_while_a_step_runs() -> None:
    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        session, x = compiled.session(lifetime=100.0), torch.randn(3)
        session.step(x)
        with compiled._engine._loop.holding():
            future = session.submit(x)
            with pytest.raises(SessionBusy):
                session.reset()
            session.close()
        compiled._engine._hand_over()
        assert future.result(30)[0].shape == (H,)
        with pytest.raises(SessionClosed):
            session.step(x)
        assert session._state == {}


def test_closing_the_model_while_steps_wait() -> None:
    compiled = cellc.compile(make(), carry={"state": "1"}, backend="eager")
    opened, x = [compiled.session() for _ in range(20)], torch.randn(3)
    compiled.warmup(x, torch.zeros(H))
    with compiled._engine._loop.holding():
        futures = [s.submit(x) for s in opened]
        closing = threading.Thread(target=compiled.close)
        closing.start()
    compiled._engine._hand_over()
    closing.join(30)
    assert not closing.is_alive()
    assert all(f.result(0)[0].shape == (H,) for f in futures)
    for session in opened:
        with pytest.raises(ClosedError):
            session.step(x)


def test_threads_that_step_one_session() -> None:
    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        session, taken = compiled.session({"state": torch.zeros(H)}), []
        compiled.warmup(torch.randn(3), torch.zeros(H))

        def work() -> None:
            for k in range(40):
                x = torch.randn(3)
                try:
                    if k % 2:
                        taken.append((x, session.step(x)))
                    else:
                        future: Future[Any] = session.submit(x)
                        if k % 4 == 0 and future.cancel():
                            continue
                        taken.append((x, future.result(30)))
                except SessionBusy:
                    pass

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not session._busy and compiled._engine.flight.futures == 0
        assert taken


def test_cancelled_tasks_leave_their_sessions_usable() -> None:
    async def some(opened: list[Any]) -> None:
        tasks = [asyncio.create_task(s.step_async(torch.randn(3))) for s in opened]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        opened = [compiled.session() for _ in range(10)]
        for _ in range(5):
            asyncio.run(some(opened))
            compiled(torch.randn(3))
        compiled._engine.run_until(lambda: not any(s._busy for s in opened))
        for session in opened:
            session.step(torch.randn(3))
        assert compiled._engine._arenas.idle()


@pytest.mark.parametrize("lifetime", [0, -1.0, "5", True, float("nan")])
def test_nonsense_lifetimes(lifetime: Any) -> None:
    with cellc.compile(make(), carry={"state": "1"}, backend="eager") as compiled:
        with pytest.raises(UnsupportedError, match="lifetime"):
            compiled.session(lifetime=lifetime)


def test_a_session_of_another_model_is_refused() -> None:
    """It would be run with this one's weights."""
    model, other, x = make(), make(), torch.randn(3)
    for parameter in other.parameters():
        parameter.add_(1.0)
    with (
        cellc.compile(model, carry={"state": "1"}, backend="eager") as ours,
        cellc.compile(other, carry={"state": "1"}, backend="eager") as theirs,
    ):
        mine, strange = ours.session(), theirs.session()
        got, error = ours.step_all([(mine, x), (strange, x)], return_exceptions=True)
        torch.testing.assert_close(got[0], model(x)[0])
        assert isinstance(error, UnsupportedError)
        torch.testing.assert_close(strange.step(x)[0], other(x)[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_deadlines_of_steps_that_are_taken_together(workers: int) -> None:
    """Those of the session go before those of the compiled model."""
    model, x = make(), torch.randn(3)
    options = {"policy": "deadline", "workers": workers}
    with cellc.compile(model, carry={"state": "1"}, backend="eager", options=options) as compiled:
        hurried, patient = compiled.session(), compiled.session()
        steps = [(hurried, x), (patient.with_options(deadline=60.0), x)]
        error, got = compiled.with_options(deadline=1e-9).step_all(steps, return_exceptions=True)
        assert isinstance(error, cellc.DeadlineError)
        torch.testing.assert_close(got[0], model(x)[0])
