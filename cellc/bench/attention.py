"""Greedy decoding with attention over the encoder's own outputs, and the same in padded batches.

Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation, EMNLP
2015, arXiv:1508.04025 (the dot score). The end token is the request's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from cellc.bench.case import Case, Way
from cellc.bench.decode import CELLC, EOS, LONGEST, PADDED, SAID, VOCABULARY, make_requests
from cellc.bench.peers import by_length
from cellc.bench.place import HERE, Place
from cellc.bench.recurrent import ALONE, SAMPLE

BATCH = 128


class Translator(nn.Module):
    """[T] tokens to [L] tokens, at most `limit`."""

    def __init__(self, hidden: int, limit: int = LONGEST, bias: float = 1.6) -> None:
        super().__init__()
        self.limit = limit
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.encoder, self.decoder = nn.LSTM(hidden, hidden), nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(2 * hidden, VOCABULARY)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(4)  # so that what is said differs
            self.head.bias[EOS] += bias  # how soon it ends

    def step(
        self, token: Tensor, h: Tensor, c: Tensor, memory: Tensor, *padding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next token and the state, of one request (h [H], memory [T, H]) or of a padded batch
        ([B, H], [B, T, H]).
        """
        h, c = self.decoder(self.embedding(token), (h, c))
        scores = (memory @ h.unsqueeze(-1)).squeeze(-1)
        for mask in padding:
            scores = scores.masked_fill(mask, float("-inf"))
        context = (scores.softmax(-1).unsqueeze(-2) @ memory).squeeze(-2)
        return self.head(torch.cat([h, context], -1)).argmax(-1), h, c

    def forward(self, tokens: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.embedding(tokens))
        h, c = h[0], c[0]
        token, said = torch.tensor(0, device=self.head.weight.device), []
        for _ in range(self.limit):
            token, h, c = self.step(token, h, c, memory)
            said.append(token)
            if token == EOS:
                break
        return torch.stack(said)

    def padded(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The same for many at once, until the last has ended; what has ended runs on."""
        packed = pack_sequence(list(batch), enforce_sorted=False)
        states, (h, c) = self.encoder(packed._replace(data=self.embedding(packed.data)))
        memory, lengths = pad_packed_sequence(states, batch_first=True)
        padding = (torch.arange(memory.shape[1]) >= lengths.unsqueeze(-1)).to(memory.device)
        h, c = h[0], c[0]
        token = torch.zeros(len(batch), dtype=torch.int64, device=memory.device)
        done, ends = torch.zeros_like(token).bool(), torch.zeros_like(token)
        said = []
        for _ in range(self.limit):
            token, h, c = self.step(token, h, c, memory, padding)
            said.append(token)
            ends += ~done
            done |= token == EOS
            if done.all():
                break
        rows = torch.stack(said, 1)
        return [row[:end] for row, end in zip(rows, ends.tolist(), strict=True)]


def attention_case(hidden: int, count: int, place: Place = HERE) -> Case:
    """Greedy decoding until the end token; paths seen."""
    torch.manual_seed(0)
    model = place.ready(Translator(hidden))
    requests = place.moved(make_requests(count))
    sample = min(SAMPLE, count)
    compiled = place.compiled(model)

    def padded() -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for batch in by_length(requests, BATCH):
            found |= zip(batch, model.padded([requests[i] for i in batch]), strict=True)
        return [found[i] for i in range(count)]

    ways = [
        Way(ALONE, lambda: [model(x) for x in requests[:sample]], sample),
        Way(PADDED, padded),
        Way(CELLC, lambda: compiled.map(requests)),
    ]
    return Case(
        f"LSTM to LSTM with attention, greedy, {hidden} units, {count} requests at once",
        count,
        ways,
        PADDED,
        compiled=[compiled],
        facts=lambda: {SAID: sum(map(len, compiled.map(requests))) / count},
    )
