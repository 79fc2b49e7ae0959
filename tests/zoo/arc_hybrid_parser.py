"""Greedy dependency parser: a network over BiLSTM states chooses every transition.

Kiperwasser, Goldberg: Simple and Accurate Dependency Parsing Using Bidirectional LSTM Feature
Representations, TACL 2016, https://arxiv.org/abs/1603.04351 (section 4, arc-hybrid, unlabelled).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, ROOT = 6, 12, 0
SHIFT, LEFT, RIGHT = 0, 1, 2
SPREAD = 2.0


class ArcHybrid(nn.Module):
    """Tokens, after the root's, in; the head of each (the root's is -1) out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE, bidirectional=True)
        self.nothing = nn.Parameter(torch.zeros(2 * SIZE))
        self.mlp = nn.Sequential(nn.Linear(8 * SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        heads = torch.full_like(tokens, -1)
        stack: list[int] = []
        buffer = list(range(1, len(tokens))) + [ROOT]
        while len(buffer) > 1 or stack:
            places = [stack[-k] if len(stack) >= k else None for k in (3, 2, 1)]
            places.append(buffer[0] if buffer else None)
            features = [self.nothing if at is None else states[at] for at in places]
            scores = self.mlp(torch.cat(features))
            legal = []
            if len(buffer) > 1:
                legal.append(SHIFT)
            if stack:
                legal.append(LEFT)
            if len(stack) > 1:
                legal.append(RIGHT)
            action = max(legal, key=lambda a: scores[a].item())
            if action == SHIFT:
                stack.append(buffer.pop(0))
            elif action == LEFT:
                heads[stack.pop()] = buffer[0]
            else:
                child = stack.pop()
                heads[child] = stack[-1]
        return heads


def make() -> nn.Module:
    model = ArcHybrid()
    with torch.no_grad():  # spreads the scores: trees of different shapes
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([ROOT, *[draw.randrange(1, VOCABULARY) for _ in range(n)]])
        for n in (1, 2, 3, 5, 8, 10, 5, 7, 4, 6)
    ]
