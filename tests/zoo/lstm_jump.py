"""LSTM-Jump: reads a few words, then jumps over as many as it chooses, or stops.

Yu, Lee, Le: Learning to Skim Text, ACL 2017, https://arxiv.org/abs/1704.06877 (jumps by argmax).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES, READ, JUMP, JUMPS = 8, 12, 3, 2, 4, 4
SPREAD, STOP = 3.2, 2.0


class LSTMJump(nn.Module):
    """Tokens in, the scores of the classes and the positions that were read out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.lstm = nn.LSTMCell(SIZE, SIZE)
        self.jump = nn.Linear(SIZE, JUMP + 1)
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        h, c = torch.zeros(1, SIZE), torch.zeros(1, SIZE)
        read: list[int] = []
        position = jumps = 0
        while position < len(tokens):
            for _ in range(READ):
                if position == len(tokens):
                    break
                h, c = self.lstm(self.embedding(tokens[position : position + 1]), (h, c))
                read.append(position)
                position += 1
            jump = torch.argmax(self.jump(h)).item()
            if jump == 0 or jumps == JUMPS:
                break
            position += int(jump) - 1
            jumps += 1
        return self.out(h), read


def make() -> nn.Module:
    model = LSTMJump()
    with torch.no_grad():  # spreads the scores: jumps are of different widths
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.jump.bias[0] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 4, 6, 9, 14, 9, 12, 18, 16)
    ]
