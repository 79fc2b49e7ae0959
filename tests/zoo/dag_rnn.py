"""DAG-RNN: nodes in topological order read the sum of their predecessors; scores at every node.

Shuai, Zuo, Wang, Wang: DAG-Recurrent Neural Networks For Scene Labeling, CVPR 2016,
https://arxiv.org/abs/1509.00552 (equation 4).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, SIZE, CLASSES = 5, 8, 4


class DAGRNN(nn.Module):
    """Features of nodes and predecessors of each in, scores of all nodes out."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(FEATURES, SIZE)
        self.hidden = nn.Linear(SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, features: Tensor, predecessors: list[list[int]]) -> Tensor:
        states: list[Tensor] = []
        for x, before in zip(features, predecessors, strict=True):
            if before:
                total = torch.stack([states[p] for p in before]).sum(0)
            else:
                total = torch.zeros(SIZE)
            states.append(torch.relu(self.input(x) + self.hidden(total)))
        return self.out(torch.stack(states))


def make() -> nn.Module:
    return DAGRNN()


def requests() -> list[Any]:
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)

    def graph(nodes: int) -> Any:
        predecessors = [
            sorted(draw.sample(range(node), draw.randint(0, min(node, 3)))) for node in range(nodes)
        ]
        return torch.randn(nodes, FEATURES, generator=generator), predecessors

    return [graph(n) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)]
