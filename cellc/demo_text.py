"""The demo's data and model: sentences of Python's own documentation, and a classifier of them.

Duty: text to token numbers, and a model as anybody would write it. Goes out to `cellc.demo`: a
`Corpus` of distinct sentences, longest last, and an nn.Module with random weights.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cellc.errors import UsageError

MIN_TOKENS, MAX_TOKENS = 3, 120
_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(])")
_TOKEN = re.compile(r"[a-z_]+|\d+|[^\w\s]")


class Classifier(nn.Module):
    """Tokens [T] to scores [classes], from the last state of an LSTM."""

    def __init__(self, vocabulary: int, hidden: int = 256, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(tokens))
        scores: Tensor = self.classify(states[-1])
        return scores


def make_model(vocabulary: int, hidden: int, seed: int = 0) -> Classifier:
    """A classifier with random weights of a fixed seed; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(vocabulary, hidden).eval()


@dataclass(frozen=True)
class Corpus:
    """Distinct sentences as i64[T] tokens, in a fixed shuffled order."""

    sentences: Sequence[Tensor]
    vocabulary: int

    @property
    def lengths(self) -> list[int]:
        return [len(sentence) for sentence in self.sentences]


def load_corpus(max_tokens: int = MAX_TOKENS, limit: int | None = None, seed: int = 0) -> Corpus:
    """The sentences of the documentation that this Python brings along."""
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UsageError(
            "this Python comes without its documentation (pydoc_data), which the demo reads; "
            "install the full standard library"
        ) from error
    return make_corpus(topics.values(), max_tokens, limit, seed)


def make_corpus(
    texts: Iterable[str], max_tokens: int = MAX_TOKENS, limit: int | None = None, seed: int = 0
) -> Corpus:
    """Distinct sentences of MIN_TOKENS to `max_tokens` tokens, numbered by first appearance."""
    found = dict.fromkeys(
        words
        for text in texts
        for sentence in split_sentences(text)
        if MIN_TOKENS <= len(words := tuple(tokenise(sentence))) <= max_tokens
    )
    kept = list(found)
    random.Random(seed).shuffle(kept)
    kept = kept[:limit]
    numbers: dict[str, int] = {}
    for words in kept:
        for word in words:
            numbers.setdefault(word, len(numbers))
    sentences = [torch.tensor([numbers[word] for word in words]) for words in kept]
    return Corpus(sentences, len(numbers))


def split_sentences(text: str) -> list[str]:
    """Sentences of running text; a paragraph without an end is one sentence.

    >>> split_sentences("It ends. Or (see 3.1) it does not!\\n\\nA title")
    ['It ends.', 'Or (see 3.1) it does not!', 'A title']
    """
    paragraphs = (" ".join(p.split()) for p in _PARAGRAPH.split(text))
    return [s for p in paragraphs for s in _SENTENCE.split(p) if s]


def tokenise(sentence: str) -> list[str]:
    """Words, numbers and punctuation marks, in lower case.

    >>> tokenise("Don't call x_1(), see 3.12.")
    ['don', "'", 't', 'call', 'x_', '1', '(', ')', ',', 'see', '3', '.', '12', '.']
    """
    return _TOKEN.findall(sentence.lower())
