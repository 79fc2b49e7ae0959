"""A whole answer of a predicted length at once, refined until it no longer changes.

Lee, Mansimov, Cho: Deterministic Non-Autoregressive Neural Sequence Modeling by Iterative
Refinement, EMNLP 2018, https://arxiv.org/abs/1802.06901 (BiGRUs with attention for Transformers).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, MASK, LONGEST, LIMIT = 8, 12, 0, 8, 8
SPREAD, PLACES = 2.81, 2.0


class Refinement(nn.Module):
    """Tokens in, the answer and how often it was refined out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRU(SIZE, SIZE // 2, bidirectional=True)
        self.length = nn.Linear(SIZE, LONGEST)
        self.positions = nn.Embedding(LONGEST, SIZE)
        self.decoder = nn.GRU(SIZE, SIZE // 2, bidirectional=True)
        self.out = nn.Linear(2 * SIZE, VOCABULARY)

    def refine(self, answer: Tensor, memory: Tensor) -> Tensor:
        places = self.positions(torch.arange(len(answer)))
        states, _ = self.decoder(self.embedding(answer) + places)
        context = torch.softmax(states @ memory.T, dim=-1) @ memory
        refined: Tensor = self.out(torch.cat([states, context], dim=-1)).argmax(-1)
        return refined

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        memory, _ = self.encoder(self.embedding(tokens))
        length = int(self.length(memory.mean(0)).argmax()) + 1
        answer = torch.full((length,), MASK)
        rounds = 0
        while rounds < LIMIT:
            refined = self.refine(answer, memory)
            rounds += 1
            if torch.equal(refined, answer):
                break
            answer = refined
        return answer, rounds


def make() -> nn.Module:
    model = Refinement()
    with torch.no_grad():  # spreads the scores: answers of different lengths
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.positions.weight.mul_(PLACES)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(1, VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
