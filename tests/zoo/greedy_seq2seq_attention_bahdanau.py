"""Attention by an additive score over a bidirectional LSTM, decoded greedily.

Bahdanau, Cho, Bengio: Neural Machine Translation by Jointly Learning to Align and Translate, ICLR
2015, https://arxiv.org/abs/1409.0473 (LSTMs for its GRUs; the loop is that of PyTorch's tutorial).
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, VOCABULARY, SOS, EOS, LIMIT = 8, 12, 0, 1, 12
SPREAD, STOP = 3.5, 1.0


class BahdanauAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(SIZE, SIZE)
        self.key = nn.Linear(2 * SIZE, SIZE)
        self.score = nn.Linear(SIZE, 1)

    def forward(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(torch.tanh(self.query(query) + self.key(states)))
        weights = F.softmax(scores.squeeze(-1), dim=-1)
        return weights @ states, weights


class AttentionSeq2Seq(nn.Module):
    """Tokens in, the tokens of the answer and the attention of each [L, T] out."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.LSTM(SIZE, SIZE, bidirectional=True)
        self.start = nn.Linear(SIZE, SIZE)
        self.attention = BahdanauAttention()
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.decoder = nn.LSTMCell(3 * SIZE, SIZE)
        self.out = nn.Linear(4 * SIZE, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[list[int], Tensor]:
        states, (h_n, _) = self.encoder(self.source(tokens))
        h = torch.tanh(self.start(h_n[1]))
        c = torch.zeros_like(h)
        decoder_input = torch.tensor(SOS)
        decoded_words: list[int] = []
        attentions = []
        for _ in range(LIMIT):
            embedded = self.target(decoder_input)
            context, weights = self.attention(h, states)
            attentions.append(weights)
            h, c = self.decoder(torch.cat([embedded, context]), (h, c))
            output = self.out(torch.cat([h, context, embedded]))
            _, topi = output.topk(1)
            if topi.item() == EOS:
                decoded_words.append(EOS)
                break
            else:
                decoded_words.append(int(topi.item()))
            decoder_input = topi.squeeze().detach()
        return decoded_words, torch.stack(attentions)


def make() -> nn.Module:
    model = AttentionSeq2Seq()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.target.weight.div_(SPREAD)
        model.out.bias[EOS] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(2, VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
