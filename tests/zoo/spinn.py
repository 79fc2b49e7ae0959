"""SPINN without tracking (SPINN-PI-NT): a buffer, a stack, and given shift and reduce transitions.

Bowman, Gauthier, Rastogi, Gupta, Manning, Potts: A Fast Unified Model for Parsing and Sentence
Understanding, ACL 2016, https://arxiv.org/abs/1603.06021 (equations 3 to 6; h = o tanh(c) as in the
authors' code).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES = 8, 20, 3


class SPINN(nn.Module):
    """Tokens and transitions in, scores of the sentence out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.word = nn.Linear(SIZE, 2 * SIZE)
        self.left = nn.Linear(SIZE, 5 * SIZE)
        self.right = nn.Linear(SIZE, 5 * SIZE, bias=False)
        self.out = nn.Linear(SIZE, CLASSES)

    def reduce(self, left: Any, right: Any) -> tuple[Tensor, Tensor]:
        (h_left, c_left), (h_right, c_right) = left, right
        i, f_left, f_right, o, g = (self.left(h_left) + self.right(h_right)).chunk(5, -1)
        c = torch.sigmoid(f_left) * c_left + torch.sigmoid(f_right) * c_right
        c = c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, tokens: Tensor, transitions: list[str]) -> Tensor:
        words = self.word(self.embedding(tokens))
        buffer = [word.chunk(2, -1) for word in words.unbind(0)]
        buffer.reverse()
        stack: list[Any] = []
        for transition in transitions:
            if transition == "shift":
                stack.append(buffer.pop())
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(self.reduce(left, right))
        h, _ = stack.pop()
        return self.out(h)


def make() -> nn.Module:
    return SPINN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def transitions(leaves: int) -> list[str]:
        if leaves == 1:
            return ["shift"]
        left = draw.randint(1, leaves - 1)
        return [*transitions(left), *transitions(leaves - left), "reduce"]

    def sentence(length: int) -> Any:
        tokens = torch.tensor([draw.randrange(VOCABULARY) for _ in range(length)])
        return tokens, transitions(length)

    return [sentence(n) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 6)]
