"""Quasi-recurrent network: a causal convolution of window 2 over time, then fo-pooling.

Bradbury, Merity, Xiong, Socher: Quasi-Recurrent Neural Networks, ICLR 2017,
https://arxiv.org/abs/1611.01576 (equations 1 and 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, SIZE, WINDOW = 5, 8, 2


class QRNN(nn.Module):
    """[T, INPUT] in; [T, SIZE] and the last state out."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(INPUT, 3 * SIZE, WINDOW)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(xs.t(), (WINDOW - 1, 0))  # masked: no step sees a later one
        zs, fs, os = self.convolution(padded).t().chunk(3, dim=-1)
        zs, fs, os = torch.tanh(zs), torch.sigmoid(fs), torch.sigmoid(os)
        c = xs.new_zeros(SIZE)
        outputs = []
        for z, f, o in zip(zs, fs, os, strict=True):
            c = f * c + (1 - f) * z
            outputs.append(o * c)
        return torch.stack(outputs), c


def make() -> nn.Module:
    return QRNN()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
