"""What a launch costs the host, and what share of the machine's arithmetic is left for cells.

Host cost is all but kernels: scheduling, index tables, plans and regions, answers read. What is
done while a kernel runs takes no time of its own, and is not counted. Decoding, a turn makes one
launch of one step while nobody comes or goes, over as many as one leg of a request has, the way to
its next leg among them; reading, whole requests come, run in chains, and are answered. The share is
of a matrix product's speed, measured in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from cellc.bench.case import Case
from cellc.bench.decode import VOCABULARY, Translator
from cellc.bench.place import HERE, Place
from cellc.bench.recurrent import LastState, make_requests

STEPS = 100
LEG = 64  # steps, of which one leads to the next leg
SIZE = 2048  # of the product
LENGTH = 24
LAUNCH = "us a launch of one step, {} rows decoding"
CELL = "us a cell, {} rows decoding"
READING = "us a cell, {} requests of {} steps"
PEAK = f"GFLOP/s of a {SIZE}^3 product, the faster of torch.mm and numpy"
SHARE = "useful share of it, {}"
EQUAL, DRAWN = f"requests of {LENGTH} vectors", "lengths as drawn"


class Decoding:
    """Requests that decode side by side, each turn a step of all of them."""

    def __init__(self, hidden: int, rows: int, place: Place) -> None:
        torch.manual_seed(0)
        model = place.ready(Translator(hidden, limit=STEPS, bias=-1e4))
        self._requests = place.moved([torch.randint(VOCABULARY, (8,)) for _ in range(rows)])
        self.compiled = place.compiled(model)
        self._ready = False

    def _warm(self) -> None:
        for _ in range(3):
            self.compiled.map(self._requests)
        self.compiled._engine.launcher.ahead = lambda seconds: 1  # type: ignore[method-assign]
        self._ready = True

    def cost(self) -> float:
        """Microseconds of a launch besides its kernel, in the middle of a decode."""
        if not self._ready:
            self._warm()
        return statistics.median(self._decode() for _ in range(5))

    def _decode(self) -> float:
        compiled, engine = self.compiled, self.compiled._engine
        tickets = [compiled._ticket((x,), {}) for x in self._requests]
        engine.enqueue(tickets)
        for _ in range(20):  # they are admitted, and have read
            engine.step()
        before, start = compiled.stats(), time.perf_counter()
        for _ in range(LEG):
            engine.step()
        seconds, after = time.perf_counter() - start, compiled.stats()
        engine.run(tickets)
        return _host_seconds(seconds, before, after) / _grown("launches", before, after) * 1e6


def _grown(what: str, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return after[what] - before[what]


def _host_seconds(seconds: float, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return seconds - _grown("kernel_seconds", before, after)


def host_case(hidden: int, place: Place = HERE, rows: Sequence[int] = (64, 256)) -> Case:
    """Host costs at a few and at many rows."""
    decoding = {n: Decoding(hidden, n, place) for n in rows}
    reading = place.compiled(place.ready(LastState("lstm", hidden, True)))
    requests = place.moved(make_requests([LENGTH] * max(rows), hidden, tokens=True))

    def read() -> float:
        reading.map(requests)
        before, start = reading.stats(), time.perf_counter()
        reading.map(requests)
        host = _host_seconds(time.perf_counter() - start, before, reading.stats())
        return host / (len(requests) * LENGTH) * 1e6

    def facts() -> dict[str, float]:
        found: dict[str, float] = {}
        for n, one in decoding.items():
            cost = one.cost()
            found |= {LAUNCH.format(n): cost, CELL.format(n): cost / n}
        costs = statistics.median(read() for _ in range(5))
        return {**found, READING.format(len(requests), LENGTH): costs}

    return Case(
        f"Host cost besides kernels, LSTM, {hidden} units, structures seen",
        facts=facts,
        compiled=[*(d.compiled for d in decoding.values()), reading],
    )


def saturation_case(hidden: int, lengths: Sequence[int], place: Place = HERE) -> Case:
    """Useful arithmetic of an LSTM on vectors, of which nothing can be folded, to the speed of a
    product: full batches from first to last, and lengths as drawn with the thin end of the longest.
    """
    torch.manual_seed(0)
    compiled = place.compiled(place.ready(LastState("lstm", hidden, False)))
    kinds = {EQUAL: [LENGTH] * len(lengths), DRAWN: list(lengths)}
    requests = {name: make_requests(given, hidden, False) for name, given in kinds.items()}
    warm: list[object] = []

    def facts() -> dict[str, float]:
        if not warm:
            warm.extend(compiled.map(r) for r in requests.values())
        product = product_speed()
        found = {PEAK: product / 1e9}
        for name, given in requests.items():
            start = time.perf_counter()
            compiled.map(given)
            useful = sum(map(len, given)) * 2 * 8 * hidden**2
            speed = useful / (time.perf_counter() - start)
            found |= {f"useful GFLOP/s, {name}": speed / 1e9, SHARE.format(name): speed / product}
        return found

    return Case(
        f"LSTM, {hidden} units, {len(lengths)} requests of vectors at once: arithmetic",
        facts=facts,
        compiled=[compiled],
    )


def product_speed(times: int = 7) -> float:
    """The best of a few, by two libraries, neither of which is at its best everywhere: FLOP/s."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    seconds = []
    for product in (partial(torch.mm, a, b), partial(np.matmul, a.numpy(), b.numpy())):
        for _ in range(times):
            start = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(seconds)
