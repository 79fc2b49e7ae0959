"""Lattice LSTM: a character LSTM into whose cells the words that end there lead, gated.

Zhang, Yang: Chinese NER Using Lattice LSTM, ACL 2018, https://arxiv.org/abs/1805.02023 (equations
11 to 15; words are (start, end, token)).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, CHARACTERS, WORDS, TAGS = 8, 15, 20, 4


class LatticeLSTM(nn.Module):
    """Characters and the words among them in, tag scores of all characters out."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, SIZE)
        self.words = nn.Embedding(WORDS, SIZE)
        self.character_gates = nn.Linear(2 * SIZE, 4 * SIZE)
        self.word_gates = nn.Linear(2 * SIZE, 3 * SIZE)
        self.link = nn.Linear(2 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, TAGS)

    def word_cell(self, token: Tensor, h: Tensor, c: Tensor) -> Tensor:
        i, f, u = self.word_gates(torch.cat([self.words(token), h])).chunk(3)
        return torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)

    def forward(self, characters: Tensor, words: list[tuple[int, int, Tensor]]) -> Tensor:
        h = c = torch.zeros(SIZE)
        states: list[tuple[Tensor, Tensor]] = []
        for j, x in enumerate(self.characters(characters)):
            i, o, f, u = self.character_gates(torch.cat([x, h])).chunk(4)
            i, u = torch.sigmoid(i), torch.tanh(u)
            cells = [self.word_cell(token, *states[b]) for b, e, token in words if e == j]
            if cells:
                links = [torch.sigmoid(self.link(torch.cat([x, cell]))) for cell in cells]
                weights = torch.softmax(torch.stack([i, *links]), 0)
                c = (weights * torch.stack([u, *cells])).sum(0)
            else:
                c = torch.sigmoid(f) * c + i * u
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append((h, c))
        return self.out(torch.stack([h for h, _ in states]))


def make() -> nn.Module:
    return LatticeLSTM()


def requests() -> list[Any]:
    draw = random.Random(0)

    def sentence(length: int) -> Any:
        characters = torch.tensor([draw.randrange(CHARACTERS) for _ in range(length)])
        spans = [(b, e) for b in range(length) for e in range(b + 1, min(b + 4, length))]
        chosen = sorted(draw.sample(spans, len(spans) // 3))
        return characters, [(b, e, torch.tensor(draw.randrange(WORDS))) for b, e in chosen]

    return [sentence(n) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)]
