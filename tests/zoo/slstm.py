"""sLSTM of xLSTM: exponential gating with a stabiliser state, memory mixing within heads.

Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter: xLSTM:
Extended Long Short-Term Memory, NeurIPS 2024, https://arxiv.org/abs/2405.04517 (section 2.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, HEADS, HEAD = 6, 2, 4
SIZE = HEADS * HEAD


class State(NamedTuple):
    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class SLSTMCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(INPUT, 4 * SIZE)
        self.recurrent = nn.Parameter(torch.randn(HEADS, HEAD, 4 * HEAD) / HEAD**0.5)

    def forward(self, x: Tensor, state: State) -> State:
        h, c, n, m = state
        mixed = torch.einsum("hd,hde->he", h, self.recurrent)
        z, i, f, o = (self.weight(x).view(HEADS, 4 * HEAD) + mixed).chunk(4, dim=-1)
        log_f = F.logsigmoid(f)
        m_new = torch.maximum(log_f + m, i)
        i, f = torch.exp(i - m_new), torch.exp(log_f + m - m_new)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        return State(torch.sigmoid(o) * c / n, c, n, m_new)


class SLSTM(nn.Module):
    """[T, INPUT] in, [T, SIZE] out: normalised per head, as in the block of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = SLSTMCell()
        self.norm = nn.GroupNorm(HEADS, SIZE)

    def forward(self, xs: Tensor) -> Tensor:
        zeros = xs.new_zeros(HEADS, HEAD)
        state = State(zeros, zeros, zeros, zeros)
        outputs = []
        for x in xs:
            state = self.cell(x, state)
            outputs.append(state.h.flatten())
        return self.norm(torch.stack(outputs))


def make() -> nn.Module:
    return SLSTM()


def requests() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, INPUT, generator=draw) for n in (1, 2, 3, 5, 8, 12, 2, 7, 4, 6)]
