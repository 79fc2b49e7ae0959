"""The encoder of GNMT: a bidirectional LSTM layer, then LSTM layers, residual from the third on.

Wu et al.: Google's Neural Machine Translation System: Bridging the Gap between Human and Machine
Translation, 2016, https://arxiv.org/abs/1609.08144 (sections 3.1 and 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, SIZE = 20, 8


def run(cell: nn.LSTMCell, xs: list[Tensor]) -> list[Tensor]:
    h, c = torch.zeros(SIZE), torch.zeros(SIZE)
    outputs = []
    for x in xs:
        h, c = cell(x, (h, c))
        outputs.append(h)
    return outputs


class Encoder(nn.Module):
    """Tokens [T] in, [T, SIZE] out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.forwards = nn.LSTMCell(SIZE, SIZE)
        self.backwards = nn.LSTMCell(SIZE, SIZE)
        self.second = nn.LSTMCell(2 * SIZE, SIZE)
        self.third = nn.LSTMCell(SIZE, SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        words = list(self.embedding(tokens))
        left = run(self.forwards, words)
        right = run(self.backwards, words[::-1])[::-1]
        xs = [torch.cat(pair) for pair in zip(left, right, strict=True)]
        xs = run(self.second, xs)
        xs = [x + h for x, h in zip(xs, run(self.third, xs), strict=True)]
        return torch.stack(xs)


def make() -> nn.Module:
    return Encoder()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, VOCABULARY, (n,), generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)
    ]
