"""Pointer network: every step points at an input not yet chosen, or at the end.

Vinyals, Fortunato, Jaitly: Pointer Networks, NeurIPS 2015, https://arxiv.org/abs/1506.03134
(section 2.3; chosen inputs are masked as in Bello et al., https://arxiv.org/abs/1611.09940).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZE, END = 8, 0
SPREAD, STOP = 4.0, -3.0


class PointerNetwork(nn.Module):
    """Points [T, 2] in, the indices of some of them in the order chosen out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, SIZE)
        self.encoder = nn.LSTM(SIZE, SIZE)
        self.end = nn.Parameter(torch.randn(1, SIZE))
        self.go = nn.Parameter(torch.randn(SIZE))
        self.decoder = nn.LSTMCell(SIZE, SIZE)
        self.w1 = nn.Linear(SIZE, SIZE, bias=False)
        self.w2 = nn.Linear(SIZE, SIZE, bias=False)
        self.v = nn.Linear(SIZE, 1, bias=False)
        self.stop = nn.Parameter(torch.zeros(1))

    def forward(self, points: Tensor) -> list[int]:
        embedded = self.embed(points)
        states, (h, c) = self.encoder(embedded)
        h, c = h[0], c[0]
        states = torch.cat([self.end, states])
        keys = self.w1(states)
        mask = torch.zeros(len(states), dtype=torch.bool)
        x = self.go
        chosen: list[int] = []
        while len(chosen) < len(points):
            h, c = self.decoder(x, (h, c))
            u = self.v(torch.tanh(keys + self.w2(h))).squeeze(-1)
            u = torch.cat([u[:1] + self.stop, u[1:]])
            index = int(u.masked_fill(mask, float("-inf")).argmax())
            if index == END:
                break
            mask[index] = True
            chosen.append(index - 1)
            x = embedded[index - 1]
        return chosen


def make() -> nn.Module:
    model = PointerNetwork()
    with torch.no_grad():  # spreads the scores: some answers leave inputs out
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.stop.add_(STOP)
    return model


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, generator=draw) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)]
