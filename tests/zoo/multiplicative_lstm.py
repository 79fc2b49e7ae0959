"""Multiplicative LSTM: the hidden-to-hidden transition depends on the input.

Krause, Lu, Murray, Renals: Multiplicative LSTM for Sequence Modelling, 2016,
https://arxiv.org/abs/1609.07959.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, SIZE = 16, 8


class MultiplicativeLSTM(nn.Module):
    """A language model: tokens [T] in, scores of each next token [T, VOCABULARY] out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.w_mx = nn.Linear(SIZE, SIZE, bias=False)
        self.w_mh = nn.Linear(SIZE, SIZE, bias=False)
        self.w_x = nn.Linear(SIZE, 4 * SIZE)
        self.w_m = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        m = self.w_mx(x) * self.w_mh(h)
        h_hat, i, o, f = torch.split(self.w_x(x) + self.w_m(m), SIZE, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(h_hat)
        return torch.tanh(c) * torch.sigmoid(o), c

    def forward(self, tokens: Tensor) -> Tensor:
        h, c = torch.zeros(SIZE), torch.zeros(SIZE)
        logits = []
        for token in tokens:
            h, c = self.step(self.embedding(token), h, c)
            logits.append(self.out(h))
        return torch.stack(logits)


def make() -> nn.Module:
    return MultiplicativeLSTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, VOCABULARY, (n,), generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)
    ]
