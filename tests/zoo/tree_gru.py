"""Tree GRU over nested dicts: {"left", "right"} at inner nodes, {"token"} at leaves.

Jin, Barzilay, Jaakkola: Junction Tree Variational Autoencoder for Molecular Graph Generation, ICML
2018, https://arxiv.org/abs/1802.04364 (its tree GRU, upwards; inner nodes have no label: x = 0).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 20, 3


class TreeGRU(nn.Module):
    """A binary tree in, scores of its root out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.update_x = nn.Linear(SIZE, SIZE)
        self.update_h = nn.Linear(SIZE, SIZE, bias=False)
        self.reset_x = nn.Linear(SIZE, SIZE)
        self.reset_h = nn.Linear(SIZE, SIZE, bias=False)
        self.new_x = nn.Linear(SIZE, SIZE)
        self.new_h = nn.Linear(SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, CLASSES)

    def cell(self, x: Tensor, children: list[Tensor]) -> Tensor:
        total = torch.zeros(SIZE)
        gated = torch.zeros(SIZE)
        for h in children:
            r = torch.sigmoid(self.reset_x(x) + self.reset_h(h))
            total = total + h
            gated = gated + r * h
        z = torch.sigmoid(self.update_x(x) + self.update_h(total))
        new = torch.tanh(self.new_x(x) + self.new_h(gated))
        return (1 - z) * total + z * new

    def encode(self, tree: dict[str, Any]) -> Tensor:
        if "token" in tree:
            return self.cell(self.embedding(tree["token"]), [])
        children = [self.encode(tree["left"]), self.encode(tree["right"])]
        return self.cell(torch.zeros(SIZE), children)

    def forward(self, tree: dict[str, Any]) -> Tensor:
        return self.out(self.encode(tree))


def make() -> nn.Module:
    return TreeGRU()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(leaves: int) -> dict[str, Any]:
        if leaves == 1:
            return {"token": torch.tensor(draw.randrange(VOCABULARY))}
        left = draw.randint(1, leaves - 1)
        return {"left": tree(left), "right": tree(leaves - left)}

    return [(tree(n),) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
