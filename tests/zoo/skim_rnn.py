"""Skim-RNN: each word updates the whole state, or only a little of it by a smaller RNN.

Seo, Min, Farhadi, Hajishirzi: Neural Speed Reading via Skim-RNN, ICLR 2018,
https://arxiv.org/abs/1711.02085 (as at test time).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, SMALL, VOCABULARY, CLASSES = 8, 3, 12, 3
SPREAD = 2.0


class SkimRNN(nn.Module):
    """Tokens in, the scores of the classes and how many tokens were skimmed out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.decide = nn.Linear(2 * SIZE, 2)
        self.big = nn.LSTMCell(SIZE, SIZE)
        self.small = nn.LSTMCell(SIZE, SMALL)
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        h = torch.zeros(1, SIZE)
        c = torch.zeros(1, SIZE)
        skimmed = 0
        for x in self.embedding(tokens).split(1):
            p = torch.softmax(self.decide(torch.cat([x, h], dim=1)), dim=1)
            if p[0, 1] > p[0, 0]:
                h_small, c_small = self.small(x, (h[:, :SMALL], c[:, :SMALL]))
                h = torch.cat([h_small, h[:, SMALL:]], dim=1)
                c = torch.cat([c_small, c[:, SMALL:]], dim=1)
                skimmed += 1
            else:
                h, c = self.big(x, (h, c))
        return self.out(h), skimmed


def make() -> nn.Module:
    model = SkimRNN()
    with torch.no_grad():  # spreads the scores: words are read and skimmed
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
