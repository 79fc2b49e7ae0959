"""Encoder-decoder of GRUs, decoded greedily until the end of the sentence.

Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio: Learning Phrase Representations
using RNN Encoder-Decoder for Statistical Machine Translation, EMNLP 2014,
https://arxiv.org/abs/1406.1078.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, SOS, EOS, LIMIT = 8, 12, 0, 1, 12
SPREAD, STOP = 5.0, 6.0


class Seq2Seq(nn.Module):
    """Tokens [1, T] in, the tokens of the answer out."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRU(SIZE, SIZE, batch_first=True)
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.decoder = nn.GRUCell(2 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def forward(self, tokens: Tensor) -> list[int]:
        _, summary = self.encoder(self.source(tokens))
        summary = summary[-1]
        h = torch.tanh(summary)
        token = torch.tensor([SOS])
        answer: list[int] = []
        done = False
        while not done and len(answer) < LIMIT:
            h = self.decoder(torch.cat([self.target(token), summary], dim=1), h)
            token = self.out(h).argmax(-1)
            if token.item() == EOS:
                done = True
            else:
                answer.append(int(token.item()))
        return answer


def make() -> nn.Module:
    model = Seq2Seq()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[EOS] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([[draw.randrange(2, VOCABULARY) for _ in range(n)]])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
