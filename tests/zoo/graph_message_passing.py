"""Gated graph neural network: two rounds of messages along neighbour lists, then a gated readout.

Li, Tarlow, Brockschmidt, Zemel: Gated Graph Sequence Neural Networks, ICLR 2016,
https://arxiv.org/abs/1511.05493 (one edge type, both directions alike).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, SIZE, OUTPUTS, ROUNDS = 5, 8, 3, 2


class GGNN(nn.Module):
    """Features and neighbours of nodes in, a vector of the graph out."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(SIZE, SIZE, bias=False)
        self.bias = nn.Parameter(nn.init.uniform_(torch.empty(SIZE), -0.5, 0.5))
        self.update = nn.GRUCell(SIZE, SIZE)
        self.gate = nn.Linear(SIZE + FEATURES, OUTPUTS)
        self.out = nn.Linear(SIZE + FEATURES, OUTPUTS)

    def forward(self, features: Tensor, neighbours: list[list[int]]) -> Tensor:
        padding = features.new_zeros(features.size(0), SIZE - FEATURES)
        states = list(torch.cat([features, padding], 1))
        for _ in range(ROUNDS):
            messages = [self.message(h) for h in states]
            updated = []
            for h, around in zip(states, neighbours, strict=True):
                a = self.bias
                for u in around:
                    a = a + messages[u]
                updated.append(self.update(a, h))
            states = updated
        both = torch.cat([torch.stack(states), features], 1)
        return torch.tanh((torch.sigmoid(self.gate(both)) * torch.tanh(self.out(both))).sum(0))


def make() -> nn.Module:
    return GGNN()


def requests() -> list[Any]:
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)

    def graph(nodes: int) -> Any:
        neighbours: list[list[int]] = [[] for _ in range(nodes)]
        for u in range(nodes):
            for v in range(u):
                if draw.random() < 2 / nodes:
                    neighbours[u].append(v)
                    neighbours[v].append(u)
        return torch.randn(nodes, FEATURES, generator=generator), neighbours

    return [graph(n) for n in (1, 2, 3, 4, 6, 8, 10, 5, 6, 7)]
