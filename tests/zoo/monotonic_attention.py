"""Hard monotonic attention: every output takes the next input that is likely enough.

Raffel, Luong, Liu, Weiss, Eck: Online and Linear-Time Attention by Enforcing Monotonic Alignments,
ICML 2017, https://arxiv.org/abs/1704.00784 (decoded greedily, as at test time).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, SOS, EOS, LIMIT = 8, 12, 0, 1, 10
SPREAD, STOP, MOVE = 4.0, 2.5, -1.0


class MonotonicAttention(nn.Module):
    """Tokens in, the tokens of the answer and the input that each attends to out."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRU(SIZE, SIZE)
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.decoder = nn.GRUCell(2 * SIZE, SIZE)
        self.query = nn.Linear(SIZE, SIZE)
        self.key = nn.Linear(SIZE, SIZE, bias=False)
        self.v = nn.Linear(SIZE, 1)
        self.out = nn.Linear(2 * SIZE, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[list[int], list[int]]:
        states, h = self.encoder(self.source(tokens))
        h = h[0]
        token = torch.tensor(SOS)
        position = 0
        answer: list[int] = []
        positions: list[int] = []
        while token != EOS and len(answer) < LIMIT:
            query = self.query(h)
            while position < len(states):
                energy = self.v(torch.tanh(query + self.key(states[position])))
                if torch.sigmoid(energy) >= 0.5:
                    break
                position += 1
            context = states[position] if position < len(states) else torch.zeros(SIZE)
            h = self.decoder(torch.cat([self.target(token), context]), h)
            token = torch.argmax(self.out(torch.cat([h, context])))
            answer.append(int(token.item()))
            positions.append(position)
        return answer, positions


def make() -> nn.Module:
    model = MonotonicAttention()
    with torch.no_grad():  # spreads the scores: the pointer stays, moves, or runs out
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.v.bias.add_(MOVE)
        model.out.bias[EOS] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(2, VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
