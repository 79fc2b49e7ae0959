"""Sessions: state carried from step to step."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc
from cellc import sessions
from cellc.errors import RequestError, SessionBusy, SessionClosed, UnsupportedError

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
