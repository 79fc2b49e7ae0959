"""Trees grown from the root: each node says its label, whether it has children and a next sibling.

Alvarez-Melis, Jaakkola: Tree-structured Decoding with Doubly-recurrent Neural Networks, ICLR 2017,
https://openreview.net/forum?id=HkYhZDqxg (section 3).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, DEPTH, WIDTH = 8, 12, 3, 3
SPREAD, GROW = 3.8, 2.0


class DRNN(nn.Module):
    """Tokens of a description in, a tree out: the label of its root, then its subtrees."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRU(SIZE, SIZE)
        self.labels = nn.Embedding(VOCABULARY, SIZE)
        self.ancestral = nn.GRUCell(SIZE, SIZE)
        self.fraternal = nn.GRUCell(SIZE, SIZE)
        self.from_parent = nn.Linear(SIZE, SIZE, bias=False)
        self.from_sibling = nn.Linear(SIZE, SIZE, bias=False)
        self.parent = nn.Linear(SIZE, 1)
        self.sibling = nn.Linear(SIZE, 1)
        self.out = nn.Linear(SIZE, VOCABULARY)
        self.offset = nn.Parameter(torch.randn(2, VOCABULARY))

    def grow(self, h_a: Tensor, h_f: Tensor, depth: int) -> tuple[list[Any], Tensor, bool]:
        h = torch.tanh(self.from_parent(h_a) + self.from_sibling(h_f))
        deeper = torch.sigmoid(self.parent(h)).item() > 0.5 and depth < DEPTH
        more = torch.sigmoid(self.sibling(h)).item() > 0.5
        scores = self.out(h) + deeper * self.offset[0] + more * self.offset[1]
        label = scores.argmax(-1)
        x = self.labels(label)
        node: list[Any] = [int(label)]
        if deeper:
            below = self.ancestral(x, h_a)
            brother = torch.zeros(SIZE)
            another = True
            while another and len(node) <= WIDTH:
                child, label, another = self.grow(below, brother, depth + 1)
                node.append(child)
                brother = self.fraternal(self.labels(label), brother)
        return node, label, more

    def forward(self, tokens: Tensor) -> list[Any]:
        _, h = self.encoder(self.source(tokens))
        tree, _, _ = self.grow(h[0], torch.zeros(SIZE), 0)
        return tree


def make() -> nn.Module:
    model = DRNN()
    with torch.no_grad():  # spreads the scores: trees of different shapes
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.parent.bias.add_(GROW)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
