"""`@cellc.cell`: what is marked is a cell, and is checked to be one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc

SIZE = 5


@cellc.cell
def decay(h: Tensor, rate: float) -> Tensor:
    return h * rate


@cellc.cell
class Step(nn.Module):
    """A marked Module class; it uses a marked function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return decay(torch.tanh(self.linear(torch.cat([x, h]))), 0.5)


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = Step()

    def forward(self, xs: Tensor) -> Tensor:
        h = xs.new_zeros(SIZE)
        for x in xs:
            h = self.step(x, h)
        return h


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2 * SIZE, SIZE)

    @cellc.cell
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat([x, h])))

    def forward(self, xs: Tensor) -> Tensor:
        h = xs.new_zeros(SIZE)
        for x in xs:
            h = decay(self.step(x, h), 0.9)
        return h


@cellc.cell
class Outer(Marked):
    """A marked cell that holds marked cells in a loop: those are the cells."""


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()

    def forward(self, xs: Tensor) -> Tensor:
        return self.outer(xs) + 1


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("make", "cells"), [(Marked, 1), (Methods, 2), (Nested, 1)])
def test_marked_cells(make: Any, cells: int) -> None:
    model = make().eval()
    requests = [(torch.randn(n, SIZE),) for n in (1, 2, 3, 6, 4)]
    with cellc.compile(model, backend="eager") as compiled:
        for request, got in zip(requests, compiled.map(requests), strict=True):
            torch.testing.assert_close(got, model(*request), rtol=1e-4, atol=1e-5)
        assert compiled._compiler.unfolder.reason is None
        assert compiled.stats()["plans_traced"] == 0
        assert sum(cell.recurrent for cell in compiled.cells.values()) == cells


def test_a_marked_function_is_still_the_function() -> None:
    assert decay.__name__ == "decay"
    torch.testing.assert_close(decay(torch.ones(2), 0.5), torch.full((2,), 0.5))
    assert Step.__name__ == "Step" and isinstance(Step(), nn.Module)


class Closing(nn.Module):
    """Its cell takes data from around it."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        h = torch.zeros(SIZE)

        for x in xs:

            @cellc.cell
            def step(h: Tensor) -> Tensor:
                return torch.tanh(h + x)  # noqa: B023

            h = step(h)
        return h


class Reading(nn.Module):
    """Its cell looks at a value."""

    @cellc.cell
    def step(self, h: Tensor, x: Tensor) -> Tensor:
        return h + x if x.sum() > 0 else h - x

    def forward(self, xs: list[Tensor]) -> Tensor:
        h = torch.zeros(SIZE)
        for x in xs:
            h = self.step(h, x)
        return h


class Summing(nn.Module):
    """Its cell takes a list of any length, and adds it up in Python."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(SIZE, SIZE)

    @cellc.cell
    def merge(self, states: list[Tensor]) -> Tensor:
        return torch.tanh(self.linear(sum(states)))  # type: ignore[arg-type]

    def forward(self, tree: Any) -> Tensor:
        if isinstance(tree, Tensor):
            return tree
        return self.merge([self.forward(child) for child in tree])


def test_a_marked_cell_may_hold_a_loop() -> None:
    model = Summing().eval()
    x = torch.randn(6, SIZE)
    requests = [([x[0], x[1]],), ([x[0], [x[1], x[2], x[3]], x[4]],), ([[x[5]], x[2], x[1], x[0]],)]
    with cellc.compile(model, backend="eager") as compiled:
        for request, got in zip(requests, compiled.map(requests), strict=True):
            torch.testing.assert_close(got, model(*request), rtol=1e-4, atol=1e-5)


class Structured(nn.Module):
    """Its cell takes a part of the request."""

    @cellc.cell
    def encode(self, tree: Any) -> Tensor:
        if isinstance(tree, Tensor):
            return tree
        return torch.tanh(self.encode(tree[0]) + self.encode(tree[1]))

    def forward(self, tree: Any) -> Tensor:
        return self.encode(tree)


def _list() -> Any:
    return [torch.randn(SIZE) for _ in range(4)]


REFUSED: dict[str, tuple[type[nn.Module], Any, str]] = {
    "closes over data": (Closing, _list(), "step: it uses a value.*none of its arguments"),
    "reads a value": (Reading, _list(), "step: the forward reads the value"),
    "takes structure": (Structured, ((torch.ones(2), torch.ones(2)), torch.ones(2)), "structure"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_cell(kind: str) -> None:
    """A clear error, with the line of the call."""
    make, request, message = REFUSED[kind]
    with cellc.compile(make().eval(), backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError, match=f"(?s){message}.*test_marks.py:"):
            compiled(request)


@pytest.mark.parametrize("target", [3, len, dict, nn.Linear(1, 1)])
def test_what_cannot_be_marked(target: Any) -> None:
    with pytest.raises(cellc.UnsupportedError, match="@cellc.cell"):
        cellc.cell(target)
