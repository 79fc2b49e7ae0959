"""IndRNN: neurons of a layer are independent of each other, layers are stacked.

Li, Li, Cook, Zhu, Gao: Independently Recurrent Neural Network (IndRNN): Building a Longer and
Deeper RNN, CVPR 2018, https://arxiv.org/abs/1803.04831 (equation 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, SIZE, LAYERS, CLASSES = 5, 8, 2, 4


class IndRNNLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Linear(inputs, SIZE)
        self.recurrent = nn.Parameter(torch.empty(SIZE).uniform_(0, 1))

    def forward(self, xs: Tensor) -> Tensor:
        h = torch.zeros(SIZE)
        outputs = []
        for x in xs:
            h = F.relu(self.weight(x) + self.recurrent * h)
            outputs.append(h)
        return torch.stack(outputs)


class IndRNN(nn.Module):
    """[T, INPUT] in, scores of classes after the last step out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(IndRNNLayer(SIZE if i else INPUT) for i in range(LAYERS))
        self.out = nn.Linear(SIZE, CLASSES)

    def forward(self, xs: Tensor) -> Tensor:
        for layer in self.layers:
            xs = layer(xs)
        return self.out(xs[-1])


def make() -> nn.Module:
    return IndRNN()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
