"""What a second worker gives: requests a second of one worker, of two, and of one on two threads.

Small cells, where threads of one launch have little to share. Kernels of two workers run side by
side, what the host does takes turns (Python's lock), so the gain says what share that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from cellc.bench.case import Case, Way
from cellc.bench.recurrent import ALONE, SAMPLE, LastState, make_requests
from cellc.compiled import Compiled
from cellc.entry import compile

ONE = "cellc, one worker of one thread"
TWO = "cellc, two workers of one thread each"
WIDE = "cellc, one worker of two threads"
LONG = 4  # times as many steps: less of the time is the host's, which goes by requests
T = TypeVar("T")


def workers_case(
    hidden: int, lengths: Sequence[int], name: str, times: int = 1, backend: str = "auto"
) -> Case:
    """An LSTM on tokens, every length `times` as long as given."""
    torch.manual_seed(0)
    model = LastState("lstm", hidden, True).eval().requires_grad_(False)
    lengths = [times * n for n in lengths]
    requests = make_requests(lengths, hidden, tokens=True)
    ways: dict[str, tuple[int, Compiled]] = {}
    for way, threads, workers in ((ONE, 1, 1), (TWO, 1, 2), (WIDE, 2, 1)):
        compiled = _made(model, threads, workers, backend)
        ways[way] = (threads, compiled)
        for _ in range(3):
            _with_threads(threads, partial(compiled.map, requests))

    def run(threads: int, compiled: Compiled) -> Sequence[Tensor]:
        return _with_threads(threads, partial(compiled.map, requests))

    mean = sum(lengths) / len(lengths)
    return Case(
        f"LSTM, {hidden} units, {len(lengths)} requests of {mean:.0f} tokens at once, by workers",
        len(requests),
        [
            Way(ALONE, lambda: [model(x) for x in requests[:SAMPLE]], SAMPLE),
            *(Way(way, partial(run, *given)) for way, given in ways.items()),
        ],
        base=ONE,
        compiled=[compiled for _, compiled in ways.values()],
        name=name,
    )


def _made(model: LastState, threads: int, workers: int, backend: str) -> Compiled:
    """Of so many workers of so many threads each."""
    devices = ["cpu"] * workers
    return _with_threads(
        threads * workers,
        lambda: compile(model, device=devices, backend=backend),  # type: ignore[arg-type]
    )


def _with_threads(threads: int, work: Callable[[], T]) -> T:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return work()
    finally:
        torch.set_num_threads(before)
