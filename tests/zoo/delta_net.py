"""DeltaNet: fast weights with the delta update rule and the DPFP feature map.

Schlag, Irie, Schmidhuber: Linear Transformers Are Secretly Fast Weight Programmers, ICML 2021,
https://arxiv.org/abs/2102.11174 (equations 23 to 28, section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZE, KEY, NU = 6, 4, 2


def dpfp(x: Tensor) -> Tensor:
    """The deterministic parameter-free projection, normalised to sum 1."""
    x = torch.cat([torch.relu(x), torch.relu(-x)], dim=-1)
    rolled = torch.cat([x.roll(shifts=j, dims=-1) for j in range(1, NU + 1)], dim=-1)
    features = torch.cat([x] * NU, dim=-1) * rolled
    return features / (features.sum(-1, keepdim=True) + 1e-5)


class DeltaNet(nn.Module):
    """[T, SIZE] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(SIZE, 2 * KEY + SIZE + 1, bias=False)

    def forward(self, xs: Tensor) -> Tensor:
        fast = torch.zeros(SIZE, 2 * KEY * NU)
        outputs = []
        for x in xs:
            k, q, v, beta = self.slow(x).split([KEY, KEY, SIZE, 1], dim=-1)
            k, q, beta = dpfp(k), dpfp(q), torch.sigmoid(beta)
            fast = fast + torch.outer(beta * (v - fast.mv(k)), k)
            outputs.append(fast.mv(q))
        return torch.stack(outputs)


def make() -> nn.Module:
    return DeltaNet()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
