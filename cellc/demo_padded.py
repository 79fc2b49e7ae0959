"""The demo's rival: padded batching in PyTorch, as good as it gets by hand.

Duty: run a `Classifier` on many sentences in buckets of about one length, padded; and say how a
dynamic batcher in another process serves the same. Same weights, same inputs as cellc's side. Comes
in: token tensors; goes out: score tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cellc.bench.batch_server import make_buckets
from cellc.bench.online_workloads import Made
from cellc.demo_text import Classifier, load_corpus, make_model


@torch.inference_mode()
def run_padded(model: Classifier, sentences: Sequence[Tensor]) -> Tensor:
    """One padded batch: scores [B, classes], each from the last state before its padding."""
    lengths = torch.tensor([len(s) for s in sentences])
    states, _ = model.lstm(model.embed(pad_sequence(list(sentences))))  # [T, B, H]
    scores: Tensor = model.classify(states[lengths - 1, torch.arange(len(sentences))])
    return scores


def run_bucketed(model: Classifier, sentences: Sequence[Tensor]) -> list[Tensor]:
    """All sentences, one padded batch a bucket, results in order."""
    results: list[Tensor] = [torch.empty(0)] * len(sentences)
    for bucket in make_buckets([len(s) for s in sentences]):
        scores = run_padded(model, [sentences[i] for i in bucket]).unbind()
        for i, score in zip(bucket, scores, strict=True):
            results[i] = score
    return results


@dataclass(frozen=True)
class Sentences:
    """What a process must know to make the demo's model and sentences again, and serve them padded
    (`cellc.bench.peer_process`).
    """

    max_tokens: int
    num_sentences: int
    hidden: int

    def make(self) -> Made:
        corpus = load_corpus(self.max_tokens, self.num_sentences)
        model = make_model(corpus.vocabulary, self.hidden)
        return Made(model, corpus.sentences, lambda batch: run_padded(model, batch).unbind())
