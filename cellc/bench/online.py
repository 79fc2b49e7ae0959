"""Latency against load: requests come one by one, cellc and a batch server answer the same ones.

Duty: an open loop: arrivals are drawn beforehand and latencies count from them, so that a server
that falls behind is charged for it. Loads are shares of the peer's own peak. Everything is checked
against `model(x)`, then timed in alternated rounds as other cases are. Comes in: a `Workload`;
goes out: an `OnlineOutcome`, plain numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cellc.bench.arrivals import Load, Trace, make_load
from cellc.bench.batch_server import Policy
from cellc.bench.case import TOLERANCE, Differs
from cellc.bench.measure import (
    Patience,
    Served,
    alternate,
    burst_rate,
    no_long_pauses,
    noise,
    percentiles,
    serve,
)
from cellc.bench.online_figures import (
    CELLC,
    POISSON,
    LoadFigure,
    OnlineOutcome,
    Run,
    figures_of,
)
from cellc.bench.online_workloads import Made, Workload
from cellc.bench.peer_process import PeerProcess
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.options import BackendName
from cellc.request import as_call

SHARES = (0.3, 0.7, 0.95)
FEW, MANY = 64, 4096  # requests at once: the first, which says how many measure a peak; the most
SEARCH = 1000  # first seed of the loads that policies are searched with
KEPT = 2  # policies that the search keeps

Server = Callable[[Load], Served]


@dataclass(frozen=True)
class Conditions:
    """`seconds` of each load, `rounds` kept of each; a trace stands in place of Poisson arrivals,
    at its own rate where there are no `shares`.
    """

    shares: Sequence[float] = SHARES
    seconds: float = 1.0
    rounds: int = 5
    backend: BackendName = "auto"
    trace: Trace | None = None


@dataclass
class Bench:
    """A workload, and both servers of it."""

    workload: Workload
    made: Made
    expected: Sequence[Any]
    compiled: Compiled
    peer: PeerProcess
    conditions: Conditions
    patience: Patience
    say: Callable[[str], None]
    worst: float = 0.0
    peak: float = 0.0
    others: list[float] = field(default_factory=list)
    dropped: int = 0

    def submit(self, request: Any) -> Future[Any]:
        args, kwargs = as_call(request)
        future: Future[Any] = self.compiled.submit(*args, **kwargs)
        return future

    def check(self, who: str, results: Sequence[Any], chosen: Sequence[int] | range) -> None:
        """Raises Differs where a result is not PyTorch's."""
        for result, i in zip(results, chosen, strict=True):
            difference = differ(result, self.expected[i])
            if difference is None:
                raise Differs(f"{self.workload.title}: {who} differs from PyTorch at request {i}")
            self.worst = max(self.worst, difference)

    def name(self, policy: Policy) -> str:
        return f"{self.workload.peer}, {policy}"


def measure_online(
    workload: Workload, conditions: Conditions, patience: Patience, say: Callable[[str], None]
) -> OnlineOutcome:
    """Check, measure the peaks, then each load; `say` is told what is being done."""
    with torch.no_grad(), _bench(workload, conditions, patience, say) as bench:
        say("checking that results are equal")
        requests, every = bench.made.requests, range(len(bench.made.requests))
        for _ in range(2):  # paths of the first pass are new
            bench.check(CELLC, bench.compiled.map(requests), every)
        bench.check(workload.peer, bench.peer.results(), every)
        say("measuring peaks")
        policy, own = _peaks(bench)
        shares: Sequence[float] = conditions.shares
        if not shares and conditions.trace is not None:
            shares = [conditions.trace.rate / bench.peak]
        figures = [figure for share in shares for figure in _load(bench, share)]
        return OnlineOutcome(
            workload.title,
            workload.peer,
            str(policy),
            len(requests),
            bench.peak,
            own,
            bench.worst,
            figures,
            max(bench.others, default=None),
            bench.dropped,
            workload.case,
            f"as in {conditions.trace.name}" if conditions.trace else POISSON,
        )


@contextmanager
def _bench(
    workload: Workload, conditions: Conditions, patience: Patience, say: Callable[[str], None]
) -> Iterator[Bench]:
    say("making the model, and the same in another process")
    made = workload.make()
    with (
        PeerProcess(workload.as_made(made), torch.get_num_threads()) as peer,
        compile(made.model, backend=conditions.backend) as compiled,
    ):
        expected = [made.alone(request) for request in made.requests]
        with no_long_pauses():
            yield Bench(workload, made, expected, compiled, peer, conditions, patience, say)


def _peaks(bench: Bench) -> tuple[Policy, float]:
    """Requests a second when many are there at once: sets the peer's, returns its configuration,
    the faster of those that do not wait, and cellc's. There are as many as the peer answers in the
    seconds of a load, each request once at least, so that batches are full, and sending is little.
    """
    requests, peer = bench.made.requests, bench.peer
    policies = [p for p in bench.workload.policies if not p.timeout_ms]
    rate = max(peer.burst(policies[0], FEW) for _ in range(2))
    count = max(FEW, len(requests), min(MANY, round(rate * bench.conditions.seconds)))
    policy = max(policies, key=lambda p: peer.burst(p, count))
    requests = [requests[i % len(requests)] for i in range(count)]
    works: list[Callable[[], float]] = [
        lambda: peer.burst(policy, count),
        lambda: burst_rate(bench.submit, requests),
    ]
    works[1]()
    kept = _alternate(bench, works)
    bench.peak = statistics.median(theirs for theirs, _ in kept)
    return policy, float(statistics.median(own for _, own in kept))


def _load(bench: Bench, share: float) -> list[LoadFigure]:
    """Figures of all servers at one load."""
    rate = bench.peak * share
    what = f"{share:.0%} of the peer's peak, {rate:,.0f} requests/s"
    shown = list(dict.fromkeys([*_search(bench, what, rate), *bench.workload.always]))
    bench.say(f"{what}: {CELLC}, and {'; '.join(map(str, shown))}")
    number = [0] * (1 + len(shown))

    def next_run(server: int) -> Run:
        load = _draw(bench, bench.conditions, rate, number[server])  # the same for each server
        number[server] += 1
        return _own_run(bench, load) if server == 0 else _peer_run(bench, shown[server - 1], load)

    rounds = _alternate(bench, [partial(next_run, i) for i in range(len(number))])
    return figures_of(share, rate, [CELLC, *map(bench.name, shown)], rounds)


def _search(bench: Bench, what: str, rate: float) -> list[Policy]:
    """The peer's most promising configurations, by the better p90 of two short runs each: which is
    best is told by the rounds that count.
    """
    policies = bench.workload.policies
    if len(policies) <= KEPT:
        return list(policies)
    bench.say(f"{what}: searching the peer's best configurations")
    conditions = replace(bench.conditions, seconds=bench.conditions.seconds / 2)
    found = [float("inf")] * len(policies)
    for seed in (SEARCH, SEARCH + 1):
        load = _draw(bench, conditions, rate, seed)
        for i, policy in enumerate(policies):
            found[i] = min(found[i], _peer_run(bench, policy, load).p90)
    return [policies[i] for i in sorted(range(len(policies)), key=found.__getitem__)[:KEPT]]


def _draw(bench: Bench, conditions: Conditions, rate: float, seed: int) -> Load:
    count = len(bench.made.requests)
    if conditions.trace is None:
        return make_load(rate, conditions.seconds, count, seed)
    return conditions.trace.load(count, rate)


def _own_run(bench: Bench, load: Load) -> Run:
    return _run(bench, CELLC, load, serve(bench.submit, bench.made.requests, load))


def _peer_run(bench: Bench, policy: Policy, load: Load) -> Run:
    return _run(bench, bench.name(policy), load, bench.peer.serve(load, policy))


def _run(bench: Bench, who: str, load: Load, served: Served) -> Run:
    bench.check(who, served.results, served.chosen.tolist())
    last = float((load.arrivals + served.latencies).max())
    return Run(*percentiles(served.latencies), len(load.arrivals) / last, len(load.arrivals))


def _alternate(bench: Bench, works: Sequence[Callable[[], Any]]) -> list[tuple[Any, ...]]:
    """Results of the rounds kept; what others took, and how many were dropped, is noted."""
    ran, rounds = [0], bench.conditions.rounds

    def counted() -> Any:
        ran[0] += 1
        return works[0]()

    kept = alternate(
        [counted, *works[1:]], rounds, 3 * rounds, bench.patience, pids=[bench.peer.pid]
    )
    share = noise(kept)
    bench.others += [] if share is None else [share]
    bench.dropped += ran[0] - len(kept)
    return [r.results for r in kept]


def differ(got: Any, want: Any) -> float | None:
    """The largest difference of two results; None where they are not equal up to rounding."""
    (a, form), (b, other) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    if form != other:
        return None
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, (Tensor, float)):
            if x != y:
                return None
            continue
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        if x.shape != y.shape or x.dtype != y.dtype:
            return None
        if not torch.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            return None
        if x.is_floating_point() and x.numel():
            worst = max(worst, float((x - y).abs().nan_to_num().max()))
    return worst
