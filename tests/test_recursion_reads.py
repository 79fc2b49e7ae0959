"""Recursion whose calls read values, and methods that keep what they make: no call stands for
another that may go elsewhere.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc


class Chain(nn.Module):
    """(word,) or (word, rest): a sign that a value decides at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, t: Any) -> Tensor:
        return self.walk(t)

    def walk(self, t: Any) -> Tensor:
        if len(t) == 1:
            leaf: Tensor = self.emb(torch.tensor(t[0]))
            return leaf
        h: Tensor = self.lin(self.walk(t[1]))
        return -h if h[0] > 0 else h


class Words(nn.Module):
    """(a, b) or a word: each word leads to another that a value names."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head, self.join = nn.Embedding(11, 8), nn.Linear(8, 11), nn.Linear(16, 8)

    def forward(self, t: Any) -> Tensor:
        if isinstance(t, tuple):
            return torch.tanh(self.join(torch.cat([self.forward(t[0]), self.forward(t[1])])))
        k = int(self.head(self.emb(torch.tensor(t))).argmax())
        h: Tensor = self.emb(torch.tensor(k))
        return h


CHAINS = [(1,), (2,), *[(0, (0, (w,))) for w in range(11)], *[(0, (w,)) for w in range(11)]]
TREES = [((0, 1), (2, 3)), *itertools.product(range(4), range(4)), ((5, (6, 7)), 8), (1, (2, 3))]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("make", "requests"), [(Chain, CHAINS), (Words, TREES)])
def test_a_value_read_in_a_recursion(
    make: Callable[[], nn.Module], requests: list[Any], together: bool
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with cellc.compile(model, backend="eager") as compiled, torch.no_grad():
        for _ in range(2):
            calls = [(t,) for t in requests]
            got = compiled.map(calls) if together else [compiled(t) for t in requests]
            for t, y in zip(requests, got, strict=True):
                torch.testing.assert_close(y, model(t), rtol=1e-4, atol=1e-5)


class Plain:
    log: list[Tensor]


class Keeps(nn.Module):
    """A step that keeps its state somewhere, which is looked at only where there are many."""

    KEPT: list[Tensor] = []

    def __init__(self, where: str) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.where, self.plain = where, Plain()
        self.plain.log = []
        self.list: list[Tensor] = []
        self.box: dict[str, list[Tensor]] = {"a": []}
        self.deque: deque[Tensor] = deque()

    def log(self) -> Any:
        places = {"plain": self.plain.log, "list": self.list, "nested": self.box["a"],
                  "deque": self.deque, "class": self.KEPT}  # fmt: skip
        return places[self.where]

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        new: Tensor = self.cell(x, h)
        self.log().append(new)
        return new

    def forward(self, xs: list[Tensor]) -> Tensor:
        self.log().clear()
        h = torch.zeros(8)
        for x in xs:
            h = self.step(x, h)
        if len(xs) > 2:
            kept: Tensor = self.log()[-1] if self.log() else torch.zeros(8)
            return kept
        return h


@pytest.mark.parametrize("where", ["plain", "list", "nested", "deque", "class"])
def test_a_method_that_keeps_what_it_makes(where: str) -> None:
    torch.manual_seed(0)
    model = Keeps(where).eval()
    requests = [list(torch.randn(n, 8)) for n in (1, 2, 3, 5)]
    with cellc.compile(model, backend="eager") as compiled, torch.no_grad():
        for _ in range(2):
            got = compiled.map([(xs,) for xs in requests])
            for xs, y in zip(requests, got, strict=True):
                torch.testing.assert_close(y, model(xs), rtol=1e-4, atol=1e-5)
