"""Binary TreeLSTM as a loop over arrays: leaves first, then the two children of each inner node.

Tai, Socher, Manning: Improved Semantic Representations From Tree-Structured Long Short-Term Memory
Networks, ACL 2015, https://arxiv.org/abs/1503.00075 (equations 9 to 14, N = 2).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 20, 3


class IndexedTreeLSTM(nn.Module):
    """Tokens of leaves and the children of inner nodes in, scores of all nodes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.leaf = nn.Linear(SIZE, 3 * SIZE)
        self.iou = nn.Linear(2 * SIZE, 3 * SIZE)
        self.forget = nn.Linear(2 * SIZE, 2 * SIZE)
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, leaves: Tensor, children: list[list[int]]) -> Tensor:
        i, o, u = self.leaf(self.embedding(leaves)).chunk(3, -1)
        cells = torch.sigmoid(i) * torch.tanh(u)
        c = list(cells)
        h = list(torch.sigmoid(o) * torch.tanh(cells))
        for left, right in children:
            both = torch.cat([h[left], h[right]])
            i, o, u = self.iou(both).chunk(3, -1)
            f_left, f_right = torch.sigmoid(self.forget(both)).chunk(2, -1)
            c.append(torch.sigmoid(i) * torch.tanh(u) + f_left * c[left] + f_right * c[right])
            h.append(torch.sigmoid(o) * torch.tanh(c[-1]))
        return self.out(torch.stack(h))


def make() -> nn.Module:
    return IndexedTreeLSTM()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(num: int) -> Any:
        leaves = torch.tensor([draw.randrange(VOCABULARY) for _ in range(num)])
        roots, children = list(range(num)), []
        while len(roots) > 1:
            i = draw.randrange(len(roots) - 1)
            children.append(roots[i : i + 2])
            roots[i : i + 2] = [num + len(children) - 1]
        return leaves, children

    return [tree(n) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 6)]
