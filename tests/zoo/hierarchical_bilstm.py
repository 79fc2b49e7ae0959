"""Hierarchical BiLSTM: words into sentences by attention, sentences into a document; a label each.

Jin, Szolovits: Hierarchical Neural Networks for Sequential Sentence Classification in Medical
Scientific Abstracts, EMNLP 2018, https://arxiv.org/abs/1808.06161 (section 3, up to the scores that
its CRF reads; two views of attention).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VIEWS, VOCABULARY, LABELS = 6, 2, 20, 4


class HierarchicalBiLSTM(nn.Module):
    """Sentences (tensors of tokens) of a document in, label scores of each sentence out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.words = nn.LSTM(SIZE, SIZE, bidirectional=True)
        self.attention = nn.Linear(2 * SIZE, SIZE)
        self.views = nn.Linear(SIZE, VIEWS, bias=False)
        self.sentences = nn.LSTM(VIEWS * 2 * SIZE, SIZE, bidirectional=True)
        self.out = nn.Linear(2 * SIZE, LABELS)

    def sentence(self, tokens: Tensor) -> Tensor:
        states, _ = self.words(self.embedding(tokens))
        weights = torch.softmax(self.views(torch.tanh(self.attention(states))), 0)
        return (weights.T @ states).flatten()

    def forward(self, document: list[Tensor]) -> Tensor:
        sentences = torch.stack([self.sentence(tokens) for tokens in document])
        states, _ = self.sentences(sentences)
        return self.out(states)


def make() -> nn.Module:
    return HierarchicalBiLSTM()


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
