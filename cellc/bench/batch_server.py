"""What users serve a model with where they have no cellc: a dynamic batcher around padded batches.

Duty: collect requests in queues of about one length, run what is due as one batch, answer by
futures. Comes in: a function of many requests; goes out: results. `Batcher` is the rule, without
threads or a clock of its own; `BatchServer` is the rule with a thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
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


@dataclass(frozen=True)
class Policy:
    """How a batcher is configured.

    timeout_ms: that a request may wait for others; 0 runs what is there. width: lengths 1 to
    `width` are one queue, the next `width` another; None: all are one.
    """

    timeout_ms: float = 0.0
    width: int | None = WIDTH
    max_batch: int = MAX_BATCH

    def __str__(self) -> str:
        if self.max_batch == 1:
            return "one at a time"
        queues = "one queue" if self.width is None else f"buckets of {self.width}"
        waits = f"waits {self.timeout_ms:g} ms" if self.timeout_ms else "no waiting"
        return f"{queues}, {waits}"


class Batcher(Generic[T]):
    """Queues of requests: the oldest that is overdue runs first, then a queue that is full."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._timeout = policy.timeout_ms / 1e3
        self._queues: dict[int, deque[tuple[float, T]]] = {}  # by bucket, none of them empty

    def add(self, item: T, length: int, now: float) -> None:
        width = self.policy.width
        bucket = 0 if width is None else bucket_of(length, width)
        self._queues.setdefault(bucket, deque()).append((now, item))

    def take(self, now: float, *, all_due: bool = False) -> tuple[list[T], float | None]:
        """The batch to run now; or none, and the seconds until one will be due, None where nothing
        waits. `all_due`: nobody waits any longer.
        """
        if not self._queues:
            return [], None
        bucket = min(self._queues, key=lambda b: self._queues[b][0][0])
        left = self._queues[bucket][0][0] + self._timeout - now
        if left > 0 and not all_due:
            full = (b for b, q in self._queues.items() if len(q) >= self.policy.max_batch)
            chosen = next(full, None)
            if chosen is None:
                return [], left
            bucket = chosen
        queue = self._queues[bucket]
        batch = [queue.popleft()[1] for _ in range(min(len(queue), self.policy.max_batch))]
        if not queue:
            del self._queues[bucket]
        return batch, None


class BatchServer:
    """A batcher with a thread that runs the batches; a context manager, which finishes what is
    queued.

    run: results of many requests, in order. length: of one request, None: all are alike.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        length: Callable[[Any], int] | None = len,
        policy: Policy | None = None,
    ) -> None:
        self._run_batch, self._length = run, length or (lambda _: 1)
        self._batcher: Batcher[tuple[Any, Future[Any]]] = Batcher(policy or Policy())
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="batch-server", daemon=True)
        self._thread.start()

    def configure(self, policy: Policy) -> None:
        """From now on; only while no request waits."""
        with self._changed:
            self._batcher = Batcher(policy)

    def submit(self, request: Any) -> Future[Any]:
        """One request; its result comes by the future."""
        future: Future[Any] = Future()
        length = self._length(request)
        with self._changed:
            if self._closing:
                raise RuntimeError("the batch server is closed")
            self._batcher.add((request, future), length, time.perf_counter())
            self._changed.notify()
        return future

    def close(self) -> None:
        """Finish what is queued and join the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> BatchServer:
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
                results = self._run_batch([request for request, _ in batch])
                answers = list(zip(batch, results, strict=True))
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), result in answers:
                future.set_result(result)

    def _next(self) -> list[tuple[Any, Future[Any]]]:
        """The next batch; empty when closed and done."""
        with self._changed:
            while True:
                batch, wait = self._batcher.take(time.perf_counter(), all_due=self._closing)
                if batch or self._closing:
                    return batch
                self._changed.wait(wait)
