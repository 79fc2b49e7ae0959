"""Forwards that ask for the very type of what they are given, or which of it is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.pipeline import Pipeline

SIZE = 4
Act = Callable[..., Any]


class Asking(nn.Module):
    def __init__(self, act: Act) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(SIZE, SIZE), act

    def forward(self, x: Any, y: Any) -> Any:
        return self.act(self.linear, x, y)


def is_tensor(x: Any) -> bool:
    return type(x) is Tensor


def by_type(linear: Any, x: Any, y: Any) -> Any:
    return linear(x) if type(x) is Tensor else linear(x) * 2


def by_class(linear: Any, x: Any, y: Any) -> Any:
    return linear(x) * (2 if x.__class__ is Tensor else 3)


def by_table(linear: Any, x: Any, y: Any) -> Any:
    return linear(x) * {Tensor: 2}.get(type(x), 3)


def by_a_function(linear: Any, x: Any, y: Any) -> Any:
    return linear(x) * (2 if is_tensor(x) else 3)


class ByType(Asking):
    def forward(self, x: Any, y: Any) -> Any:
        return self.linear(x) if type(x) is Tensor else self.linear(x) * 2


class ByHelper(Asking):
    def forward(self, x: Any, y: Any) -> Any:
        return self.helper(x)

    def helper(self, x: Any) -> Any:
        return by_a_function(self.linear, x, x)


def eager(model: nn.Module, *args: Any) -> Tensor:
    with torch.no_grad():
        return model(*args)  # type: ignore[no-any-return]


@pytest.mark.parametrize("act", [by_type, by_class, by_table, by_a_function])
def test_functions_that_take_a_stand_in_for_something_else_are_refused(act: Act) -> None:
    refused(naming(act, nn.Linear(SIZE, SIZE)))


def naming(act: Act, linear: nn.Module) -> Callable[..., Any]:
    """A function that names another in its globals."""
    names = {"act": act, "linear": linear, "__name__": __name__}
    exec("def forward(x, y):\n    return act(linear, x, y)", names)
    return names["forward"]  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [ByType, ByHelper])
def test_models_that_take_a_stand_in_for_something_else_are_refused(kind: type[Asking]) -> None:
    refused(kind(by_type).eval())


def refused(model: Any) -> None:
    """Whoever asks, however often."""
    x = torch.randn(SIZE)
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            with pytest.raises(cellc.UnsupportedError, match=r"isinstance.*\n  at test_identity"):
                compiled(x, x + 1)
        found = compiled.map([(x, x), (torch.randn(2, SIZE), x)], return_exceptions=True)
        assert all(isinstance(e, cellc.UnsupportedError) for e in found)
        with pytest.raises(cellc.UnsupportedError):
            compiled.submit(x, x).result(30)
        assert compiled.stats()["live_bytes"] == 0


class Lists(Asking):
    def forward(self, x: Any, y: Any) -> Any:
        if type(x) is list:
            x = torch.stack(x)
        return self.linear(x) if isinstance(y, Tensor) else self.linear(x) + y


def test_types_of_what_is_no_tensor_may_be_asked_for() -> None:
    model, rows = Lists(by_type).eval(), list(torch.randn(3, SIZE))
    with cellc.compile(model, backend="eager") as compiled:
        for args in [(rows, rows[0]), (rows[0], 1.5), (torch.stack(rows), rows[1]), (rows, 2.0)]:
            torch.testing.assert_close(compiled(*args), eager(model, *args))


def test_others_are_not_run_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it matters does a traced model run once more."""
    monkeypatch.setattr(Pipeline, "own_result", lambda *_: pytest.fail("it ran"))
    model = nn.LSTM(SIZE, SIZE).eval()
    with cellc.compile(model, backend="eager") as compiled, torch.no_grad():
        x = torch.randn(5, SIZE)
        torch.testing.assert_close(compiled(x), model(x))


def which(x: Any, y: Any) -> Tensor:
    return torch.tanh(x) * (2 if x is y else 3)  # type: ignore[no-any-return]


class Which(Asking):
    def forward(self, x: Any, y: Any) -> Any:
        return self.linear(x[0]) * (2 if x[0] is y[1] else 3) + self.linear(y[0])


@pytest.mark.parametrize("order", [1, -1])
def test_which_tensors_are_one_is_structure(order: int) -> None:
    a, b = torch.randn(SIZE), torch.randn(SIZE)
    model = Which(by_type).eval()
    plain = [(a, a), (a, b), (a, a.clone()), (b, b)][::order]
    nested = [([x, b], [b, y]) for x, y in plain]
    for forward, requests in ((which, plain), (model, nested)):
        with cellc.compile(forward, backend="eager") as compiled:
            for _ in range(2):
                for args, got in zip(requests, compiled.map(requests), strict=True):
                    torch.testing.assert_close(got, eager(forward, *args))
                    torch.testing.assert_close(compiled(*args), eager(forward, *args))


class Folds(Asking):
    def forward(self, x: Any, y: Any) -> Any:
        trees, rows = (x, y) if isinstance(x, list) else ([x, y], torch.ones(3, SIZE))
        first = trees[0].fold(self.node, nodes=rows)
        return first * (2 if trees[0] is trees[1] else 3)

    def node(self, row: Tensor, children: list[Tensor]) -> Tensor:
        row = self.linear(row)
        return torch.tanh(row + torch.stack(children).sum(0)) if children else row


@pytest.mark.parametrize("order", [1, -1])
def test_which_trees_are_one_is_structure(order: int) -> None:
    a, b = cellc.Tree(parents=[2, 2, -1]), cellc.Tree(parents=[2, 2, -1])
    assert a == b
    model, rows = Folds(by_type).eval(), torch.randn(3, SIZE)
    given = [(a, a), (a, b), (b, b)][::order]
    for requests in (given, [([x, y], rows) for x, y in given]):
        with cellc.compile(model, backend="eager") as compiled:
            for _ in range(2):
                for args, got in zip(requests, compiled.map(requests), strict=True):
                    torch.testing.assert_close(got, eager(model, *args))
                    torch.testing.assert_close(compiled(*args), eager(model, *args))
