"""The demo's rival: padded batching in PyTorch, as good as it gets by hand.

Duty: run a `Classifier` on many sentences in buckets of about one length, padded; and serve
requests with a dynamic batcher, one queue a bucket. Same model object, same weights, same inputs
as cellc's side. Comes in: token tensors; goes out: score tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cellc.bench import batch_server
from cellc.bench.batch_server import BatchServer, Policy
from cellc.demo_text import Classifier

WIDTH = batch_server.WIDTH  # lengths 1 to 10 are one bucket, 11 to 20 the next
MAX_BATCH = batch_server.MAX_BATCH


def bucket_of(length: int, width: int = WIDTH) -> int:
    return (length - 1) // width


def make_buckets(lengths: Sequence[int], width: int = WIDTH) -> list[list[int]]:
    """Positions of sequences, by bucket, sorted by length; shortest bucket first.

    >>> make_buckets([25, 3, 10, 11])
    [[1, 2], [3], [0]]
    """
    buckets: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        buckets.setdefault(bucket_of(lengths[i], width), []).append(i)
    return list(buckets.values())


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


class PaddedServer(BatchServer):
    """The classifier behind a dynamic batcher, one queue a bucket; timeout in seconds."""

    def __init__(
        self, model: Classifier, timeout: float, max_batch: int = MAX_BATCH, width: int = WIDTH
    ) -> None:
        super().__init__(
            lambda sentences: run_padded(model, sentences).unbind(),
            policy=Policy(timeout * 1e3, width, max_batch),
        )
