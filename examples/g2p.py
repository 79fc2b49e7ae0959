"""Spelling to sound: the GRU encoder-decoder of g2p-en, with its own pretrained weights.

Park and Kim, github.com/Kyubyong/g2p; the package computes one word at a time in numpy. A request
is the letters of a word; the decoder speaks phonemes until it says </s>, which the forward reads at
every step. `python examples/g2p.py` measures the words of Python's documentation and checks every
phoneme against the package's code. Needs `pip install 'cellc[examples]'`, or `--no-deps g2p-en`
alone: NLTK and its data, which the package asks for, are for looking words up and not used here.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import cellc

Run = Callable[["G2P", PackedSequence], Tensor]

LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=3)}
UNKNOWN, END_OF_WORD = 1, 2  # letters
START, END = 2, 3  # phonemes
LONGEST = 20  # phonemes; the package stops there
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
WARM_UP, SAMPLE, BATCH = 256, 500, 256
PACKAGE, PADDED = "g2p-en's code, one at a time", "PyTorch, padded batches"
DROPPING = "the same, tables, ended dropped"


def package_file(name: str) -> Path:
    """A file of the installed package, which is not imported: that would need NLTK and its data."""
    try:
        return Path(str(metadata.distribution("g2p-en").locate_file(f"g2p_en/{name}")))
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "the weights of this model come with g2p-en: pip install 'cellc[examples]', "
            "or --no-deps g2p-en==2.1.0 alone",
            name="g2p_en",
        ) from None


class G2P(nn.Module):
    """The letters of a word, </s> last, to its phonemes."""

    def __init__(self, letters: int = 29, phonemes: int = 74, hidden: int = 256) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, hidden)
        self.encoder = nn.GRU(hidden, hidden)
        self.phonemes = nn.Embedding(phonemes, hidden)
        self.decoder = nn.GRUCell(hidden, hidden)
        self.head = nn.Linear(hidden, phonemes)

    def forward(self, letters: Tensor) -> Tensor:  # [T] to [phonemes]
        _, last = self.encoder(self.letters(letters))
        h, token = last[0], torch.tensor(START)
        spoken: list[Tensor] = []
        for _ in range(LONGEST):
            h = self.decoder(self.phonemes(token), h)
            token = self.head(h).argmax()
            if token == END:
                break
            spoken.append(token)
        return torch.stack(spoken) if spoken else letters[:0]


def load_model() -> G2P:
    """The model with the package's weights."""
    with np.load(package_file("checkpoint20.npz")) as file:
        given = {name: torch.from_numpy(file[name]) for name in file.files}
    names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb"}
    names |= {"head.weight": "fc_w", "head.bias": "fc_b"}
    for kind in ("w_ih", "w_hh", "b_ih", "b_hh"):
        whole = kind.replace("w_", "weight_").replace("b_", "bias_")
        names |= {f"encoder.{whole}_l0": f"enc_{kind}", f"decoder.{whole}": f"dec_{kind}"}
    net = G2P()
    net.load_state_dict({ours: given[theirs] for ours, theirs in names.items()})
    return net.eval().requires_grad_(False)


try:
    model = load_model()
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        raise SystemExit(str(error)) from None
    raise


def encode(word: str) -> Tensor:
    return torch.tensor([*[LETTERS.get(letter, UNKNOWN) for letter in word], END_OF_WORD])


def example_inputs() -> list[tuple[Tensor]]:
    words = "a cell is batched with whichever cells are ready internationalization".split()
    return [(encode(word),) for word in words]


def words_of_text() -> list[str]:
    """Distinct words of Python's documentation and docstrings, in a fixed shuffled order."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        if not SKIPPED & {*path.relative_to(library).parts}:
            source = path.read_text(encoding="utf-8", errors="ignore")
            texts += re.findall(r'"""(.*?)"""', source, re.DOTALL)
    word = re.compile(r"(?<![A-Za-z_])[A-Za-z][a-z]+(?![A-Za-z_])")  # no part of an identifier
    found = sorted({w.lower() for text in texts for w in word.findall(text)})
    random.Random(0).shuffle(found)
    return found


# -- what it is measured against -------------------------------------------------------------------


def package_code() -> Any:
    """An object of the package's own class, run from its source without its imports."""
    path = package_file("g2p.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in its strings
        parsed = ast.parse(path.read_text(encoding="utf-8"))
        (definition,) = [n for n in parsed.body if isinstance(n, ast.ClassDef) and n.name == "G2p"]
        code = compile(ast.Module([definition], []), str(path), "exec")
    names: dict[str, Any] = {"np": np, "os": os, "dirname": str(path.parent)}
    names |= {"cmudict": SimpleNamespace(dict=dict), "construct_homograph_dictionary": dict}
    exec(code, names)
    return names["G2p"]()


def pronounce(package: Any, word: str) -> list[int]:
    """The package's phonemes as the numbers they have in the model."""
    return [package.p2idx[phoneme] for phoneme in package.predict(word)]


def padded(net: G2P, letters: Sequence[Tensor], run: Run) -> list[Tensor]:
    """Words sorted by length, in batches that `run` encodes packed and decodes padded."""
    order = sorted(range(len(letters)), key=lambda i: -len(letters[i]))
    results: dict[int, Tensor] = {}
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        spoken = run(net, pack_sequence([letters[i] for i in chosen]))
        lengths = (spoken == END).int().argmax(1).tolist()  # the last column is END throughout
        results |= {i: row[:n] for i, row, n in zip(chosen, spoken, lengths, strict=True)}
    return [results[i] for i in range(len(letters))]


def masked(net: G2P, packed: PackedSequence) -> Tensor:
    """PyTorch's modules on a batch until its last word ends; rows that ended say </s> on."""
    _, last = net.encoder(packed._replace(data=net.letters(packed.data)))
    h, rows = last[0], last.shape[1]
    token, alive = torch.full((rows,), START), torch.ones(rows, dtype=torch.bool)
    spoken = torch.full((rows, LONGEST + 1), END)
    for step in range(LONGEST):
        h = net.decoder(net.phonemes(token), h)
        token = torch.where(alive, net.head(h).argmax(1), END)
        spoken[:, step] = token
        alive = token != END
        if not alive.any():
            break
    return spoken


def dropping(net: G2P, packed: PackedSequence) -> Tensor:
    """The GRUs by hand: gates of all letters and phonemes in tables, rows that ended dropped."""
    encoder, decoder = cast(Any, net.encoder), cast(Any, net.decoder)
    reads = linear(net.letters.weight, encoder.weight_ih_l0, encoder.bias_ih_l0)[packed.data]
    says = linear(net.phonemes.weight, decoder.weight_ih, decoder.bias_ih)

    def gru(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, k = linear(h, weight, bias), 2 * h.shape[1]
        r, z = (x[:, :k] + y[:, :k]).sigmoid_().chunk(2, 1)
        return torch.lerp(torch.addcmul(x[:, k:], r, y[:, k:]).tanh_(), h, z)

    sizes = packed.batch_sizes.tolist()
    h = torch.zeros(sizes[0], decoder.hidden_size)
    for x in torch.split(reads, sizes):
        h[: len(x)] = gru(x, h[: len(x)], encoder.weight_hh_l0, encoder.bias_hh_l0)
    token, rows = torch.full((len(h),), START), torch.arange(len(h))
    spoken = torch.full((len(h), LONGEST + 1), END)
    for step in range(LONGEST):
        h = gru(says[token], h, decoder.weight_hh, decoder.bias_hh)
        token = net.head(h).argmax(1)
        (alive,) = (token != END).nonzero(as_tuple=True)
        if not len(alive):
            break
        rows, h, token = rows[alive], h[alive], token[alive]
        spoken[rows, step] = token
    return spoken


# -- measured --------------------------------------------------------------------------------------


def measure(console: Console, limit: int, rounds: int) -> Table:
    """All ways in turn, round after round; every result is checked."""
    words, package = words_of_text(), package_code()
    warm_up, words = words[:WARM_UP], words[WARM_UP:][: limit or None]
    console.print(f"{len(words):,} distinct words; the package's code on all of them, to compare")
    expected = [pronounce(package, word) for word in words]
    letters = [encode(word) for word in words]
    requests = [(x,) for x in letters]
    rates: dict[str, list[float]] = {}

    threads = torch.get_num_threads()

    def run(
        text: str, way: Callable[[], Sequence[Any]], counts: Sequence[int] = (threads,)
    ) -> None:
        found = []  # of each number of torch's threads; the best counts, as more may be slower
        for count in counts:
            torch.set_num_threads(count)
            start = time.perf_counter()
            results = way()
            found.append(len(results) / (time.perf_counter() - start))
            for word, got, want in zip(words, results, expected, strict=False):  # or of a sample
                if [int(phoneme) for phoneme in got] != want:
                    raise SystemExit(f"{text} differs from the package's code on {word!r}")
        torch.set_num_threads(threads)
        rates.setdefault(text, []).append(max(found))

    for _ in range(rounds):
        run(PACKAGE, lambda: [pronounce(package, word) for word in words[:SAMPLE]])
        run(PADDED, lambda: padded(model, letters, masked), (1, threads))
        run(DROPPING, lambda: padded(model, letters, dropping), (1, threads))
        with cellc.compile(model, max_batch=2048) as compiled:
            compiled.map([(encode(word),) for word in warm_up])  # kernels are compiled here
            run("cellc, words never seen", lambda: compiled.map(requests))
            run("cellc, seen", lambda: compiled.map(requests))
    table = Table("", "words/s", "to g2p-en", "to padded")
    for text, found in rates.items():
        row = [f"{statistics.median(found):,.0f}"]
        for base in (rates[PACKAGE], rates[PADDED]):
            ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
            row.append(f"{ratio:.2f}x")
        table.add_row(text, *row)
    table.caption = f"medians of {rounds} rounds; all phonemes equal to the package's"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Pronounces the words of Python's documentation.")
    parser.add_argument("--words", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args, console = parser.parse_args(), Console(highlight=False)
    try:
        with torch.no_grad():
            console.print(measure(console, args.words, max(1, args.rounds)))
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


if __name__ == "__main__":
    main()
