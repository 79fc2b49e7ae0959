"""Cases beside the plain recurrence: a tagger that reads both ways, sessions.

Each compares cellc with what a user of PyTorch writes by hand, on the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from cellc.bench.case import Case, Way
from cellc.bench.place import HERE, Place
from cellc.bench.recurrent import ALONE, CELLC, SAMPLE, VOCABULARY, buckets_of, make_requests
from cellc.sessions import Session

TAGS, STEPS = 17, 16


class Tagger(nn.Module):
    """[T] tokens to [T, tags] scores, by an LSTM that reads both ways."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.rnn = nn.LSTM(hidden, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        scores: Tensor = self.head(states)
        return scores

    def packed(self, requests: Sequence[Tensor]) -> list[Tensor]:
        """All at once; padding would reach the direction that begins at the end."""
        packed = pack_sequence(list(requests), enforce_sorted=False)
        states, _ = self.rnn(packed._replace(data=self.embedding(packed.data)))
        scores, lengths = pad_packed_sequence(states._replace(data=self.head(states.data)))
        return [scores[:n, i] for i, n in enumerate(lengths.tolist())]


def tagger_case(hidden: int, lengths: Sequence[int], place: Place = HERE) -> Case:
    torch.manual_seed(0)
    model = place.ready(Tagger(hidden))
    requests = place.moved(make_requests(lengths, hidden, tokens=True))
    sample = min(SAMPLE, len(requests))
    compiled = place.compiled(model)

    def buckets() -> list[Tensor]:
        results: list[Any] = [None] * len(requests)
        for batch in buckets_of(requests):
            for i, y in zip(batch, model.packed([requests[i] for i in batch]), strict=True):
                results[i] = y
        return results

    packed, bucketed = f"PyTorch, packed {len(requests)}", "PyTorch, packed, buckets of 10"
    ways = [
        Way(ALONE, lambda: [model(x) for x in requests[:sample]], sample),
        Way(packed, lambda: model.packed(requests)),
        Way(bucketed, buckets),
        Way(CELLC, lambda: compiled.map(requests)),
    ]
    title = f"BiLSTM tagger, {hidden} units a direction, {len(requests)} requests at once"
    return Case(title, len(requests), ways, bucketed, compiled=[compiled])


class Step(nn.Module):
    """A step of a stream: [H] and a state to [H] and a state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        h, c = self.cell(x, state)
        return self.head(h), (h, c)


def sessions_case(hidden: int, count: int, place: Place = HERE) -> Case:
    """`count` streams side by side, each `STEPS` steps: results of a stream, joined."""
    torch.manual_seed(0)
    model = place.ready(Step(hidden))
    streams = torch.randn(count, STEPS, hidden).to(place.device)
    zeros = streams.new_zeros(hidden)
    sample = min(SAMPLE, count)
    compiled = place.compiled(model, carry={"state": "1"})

    def alone() -> list[Tensor]:
        results = []
        for stream in streams[:sample]:
            state, said = (zeros, zeros), []
            for x in stream:
                y, state = model(x, state)
                said.append(y)
            results.append(torch.stack(said))
        return results

    def by_hand() -> list[Tensor]:
        states: list[Any] = [(zeros, zeros)] * count  # a server's: each stream's of its own
        said: list[list[Tensor]] = [[] for _ in streams]
        for t in range(STEPS):
            h, c = (torch.stack(parts) for parts in zip(*states, strict=True))
            y, (h, c) = model(torch.stack([s[t] for s in streams]), (h, c))
            states = list(zip(h.unbind(), c.unbind(), strict=True))
            for one, row in zip(said, y.unbind(), strict=True):
                one.append(row)
        return [torch.stack(rows) for rows in said]

    def cellular() -> list[Tensor]:
        sessions: list[Session] = [compiled.session({"state": (zeros, zeros)}) for _ in streams]
        said: list[list[Tensor]] = [[] for _ in streams]
        for t in range(STEPS):
            steps = [(s, (x[t],)) for s, x in zip(sessions, streams, strict=True)]
            for one, (y, _) in zip(said, compiled.step_all(steps), strict=True):
                one.append(y)
        for session in sessions:
            session.close()
        return [torch.stack(rows) for rows in said]

    hand = "PyTorch, all streams stacked by hand"
    ways = [
        Way("PyTorch, one stream at a time", alone, sample),
        Way(hand, by_hand),
        Way("cellc sessions", cellular),
    ]
    title = f"LSTM streams, {hidden} units, {count} sessions of {STEPS} steps"
    return Case(title, count, ways, hand, unit="streams", compiled=[compiled])
