"""SDT-RNN: a dependency tree's nodes sum their children, one weight for each arc label.

Socher, Karpathy, Le, Manning, Ng: Grounded Compositional Semantics for Finding and Describing
Images with Sentences, TACL 2014, https://doi.org/10.1162/tacl_a_00177 (children are weighted by how
many words are below them).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, LABELS = 8, 20, ("nsubj", "dobj", "amod", "det")


class SDTRNN(nn.Module):
    """A tree of (token, [(label, tree)]) in, its root's vector out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.word = nn.Linear(SIZE, SIZE, bias=False)
        self.arcs = nn.ModuleDict({label: nn.Linear(SIZE, SIZE, bias=False) for label in LABELS})

    def encode(self, tree: Any) -> tuple[Tensor, int]:
        token, children = tree
        total, words = self.word(self.embedding(token)), 1
        for label, child in children:
            h, below = self.encode(child)
            total = total + below * self.arcs[label](h)
            words += below
        return torch.tanh(total / words), words

    def forward(self, tree: Any) -> Tensor:
        h, _ = self.encode(tree)
        return h


def make() -> nn.Module:
    return SDTRNN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def tree(words: int) -> Any:
        children, rest = [], words - 1
        while rest:
            size = draw.randint(1, rest)
            children.append((draw.choice(LABELS), tree(size)))
            rest -= size
        return torch.tensor(draw.randrange(VOCABULARY)), children

    return [(tree(n),) for n in (1, 2, 3, 5, 8, 12, 4, 7, 6, 3)]
