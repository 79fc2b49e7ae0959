"""Decoding: greedy sequence-to-sequence with an end token, cellc against padded PyTorch batches.
`python -m cellc.bench.decode`.

Results are checked against each other before anything is timed; rounds alternate. Also printed:
what the host costs a launch while 64 requests decode and nobody comes or goes (all but kernels, in
turns of one step), and how often the forward's own Python ran: never, on paths seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cellc.compiled import Compiled
from cellc.entry import compile

VOCABULARY, EOS, LONGEST = 1000, 3, 40
IN_FLIGHT, STEPS = 64, 100
EAGER, PADDED, CELLC = "PyTorch, one at a time", "PyTorch, padded batches", "cellc, paths seen"
RUNS = [0]  # of the forward's own Python


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
        h = c = torch.zeros(self.hidden)
        for token in tokens:
            h, c = self.encoder(self.embedding(token), (h, c))
        token, said = torch.tensor(0), []
        for _ in range(self.limit):
            h, c = self.decoder(self.embedding(token), (h, c))
            token = self.head(h).argmax(-1)
            said.append(token)
            if token == EOS:
                break
        return torch.stack(said)

    def padded(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The same for many at once, until the last has ended."""
        lengths = torch.tensor([len(x) for x in batch])
        tokens = nn.utils.rnn.pad_sequence(list(batch))
        h = c = torch.zeros(len(batch), self.hidden)
        for t, row in enumerate(tokens):
            new_h, new_c = self.encoder(self.embedding(row), (h, c))
            there = (lengths > t)[:, None]
            h, c = torch.where(there, new_h, h), torch.where(there, new_c, c)
        token, alive = torch.zeros(len(batch), dtype=torch.int64), torch.ones(len(batch)).bool()
        said = []
        for _ in range(self.limit):
            h, c = self.decoder(self.embedding(token), (h, c))
            token = torch.where(alive, self.head(h).argmax(-1), EOS)
            said.append(token)
            alive = alive & (token != EOS)
            if not alive.any():
                break
        rows = torch.stack(said, 1)
        ends = [int(k) for k in (rows == EOS).int().argmax(1)]
        return [
            row[: end + 1] if row[end] == EOS else row for row, end in zip(rows, ends, strict=True)
        ]


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


def throughput(count: int, rounds: int, backend: str) -> Table:
    """Requests a second, each way in turn."""
    torch.manual_seed(0)
    model = Translator(bias=1.6).eval().requires_grad_(False)
    requests = make_requests(count)
    rates: dict[str, list[float]] = {EAGER: [], PADDED: [], CELLC: []}
    with compile(model, backend=backend) as compiled:  # type: ignore[arg-type]

        def timed(text: str, way: Callable[[], list[Tensor]]) -> list[Tensor]:
            start = time.perf_counter()
            results = way()
            rates[text].append(len(results) / (time.perf_counter() - start))
            return results

        want = padded_batches(model, requests)
        for _ in range(2):
            if not all(map(torch.equal, compiled.map(requests), want)):
                raise SystemExit("cellc and the padded batches say different tokens")
        ran = RUNS[0]
        for _ in range(rounds):
            timed(PADDED, lambda: padded_batches(model, requests))
            timed(CELLC, lambda: compiled.map(requests))
        again = RUNS[0] - ran
        timed(EAGER, lambda: [model(x) for x in requests[:64]])
    said = statistics.mean(len(x) for x in want)
    table = Table("", "requests/s", "to padded")
    for text, found in rates.items():
        rate = statistics.median(found)
        table.add_row(text, f"{rate:,.0f}", f"{rate / statistics.median(rates[PADDED]):.2f}x")
    table.caption = (
        f"{count} requests, {said:.1f} tokens said on average; medians of {rounds} rounds; "
        f"runs of the forward's own Python in cellc's rounds: {again}"
    )
    return table


def host_cost(backend: str) -> tuple[float, float]:
    """Microseconds of a launch besides its kernel, while 64 decode; and rows a step."""
    torch.manual_seed(0)
    model = Translator(limit=STEPS, bias=-1e4).eval().requires_grad_(False)
    requests = [torch.randint(VOCABULARY, (8,)) for _ in range(IN_FLIGHT)]
    with compile(model, backend=backend) as compiled:  # type: ignore[arg-type]
        for _ in range(3):
            compiled.map(requests)
        compiled._engine.launcher.ahead = lambda seconds: 1  # type: ignore[method-assign]
        costs = [_decode(compiled, requests) for _ in range(5)]
    return statistics.median(cost for cost, _ in costs), costs[-1][1]


def _decode(compiled: Compiled, requests: Sequence[Tensor]) -> tuple[float, float]:
    """Host cost of the turns in the middle of a decode."""
    engine = compiled._engine
    tickets = [compiled._ticket((x,), {}) for x in requests]
    engine.enqueue(tickets)
    for _ in range(20):  # they are admitted, and have read
        engine.step()
    before, start = compiled.stats(), time.perf_counter()
    for _ in range(STEPS // 2):
        engine.step()
    seconds, after = time.perf_counter() - start, compiled.stats()
    engine.run(tickets)
    launches = after["launches"] - before["launches"]
    kernels = after["kernel_seconds"] - before["kernel_seconds"]
    rows = (after["rows"] - before["rows"]) / max(after["steps"] - before["steps"], 1)
    return (seconds - kernels) / launches * 1e6, rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cellc.bench.decode", description=__doc__)
    parser.add_argument("--requests", type=int, default=512, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--backend", default="auto")
    args, console = parser.parse_args(), Console(highlight=False)
    try:
        console.print(throughput(max(1, args.requests), max(1, args.rounds), args.backend))
        cost, rows = host_cost(args.backend)
        console.print(f"host, a launch of one step at {rows:.0f} rows: {cost:.0f} us")
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


if __name__ == "__main__":
    main()
