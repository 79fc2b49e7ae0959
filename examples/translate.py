"""Spoken numbers to digits: an LSTM with attention, decoded greedily or by beam search.

Bahdanau, Cho, Bengio: Neural Machine Translation by Jointly Learning to Align and Translate, ICLR
2015, arXiv:1409.0473. A decoder stops at the token that it chose itself, so nobody knows how long a
request runs until it has run. `python examples/translate.py --help` says what the script shows;
`cellc inspect examples/translate.py:model` shows the cells of the greedy decoder.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import cellc

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SIZES = {"billion": 10**9, "million": 10**6, "thousand": 10**3, "hundred": 10**2}
WORDS = {word: i for i, word in enumerate([*UNITS, *TENS, *SIZES, "a", "and"])}
WRITTEN = "\n0123456789"
END = 0  # the token that ends what is written, and stands before its first digit
BATCH, ROUNDS = 128, 5
TEXTS = ["three hundred and forty-two thousand one", "fifteen hundred and six", "a billion and two"]


def say(n: int, rng: random.Random) -> str:
    """One of the ways to: "fifteen hundred and six", "a thousand five hundred six", and so on."""
    for name, size in SIZES.items():
        if size == 1_000 and n < 10_000 and n // 100 % 10 and rng.random() < 0.2:
            continue  # in hundreds
        if n >= size:
            many, rest = divmod(n, size)
            start = "a" if many == 1 and rng.random() < 0.3 else say(many, rng)
            link = " and " if rest < 100 and rng.random() < 0.7 else " "
            return f"{start} {name}" + (link + say(rest, rng) if rest else "")
    if n < 20:
        return UNITS[n]
    return TENS[n // 10 - 2] + (f"-{UNITS[n % 10]}" if n % 10 else "")


def random_pairs(seed: int, held_out: bool) -> Iterator[tuple[str, str]]:
    """What is said and what is written, without end; of numbers above 999 a tenth is held out."""
    rng = random.Random(seed)
    while True:
        zeros = rng.choice((1, 10))  # as common as other digits, or more common than all others
        digits = rng.choices("0123456789", [zeros] + 9 * [1], k=rng.randint(1, 12))
        n = int("".join(digits))
        if held_out == (n > 999 and random.Random(n).random() < 0.1):
            yield say(n, rng), str(n)


def to_words(text: str) -> Tensor:
    words = re.findall(r"\w+", text.lower())
    if not words or not WORDS.keys() >= set(words):
        raise ValueError(f"{text!r} is not made of these words: {' '.join(WORDS)}")
    return torch.tensor([WORDS[word] for word in words])


def to_text(tokens: Tensor) -> str:
    return "".join(WRITTEN[token] for token in tokens.tolist()).rstrip("\n")


class Translator(nn.Module):
    """Words [T] to the tokens of what is written, up to END or `limit` of them."""

    def __init__(self, hidden: int = 128, limit: int = 13) -> None:
        super().__init__()
        self.limit = limit
        self.embed_word = nn.Embedding(len(WORDS), hidden)
        self.encoder = nn.LSTM(hidden, hidden // 2, bidirectional=True)
        self.start = nn.Linear(hidden, hidden)
        self.embed_token = nn.Embedding(len(WRITTEN), hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden)
        self.energy = nn.Linear(hidden, 1, bias=False)
        self.decoder = nn.LSTMCell(2 * hidden, hidden)
        self.out = nn.Linear(2 * hidden, len(WRITTEN))

    def begin(self, memory: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The decoder's state h and c, and what it attends to: the encoder's states, their keys."""
        h = torch.tanh(self.start(torch.cat([last[0], last[1]], -1)))  # of both directions
        return h, torch.zeros_like(h), memory, self.key(memory)

    def encode(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        memory, (last, _) = self.encoder(self.embed_word(words))
        return self.begin(memory, last)

    def step(
        self, token: Tensor, h: Tensor, c: Tensor, memory: Tensor, keys: Tensor, *padding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the next token, and the state, for one request (h [H], memory [T, H]), for k
        beams on one memory ([k, H], [T, H]), or for a padded batch ([B, H], [B, T, H]).
        """
        energy = self.energy(torch.tanh(self.query(h).unsqueeze(-2) + keys)).squeeze(-1)
        for mask in padding:
            energy = energy.masked_fill(mask, float("-inf"))
        context = (energy.softmax(-1).unsqueeze(-2) @ memory).squeeze(-2)
        h, c = self.decoder(torch.cat([self.embed_token(token), context], -1), (h, c))
        return self.out(torch.cat([h, context], -1)), h, c

    def forward(self, words: Tensor) -> Tensor:
        h, c, memory, keys = self.encode(words)
        token, tokens = torch.tensor(END), []
        for _ in range(self.limit):
            scores, h, c = self.step(token, h, c, memory, keys)
            token = scores.argmax(-1)
            tokens.append(token)
            if token == END:
                break
        return torch.stack(tokens)


class Streaming(nn.Module):
    """The same tokens, each as soon as it is chosen."""

    def __init__(self, translator: Translator) -> None:
        super().__init__()
        self.translator = translator

    def forward(self, words: Tensor) -> Iterator[Tensor]:
        h, c, memory, keys = self.translator.encode(words)
        token = torch.tensor(END)
        for _ in range(self.translator.limit):
            scores, h, c = self.translator.step(token, h, c, memory, keys)
            token = scores.argmax(-1)
            yield token
            if token == END:
                break


class Beam(nn.Module):
    """The likeliest tokens that a search with `width` beams finds, and their log-probability."""

    def __init__(self, translator: Translator, width: int = 4) -> None:
        super().__init__()
        self.translator, self.width = translator, width

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        width, size = self.width, len(WRITTEN)
        h, c, memory, keys = self.translator.encode(words)
        h, c = h.expand(width, -1), c.expand(width, -1)
        token = torch.full((width,), END)
        total = torch.tensor([0.0] + (width - 1) * [float("-inf")])  # all begin alike: one counts
        done = torch.zeros(width, dtype=torch.bool)
        only_end = torch.tensor([0.0] + (size - 1) * [float("-inf")])  # what follows what is done
        steps = []
        for _ in range(self.translator.limit):
            scores, h, c = self.translator.step(token, h, c, memory, keys)
            gains = torch.where(done.unsqueeze(-1), only_end, log_softmax(scores, -1))
            total, best = (total.unsqueeze(-1) + gains).flatten().topk(width)
            parents, token = best // size, best % size
            steps.append((parents, token))
            h, c, done = h[parents], c[parents], done[parents] | (token == END)
            if done[0]:  # the others only become less likely
                break
        row, tokens = torch.tensor([0]), []
        for parents, token in reversed(steps):
            tokens.append(token[row])
            row = parents[row]
        sequence = torch.cat(tokens[::-1])
        length = int((sequence != END).sum()) + 1  # one END is enough
        return sequence[:length], total[0]


torch.manual_seed(0)
model = Translator().eval()
for weights in model.parameters():
    nn.init.normal_(weights, std=0.5)  # untrained, but it stops after different numbers of steps


def example_inputs() -> list[tuple[Tensor]]:
    return [(to_words(said),) for said, _ in itertools.islice(random_pairs(1, True), 8)]


def encode_padded(net: Translator, requests: Sequence[Tensor]) -> tuple[Tensor, ...]:
    lengths = torch.tensor([len(words) for words in requests])
    embedded = net.embed_word(pad_sequence(list(requests)))
    states, (last, _) = net.encoder(pack_padded_sequence(embedded, lengths, enforce_sorted=False))
    memory, _ = pad_packed_sequence(states, batch_first=True)
    padding = torch.arange(memory.shape[1]) >= lengths.unsqueeze(-1)
    return *net.begin(memory, last), padding


def translate_padded(net: Translator, requests: Sequence[Tensor]) -> list[Tensor]:
    """Greedy decoding as one batches it without cellc: requests of similar lengths, padded; one
    that has ended runs on with the others of its batch.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    found: dict[int, Tensor] = {}
    for part in (order[at : at + BATCH] for at in range(0, len(order), BATCH)):
        h, c, *memory = encode_padded(net, [requests[i] for i in part])
        token, tokens = torch.full((len(part),), END), []
        done, lengths = torch.zeros_like(token).bool(), torch.zeros_like(token)
        for _ in range(net.limit):
            scores, h, c = net.step(token, h, c, *memory)
            token = scores.argmax(-1)
            tokens.append(token)
            lengths += ~done
            done |= token == END
            if done.all():
                break
        rows = zip(part, torch.stack(tokens, 1), lengths.tolist(), strict=True)
        found.update((i, row[:length]) for i, row, length in rows)
    return [found[i] for i in range(len(requests))]


def train(net: Translator, steps: int, console: Console | None = None) -> None:
    """Teacher forcing on padded batches; on a terminal one line of progress, else ten."""
    pairs, every = random_pairs(0, held_out=False), max(steps // 10, 1)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    net.train()
    for step in range(1, steps + 1):
        said, written = zip(*itertools.islice(pairs, BATCH // 2), strict=True)
        wanted = [torch.tensor([WRITTEN.index(c) for c in f"{text}\n"]) for text in written]
        targets = pad_sequence(wanted, padding_value=-1)
        h, c, *memory = encode_padded(net, [to_words(text) for text in said])
        token, rows = torch.full((len(said),), END), []
        for target in targets:
            scores, h, c = net.step(token, h, c, *memory)
            rows.append(scores)
            token = target.clamp(min=END)
        loss = cross_entropy(torch.cat(rows), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if console and (console.is_terminal or step % every == 0):
            end = "\r" if console.is_terminal and step < steps else "\n"
            console.print(f"training, step {step:,} of {steps:,}: loss {loss.item():.4f}", end=end)
    net.eval()


def show(console: Console, net: Translator, texts: Sequence[str], width: int) -> None:
    """Translations by beam search, and the greedy one where it differs."""
    for text in texts:
        tokens, score = Beam(net, width)(to_words(text))
        beam, greedy = to_text(tokens), to_text(net(to_words(text)))
        other = "" if greedy == beam else f"; greedily {greedy}"
        console.print(f"{text}: {beam} (probability {score.exp():.3f}{other})")


def measure(console: Console, net: Translator, count: int, width: int) -> Table:
    """What is right, and how fast, on numbers that were held out."""
    pairs = list(itertools.islice(random_pairs(2, held_out=True), count + BATCH))
    beam, wanted = Beam(net, width), [written for _, written in pairs[BATCH:]]
    everything = [to_words(said) for said, _ in pairs]
    warm_up, words = everything[:BATCH], everything[BATCH:]
    with cellc.compile(net) as greedy_cells, cellc.compile(beam) as beam_cells:
        ways: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
            "greedy, eager": lambda given: [net(x) for x in given],
            f"greedy, padded batches of {BATCH}": lambda given: translate_padded(net, given),
            "greedy, cellc": greedy_cells.map,
            f"{width} beams, eager": lambda given: [beam(x)[0] for x in given],
            f"{width} beams, cellc": lambda given: [y for y, _ in beam_cells.map(given)],
        }
        console.print(f"cells are found and kernels compiled on {BATCH} others, not counted")
        for run in ways.values():
            run(warm_up)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        results: dict[str, list[Tensor]] = {}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                start = time.perf_counter()
                results[name] = run(words)
                rates[name].append(count / (time.perf_counter() - start))
    title = f"{count:,} held-out numbers, one thread"
    table = Table("", "right", "requests/s", "to eager", title=title)
    for name in ways:
        eager = name.split(", ")[0] + ", eager"
        torch.testing.assert_close(results[name], results[eager], rtol=0, atol=0)  # every token
        right = sum(to_text(y) == text for y, text in zip(results[name], wanted, strict=True))
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates[eager], strict=True))
        rate = statistics.median(rates[name])
        table.add_row(name, f"{right / count:.2%}", f"{rate:,.0f}", f"{ratio:.2f}x")
    table.caption = f"medians of {ROUNDS} alternated rounds; all tokens equal to eager's"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a translator of spoken numbers (under a minute), look at what it\n"
        "writes, and measure its decoding on numbers it never saw: one at a time, in padded\n"
        "batches, and by cellc, which batches the steps of whatever requests still run.",
        epilog="examples:\n  python examples/translate.py --weights /tmp/translate.pt\n"
        "  python examples/translate.py --weights /tmp/translate.pt 'fifteen hundred and six'",
    )
    add = parser.add_argument
    add("text", nargs="*", help="translate these, each in quotes, instead of measuring")
    add("--steps", type=int, default=1000, metavar="N", help="training: 500 give 98%%, 1000 99%%")
    add("--count", type=int, default=600, metavar="N", help="held-out numbers (%(default)s)")
    add("--width", type=int, default=4, metavar="K", help="beams of the search (%(default)s)")
    add("--weights", type=Path, metavar="PATH", help="load them, or train and save them there")
    args, console = parser.parse_args(), Console(highlight=False)
    if min(args.steps, args.count, args.width) < 1:
        parser.error("--steps, --count and --width are at least 1")
    if args.weights and not args.weights.absolute().parent.is_dir():
        parser.error(f"no folder for {args.weights}")
    try:
        list(map(to_words, args.text))  # before a minute of training
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # with more, operations this small only wait for each other
    torch.manual_seed(0)
    net = Translator().eval()
    try:
        if args.weights and args.weights.exists():
            net.load_state_dict(torch.load(args.weights, weights_only=True))
        else:
            train(net, args.steps, console)
            if args.weights:
                torch.save(net.state_dict(), args.weights)
        with torch.no_grad():
            show(console, net, args.text or TEXTS, args.width)
            if args.text:
                return
            with cellc.compile(Streaming(net)) as streaming:
                tokens = streaming.stream(to_words(TEXTS[0]))
                console.print("streamed:", *(WRITTEN[token] for token in tokens if token != END))
            console.print(measure(console, net, args.count, args.width))
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None


if __name__ == "__main__":
    main()
