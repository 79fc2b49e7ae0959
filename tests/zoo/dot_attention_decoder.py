"""Attention by the dot score between a GRU cell's states, decoded greedily to a list of numbers.

Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation, EMNLP
2015, https://arxiv.org/abs/1508.04025 (global attention, "dot", without input feeding).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, EOS, LIMIT = 8, 12, 0, 10
SPREAD = 2.75


class DotAttention(nn.Module):
    """Tokens in, the tokens of the answer and the score of each out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRUCell(SIZE, SIZE)
        self.decoder = nn.GRUCell(SIZE, SIZE)
        self.combine = nn.Linear(2 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[list[int], list[float]]:
        h = torch.zeros(1, SIZE)
        states = []
        for token in tokens:
            h = self.encoder(self.embedding(token.view(1)), h)
            states.append(h)
        memory = torch.cat(states)

        last = EOS
        words: list[int] = []
        scores: list[float] = []
        for _ in range(LIMIT):
            h = self.decoder(self.embedding(torch.tensor([last])), h)
            weights = torch.softmax(h @ memory.t(), dim=1)
            h_tilde = torch.tanh(self.combine(torch.cat([weights @ memory, h], dim=1)))
            score, best = torch.log_softmax(self.out(h_tilde), dim=1).max(dim=1)
            last = int(best.item())
            scores.append(score.item())
            if last == EOS:
                break
            words.append(last)
        return words, scores


def make() -> nn.Module:
    model = DotAttention()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(1, VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
