"""Linear recurrent unit: a complex diagonal recurrence, written in real arithmetic.

Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De: Resurrecting Recurrent Neural Networks for
Long Sequences, ICML 2023, https://arxiv.org/abs/2303.06349 (appendix A).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, STATE, R_MIN, R_MAX = 6, 8, 0.5, 0.95


class LRU(nn.Module):
    """x' = lambda * x + gamma * (B u), y = Re(C x') + D * u."""

    def __init__(self) -> None:
        super().__init__()
        radius = torch.rand(STATE) * (R_MAX**2 - R_MIN**2) + R_MIN**2
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(radius)))
        self.theta_log = nn.Parameter(torch.log(math.pi * (0.05 + torch.rand(STATE))))
        self.gamma_log = nn.Parameter(torch.log(torch.sqrt(1 - radius)))
        self.b_re = nn.Parameter(torch.randn(STATE, SIZE) / math.sqrt(2 * SIZE))
        self.b_im = nn.Parameter(torch.randn(STATE, SIZE) / math.sqrt(2 * SIZE))
        self.c_re = nn.Parameter(torch.randn(SIZE, STATE) / math.sqrt(STATE))
        self.c_im = nn.Parameter(torch.randn(SIZE, STATE) / math.sqrt(STATE))
        self.d = nn.Parameter(torch.randn(SIZE))

    def forward(self, us: Tensor) -> Tensor:
        modulus = torch.exp(-torch.exp(self.nu_log))
        angle = torch.exp(self.theta_log)
        lambda_re, lambda_im = modulus * torch.cos(angle), modulus * torch.sin(angle)
        gamma = torch.exp(self.gamma_log)
        b_re, b_im = gamma[:, None] * self.b_re, gamma[:, None] * self.b_im
        re, im = us.new_zeros(STATE), us.new_zeros(STATE)
        outputs = []
        for u in us:
            re, im = (
                lambda_re * re - lambda_im * im + b_re @ u,
                lambda_re * im + lambda_im * re + b_im @ u,
            )
            outputs.append(self.c_re @ re - self.c_im @ im + self.d * u)
        return torch.stack(outputs)


class LRUBlock(nn.Module):
    """Norm, LRU, gated linear unit and a residual, as in figure 1; [T, SIZE] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.lru = LRU()
        self.mix = nn.Linear(SIZE, 2 * SIZE)

    def forward(self, xs: Tensor) -> Tensor:
        return xs + F.glu(self.mix(F.gelu(self.lru(self.norm(xs)))), dim=-1)


def make() -> nn.Module:
    return LRUBlock()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
