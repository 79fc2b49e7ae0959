"""Simple recurrent unit: products over the whole sequence first, then a light recurrence.

Lei, Zhang, Wang, Dai, Artzi: Simple Recurrent Units for Highly Parallelizable Recurrence,
EMNLP 2018, https://arxiv.org/abs/1709.02755 (equations 1 to 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZE, LAYERS = 8, 2


class SRULayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(SIZE, 3 * SIZE, bias=False)
        self.v_f = nn.Parameter(0.5 * torch.randn(SIZE))
        self.v_r = nn.Parameter(0.5 * torch.randn(SIZE))
        self.b_f = nn.Parameter(0.1 * torch.randn(SIZE))
        self.b_r = nn.Parameter(0.1 * torch.randn(SIZE))

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        value, forget, reset = self.weight(xs).chunk(3, dim=-1)
        c = xs.new_zeros(SIZE)
        outputs = []
        for t in range(xs.shape[0]):
            f = torch.sigmoid(forget[t] + self.v_f * c + self.b_f)
            r = torch.sigmoid(reset[t] + self.v_r * c + self.b_r)
            c = f * c + (1 - f) * value[t]
            outputs.append(r * c + (1 - r) * xs[t])
        return torch.stack(outputs), c


class SRU(nn.Module):
    """[T, SIZE] in; [T, SIZE] and the last state of each layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SRULayer() for _ in range(LAYERS))

    def forward(self, xs: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = []
        for layer in self.layers:
            xs, c = layer(xs)
            states.append(c)
        return xs, states


def make() -> nn.Module:
    return SRU()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
