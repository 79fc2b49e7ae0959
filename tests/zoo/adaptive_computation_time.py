"""Adaptive computation time: a cell ponders each input until its halting weights add up.

Graves: Adaptive Computation Time for Recurrent Neural Networks, 2016,
https://arxiv.org/abs/1603.08983 (section 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, SIZE, OUTPUT, EPSILON, MOST = 5, 8, 3, 0.01, 8
SPREAD, HALT = 2.0, -1.0


class ACT(nn.Module):
    """[T, INPUT] in, [T, OUTPUT] and the steps and remainder of every input out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(INPUT + 1, SIZE)  # the flag tells the first step of an input
        self.halt = nn.Linear(SIZE, 1)
        self.out = nn.Linear(SIZE, OUTPUT)

    def forward(self, xs: Tensor) -> tuple[Tensor, list[int], Tensor]:
        state = torch.zeros(SIZE)
        outputs, ponder, remainders = [], [], []
        for x in xs:
            halting_sum = torch.zeros(1)
            mean_state = torch.zeros(SIZE)
            steps = 0
            while True:
                flag = torch.ones(1) if steps == 0 else torch.zeros(1)
                state = self.cell(torch.cat([x, flag]), state)
                steps += 1
                h = torch.sigmoid(self.halt(state))
                if halting_sum + h >= 1 - EPSILON or steps == MOST:
                    break
                halting_sum = halting_sum + h
                mean_state = mean_state + h * state
            remainder = 1 - halting_sum
            state = mean_state + remainder * state
            outputs.append(self.out(state))
            ponder.append(steps)
            remainders.append(remainder)
        return torch.stack(outputs), ponder, torch.cat(remainders)


def make() -> nn.Module:
    model = ACT()
    with torch.no_grad():  # spreads the halting weights: one step, several, or the most
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.halt.bias.add_(HALT)
    return model


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
