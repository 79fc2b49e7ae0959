"""Plain recursive net with merge scores over trees that are dataclasses, known to torch's pytrees.

Socher, Lin, Ng, Manning: Parsing Natural Scenes and Natural Language with Recursive Neural
Networks, ICML 2011, https://icml.cc/2011/papers/125_icmlpaper.pdf (p = f(W [c1; c2] + b),
a score of each merge, a tree's score is their sum); such nets are from Goller and Kuechler,
https://doi.org/10.1109/ICNN.1996.548916.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SIZE, VOCABULARY = 8, 20


@dataclass
class Leaf:
    token: Tensor


@dataclass
class Node:
    left: Leaf | Node
    right: Leaf | Node


pytree.register_dataclass(Leaf)
pytree.register_dataclass(Node)


class TreeRNN(nn.Module):
    """A tree in, its root's vector and its score out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.semantic = nn.Linear(SIZE, SIZE)
        self.merge = nn.Linear(2 * SIZE, SIZE)
        self.score = nn.Linear(SIZE, 1, bias=False)

    def encode(self, tree: Leaf | Node) -> tuple[Tensor, Tensor]:
        if isinstance(tree, Leaf):
            return torch.sigmoid(self.semantic(self.embedding(tree.token))), torch.zeros(1)
        (left, score_left), (right, score_right) = self.encode(tree.left), self.encode(tree.right)
        p = torch.sigmoid(self.merge(torch.cat([left, right])))
        return p, self.score(p) + score_left + score_right

    def forward(self, tree: Leaf | Node) -> tuple[Tensor, Tensor]:
        return self.encode(tree)


def make() -> nn.Module:
    return TreeRNN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(leaves: int) -> Leaf | Node:
        if leaves == 1:
            return Leaf(torch.tensor(draw.randrange(VOCABULARY)))
        left = draw.randint(1, leaves - 1)
        return Node(tree(left), tree(leaves - left))

    return [tree(n) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
