"""Manhattan LSTM: one encoder for two sentences, their similarity exp(-|h1 - h2|).

Mueller, Thyagarajan: Siamese Recurrent Architectures for Learning Sentence Similarity, AAAI 2016,
https://doi.org/10.1609/aaai.v30i1.10350.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY = 8, 20


class MaLSTM(nn.Module):
    """Two sentences in, their similarity out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE)

    def encode(self, tokens: Tensor) -> Tensor:
        _, (h, _) = self.lstm(self.embedding(tokens))
        return h[-1]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.exp(-torch.norm(self.encode(first) - self.encode(second), p=1))


def make() -> nn.Module:
    return MaLSTM()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tokens(length: int) -> Tensor:
        return torch.tensor([draw.randrange(VOCABULARY) for _ in range(length)])

    lengths = [(1, 1), (1, 4), (3, 2), (5, 5), (8, 3), (12, 10), (2, 7), (6, 6), (4, 1), (9, 12)]
    return [(tokens(n), tokens(m)) for n, m in lengths]
