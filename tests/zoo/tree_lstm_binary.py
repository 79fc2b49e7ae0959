"""Binary (N-ary, N = 2) TreeLSTM over nested pairs; leaves are token tensors.

Tai, Socher, Manning: Improved Semantic Representations From Tree-Structured Long Short-Term Memory
Networks, ACL 2015, https://arxiv.org/abs/1503.00075 (equations 9 to 14).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 20, 3


class TreeLSTM(nn.Module):
    """A tree in, scores of its root out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.leaf = nn.Linear(SIZE, 2 * SIZE)
        self.iou = nn.Linear(2 * SIZE, 3 * SIZE)
        self.forget = nn.Linear(2 * SIZE, 2 * SIZE)
        self.out = nn.Linear(SIZE, CLASSES)

    def encode(self, tree: Any) -> tuple[Tensor, Tensor]:
        if isinstance(tree, Tensor):
            h, c = self.leaf(self.embedding(tree)).chunk(2, -1)
            return torch.tanh(h), c
        (left, c_left), (right, c_right) = self.encode(tree[0]), self.encode(tree[1])
        both = torch.cat([left, right], -1)
        i, o, u = self.iou(both).chunk(3, -1)
        f_left, f_right = torch.sigmoid(self.forget(both)).chunk(2, -1)
        c = torch.sigmoid(i) * torch.tanh(u) + f_left * c_left + f_right * c_right
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, tree: Any) -> Tensor:
        h, _ = self.encode(tree)
        return self.out(h)


def make() -> nn.Module:
    return TreeLSTM()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(leaves: int) -> Any:
        if leaves == 1:
            return torch.tensor(draw.randrange(VOCABULARY))
        left = draw.randint(1, leaves - 1)
        return tree(left), tree(leaves - left)

    return [(tree(n),) for n in (1, 2, 3, 5, 8, 13, 2, 7, 4, 6)]
