"""Greedy decoding with an end token: an LSTM to an LSTM, and the same in padded PyTorch batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cellc.bench.case import Case, Way
from cellc.bench.place import HERE, Place
from cellc.bench.recurrent import ALONE, SAMPLE

VOCABULARY, EOS, LONGEST = 1000, 3, 40
PADDED, CELLC = "PyTorch, padded batches", "cellc, paths seen"
RUNS = [0]  # of the forward's own Python
PYTHON_RUNS = "runs of the forward's own Python in a pass of cellc"
SAID = "tokens said on average"


class Translator(nn.Module):
    """An LSTM reads, another says: [T] tokens to [L] tokens, at most `limit`."""

    def __init__(self, hidden: int = 256, limit: int = LONGEST, bias: float = 0.0) -> None:
        super().__init__()
        self.hidden, self.limit = hidden, limit
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.encoder, self.decoder = nn.LSTMCell(hidden, hidden), nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, VOCABULARY)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(4)  # so that what is said differs
            self.head.bias[EOS] += bias  # how soon it ends

    def forward(self, tokens: Tensor) -> Tensor:
        RUNS[0] += 1
        there = self.head.weight.device
        h = c = torch.zeros(self.hidden, device=there)
        for token in tokens:
            h, c = self.encoder(self.embedding(token), (h, c))
        token, said = torch.tensor(0, device=there), []
        for _ in range(self.limit):
            h, c = self.decoder(self.embedding(token), (h, c))
            token = self.head(h).argmax(-1)
            said.append(token)
            if token == EOS:
                break
        return torch.stack(said)

    def padded(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The same for many at once, until the last has ended."""
        tokens = nn.utils.rnn.pad_sequence(list(batch))
        lengths = torch.tensor([len(x) for x in batch], device=tokens.device)
        h = c = torch.zeros(len(batch), self.hidden, device=tokens.device)
        for t, row in enumerate(tokens):
            new_h, new_c = self.encoder(self.embedding(row), (h, c))
            there = (lengths > t)[:, None]
            h, c = torch.where(there, new_h, h), torch.where(there, new_c, c)
        token, alive = torch.zeros_like(lengths), torch.ones_like(lengths).bool()
        said = []
        for _ in range(self.limit):
            h, c = self.decoder(self.embedding(token), (h, c))
            token = torch.where(alive, self.head(h).argmax(-1), EOS)
            said.append(token)
            alive = alive & (token != EOS)
            if not alive.any():
                break
        rows = torch.stack(said, 1)
        is_end = rows == EOS
        ends = torch.where(is_end.any(1), is_end.int().argmax(1), rows.shape[1]).tolist()
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def make_requests(count: int, seed: int = 0) -> list[Tensor]:
    """Sentences of 4 to 30 tokens."""
    draw = random.Random(seed)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(draw.randint(4, 30))])
        for _ in range(count)
    ]


def padded_batches(model: Translator, requests: Sequence[Tensor], size: int = 128) -> list[Tensor]:
    """Sorted by length, in batches."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    found: dict[int, Tensor] = {}
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        found |= zip(chosen, model.padded([requests[i] for i in chosen]), strict=True)
    return [found[i] for i in range(len(requests))]


def decode_case(hidden: int, count: int, place: Place = HERE) -> Case:
    """Greedy decoding until the end token; paths seen."""
    torch.manual_seed(0)
    model = place.ready(Translator(hidden, bias=1.6))
    requests = place.moved(make_requests(count))
    sample = min(SAMPLE, count)
    compiled = place.compiled(model)

    def facts() -> dict[str, float]:
        ran = RUNS[0]
        said = compiled.map(requests)
        return {PYTHON_RUNS: RUNS[0] - ran, SAID: sum(map(len, said)) / count}

    ways = [
        Way(ALONE, lambda: [model(x) for x in requests[:sample]], sample),
        Way(PADDED, lambda: padded_batches(model, requests)),
        Way(CELLC, lambda: compiled.map(requests)),
    ]
    title = f"LSTM to LSTM, greedy, {hidden} units, {count} requests at once"
    return Case(title, count, ways, PADDED, compiled=[compiled], facts=facts)
