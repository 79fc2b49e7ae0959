"""Closed-form continuous-time cell, over observations with the time since the last one.

Hasani, Lechner, Amini, Liebenwein, Ray, Tschaikowski, Teschl, Rus: Closed-form Continuous-time
Neural Networks, Nature Machine Intelligence 2022, https://arxiv.org/abs/2106.13898.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE, BACKBONE, CLASSES = 4, 8, 10, 3


class CfCCell(nn.Module):
    """x(t) = sigmoid(-f(x, I) t) * g(x, I) + (1 - sigmoid(-f(x, I) t)) * h(x, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(INPUT + SIZE, BACKBONE), nn.SiLU())
        self.f = nn.Linear(BACKBONE, SIZE)
        self.g = nn.Linear(BACKBONE, SIZE)
        self.h = nn.Linear(BACKBONE, SIZE)

    def forward(self, value: Tensor, state: Tensor, elapsed: Tensor) -> Tensor:
        features = self.backbone(torch.cat([value, state], -1))
        gate = torch.sigmoid(-self.f(features) * elapsed)
        return gate * torch.tanh(self.g(features)) + (1.0 - gate) * torch.tanh(self.h(features))


class CfC(nn.Module):
    """Values [T, INPUT] and time deltas [T] in, scores of classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = CfCCell()
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, values: Tensor, deltas: Tensor) -> Tensor:
        state = torch.zeros(SIZE)
        for t in range(values.size(0)):
            state = self.cell(values[t], state, deltas[t])
        return self.out(state)


def make() -> nn.Module:
    return CfC()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, INPUT, generator=draw), 2 * torch.rand(n, generator=draw))
        for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)
    ]
