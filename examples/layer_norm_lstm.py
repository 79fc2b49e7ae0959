"""A layer-normalised LSTM written by hand, stacked twice in one loop over time.

Layer normalisation: Ba, Kiros, Hinton, arXiv:1607.06450. cellc finds two recurrent cells, one a
layer; `cellc inspect examples/layer_norm_lstm.py:model`.
"""

import torch
from torch import nn


class LayerNormCell(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.input, self.state = (
            nn.Linear(size, 4 * hidden),
            nn.Linear(hidden, 4 * hidden, bias=False),
        )
        self.norm, self.cell_norm = nn.LayerNorm(4 * hidden), nn.LayerNorm(hidden)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        i, f, g, o = self.norm(self.input(x) + self.state(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.cell_norm(c)), c


class Encoder(nn.Module):
    """Vectors [T, size] to states [T, hidden]."""

    def __init__(self, size: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.first, self.second = LayerNormCell(size, hidden), LayerNormCell(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = h2 = c2 = x.new_zeros(self.hidden)
        states = []
        for t in range(len(x)):
            h, c = self.first(x[t], h, c)
            h2, c2 = self.second(h, h2, c2)
            states.append(h2)
        return torch.stack(states)


torch.manual_seed(0)
model = Encoder().eval()


def example_inputs() -> list[tuple[torch.Tensor]]:
    return [(torch.randn(length, 32),) for length in (6, 11, 1, 8)]
