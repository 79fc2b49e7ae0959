"""Phased LSTM: a time gate opens each unit in its own phase of its own period; times are an input.

Neil, Pfeiffer, Liu: Phased LSTM: Accelerating Recurrent Network Training for Long or Event-based
Sequences, NIPS 2016, https://arxiv.org/abs/1610.09513 (equations 2 to 11).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE, CLASSES = 4, 8, 3


class PhasedLSTMCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(INPUT, 4 * SIZE)
        self.h = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.peep = nn.Parameter(0.5 * torch.randn(3, SIZE))
        self.tau = nn.Parameter(torch.exp(3 * torch.rand(SIZE)))
        self.shift = nn.Parameter(5 * torch.rand(SIZE))
        self.ratio = nn.Parameter(torch.full((SIZE,), 0.4))
        self.leak = 0.001

    def time_gate(self, time: Tensor) -> Tensor:
        phase = torch.remainder(time - self.shift, self.tau) / self.tau
        rising = 2 * phase / self.ratio
        leak = self.leak if self.training else 0.0
        closed_or_falling = torch.where(phase < self.ratio, 2 - rising, leak * phase)
        return torch.where(phase < 0.5 * self.ratio, rising, closed_or_falling)

    def forward(self, x: Tensor, time: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        k = self.time_gate(time)
        i, f, g, o = (self.x(x) + self.h(h)).chunk(4, -1)
        i = torch.sigmoid(i + self.peep[0] * c)
        f = torch.sigmoid(f + self.peep[1] * c)
        c_open = f * c + i * torch.tanh(g)
        c_new = k * c_open + (1 - k) * c
        o = torch.sigmoid(o + self.peep[2] * c_open)
        h_open = o * torch.tanh(c_open)
        return k * h_open + (1 - k) * h, c_new


class PhasedLSTM(nn.Module):
    """Events [T, INPUT] and their times [T] in, scores of classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = PhasedLSTMCell()
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, events: Tensor, times: Tensor) -> Tensor:
        h, c = events.new_zeros(SIZE), events.new_zeros(SIZE)
        for x, time in zip(events, times, strict=True):
            h, c = self.cell(x, time, h, c)
        return self.out(h)


def make() -> nn.Module:
    return PhasedLSTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "events": torch.randn(n, INPUT, generator=draw),
            "times": torch.cumsum(3 * torch.rand(n, generator=draw), 0),
        }
        for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)
    ]
