"""Linear attention run as a recurrent network: attention memory and normaliser memory.

Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs: Fast Autoregressive Transformers with
Linear Attention, ICML 2020, https://arxiv.org/abs/2006.16236 (equations 16 to 20).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, HEADS = 8, 2
HEAD = SIZE // HEADS


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """[T, SIZE] in and out: the attention of heads, then the feed-forward f of equation 20."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(SIZE, SIZE)
        self.key = nn.Linear(SIZE, SIZE)
        self.value = nn.Linear(SIZE, SIZE)
        self.f = nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.ReLU(), nn.Linear(2 * SIZE, SIZE))

    def forward(self, xs: Tensor) -> Tensor:
        s = xs.new_zeros(HEADS, HEAD, HEAD)
        z = xs.new_zeros(HEADS, HEAD)
        outputs = []
        for x in xs:
            q = phi(self.query(x).view(HEADS, HEAD))
            k = phi(self.key(x).view(HEADS, HEAD))
            v = self.value(x).view(HEADS, HEAD)
            s = s + torch.einsum("hd,hm->hdm", k, v)
            z = z + k
            attended = torch.einsum("hd,hdm->hm", q, s) / (q * z).sum(-1, keepdim=True)
            outputs.append(self.f(attended.reshape(SIZE) + x))
        return torch.stack(outputs)


def make() -> nn.Module:
    return LinearAttention()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
