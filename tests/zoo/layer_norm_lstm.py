"""LSTM with layer normalisation of both projections and of the cell state.

Ba, Kiros, Hinton: Layer Normalization, 2016, https://arxiv.org/abs/1607.06450 (equations 20 to 22).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, INPUT, SIZE, CLASSES = 20, 6, 8, 3


class LayerNormLSTMCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_h = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.weight_x = nn.Linear(INPUT, 4 * SIZE, bias=False)
        self.bias = nn.Parameter(0.1 * torch.randn(4 * SIZE))
        self.norm_h = nn.LayerNorm(4 * SIZE)
        self.norm_x = nn.LayerNorm(4 * SIZE)
        self.norm_c = nn.LayerNorm(SIZE)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.norm_h(self.weight_h(h)) + self.norm_x(self.weight_x(x)) + self.bias
        f, i, o, g = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm_c(c))
        return h, c


class LayerNormLSTM(nn.Module):
    """Tokens [T] in, scores of classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, INPUT)
        self.cell = LayerNormLSTMCell()
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        h = torch.zeros(SIZE)
        c = torch.zeros(SIZE)
        for t in range(embedded.shape[0]):
            h, c = self.cell(embedded[t], h, c)
        return self.out(h)


def make() -> nn.Module:
    return LayerNormLSTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, VOCABULARY, (n,), generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)
    ]
