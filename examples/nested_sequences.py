"""Characters in words in sentences: a GRU spells each word, an LSTM reads the words.

Word vectors from characters: Ling et al., Finding Function in Form, EMNLP 2015, arXiv:1508.02096.
A request is a list of words, each a list of character codes. `python examples/nested_sequences.py`
runs the sentences of Python's own documentation;
`cellc inspect examples/nested_sequences.py:model` shows the cells found.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import cellc

Sentence = list[list[int]]  # words, each the codes of its characters


class Reader(nn.Module):
    """Words as character codes to class scores of the sentence."""

    def __init__(self, characters: int = 128, hidden: int = 64, classes: int = 5) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(characters, hidden)
        self.spell = nn.GRUCell(hidden, hidden)
        self.read = nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, words: Sentence) -> Tensor:
        h = c = torch.zeros(self.hidden)
        for word in words:
            spelt = torch.zeros(self.hidden)
            for code in word:
                spelt = self.spell(self.embedding(torch.tensor(code)), spelt)
            h, c = self.read(spelt, (h, c))
        scores: Tensor = self.head(h)
        return scores


torch.manual_seed(0)
model = Reader().eval()


def encode(text: str) -> Sentence:
    """Codes of the ASCII characters of each word."""
    words = text.encode("ascii", errors="ignore").split()
    return [list(word) for word in words]


def sentences(texts: Iterable[str]) -> list[Sentence]:
    """Distinct sentences of 3 to 40 words."""
    split = (re.split(r"(?<=[.!?])\s+", text) for text in texts)
    found = dict.fromkeys(itertools.chain.from_iterable(split))
    return [words for text in found if 3 <= len(words := encode(text)) <= 40]


def example_inputs() -> list[tuple[Sentence]]:
    texts = ["a", "to be", "cells are small", "one weight, many uses", "read the words in order"]
    return [(encode(text),) for text in texts]


def main(count: int = 600, warm_up: int = 64) -> None:
    """Eager one at a time, and cellc on sentences never seen, then seen."""
    from pydoc_data.topics import topics

    requests = [(words,) for words in sentences(topics.values())][: warm_up + count]
    others, requests = requests[:warm_up], requests[warm_up:]
    with cellc.compile(model) as compiled, torch.no_grad():
        compiled.map(others)  # kernels are compiled here
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more, operations this small only wait for each other
        start = time.perf_counter()
        expected = [model(*request) for request in requests]
        eager = time.perf_counter() - start
        torch.set_num_threads(threads)
        print(f"{len(requests)} sentences: eager {eager:.2f} s")
        for text in ("never seen", "seen"):
            start = time.perf_counter()
            results = compiled.map(requests)
            seconds = time.perf_counter() - start
            torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
            print(f"cellc, {text}: {seconds:.2f} s, {eager / seconds:.1f}x, equal to eager")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
