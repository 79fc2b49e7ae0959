"""BiLSTM-CRF decoded by Viterbi, its backpointers followed one number at a time.

Lample, Ballesteros, Subramanian, Kawakami, Dyer: Neural Architectures for Named Entity Recognition,
NAACL 2016, https://arxiv.org/abs/1603.01360 (section 2.2; the loop is that of PyTorch's tutorial).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, TAGS = 8, 12, 5
SPREAD = 4.81


class ViterbiCRF(nn.Module):
    """Tokens in, the score of the best tags and these tags out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE, bidirectional=True)
        self.emission = nn.Linear(2 * SIZE, TAGS)
        self.start = nn.Parameter(torch.randn(TAGS))
        self.end = nn.Parameter(torch.randn(TAGS))
        self.transitions = nn.Parameter(torch.randn(TAGS, TAGS))

    def forward(self, tokens: Tensor) -> tuple[float, list[int]]:
        states, _ = self.lstm(self.embedding(tokens))
        emissions = self.emission(states)
        score = self.start + emissions[0]
        backpointers = []
        for emission in emissions[1:]:
            best, previous = (score.unsqueeze(1) + self.transitions).max(dim=0)
            backpointers.append(previous)
            score = best + emission
        score = score + self.end
        best_tag = score.argmax().item()
        path_score = score[int(best_tag)].item()
        path = [int(best_tag)]
        for pointers in reversed(backpointers):
            best_tag = pointers[int(best_tag)].item()
            path.append(int(best_tag))
        path.reverse()
        return path_score, path


def make() -> nn.Module:
    model = ViterbiCRF()
    with torch.no_grad():  # spreads the scores: tags change
        for module in (model.embedding, model.lstm, model.emission):
            for parameter in module.parameters():
                parameter.mul_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
