"""The demo's rival: padded batching in PyTorch, as good as it gets by hand.

Duty: run a `Classifier` on many sentences in buckets of about one length, padded; and serve
requests with a dynamic batcher, one queue a bucket. Same model object, same weights, same inputs
as cellc's side. Comes in: token tensors; goes out: score tensors.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cellc.demo_text import Classifier

WIDTH = 10  # lengths 1 to 10 are one bucket, 11 to 20 the next
MAX_BATCH = 64


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


@dataclass
class _Request:
    sentence: Tensor
    future: Future[Tensor]
    arrived: float


class PaddedServer:
    """A dynamic batcher: a bucket runs when it is full, or when its oldest request has waited.

    timeout: seconds that a request may wait for others of its length; 0 runs what is there. Has a
    thread of its own; a context manager, which finishes what is queued.
    """

    def __init__(
        self, model: Classifier, timeout: float, max_batch: int = MAX_BATCH, width: int = WIDTH
    ) -> None:
        self.model, self.timeout, self.max_batch, self.width = model, timeout, max_batch, width
        self._buckets: dict[int, deque[_Request]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="padded-server", daemon=True)
        self._thread.start()

    def submit(self, sentence: Tensor) -> Future[Tensor]:
        """One request; its scores come by the future."""
        request = _Request(sentence, Future(), time.perf_counter())
        with self._changed:
            if self._closing:
                raise RuntimeError("the padded server is closed")
            bucket = bucket_of(len(sentence), self.width)
            self._buckets.setdefault(bucket, deque()).append(request)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Finish what is queued and join the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> PaddedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        while batch := self._next():
            try:
                scores = run_padded(self.model, [r.sentence for r in batch]).unbind()
            except Exception as error:
                for request in batch:
                    request.future.set_exception(error)
                continue
            for request, score in zip(batch, scores, strict=True):
                request.future.set_result(score)

    def _next(self) -> list[_Request]:
        """The next batch; empty when closed and done."""
        with self._changed:
            while True:
                queues = [q for q in self._buckets.values() if q]
                if not queues and self._closing:
                    return []
                queue, wait = self._choose(queues)
                if queue is not None:
                    return [queue.popleft() for _ in range(min(len(queue), self.max_batch))]
                self._changed.wait(wait)

    def _choose(
        self, queues: Sequence[deque[_Request]]
    ) -> tuple[deque[_Request] | None, float | None]:
        """The queue to run now, or how long to wait: one overdue first, then one that is full."""
        if not queues:
            return None, None
        oldest = min(queues, key=lambda q: q[0].arrived)
        wait = oldest[0].arrived + self.timeout - time.perf_counter()
        if wait <= 0 or self._closing:
            return oldest, None
        full = [q for q in queues if len(q) >= self.max_batch]
        return (full[0], None) if full else (None, wait)
