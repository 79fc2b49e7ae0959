"""BiLSTM whose likeliest label of each frame is read, repeats merged and blanks dropped.

Graves, Fernandez, Gomez, Schmidhuber: Connectionist Temporal Classification: Labelling Unsegmented
Sequence Data with Recurrent Neural Networks, ICML 2006, https://doi.org/10.1145/1143844.1143891
(section 3.2, best path decoding).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FRAME, SIZE, LABELS, BLANK = 5, 8, 6, 0
SPREAD, STOP = 3.5, 0.5


class CTC(nn.Module):
    """Frames [T, FRAME] in, labels and the log probability of their path out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FRAME, SIZE, bidirectional=True)
        self.out = nn.Linear(2 * SIZE, LABELS)

    def forward(self, frames: Tensor) -> tuple[list[int], Tensor]:
        states, _ = self.lstm(frames)
        log_p, path = self.out(states).log_softmax(-1).max(-1)
        labels: list[int] = []
        previous = BLANK
        for label in path.tolist():
            if label != previous and label != BLANK:
                labels.append(label)
            previous = label
        return labels, log_p.sum()


def make() -> nn.Module:
    model = CTC()
    with torch.no_grad():  # spreads the scores: blanks, repeats, and labels
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[BLANK] += STOP
    return model


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, FRAME, generator=draw) for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)]
