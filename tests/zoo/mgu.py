"""Minimal gated unit: a GRU with one gate.

Zhou, Wu, Zhang, Zhou: Minimal Gated Unit for Recurrent Neural Networks, 2016,
https://arxiv.org/abs/1603.09420 (table 1d).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE = 5, 8


class MGUCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(SIZE + INPUT, SIZE)
        self.candidate = nn.Linear(SIZE + INPUT, SIZE)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f = torch.sigmoid(self.forget(torch.cat([h, x], dim=-1)))
        candidate = torch.tanh(self.candidate(torch.cat([f * h, x], dim=-1)))
        return (1 - f) * h + f * candidate


class MGU(nn.Module):
    """[T, B, INPUT] in, the last state [B, SIZE] out; h0 may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = MGUCell()

    def forward(self, xs: Tensor, h0: Tensor | None = None) -> Tensor:
        h = xs.new_zeros(xs.shape[1], SIZE) if h0 is None else h0
        for t in range(xs.shape[0]):
            h = self.cell(xs[t], h)
        return h


def make() -> nn.Module:
    return MGU()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)

    def x(n: int) -> Tensor:
        return torch.randn(n, 1, INPUT, generator=draw)

    given = [
        {"xs": x(n), "h0": 0.5 * torch.randn(1, SIZE, generator=draw)} for n in (1, 4, 9, 2, 6)
    ]
    return [*(x(n) for n in (1, 2, 3, 5, 8, 12)), *given]
