"""Encoder-decoder of GRUs, decoded by a beam search whose states are reordered every step.

Sutskever, Vinyals, Le: Sequence to Sequence Learning with Neural Networks, NeurIPS 2014,
https://arxiv.org/abs/1409.3215 (section 3.2, with GRUs).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, SOS, EOS, BEAM, LIMIT = 8, 12, 0, 1, 3, 10
SPREAD = 4.25


class BeamSearch(nn.Module):
    """Tokens in, the best answer, its end included, and its log probability out."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, SIZE)
        self.encoder = nn.GRU(SIZE, SIZE)
        self.target = nn.Embedding(VOCABULARY, SIZE)
        self.decoder = nn.GRUCell(SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[list[int], Tensor]:
        _, h = self.encoder(self.source(tokens))
        h = h.expand(BEAM, SIZE)
        answers = torch.full((BEAM, 1), SOS)
        scores = torch.full((BEAM,), float("-inf"))
        scores[0] = 0.0  # the beams start alike: all but one are out of the first choice
        finished = torch.zeros(BEAM, dtype=torch.bool)
        only_eos = torch.full((VOCABULARY,), float("-inf"))
        only_eos[EOS] = 0.0
        for _ in range(LIMIT):
            h = self.decoder(self.target(answers[:, -1]), h)
            log_p = torch.log_softmax(self.out(h), dim=-1)
            log_p = torch.where(finished.unsqueeze(1), only_eos, log_p)
            scores, flat = (scores.unsqueeze(1) + log_p).view(-1).topk(BEAM)
            beam, token = flat // VOCABULARY, flat % VOCABULARY
            h = h.index_select(0, beam)
            answers = torch.cat([answers[beam], token.unsqueeze(1)], dim=1)
            finished = finished[beam] | (token == EOS)
            if finished[0]:  # the others can only lose
                break
        best = answers[0, 1:].tolist()
        return best[: best.index(EOS) + 1] if EOS in best else best, scores[0]


def make() -> nn.Module:
    model = BeamSearch()
    with torch.no_grad():  # spreads the scores: answers end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.target.weight.div_(SPREAD)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(2, VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
