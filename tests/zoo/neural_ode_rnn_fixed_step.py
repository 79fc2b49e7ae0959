"""ODE-RNN: the state follows an ODE between observations and a GRU updates it at each.

Rubanova, Chen, Duvenaud: Latent ODEs for Irregularly-Sampled Time Series, NeurIPS 2019,
https://arxiv.org/abs/1907.03907 (algorithm 1; the solver takes two Euler steps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE, OUTPUT, STEPS = 4, 8, 2, 2


class ODERNN(nn.Module):
    """Values [T, INPUT] and times [T] in, [T, OUTPUT] out."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(SIZE, 10), nn.Tanh(), nn.Linear(10, SIZE))
        self.cell = nn.GRUCell(INPUT, SIZE)
        self.out = nn.Linear(SIZE, OUTPUT)

    def solve(self, h: Tensor, start: Tensor, end: Tensor) -> Tensor:
        step = (end - start) / STEPS
        for _ in range(STEPS):
            h = h + step * self.field(h)
        return h

    def forward(self, values: Tensor, times: Tensor) -> Tensor:
        h = torch.zeros(SIZE)
        outputs = []
        for i in range(len(values)):
            if i > 0:
                h = self.solve(h, times[i - 1], times[i])
            h = self.cell(values[i], h)
            outputs.append(self.out(h))
        return torch.stack(outputs)


def make() -> nn.Module:
    return ODERNN()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(n, INPUT, generator=draw),
            torch.cumsum(torch.rand(n, generator=draw), 0),
        )
        for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)
    ]
