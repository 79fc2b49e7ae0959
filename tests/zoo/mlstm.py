"""mLSTM of xLSTM: a matrix memory updated by outer products, with stabilised exponential gates.

Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter: xLSTM:
Extended Long Short-Term Memory, NeurIPS 2024, https://arxiv.org/abs/2405.04517 (section 2.3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE = 6, 8


class MLSTM(nn.Module):
    """[T, INPUT] in, [T, SIZE] out."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(INPUT, SIZE)
        self.k = nn.Linear(INPUT, SIZE)
        self.v = nn.Linear(INPUT, SIZE)
        self.i = nn.Linear(INPUT, 1)
        self.f = nn.Linear(INPUT, 1)
        self.o = nn.Linear(INPUT, SIZE)

    def forward(self, xs: Tensor) -> Tensor:
        memory = torch.zeros(SIZE, SIZE)
        n = torch.zeros(SIZE)
        m = torch.zeros(1)
        outputs = []
        for x in xs:
            q, k, v = self.q(x), self.k(x) / math.sqrt(SIZE), self.v(x)
            i, f = self.i(x), self.f(x)
            m_new = torch.maximum(f + m, i)
            i, f = torch.exp(i - m_new), torch.exp(f + m - m_new)
            m = m_new
            memory = f * memory + i * torch.outer(v, k)
            n = f * n + i * k
            scale = torch.maximum(torch.abs(torch.dot(n, q)), torch.exp(-m))
            outputs.append(torch.sigmoid(self.o(x)) * (memory @ q) / scale)
        return torch.stack(outputs)


def make() -> nn.Module:
    return MLSTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
