"""Attention by the general score, its attentional state fed to the next step, decoded greedily.

Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation, EMNLP
2015, https://arxiv.org/abs/1508.04025 (global attention, "general", input feeding).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, SOS, EOS, LIMIT = 8, 12, 0, 1, 12
SPREAD, STOP = 4.4, 1.0


class LuongDecoder(nn.Module):
    """Tokens [T, 1] in, the tokens of the answer, its end included, out as [L]."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.LSTM(SIZE, SIZE, num_layers=2)
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.decoder = nn.LSTM(2 * SIZE, SIZE, num_layers=2)
        self.general = nn.Linear(SIZE, SIZE, bias=False)
        self.combine = nn.Linear(2 * SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def forward(self, src: Tensor) -> Tensor:
        memory, hidden = self.encoder(self.source(src))
        memory = memory.transpose(0, 1)  # [1, T, SIZE]
        fed = memory.new_zeros(1, 1, SIZE)
        tok = src.new_full((1, 1), SOS)
        answer: list[Tensor] = []
        while len(answer) < LIMIT:
            rnn_input = torch.cat([self.target(tok), fed], dim=2)
            output, hidden = self.decoder(rnn_input, hidden)
            query = output.transpose(0, 1)
            align = torch.bmm(query, self.general(memory).transpose(1, 2)).softmax(-1)
            context = torch.bmm(align, memory)
            fed = torch.tanh(self.combine(torch.cat([context, query], dim=2)))
            tok = self.out(fed).squeeze(0).argmax(-1, keepdim=True)
            answer.append(tok.view(()))
            if tok == EOS:
                break
        return torch.stack(answer)


def make() -> nn.Module:
    model = LuongDecoder()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.target.weight.div_(SPREAD)
        model.out.bias[EOS] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([[draw.randrange(2, VOCABULARY)] for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
