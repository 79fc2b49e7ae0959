"""Pointer-generator: every word is generated, or copied from a source that may hold unknown words.

See, Liu, Manning: Get To The Point: Summarization with Pointer-Generator Networks, ACL 2017,
https://arxiv.org/abs/1704.04368 (section 2.2, without coverage).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, UNKNOWN, START, STOP_WORD, LIMIT = 8, 12, 0, 1, 2, 12
SPREAD, STOP = 4.75, 1.0


class PointerGenerator(nn.Module):
    """Tokens in the vocabulary extended by a source's own unknown words, and how many those are.

    Out come the tokens of the summary, of the same extended vocabulary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.LSTM(SIZE, SIZE, bidirectional=True, batch_first=True)
        self.reduce_h = nn.Linear(2 * SIZE, SIZE)
        self.reduce_c = nn.Linear(2 * SIZE, SIZE)
        self.decoder = nn.LSTMCell(SIZE, SIZE)
        self.w_h = nn.Linear(2 * SIZE, SIZE, bias=False)
        self.w_s = nn.Linear(2 * SIZE, SIZE)
        self.v = nn.Linear(SIZE, 1, bias=False)
        self.p_gen = nn.Linear(5 * SIZE, 1)
        self.hidden = nn.Linear(3 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def forward(self, source: Tensor, unknown: int) -> list[int]:
        known = source.masked_fill(source >= VOCABULARY, UNKNOWN)
        states, (h, c) = self.encoder(self.embedding(known))
        h = torch.relu(self.reduce_h(torch.cat([h[0], h[1]], -1)))
        c = torch.relu(self.reduce_c(torch.cat([c[0], c[1]], -1)))
        features = self.w_h(states)
        token = START
        summary: list[int] = []
        while token != STOP_WORD and len(summary) < LIMIT:
            word = token if token < VOCABULARY else UNKNOWN
            x = self.embedding(torch.tensor([word]))
            h, c = self.decoder(x, (h, c))
            scores = self.v(torch.tanh(features + self.w_s(torch.cat([h, c], -1)).unsqueeze(1)))
            attention = scores.squeeze(-1).softmax(-1)
            context = torch.bmm(attention.unsqueeze(1), states).squeeze(1)
            p_gen = torch.sigmoid(self.p_gen(torch.cat([context, h, c, x], -1)))
            vocab = self.out(self.hidden(torch.cat([h, context], -1))).softmax(-1)
            extended = torch.cat([p_gen * vocab, torch.zeros(1, unknown)], -1)
            final = extended.scatter_add(1, source, (1 - p_gen) * attention)
            token = int(final.argmax(dim=-1).item())
            summary.append(token)
        return summary


def make() -> nn.Module:
    model = PointerGenerator()
    with torch.no_grad():  # spreads the scores: summaries end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[STOP_WORD] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)

    def source(length: int, unknown: int) -> Any:
        tokens = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        for i, at in enumerate(draw.sample(range(length), unknown)):
            tokens[at] = VOCABULARY + i
        return torch.tensor([tokens]), unknown

    lengths = [(1, 0), (2, 1), (3, 0), (5, 2), (8, 3), (12, 1), (5, 5), (7, 2), (4, 0), (10, 2)]
    return [source(n, unknown) for n, unknown in lengths]
