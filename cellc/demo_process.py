"""The padded server in a process of its own, so that nothing of cellc's side slows it down.

Duty: start a Python that serves the demo's sentences with a `PaddedServer`, and its own load
generator beside it. OpenMP lets a thread's helpers spin only while one thread of a process uses
them: beside other users of torch the same server is a third slower. The model and the sentences are
made again from their seeds; results come back to be compared. Used by `cellc.demo_measure`.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from cellc.bench import measure as bench
from cellc.bench.arrivals import Load
from cellc.bench.batch_server import BatchServer, Policy
from cellc.bench.measure import Served
from cellc.demo_padded import PaddedServer
from cellc.demo_text import load_corpus, make_model


@dataclass(frozen=True)
class Setting:
    """What the child must know to make the same model and the same sentences."""

    max_tokens: int
    num_sentences: int
    hidden: int
    threads: int


class PaddedProcess:
    """A padded server elsewhere; a context manager, which ends the process."""

    def __init__(self, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_run, args=(setting, other), daemon=True)
        self._process.start()
        other.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def burst(self) -> float:
        """Requests a second when all sentences are there at once."""
        rate: float = self._ask("burst")
        return rate

    def serve(self, load: Load, timeout: float) -> Served:
        """A load, with batches that wait for at most `timeout` seconds."""
        latencies, scores = self._ask("serve", load, timeout)
        return Served(latencies, torch.from_numpy(scores).unbind(), load.chosen)

    def _ask(self, *question: object) -> Any:
        self._pipe.send(question)
        try:
            good, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process of the padded server has ended") from None
        if not good:
            raise RuntimeError(f"the padded server failed: {answer}")
        return answer

    def __enter__(self) -> PaddedProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._pipe.close()  # which ends the child when it next listens
        if kind is None:
            self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._process.close()


def _run(setting: Setting, pipe: Connection) -> None:
    """The child: answer until the pipe is closed. An interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(setting.threads)
    corpus = load_corpus(setting.max_tokens, setting.num_sentences)
    model, sentences = make_model(corpus.vocabulary, setting.hidden), corpus.sentences
    with PaddedServer(model, 0.0) as server, bench.no_long_pauses():
        while True:
            try:
                question = pipe.recv()
            except (EOFError, ConnectionError):
                return
            pipe.send(_answer(server, sentences, *question))


def _answer(
    server: BatchServer, sentences: Sequence[Tensor], what: str, *arguments: Any
) -> tuple[bool, Any]:
    """(True, the answer) or (False, what went wrong)."""
    try:
        if what == "burst":
            return True, bench.burst_rate(server.submit, sentences)
        load, timeout = arguments
        server.configure(Policy(timeout * 1e3))
        served = bench.serve(server.submit, sentences, load)
        return True, (served.latencies, torch.stack(list(served.results)).numpy())
    except Exception as error:
        return False, repr(error)
