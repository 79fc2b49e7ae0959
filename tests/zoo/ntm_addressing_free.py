"""Neural Turing machine with content addressing only (no interpolation, shift or sharpening).

Graves, Wayne, Danihelka: Neural Turing Machines, 2014, https://arxiv.org/abs/1410.5401
(equations 2 to 6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, SIZE, SLOTS, WIDTH, OUTPUT = 4, 8, 5, 6, 4


class Head(nn.Module):
    """Weights over the slots, by the similarity of their content to a key."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(SIZE, WIDTH)
        self.strength = nn.Linear(SIZE, 1)

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        key, strength = torch.tanh(self.key(h)), F.softplus(self.strength(h))
        similarity = F.cosine_similarity(memory, key.unsqueeze(0), dim=-1)
        return torch.softmax(strength * similarity, dim=-1)


class NTM(nn.Module):
    """[T, INPUT] in; [T, OUTPUT] and the last memory out."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = nn.LSTMCell(INPUT + WIDTH, SIZE)
        self.reading = Head()
        self.writing = Head()
        self.erase = nn.Linear(SIZE, WIDTH)
        self.add = nn.Linear(SIZE, WIDTH)
        self.out = nn.Linear(SIZE + WIDTH, OUTPUT)
        self.memory = nn.Parameter(0.5 * torch.randn(SLOTS, WIDTH))

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        memory, read = self.memory, xs.new_zeros(WIDTH)
        h, c = xs.new_zeros(SIZE), xs.new_zeros(SIZE)
        outputs = []
        for x in xs:
            h, c = self.controller(torch.cat([x, read]), (h, c))
            where = self.writing(h, memory)
            memory = memory * (1 - torch.outer(where, torch.sigmoid(self.erase(h))))
            memory = memory + torch.outer(where, torch.tanh(self.add(h)))
            read = self.reading(h, memory) @ memory
            outputs.append(self.out(torch.cat([h, read])))
        return torch.stack(outputs), memory


def make() -> nn.Module:
    return NTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
