"""End-to-end memory network: a question attends to the sentences of a story, several times over.

Sukhbaatar, Szlam, Weston, Fergus: End-To-End Memory Networks, NeurIPS 2015,
https://arxiv.org/abs/1503.08895 (section 2.2, adjacent weight tying, temporal encoding).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, HOPS, MOST = 8, 12, 3, 12


class MemN2N(nn.Module):
    """A story (tensors of tokens) and a question in, scores of the answer out."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, SIZE) for _ in range(HOPS + 1))
        self.times = nn.ModuleList(nn.Embedding(MOST, SIZE) for _ in range(HOPS + 1))

    def forward(self, story: list[Tensor], question: Tensor) -> Tensor:
        ages = torch.arange(len(story)).flip(0)
        u = self.embeddings[0](question).sum(0)
        for hop in range(HOPS):
            look, say = self.embeddings[hop], self.embeddings[hop + 1]
            m = torch.stack([look(s).sum(0) for s in story]) + self.times[hop](ages)
            c = torch.stack([say(s).sum(0) for s in story]) + self.times[hop + 1](ages)
            p = torch.softmax(torch.mv(m, u), dim=0)
            u = u + torch.mv(c.t(), p)
        return torch.mv(self.embeddings[HOPS].weight, u)  # type: ignore[arg-type]


def make() -> nn.Module:
    model = MemN2N()
    with torch.no_grad():  # the paper draws weights of deviation 0.1
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)

    def tokens(length: int) -> Tensor:
        return torch.tensor([draw.randrange(VOCABULARY) for _ in range(length)])

    def story(*lengths: int) -> Any:
        return [tokens(n) for n in lengths], tokens(draw.randint(1, 5))

    return [
        story(1),
        story(5),
        story(3, 4),
        story(1, 1, 2),
        story(6, 2, 3),
        story(2, 7, 1, 4),
        story(3, 3, 3, 3, 3),
        story(9, 1),
        story(*[draw.randint(1, 6) for _ in range(8)]),
        {"story": [tokens(4), tokens(2)], "question": tokens(3)},
    ]
