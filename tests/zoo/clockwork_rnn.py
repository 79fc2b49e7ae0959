"""Clockwork RNN: groups of neurons with their own clock rates; slow groups feed fast ones.

Koutnik, Greff, Gomez, Schmidhuber: A Clockwork RNN, ICML 2014, https://arxiv.org/abs/1402.3511
(equations 1 to 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, GROUP, OUTPUT = 4, 3, 5
PERIODS = [2**i for i in range(3)]


class ClockworkRNN(nn.Module):
    """[T, INPUT] in, [T, OUTPUT] out."""

    def __init__(self) -> None:
        super().__init__()
        groups = len(PERIODS)
        self.inputs = nn.ModuleList(nn.Linear(INPUT, GROUP) for _ in PERIODS)
        self.hidden = nn.ModuleList(
            nn.Linear((groups - i) * GROUP, GROUP, bias=False) for i in range(groups)
        )
        self.out = nn.Linear(groups * GROUP, OUTPUT)

    def forward(self, xs: Tensor) -> Tensor:
        state = [torch.zeros(GROUP) for _ in PERIODS]
        outputs = []
        for t, x in enumerate(xs):
            new = list(state)
            for i, period in enumerate(PERIODS):
                if t % period == 0:
                    slower = torch.cat(state[i:], dim=-1)
                    new[i] = torch.tanh(self.inputs[i](x) + self.hidden[i](slower))
            state = new
            outputs.append(torch.tanh(self.out(torch.cat(state, dim=-1))))
        return torch.stack(outputs)


def make() -> nn.Module:
    return ClockworkRNN()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6, 11)]
