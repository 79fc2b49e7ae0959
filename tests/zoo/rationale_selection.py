"""A generator selects words of a text, and an encoder reads only these.

Lei, Barzilay, Jaakkola: Rationalizing Neural Predictions, EMNLP 2016,
https://arxiv.org/abs/1606.04155 (independent selection, at test time).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 12, 3
SPREAD, BIAS = 1.5, -0.25


class Rationale(nn.Module):
    """Tokens in, the scores of the classes and the words they rest on out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.generator = nn.LSTM(SIZE, SIZE, bidirectional=True)
        self.select = nn.Linear(2 * SIZE, 1)
        self.encoder = nn.LSTM(SIZE, SIZE)
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        states, _ = self.generator(x)
        selected = torch.sigmoid(self.select(states)).squeeze(-1) > 0.5
        if selected.any():
            _, (h, _) = self.encoder(x[selected])
            summary = h[-1]
        else:
            summary = torch.zeros(SIZE)
        return self.out(summary), tokens[selected]


def make() -> nn.Module:
    model = Rationale()
    with torch.no_grad():  # spreads the scores: none, some, or all of the words
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.select.bias.add_(BIAS)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
