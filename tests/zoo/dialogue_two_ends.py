"""Dialogue carried on turn by turn: one token ends a turn, another the dialogue.

Serban, Sordoni, Bengio, Courville, Pineau: Building End-To-End Dialogue Systems Using Generative
Hierarchical Neural Network Models, AAAI 2016, https://arxiv.org/abs/1507.04808 (HRED, greedily).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, EOU, EOD, LIMIT = 8, 12, 0, 1, 16
SPREAD, TURN = 3.25, 1.0


class HRED(nn.Module):
    """The turns so far (tensors of tokens) in, all tokens of the turns that follow out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.utterance = nn.GRU(SIZE, SIZE)
        self.context = nn.GRUCell(SIZE, SIZE)
        self.start = nn.Linear(SIZE, SIZE)
        self.decoder = nn.GRUCell(SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def listen(self, turn: Tensor, context: Tensor) -> Tensor:
        _, h = self.utterance(self.embedding(turn))
        heard: Tensor = self.context(h, context)
        return heard

    def forward(self, turns: list[Tensor]) -> Tensor:
        context = torch.zeros(1, SIZE)
        for turn in turns:
            context = self.listen(turn, context)
        h = torch.tanh(self.start(context))
        token = torch.tensor([EOU])
        said: list[Tensor] = []
        turn_start = 0
        while len(said) < LIMIT:
            h = self.decoder(self.embedding(token), h)
            token = self.out(h).argmax(dim=1)
            said.append(token)
            if token == EOD:
                break
            elif token == EOU:
                context = self.listen(torch.cat(said[turn_start:]), context)
                h = torch.tanh(self.start(context))
                turn_start = len(said)
        return torch.cat(said)


def make() -> nn.Module:
    model = HRED()
    with torch.no_grad():  # spreads the scores: turns and dialogues of different lengths
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[EOU] += TURN
    return model


def requests() -> list[Any]:
    draw = random.Random(0)

    def turns(*lengths: int) -> list[Tensor]:
        return [torch.tensor([draw.randrange(2, VOCABULARY) for _ in range(n)]) for n in lengths]

    return [
        turns(1),
        turns(5),
        turns(3, 4),
        turns(1, 1, 2),
        turns(6, 2, 3),
        turns(2, 7, 1, 4),
        turns(3, 3, 3, 3, 3),
        turns(9, 1),
        turns(4, 3),
        turns(8),
    ]
