"""Two towers over bags of words (DSSM): a query's posterior over documents, from cosines.

Huang, He, Gao, Deng, Acero, Heck: Learning Deep Structured Semantic Models for Web Search using
Clickthrough Data, CIKM 2013, https://doi.org/10.1145/2505515.2505665 (the first layer's
product with a bag of words is a sum of embeddings).
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, VOCABULARY = 8, 20


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, SIZE)
        self.layers = nn.Sequential(nn.Tanh(), nn.Linear(SIZE, SIZE), nn.Tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.words(tokens).sum(0))


class TwoTowers(nn.Module):
    """A query and documents in, log-probabilities of the documents out."""

    def __init__(self) -> None:
        super().__init__()
        self.query = Tower()
        self.document = Tower()
        self.smoothing = 10.0

    def forward(self, query: Tensor, documents: list[Tensor]) -> Tensor:
        y = self.query(query)
        cosines = [F.cosine_similarity(y, self.document(d), dim=-1) for d in documents]
        return torch.log_softmax(self.smoothing * torch.stack(cosines), 0)


def make() -> nn.Module:
    return TwoTowers()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tokens(length: int) -> Tensor:
        return torch.tensor([draw.randrange(VOCABULARY) for _ in range(length)])

    return [
        {"query": tokens(draw.randint(1, 5)), "documents": [tokens(n) for n in lengths]}
        for lengths in [
            (1,),
            (3, 5),
            (12,),
            (4, 4, 4),
            (1, 2, 3, 4),
            (7, 1),
            (2, 9, 2, 5, 6),
            (8, 8),
            (3, 1, 10),
        ]
    ]
