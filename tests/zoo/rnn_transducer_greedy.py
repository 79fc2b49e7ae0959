"""RNN transducer, decoded greedily: each frame emits symbols until the blank.

Graves: Sequence Transduction with Recurrent Neural Networks, 2012, https://arxiv.org/abs/1211.3711
(the joint network of Graves, Mohamed, Hinton, ICASSP 2013, https://arxiv.org/abs/1303.5778).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FRAME, SIZE, SYMBOLS, BLANK, MOST = 5, 8, 10, 0, 3
SPREAD, STOP = 4.0, 2.0


class Transducer(nn.Module):
    """Frames [T, FRAME] in, symbols and the frame of each out."""

    def __init__(self) -> None:
        super().__init__()
        self.transcription = nn.LSTM(FRAME, SIZE, bidirectional=True)
        self.embedding = nn.Embedding(SYMBOLS, SIZE, padding_idx=BLANK)
        self.prediction = nn.LSTMCell(SIZE, SIZE)
        self.joint_f = nn.Linear(2 * SIZE, SIZE)
        self.joint_g = nn.Linear(SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, SYMBOLS)

    def predict(self, symbol: int, state: Any) -> tuple[Tensor, Any]:
        h, c = self.prediction(self.embedding(torch.tensor(symbol)), state)
        return h, (h, c)

    def forward(self, frames: Tensor) -> tuple[list[int], list[int]]:
        encoded, _ = self.transcription(frames)
        g, state = self.predict(BLANK, None)
        hypothesis: list[int] = []
        times: list[int] = []
        for t in range(encoded.size(0)):
            f = self.joint_f(encoded[t])
            not_blank, emitted = True, 0
            while not_blank and emitted < MOST:
                logits = self.out(torch.tanh(f + self.joint_g(g)))
                _, k = logits.max(0)
                symbol = int(k.item())
                if symbol == BLANK:
                    not_blank = False
                else:
                    hypothesis.append(symbol)
                    times.append(t)
                    g, state = self.predict(symbol, state)
                    emitted += 1
        return hypothesis, times


def make() -> nn.Module:
    model = Transducer()
    with torch.no_grad():  # spreads the scores: frames emit none, some, or the most
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[BLANK] += STOP
    return model


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, FRAME, generator=draw) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)]
