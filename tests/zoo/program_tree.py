"""Expressions as nested tuples ("add", a, b): every kind of node has a cell of its own.

Allamanis, Chanthirasegaran, Kohli, Sutton: Learning Continuous Semantic Representations of Symbolic
Expressions, ICML 2017, https://arxiv.org/abs/1611.01423 (the combination of EqNets: a layer, a skip
connection and a unit norm, with weights of the node's type).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VARIABLES, CLASSES = 8, 6, 10
ARITY = {"neg": 1, "add": 2, "sub": 2, "mul": 2}


class Combine(nn.Module):
    def __init__(self, arity: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(arity * SIZE, SIZE, bias=False)
        self.skip = nn.Linear(arity * SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, *children: Tensor) -> Tensor:
        below = torch.cat(children)
        up = self.skip(below) + self.out(torch.tanh(self.hidden(below)))
        return up / up.norm()


class EqNet(nn.Module):
    """An expression in, scores of equivalence classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.variables = nn.Embedding(VARIABLES, SIZE)
        self.cells = nn.ModuleDict({kind: Combine(arity) for kind, arity in ARITY.items()})
        self.out = nn.Linear(SIZE, CLASSES)

    def encode(self, expression: Any) -> Tensor:
        if isinstance(expression, Tensor):
            return self.variables(expression)
        kind, *arguments = expression
        return self.cells[kind](*[self.encode(argument) for argument in arguments])

    def forward(self, expression: Any) -> Tensor:
        return self.out(self.encode(expression))


def make() -> nn.Module:
    return EqNet()


def requests() -> list[Any]:
    draw = random.Random(0)

    def expression(nodes: int) -> Any:
        if nodes == 1:
            return torch.tensor(draw.randrange(VARIABLES))
        if nodes == 2 or draw.random() < 0.2:
            return "neg", expression(nodes - 1)
        left = draw.randint(1, nodes - 2)
        kind = draw.choice(["add", "sub", "mul"])
        return kind, expression(left), expression(nodes - 1 - left)

    return [(expression(n),) for n in (1, 2, 3, 5, 7, 9, 12, 6, 4, 11)]
