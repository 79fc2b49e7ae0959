"""A recurrent cell whose input goes through the expert that its router chooses at every step.

Fedus, Zoph, Shazeer: Switch Transformers: Scaling to Trillion Parameter Models with Simple and
Efficient Sparsity, JMLR 2022, https://arxiv.org/abs/2101.03961 (one expert a token, section 2.1);
between LSTMs as in Shazeer et al., ICLR 2017, https://arxiv.org/abs/1701.06538.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, EXPERTS = 8, 12, 4
SPREAD = 5.0


class SwitchLSTM(nn.Module):
    """Tokens in, scores of the next token of each out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.below = nn.LSTMCell(SIZE, SIZE)
        self.router = nn.Linear(SIZE, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.ReLU(), nn.Linear(2 * SIZE, SIZE))
            for _ in range(EXPERTS)
        )
        self.above = nn.LSTMCell(SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        below = above = (torch.zeros(1, SIZE), torch.zeros(1, SIZE))
        scores = []
        for t in range(tokens.size(0)):
            below = self.below(self.embedding(tokens[t : t + 1]), below)
            h = below[0]
            gate, index = torch.softmax(self.router(h), dim=-1).max(dim=-1)
            expert = self.experts[int(index)]
            above = self.above(h + gate * expert(h), above)
            scores.append(self.out(above[0]))
        return torch.cat(scores)


def make() -> nn.Module:
    model = SwitchLSTM()
    with torch.no_grad():  # spreads the scores: every expert has tokens
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
