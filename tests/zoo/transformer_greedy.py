"""A small Transformer, its answer decoded greedily with all words so far read again each time.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin: Attention Is All You Need,
NeurIPS 2017, https://arxiv.org/abs/1706.03762 (the loop is that of The Annotated Transformer).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, HEADS, VOCABULARY, SOS, EOS, LIMIT = 8, 2, 12, 0, 1, 10
SPREAD, STOP = 1.75, 3.0


class Transformer(nn.Module):
    """Tokens [1, T] in, the tokens of the answer with both its ends out as [1, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.positions = nn.Embedding(16, SIZE)
        self.encoder = nn.TransformerEncoderLayer(SIZE, HEADS, 2 * SIZE, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(SIZE, HEADS, 2 * SIZE, batch_first=True)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        embedded: Tensor = embedding(tokens) + self.positions(torch.arange(tokens.size(1)))
        return embedded

    def forward(self, src: Tensor) -> Tensor:
        memory = self.encoder(self.embed(self.source, src))
        ys = torch.zeros(1, 1).fill_(SOS).type_as(src.data)
        for _ in range(LIMIT):
            mask = nn.Transformer.generate_square_subsequent_mask(ys.size(1))
            hidden = self.decoder(self.embed(self.target, ys), memory, tgt_mask=mask)
            prob = self.out(hidden[:, -1])
            _, next_word = torch.max(prob, dim=1)
            next_word = next_word.data[0]
            ys = torch.cat([ys, torch.zeros(1, 1).type_as(src.data).fill_(next_word)], dim=1)
            if next_word == EOS:
                break
        return ys


def make() -> nn.Module:
    model = Transformer()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[EOS] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([[draw.randrange(2, VOCABULARY) for _ in range(n)]])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
