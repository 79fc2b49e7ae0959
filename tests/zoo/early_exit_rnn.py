"""A stack of LSTMs with a classifier on each: the first that is sure enough answers.

Teerapittayanon, McDanel, Kung: BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks, ICPR 2016, https://arxiv.org/abs/1709.01686 (sure by entropy; its layers are LSTMs).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, CLASSES, LAYERS, THRESHOLD = 8, 12, 3, 4, 0.8
SPREAD = 6.0


class EarlyExit(nn.Module):
    """Tokens in, the scores of the classes and the number of layers that were run out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.layers = nn.ModuleList(nn.LSTM(SIZE, SIZE) for _ in range(LAYERS))
        self.exits = nn.ModuleList(nn.Linear(SIZE, CLASSES) for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        x = self.embedding(tokens)
        used = 0
        for layer, leave in zip(self.layers, self.exits, strict=True):
            x, (h, _) = layer(x)
            logits = leave(h[-1])
            used += 1
            p = torch.softmax(logits, dim=-1)
            entropy = -(p * torch.log(p)).sum()
            if entropy < THRESHOLD:
                break
        return logits, used


def make() -> nn.Module:
    model = EarlyExit()
    with torch.no_grad():  # spreads the scores: answers come from every layer
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
