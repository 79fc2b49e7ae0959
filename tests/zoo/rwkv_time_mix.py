"""RWKV-4 time mixing with token shift and the numerically safe state (aa, bb, pp).

Peng et al.: RWKV: Reinventing RNNs for the Transformer Era, EMNLP Findings 2023,
https://arxiv.org/abs/2305.13048 (equations 11 to 18; appendix D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZE = 8


class TimeMix(nn.Module):
    """[T, SIZE] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.time_decay = nn.Parameter(torch.linspace(-3, 1, SIZE))
        self.time_first = nn.Parameter(0.5 * torch.randn(SIZE))
        self.mix_k = nn.Parameter(torch.rand(SIZE))
        self.mix_v = nn.Parameter(torch.rand(SIZE))
        self.mix_r = nn.Parameter(torch.rand(SIZE))
        self.key = nn.Linear(SIZE, SIZE, bias=False)
        self.value = nn.Linear(SIZE, SIZE, bias=False)
        self.receptance = nn.Linear(SIZE, SIZE, bias=False)
        self.output = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, xs: Tensor) -> Tensor:
        last = torch.zeros(SIZE)
        aa, bb, pp = torch.zeros(SIZE), torch.zeros(SIZE), torch.full((SIZE,), -1e30)
        outputs = []
        for x in xs:
            k = self.key(x * self.mix_k + last * (1 - self.mix_k))
            v = self.value(x * self.mix_v + last * (1 - self.mix_v))
            r = torch.sigmoid(self.receptance(x * self.mix_r + last * (1 - self.mix_r)))
            last = x

            ww = self.time_first + k
            qq = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - qq), torch.exp(ww - qq)
            wkv = (e1 * aa + e2 * v) / (e1 * bb + e2)

            ww = pp - torch.exp(self.time_decay)
            qq = torch.maximum(ww, k)
            e1, e2 = torch.exp(ww - qq), torch.exp(k - qq)
            aa, bb, pp = e1 * aa + e2 * v, e1 * bb + e2, qq
            outputs.append(self.output(r * wkv))
        return torch.stack(outputs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.mix = TimeMix()

    def forward(self, xs: Tensor) -> Tensor:
        return xs + self.mix(self.norm(xs))


def make() -> nn.Module:
    return Block()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
