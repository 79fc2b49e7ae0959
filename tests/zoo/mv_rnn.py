"""MV-RNN: every node has a vector and a matrix, which transforms the vector of its sibling.

Socher, Huval, Manning, Ng: Semantic Compositionality through Recursive Matrix-Vector Spaces, EMNLP
2012, https://aclanthology.org/D12-1110 (word matrices of full rank).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 6, 20, 3


class MVRNN(nn.Module):
    """A tree of nested pairs in, scores of its root out."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Embedding(VOCABULARY, SIZE)
        self.matrix = nn.Embedding(VOCABULARY, SIZE * SIZE)
        nn.init.normal_(self.matrix.weight, std=0.1)
        self.matrix.weight.data += torch.eye(SIZE).flatten()  # I plus noise, as in the paper
        self.compose = nn.Linear(2 * SIZE, SIZE)
        self.compose_matrix = nn.Parameter(nn.init.xavier_uniform_(torch.empty(SIZE, 2 * SIZE)))
        self.out = nn.Linear(SIZE, CLASSES)

    def encode(self, tree: Any) -> tuple[Tensor, Tensor]:
        if isinstance(tree, Tensor):
            return self.vector(tree), self.matrix(tree).view(SIZE, SIZE)
        (a, matrix_a), (b, matrix_b) = self.encode(tree[0]), self.encode(tree[1])
        p = torch.tanh(self.compose(torch.cat([matrix_b @ a, matrix_a @ b])))
        return p, self.compose_matrix @ torch.cat([matrix_a, matrix_b])

    def forward(self, tree: Any) -> Tensor:
        p, _ = self.encode(tree)
        return self.out(p)


def make() -> nn.Module:
    return MVRNN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(leaves: int) -> Any:
        if leaves == 1:
            return torch.tensor(draw.randrange(VOCABULARY))
        left = draw.randint(1, leaves - 1)
        return tree(left), tree(leaves - left)

    return [(tree(n),) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
