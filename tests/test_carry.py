"""What sessions carry: kept of many results at once, and steps like others before."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cellc
from cellc.carry import MAX_FORMS
from cellc.flight import KEPT, by_bases
from cellc.ticket import Ticket

H = 4


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


class Cell(nn.Module):
    """An LSTM cell whose state comes back in the form it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, H)

    def forward(self, x: Tensor, state: Any) -> Any:
        if isinstance(state, dict):
            h, (c, n) = state["h"], state["rest"]
            h, c = self.cell(x, (h, c))
            return {"y": h * 2, "next": {"h": h, "rest": [c, n + 1]}}
        h, c = self.cell(x, state)
        return {"y": h * 2, "next": type(state)(*(h, c)) if isinstance(state, Pair) else (h, c)}


class Sum(nn.Module):
    """Two inputs that are told apart, and a state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.mix(state + a) - 2 * b)
        return state.sum(-1), state


def make(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


STATES = {
    "tuple": lambda i: (torch.full((H,), float(i)), torch.ones(H)),
    "named": lambda i: Pair(torch.full((H,), float(i)), torch.ones(H)),
    "dict": lambda i: {"h": torch.full((H,), float(i)), "rest": [torch.ones(H), torch.tensor(i)]},
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", STATES)
def test_states_that_are_kept_together(form: str, workers: int) -> None:
    """Of whoever steps in a turn, in any order; callers do with results what they like."""
    model, start = make(Cell), STATES[form]
    options = {"workers": workers}
    with cellc.compile(
        model, carry={"state": "next"}, backend="eager", options=options
    ) as compiled:
        opened = [compiled.session({"state": start(i)}) for i in range(40)]
        states = [start(i) for i in range(40)]
        rng = np.random.default_rng(0)
        for turn in range(8):
            who = rng.permutation(40)[: 40 if turn % 2 else 25].tolist()
            xs = torch.randn(40, 3)
            results = compiled.step_all([(opened[i], (xs[i],)) for i in who])
            for i, got in zip(who, results, strict=True):
                want = model(xs[i], states[i])
                states[i] = want["next"]
                torch.testing.assert_close(got, want)
                for tensor in pytree.tree_leaves(got):
                    tensor.zero_()
        for session, state in zip(opened, states, strict=True):
            torch.testing.assert_close(session.state["state"], state)
            pytree.tree_map(torch.zero_, session.state)
        x = torch.randn(3)
        for session, state in zip(opened, states, strict=True):
            torch.testing.assert_close(session.step(x), model(x, state))


def test_steps_like_others_before_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(Cell)
    with cellc.compile(model, carry={"state": "next"}, backend="eager") as compiled:
        start = STATES["tuple"]
        opened, states = [compiled.session({"state": start(i)}) for i in range(3)], []
        for _ in range(2):
            compiled.step_all([(s, (torch.ones(3),)) for s in opened])
        states = [s.state["state"] for s in opened]
        hits = compiled.stats()["plan_hits"]

        def never(*_: Any) -> Any:
            raise AssertionError("a step was flattened")

        writer = compiled._engine.flight.loader.writer
        copies, write_rows = [], writer.write_rows

        def noted(*args: Any) -> bool:
            copies.append(write_rows(*args))
            return copies[-1]

        x = torch.randn(3)
        with monkeypatch.context() as patched:
            patched.setattr(compiled._intake, "ticket", never)
            patched.setattr(writer, "write_rows", noted)
            results = compiled.step_all([(s, (x,)) for s in opened])
        assert copies == [True, True]  # h and c, each of all sessions at once
        for got, state in zip(results, states, strict=True):
            torch.testing.assert_close(got, model(x, state))
        news = compiled.session({"state": start(7)})  # has a state of its own, copied by itself
        states = [s.state["state"] for s in opened]
        copies.clear()
        with monkeypatch.context() as patched:
            patched.setattr(writer, "write_rows", noted)
            results = compiled.step_all([(s, (x,)) for s in (opened[0], news, *opened[1:])])
        assert copies == [True, True]
        states.insert(1, start(7))
        for got, state in zip(results, states, strict=True):
            torch.testing.assert_close(got, model(x, state))
        assert compiled.stats()["plan_hits"] == hits + 7
        with pytest.raises(cellc.CellcError):
            compiled.step_all([(opened[0], (torch.ones(5),))])
        wide = compiled.step_all([(opened[0], (x.double(),))], return_exceptions=True)[0]
        assert isinstance(wide, Exception)  # as the model refuses it


def test_plans_that_are_dropped_are_made_again() -> None:
    model, x = make(Cell), torch.randn(3)
    with cellc.compile(model, carry={"state": "next"}, backend="eager") as compiled:
        opened = [compiled.session({"state": STATES["tuple"](i)}) for i in range(3)]
        for _ in range(3):
            compiled.step_all([(s, (x,)) for s in opened])
        states = [s.state["state"] for s in opened]
        traced, old = compiled.stats()["plans_traced"], list(compiled._compiler.plans.values())
        compiled._compiler.plans.forget()
        results = compiled.step_all([(s, (x,)) for s in opened])
        assert old and compiled.stats()["plans_traced"] > traced
        for got, state in zip(results, states, strict=True):
            torch.testing.assert_close(got, model(x, state))
        compiled.step_all([(s, (x,)) for s in opened])
        entries = [ref(entry) for entry in compiled._compiler.plans.values()]
        compiled._compiler.plans.forget()
        for session in opened:
            session.reset()
            session.step(x)
        gc.collect()
        assert entries and not any(entry() for entry in entries)


class Yielding(Cell):
    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.cell(x, state)
        yield h * 2
        yield h, c


def test_pieces_that_are_carried() -> None:
    model = make(Yielding)
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        states: list[Any] = [STATES["tuple"](i) for i in range(4)]
        opened = [compiled.session({"state": state}) for state in states]
        for x in torch.randn(4, 3):
            for i, got in enumerate(compiled.step_all([(s, (x,)) for s in opened])):
                want = list(model(x, states[i]))
                torch.testing.assert_close(got, want)
                states[i] = want[1]


def test_one_tensor_given_twice_is_no_form_of_two() -> None:
    model, zeros = make(Sum), torch.zeros(3)
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        opened, states = [compiled.session({"state": zeros}) for _ in range(4)], [zeros] * 4
        for turn in range(6):
            a, b = torch.randn(3), torch.randn(3)
            given = (a, a) if turn % 3 < 2 else (a, b)
            results = compiled.step_all([(s, given) for s in opened])
            for i, got in enumerate(results):
                want = model(*given, states[i])
                torch.testing.assert_close(got, want)
                states[i] = want[1]


@pytest.mark.parametrize("keywords", [False, True])
def test_inputs_of_many_sizes_and_by_name(keywords: bool) -> None:
    model = make(Sum)
    count = MAX_FORMS + 8
    with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
        opened = [compiled.session({"state": torch.zeros(3)}) for _ in range(2)]
        compiled.step_all([(s, (torch.ones(3), torch.ones(3))) for s in opened])
        compiled.step_all([(s, (torch.ones(3), torch.ones(3))) for s in opened])
        kept = opened[0]._held[0]  # type: ignore[index]
        for size in range(count if not keywords else 3):
            for s in opened:  # so that the next state is of the same form
                s.reset()
            a, b = torch.randn(size + 1, 3), torch.randn(3)
            given: Any = {"a": a, "b": b} if keywords else (a, b)
            results = compiled.step_all([(s, given) for s in opened])
            for got in results:
                torch.testing.assert_close(got, model(a, b, torch.zeros(3)))
            states = [s.state["state"] for s in opened]
            following = compiled.step_all([(s, (b, a[0])) for s in opened])
            for got, state in zip(following, states, strict=True):
                torch.testing.assert_close(got, model(b, a[0], state))
        assert 1 <= len(kept.forms) <= MAX_FORMS


def test_a_cast_input_has_no_form() -> None:
    model = make(Sum)
    with cellc.compile(
        model, carry={"state": "1"}, backend="eager", dtype=torch.float32
    ) as compiled:
        opened, states = [compiled.session({"state": torch.zeros(3)}) for _ in range(3)], []
        states = [torch.zeros(3)] * 3
        for _ in range(4):
            a, b = torch.randn(3), torch.randn(3)
            results = compiled.step_all([(s, (a.double(), b.double())) for s in opened])
            for i, got in enumerate(results):
                want = model(a, b, states[i])
                torch.testing.assert_close(got, want)
                states[i] = want[1]


def test_a_state_holds_little_memory_of_others() -> None:
    """A session that does not step for long must not keep the states of all that did."""
    size = KEPT // 16

    def model(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(state + x)
        return state.sum(), state

    for floats in (size // 4, 2 * size):  # some share memory; one is more than may
        with cellc.compile(model, carry={"state": "1"}, backend="eager") as compiled:
            opened = [compiled.session({"state": torch.zeros(floats)}) for _ in range(50)]
            for _ in range(2):
                compiled.step_all([(s, (torch.ones(floats),)) for s in opened])
            for session in opened:
                assert session._held is not None
                (state,) = session._held[1]
                assert state.untyped_storage().nbytes() <= max(KEPT, 4 * floats)


def test_regions_of_requests_that_began_before_a_row_type_was_known() -> None:
    tickets = [Ticket(None, (), bases=np.arange(n)) for n in (2, 3, 2)]  # type: ignore[arg-type]
    found = {bases.shape[1]: (those, bases.tolist()) for those, bases in by_bases(tickets)}
    assert found[2] == ([tickets[0], tickets[2]], [[0, 1], [0, 1]])
    assert found[3] == ([tickets[1]], [[0, 1, 2]])
    assert list(by_bases([])) == []
