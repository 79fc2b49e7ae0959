"""Recursive Neural Tensor Network: a bilinear form composes two children; scores at every node.

Socher, Perelygin, Wu, Chuang, Manning, Ng, Potts: Recursive Deep Models for Semantic
Compositionality Over a Sentiment Treebank, EMNLP 2013, https://aclanthology.org/D13-1170 (section
4.3; the bias of p is the linear map's).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 6, 20, 5


class RNTN(nn.Module):
    """A tree of nested pairs in, scores of all nodes in postorder out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.linear = nn.Linear(2 * SIZE, SIZE)
        self.tensor = nn.Parameter(nn.init.normal_(torch.empty(SIZE, 2 * SIZE, 2 * SIZE), std=0.1))
        self.out = nn.Linear(SIZE, CLASSES)

    def encode(self, tree: Any, nodes: list[Tensor]) -> Tensor:
        if isinstance(tree, Tensor):
            node = self.embedding(tree)
        else:
            both = torch.cat([self.encode(tree[0], nodes), self.encode(tree[1], nodes)])
            form = torch.einsum("i,kij,j->k", both, self.tensor, both)
            node = torch.tanh(form + self.linear(both))
        nodes.append(node)
        return node

    def forward(self, tree: Any) -> Tensor:
        nodes: list[Tensor] = []
        self.encode(tree, nodes)
        return self.out(torch.stack(nodes))


def make() -> nn.Module:
    return RNTN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(leaves: int) -> Any:
        if leaves == 1:
            return torch.tensor(draw.randrange(VOCABULARY))
        left = draw.randint(1, leaves - 1)
        return tree(left), tree(leaves - left)

    return [(tree(n),) for n in (1, 2, 3, 5, 8, 4, 7, 6, 2, 5)]
