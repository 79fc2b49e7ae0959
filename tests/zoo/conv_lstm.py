"""ConvLSTM encoder and forecaster over small grids of one channel, with peepholes.

Shi, Chen, Wang, Yeung, Wong, Woo: Convolutional LSTM Network: A Machine Learning Approach for
Precipitation Nowcasting, NIPS 2015, https://arxiv.org/abs/1506.04214 (equation 3; the forecaster
starts from the encoder's states and has no input).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, GRID, KERNEL = 3, 5, 3


class ConvLSTMCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Conv2d(1, 4 * HIDDEN, KERNEL, padding=KERNEL // 2)
        self.h = nn.Conv2d(HIDDEN, 4 * HIDDEN, KERNEL, padding=KERNEL // 2, bias=False)
        self.peep = nn.Parameter(nn.init.normal_(torch.empty(3, HIDDEN, GRID, GRID), std=0.1))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (self.x(x) + self.h(h)).chunk(4, dim=1)
        i = torch.sigmoid(i + self.peep[0] * c)
        f = torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + self.peep[2] * c)
        return o * torch.tanh(c), c


class Nowcaster(nn.Module):
    """Frames [T, 1, GRID, GRID] and a number of frames in, that many next frames out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ConvLSTMCell()
        self.forecaster = ConvLSTMCell()
        self.out = nn.Conv2d(HIDDEN, 1, 1)

    def forward(self, frames: Tensor, horizon: int) -> Tensor:
        zeros = frames.new_zeros(1, HIDDEN, GRID, GRID)
        state = zeros, zeros
        for frame in frames:
            state = self.encoder(frame.unsqueeze(0), state)
        nothing = frames.new_zeros(1, 1, GRID, GRID)
        predictions = []
        for _ in range(horizon):
            state = self.forecaster(nothing, state)
            predictions.append(self.out(state[0]))
        return torch.cat(predictions)


def make() -> nn.Module:
    return Nowcaster()


def requests() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (2, 1), (3, 2), (5, 3), (8, 1), (4, 4), (2, 5), (6, 2)]
    return [(torch.rand(t, 1, GRID, GRID, generator=generator), horizon) for t, horizon in sizes]
