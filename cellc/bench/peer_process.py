"""The peer's server in a process of its own, so that nothing of cellc's side slows it down.

Duty: start a Python that makes a workload again and serves it by a `BatchServer`, with its own load
generator beside it, as cellc has one beside its engine. OpenMP lets a thread's helpers spin only
while one thread of a process uses them: beside other users of torch the same server is a third
slower. Results come back to be compared. Used by `online` and by the demo.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cellc.bench.arrivals import Load
from cellc.bench.batch_server import BatchServer, Policy
from cellc.bench.measure import Served, burst_rate, no_long_pauses, serve
from cellc.bench.online_workloads import Made
from cellc.errors import CellcError


class Maker(Protocol):
    """Can be pickled, and makes the same there."""

    def make(self) -> Made: ...


class PeerError(CellcError):
    """The peer's server cannot do what it was asked for."""

    template = "the server of PyTorch, in a process of its own, failed: {message}"


class PeerProcess:
    """A batch server elsewhere; a context manager, which ends the process."""

    def __init__(self, workload: Maker, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_run, args=(workload, threads, other), daemon=True)
        with _without_interrupts():
            self._process.start()
        other.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def results(self) -> list[Any]:
        """Of all requests, batched."""
        results: list[Any] = self._ask("results")
        return results

    def burst(self, policy: Policy, count: int) -> float:
        """Requests a second when `count` are there at once."""
        rate: float = self._ask("burst", policy, count)
        return rate

    def serve(self, load: Load, policy: Policy) -> Served:
        latencies, results = self._ask("serve", policy, load)
        return Served(latencies, results, load.chosen)

    def _ask(self, *question: object) -> Any:
        try:
            self._pipe.send_bytes(pickle.dumps(question))
            good, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            raise PeerError("it has ended") from None
        if not good:
            raise PeerError(answer)
        return answer

    def __enter__(self) -> PeerProcess:
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


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started here never sees one; ours comes afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def plain(result: Any) -> Any:
    """A result as it travels: its own numbers, not all of the batch that it is a view of."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, result)


def _run(workload: Maker, threads: int, pipe: Connection) -> None:
    """The child: answer until the pipe is closed. An interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(1) as maker:  # its OpenMP helpers end with it
            made = maker.submit(workload.make).result()
    except Exception as error:
        pipe.recv_bytes()
        pipe.send_bytes(pickle.dumps((False, repr(error))))
        return

    def run_batch(requests: Sequence[Any]) -> Sequence[Any]:
        with torch.inference_mode():
            return made.run_batch(requests)

    with BatchServer(run_batch, made.length) as server, no_long_pauses():
        while True:
            try:
                question = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError):
                return
            pipe.send_bytes(pickle.dumps(_answer(server, made, *question)))


def _answer(server: BatchServer, made: Made, what: str, *arguments: Any) -> tuple[bool, Any]:
    """(True, the answer) or (False, what went wrong)."""
    try:
        if what == "results":
            server.configure(Policy())
            return True, [plain(f.result()) for f in list(map(server.submit, made.requests))]
        server.configure(arguments[0])
        if what == "burst":
            count = arguments[1]
            requests = [made.requests[i % len(made.requests)] for i in range(count)]
            return True, burst_rate(server.submit, requests)
        served = serve(server.submit, made.requests, arguments[1])
        return True, (served.latencies, [plain(r) for r in served.results])
    except Exception as error:
        return False, repr(error)
