"""Multi-scale retention of RetNet in its recurrent form, with rotary positions.

Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei: Retentive Network: A Successor to Transformer for Large
Language Models, 2023, https://arxiv.org/abs/2307.08621 (equations 5, 6 and 8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, HEADS = 8, 2
HEAD = SIZE // HEADS


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring features, turned by the angles of one position."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class Retention(nn.Module):
    """[T, SIZE] in and out."""

    gamma: Tensor
    theta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(SIZE, SIZE, bias=False)
        self.k = nn.Linear(SIZE, SIZE, bias=False)
        self.v = nn.Linear(SIZE, SIZE, bias=False)
        self.gate = nn.Linear(SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, SIZE, bias=False)
        self.norm = nn.GroupNorm(HEADS, SIZE)
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float32))
        theta = 10000 ** -torch.linspace(0, 1, HEAD // 2)
        self.register_buffer("gamma", gamma.view(HEADS, 1, 1))
        self.register_buffer("theta", theta.repeat_interleave(2))

    def forward(self, xs: Tensor) -> Tensor:
        angles = torch.arange(xs.shape[0])[:, None] * self.theta
        cos, sin = torch.cos(angles), torch.sin(angles)
        state = torch.zeros(HEADS, HEAD, HEAD)
        outputs = []
        for n, x in enumerate(xs):
            q = rotate(self.q(x).view(HEADS, HEAD), cos[n], sin[n])
            k = rotate(self.k(x).view(HEADS, HEAD), cos[n], sin[n]) * HEAD**-0.5
            v = self.v(x).view(HEADS, HEAD)
            state = self.gamma * state + k.unsqueeze(-1) * v.unsqueeze(-2)
            outputs.append((q.unsqueeze(-2) @ state).reshape(SIZE))
        retained = self.norm(torch.stack(outputs))
        return self.out(F.silu(self.gate(xs)) * retained)


def make() -> nn.Module:
    return Retention()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
