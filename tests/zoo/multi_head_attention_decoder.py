"""A recurrent decoder that attends with several heads over a bidirectional encoder, greedily.

Chen, Firat, Bapna et al.: The Best of Both Worlds: Combining Recent Advances in Neural Machine
Translation, ACL 2018, https://arxiv.org/abs/1804.09849 (RNMT+ with GRUs); the heads are those of
Vaswani et al.: Attention Is All You Need, NeurIPS 2017, https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, HEADS, VOCABULARY, SOS, EOS, LIMIT = 8, 2, 12, 0, 1, 12
SPREAD, STOP = 3.9, 3.0


class MultiHeadDecoder(nn.Module):
    """Tokens [1, T] in, the tokens of the answer with both its ends out as [1, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRU(SIZE, SIZE // 2, bidirectional=True, batch_first=True)
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.decoder = nn.GRU(2 * SIZE, SIZE, batch_first=True)
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(SIZE)
        self.out = nn.Linear(2 * SIZE, VOCABULARY)

    def forward(self, src: Tensor) -> Tensor:
        memory, _ = self.encoder(self.source(src))
        context = memory.mean(dim=1, keepdim=True)
        hidden = None
        ys = torch.full((1, 1), SOS, dtype=torch.long)
        for _ in range(LIMIT):
            step = torch.cat([self.target(ys[:, -1:]), context], dim=-1)
            output, hidden = self.decoder(step, hidden)
            context, _ = self.attention(output, memory, memory, need_weights=False)
            context = self.norm(context + output)
            logits = self.out(torch.cat([output, context], dim=-1))[:, -1]
            _, next_word = torch.max(logits, dim=1)
            ys = torch.cat([ys, next_word.unsqueeze(0)], dim=1)
            if next_word[0] == EOS:
                break
        return ys


def make() -> nn.Module:
    model = MultiHeadDecoder()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for module in (model.source, model.encoder, model.decoder, model.attention, model.out):
            for parameter in module.parameters():
                parameter.mul_(SPREAD)
        model.out.bias[EOS] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([[draw.randrange(2, VOCABULARY) for _ in range(n)]])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
