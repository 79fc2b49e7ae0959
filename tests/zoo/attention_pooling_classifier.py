"""Hierarchical attention: words attended to within sentences, sentences within the document.

Yang, Yang, Dyer, He, Smola, Hovy: Hierarchical Attention Networks for Document Classification,
NAACL 2016, https://aclanthology.org/N16-1174 (section 2).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 12, 4


class AttentionPooling(nn.Module):
    """[T, 2 * SIZE] in, their weighted sum and the weights out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * SIZE, 2 * SIZE)
        self.context = nn.Parameter(torch.randn(2 * SIZE))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.tanh(self.hidden(states))
        weights = torch.softmax(u @ self.context, dim=0)
        return (weights.unsqueeze(1) * states).sum(0), weights


class HAN(nn.Module):
    """Sentences (tensors of tokens) of a document in, class scores and sentence weights out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.words = nn.GRU(SIZE, SIZE, bidirectional=True)
        self.word_attention = AttentionPooling()
        self.sentences = nn.GRU(2 * SIZE, SIZE, bidirectional=True)
        self.sentence_attention = AttentionPooling()
        self.out = nn.Linear(2 * SIZE, CLASSES)

    def forward(self, document: list[Tensor]) -> tuple[Tensor, Tensor]:
        sentences = []
        for tokens in document:
            states, _ = self.words(self.embedding(tokens))
            sentence, _ = self.word_attention(states)
            sentences.append(sentence)
        states, _ = self.sentences(torch.stack(sentences))
        pooled, weights = self.sentence_attention(states)
        return torch.log_softmax(self.out(pooled), dim=-1), weights


def make() -> nn.Module:
    return HAN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def document(*lengths: int) -> list[Tensor]:
        return [torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)]) for n in lengths]

    return [
        document(1),
        document(5),
        document(3, 4),
        document(1, 1, 2),
        document(6, 2, 3),
        document(2, 7, 1, 4),
        document(3, 3, 3, 3, 3),
        document(12, 1),
        document(4, 3),
    ]
