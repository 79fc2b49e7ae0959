"""Documents decoded sentence by sentence until one says stop, each word by word until its end.

Li, Luong, Jurafsky: A Hierarchical Neural Autoencoder for Paragraphs and Documents, ACL 2015,
https://arxiv.org/abs/1506.01057 (decoded greedily).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, VOCABULARY, EOS, SENTENCES, WORDS = 8, 12, 0, 4, 5
SPREAD, LOUD, STOP, END = 5.0, 4.0, -0.5, 5.0


class HierarchicalDecoder(nn.Module):
    """Sentences (tensors of tokens) of a document in, lists of the tokens of sentences out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.read_words = nn.LSTM(SIZE, SIZE)
        self.read_sentences = nn.LSTM(SIZE, SIZE)
        self.write_sentences = nn.LSTMCell(SIZE, SIZE)
        self.stop = nn.Linear(SIZE, 1)
        self.write_words = nn.LSTMCell(2 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, VOCABULARY)

    def write_sentence(self, sentence: Tensor) -> tuple[list[int], Tensor]:
        h, c = sentence, torch.zeros_like(sentence)
        words: list[int] = []
        x = self.embedding(torch.tensor(EOS))
        while len(words) < WORDS:
            h, c = self.write_words(torch.cat([x, sentence]), (h, c))
            word = self.out(h).argmax()
            x = self.embedding(word)
            if word.item() == EOS:
                break
            words.append(int(word))
        return words, h

    def forward(self, document: list[Tensor]) -> list[list[int]]:
        summaries = []
        for sentence in document:
            _, (h, _) = self.read_words(self.embedding(sentence))
            summaries.append(h[-1])
        _, (h, c) = self.read_sentences(torch.stack(summaries))
        h, c = h[-1], c[-1]
        x = torch.zeros(SIZE)
        written = []
        for _ in range(SENTENCES):
            h, c = self.write_sentences(x, (h, c))
            if torch.sigmoid(self.stop(h)).item() > 0.5:
                break
            words, x = self.write_sentence(h)
            written.append(words)
        return written


def make() -> nn.Module:
    model = HierarchicalDecoder()
    with torch.no_grad():  # spreads the scores: documents and sentences of different lengths
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.weight.mul_(LOUD)
        model.stop.bias.add_(STOP)
        model.out.bias[EOS] += END
    return model


def requests() -> list[Any]:
    draw = random.Random(0)

    def document(*lengths: int) -> list[Tensor]:
        return [torch.tensor([draw.randrange(1, VOCABULARY) for _ in range(n)]) for n in lengths]

    return [
        document(1),
        document(5),
        document(3, 4),
        document(1, 1, 2),
        document(6, 2, 3),
        document(2, 7, 1, 4),
        document(3, 3, 3, 3, 3),
        document(12, 1),
        document(4, 3),
    ]
