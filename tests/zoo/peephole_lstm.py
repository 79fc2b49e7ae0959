"""LSTM with peephole connections from the cell state to its three gates.

Gers, Schmidhuber: Recurrent Nets that Time and Count, IJCNN 2000,
https://doi.org/10.1109/IJCNN.2000.861302.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE = 5, 8


class PeepholeLSTMCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(INPUT, 4 * SIZE)
        self.h = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.peep_i = nn.Parameter(0.5 * torch.randn(SIZE))
        self.peep_f = nn.Parameter(0.5 * torch.randn(SIZE))
        self.peep_o = nn.Parameter(0.5 * torch.randn(SIZE))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (self.x(x) + self.h(h)).chunk(4, -1)
        i = torch.sigmoid(i + self.peep_i * c)
        f = torch.sigmoid(f + self.peep_f * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + self.peep_o * c)
        return o * torch.tanh(c), c


class PeepholeLSTM(nn.Module):
    """[T, INPUT] in; [T, SIZE] and the last state out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = PeepholeLSTMCell()

    def forward(self, xs: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = xs.new_zeros(SIZE), xs.new_zeros(SIZE)
        outputs = []
        for x in xs:
            state = self.cell(x, state)
            outputs.append(state[0])
        return torch.stack(outputs), state


def make() -> nn.Module:
    return PeepholeLSTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
