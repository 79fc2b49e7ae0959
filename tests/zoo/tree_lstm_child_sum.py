"""Child-Sum TreeLSTM over (token, [children]); any number of children, zeros below the leaves.

Tai, Socher, Manning: Improved Semantic Representations From Tree-Structured Long Short-Term Memory
Networks, ACL 2015, https://arxiv.org/abs/1503.00075 (equations 2 to 8).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 20, 3


class ChildSumTreeLSTM(nn.Module):
    """A tree in, scores of its root out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.iou_x = nn.Linear(SIZE, 3 * SIZE)
        self.iou_h = nn.Linear(SIZE, 3 * SIZE, bias=False)
        self.forget_x = nn.Linear(SIZE, SIZE)
        self.forget_h = nn.Linear(SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, CLASSES)

    def encode(self, tree: Any) -> tuple[Tensor, Tensor]:
        token, children = tree
        x = self.embedding(token)
        states = [self.encode(child) for child in children]
        if states:
            h = torch.stack([h for h, _ in states])
            c = torch.stack([c for _, c in states])
        else:
            h = c = torch.zeros(1, SIZE)
        i, o, u = (self.iou_x(x) + self.iou_h(h.sum(0))).chunk(3, -1)
        f = torch.sigmoid(self.forget_x(x) + self.forget_h(h))
        c = torch.sigmoid(i) * torch.tanh(u) + (f * c).sum(0)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, tree: Any) -> Tensor:
        h, _ = self.encode(tree)
        return self.out(h)


def make() -> nn.Module:
    return ChildSumTreeLSTM()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(nodes: int) -> Any:
        children, rest = [], nodes - 1
        while rest:
            size = draw.randint(1, rest)
            children.append(tree(size))
            rest -= size
        return torch.tensor(draw.randrange(VOCABULARY)), children

    return [(tree(n),) for n in (1, 2, 3, 4, 6, 9, 12, 5, 7, 3)]
