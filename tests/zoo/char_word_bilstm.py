"""BiLSTM over words, each its embedding beside the last states of a BiLSTM over its characters.

Lample, Ballesteros, Subramanian, Kawakami, Dyer: Neural Architectures for Named Entity Recognition,
NAACL 2016, https://arxiv.org/abs/1603.01360 (sections 2 and 4.1, up to the tag scores).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, CHARACTER_SIZE, CHARACTERS, VOCABULARY, TAGS = 8, 6, 15, 20, 5


class CharWordBiLSTM(nn.Module):
    """Words and the characters of each in, tag scores of each word out."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, CHARACTER_SIZE)
        self.spell = nn.LSTM(CHARACTER_SIZE, CHARACTER_SIZE, bidirectional=True)
        self.words = nn.Embedding(VOCABULARY, SIZE)
        self.context = nn.LSTM(SIZE + 2 * CHARACTER_SIZE, SIZE, bidirectional=True)
        self.hidden = nn.Linear(2 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, TAGS)

    def forward(self, words: Tensor, spellings: list[Tensor]) -> Tensor:
        spelt = []
        for spelling in spellings:
            _, (h, _) = self.spell(self.characters(spelling))
            spelt.append(torch.cat([h[0], h[1]], -1))
        states, _ = self.context(torch.cat([self.words(words), torch.stack(spelt)], -1))
        return self.out(torch.tanh(self.hidden(states)))


def make() -> nn.Module:
    return CharWordBiLSTM()


def requests() -> list[Any]:
    draw = random.Random(0)

    def sentence(*lengths: int) -> Any:
        words = torch.tensor([draw.randrange(VOCABULARY) for _ in lengths])
        spellings = [torch.tensor([draw.randrange(CHARACTERS) for _ in range(n)]) for n in lengths]
        return words, spellings

    return [
        sentence(1),
        sentence(5),
        sentence(3, 4),
        sentence(1, 1, 2),
        sentence(6, 2, 3),
        sentence(2, 7, 1, 4),
        sentence(3, 3, 3, 3, 3),
        sentence(9, 1),
        sentence(*[draw.randint(1, 6) for _ in range(8)]),
    ]
