"""BiLSTM-CRF: emissions, and the log partition function by the forward algorithm.

Lample, Ballesteros, Subramanian, Kawakami, Dyer: Neural Architectures for Named Entity Recognition,
NAACL 2016, https://arxiv.org/abs/1603.01360 (section 2.2); Huang, Xu, Yu: Bidirectional LSTM-CRF
Models for Sequence Tagging, https://arxiv.org/abs/1508.01991.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, TAGS = 8, 20, 5


class BiLSTMCRF(nn.Module):
    """Tokens in, their emission scores and the log partition function out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE, bidirectional=True)
        self.emission = nn.Linear(2 * SIZE, TAGS)
        self.start = nn.Parameter(nn.init.uniform_(torch.empty(TAGS), -0.5, 0.5))
        self.end = nn.Parameter(nn.init.uniform_(torch.empty(TAGS), -0.5, 0.5))
        self.transitions = nn.Parameter(nn.init.uniform_(torch.empty(TAGS, TAGS), -0.5, 0.5))

    def log_partition(self, emissions: Tensor) -> Tensor:
        alpha = self.start + emissions[0]
        for t in range(1, emissions.size(0)):
            scores = alpha.unsqueeze(1) + self.transitions + emissions[t].unsqueeze(0)
            alpha = torch.logsumexp(scores, dim=0)
        return torch.logsumexp(alpha + self.end, dim=0)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.lstm(self.embedding(tokens))
        emissions = self.emission(states)
        return emissions, self.log_partition(emissions)


def make() -> nn.Module:
    return BiLSTMCRF()


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
