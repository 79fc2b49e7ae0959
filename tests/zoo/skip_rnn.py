"""Skip RNN: a rounded gate updates the state or copies it, and grows while the state is copied.

Campos, Jou, Giro-i-Nieto, Torres, Chang: Skip RNN: Learning to Skip State Updates in Recurrent
Neural Networks, ICLR 2018, https://arxiv.org/abs/1708.06834 (section 3, with a GRU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE = 5, 8
SPREAD, BIAS = 4.6, 1.5


class SkipRNN(nn.Module):
    """[T, INPUT] in, states [T, SIZE] out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(INPUT, SIZE)
        self.update = nn.Linear(SIZE, 1)

    def forward(self, xs: Tensor) -> Tensor:
        state = torch.zeros(SIZE)
        u_tilde = torch.ones(1)  # the first input is always read
        delta = torch.zeros(1)
        states = []
        for x in xs:
            u = torch.round(u_tilde)
            if u.bool():
                state = self.cell(x, state)
                delta = torch.sigmoid(self.update(state))
                u_tilde = delta
            else:
                u_tilde = u_tilde + torch.min(delta, 1 - u_tilde)
            states.append(state)
        return torch.stack(states)


def make() -> nn.Module:
    model = SkipRNN()
    with torch.no_grad():  # spreads the gate: none, one, or several inputs are skipped at a time
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.update.bias.add_(BIAS)
    return model


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)]
