"""Mamba block, step by step: short causal convolution, selective scan, gate.

Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023,
https://arxiv.org/abs/2312.00752 (algorithm 2, figure 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, INNER, STATE, RANK, WINDOW = 6, 8, 4, 2, 3


class Mamba(nn.Module):
    """[T, SIZE] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(SIZE, 2 * INNER, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(INNER, WINDOW) / WINDOW)
        self.conv_bias = nn.Parameter(torch.zeros(INNER))
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        a = torch.arange(1, STATE + 1, dtype=torch.float32).repeat(INNER, 1)
        self.a_log = nn.Parameter(torch.log(a))
        self.d = nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, SIZE, bias=False)

    def step(self, u: Tensor, window: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        window = torch.cat([window[:, 1:], x[:, None]], dim=1)
        x = F.silu((window * self.conv_weight).sum(dim=1) + self.conv_bias)
        dt, b, c = torch.split(self.x_proj(x), [RANK, STATE, STATE], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        a = -torch.exp(self.a_log)
        h = torch.exp(dt[:, None] * a) * h + dt[:, None] * b[None, :] * x[:, None]
        y = h @ c + self.d * x
        return self.out_proj(y * F.silu(z)), window, h

    def forward(self, us: Tensor) -> Tensor:
        window = us.new_zeros(INNER, WINDOW)
        h = us.new_zeros(INNER, STATE)
        ys = []
        for u in us.unbind(0):
            y, window, h = self.step(u, window, h)
            ys.append(y)
        return torch.stack(ys, dim=0)


def make() -> nn.Module:
    return Mamba()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
