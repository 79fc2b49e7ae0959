"""GRU with zoneout, in eval mode: the expectation of the random mask.

Krueger et al.: Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations, ICLR 2017,
https://arxiv.org/abs/1606.01305 (section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, SIZE, ZONEOUT = 5, 8, 0.15


class ZoneoutGRU(nn.Module):
    """[T, INPUT] in, every state [T, SIZE] out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(INPUT, SIZE)

    def zoneout(self, old: Tensor, new: Tensor) -> Tensor:
        # In training, dropout of the change keeps old states and cancels (1 - ZONEOUT).
        return old + (1 - ZONEOUT) * F.dropout(new - old, ZONEOUT, self.training)

    def forward(self, xs: Tensor) -> Tensor:
        states = [xs.new_zeros(SIZE)]
        for x in xs:
            states.append(self.zoneout(states[-1], self.cell(x, states[-1])))
        return torch.stack(states[1:])


def make() -> nn.Module:
    return ZoneoutGRU()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
