"""Runs of a simulation: ways of batching by name, loads drawn, figures of each.

Duty: an application, costs and a load to a `Figure`. Comes in from `cellc.simulation.command` and
`validation`; goes out: plain numbers. No torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cellc.arithmetic import Arithmetic
from cellc.bench.arrivals import Load
from cellc.bench.batch_server import Policy as BatchPolicy
from cellc.bench.measure import percentiles
from cellc.policies import Policy, takes_deadlines
from cellc.simulation.beside import Beside
from cellc.simulation.clock import Clock, Counts, Server
from cellc.simulation.curves import CostTable
from cellc.simulation.servers import Cellular, Padded, Profiles, WholeRequests, Work

CELLULAR, FIFO, DEADLINE = "cellular", "cellular, fifo", "cellular, deadline"
PADDED, WHOLE = "padded", "whole requests"
OWN = "cellular, own policy"
OURS = {CELLULAR: "cellular", FIFO: "fifo", DEADLINE: "deadline"}
AT_ONCE = 20_000  # requests that measure a peak

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Setting:
    """What does not change between runs; `timeout_ms` and `width` are of padded batches."""

    costs: CostTable
    arithmetic: Arithmetic
    max_batch: int = 512
    devices: int = 1
    timeout_ms: float = 0.0
    width: int = 10
    policy: Policy | None = None  # of the user's own
    seed: int = 0  # of what disturbs turns, where that was measured


@dataclass(frozen=True)
class Figure:
    """One way of batching under one load. Latencies in ms; `batch`: rows a step on average, of
    padded batches requests; `busy`: share of the time that devices had work.
    """

    batching: str
    share: float | None  # of the best other's peak; None where a rate was given
    offered: float | None  # requests a second; None: all at once
    answered: float
    p50: float
    p90: float
    p99: float
    batch: float
    largest: int
    launches: int
    busy: float
    requests: int
    in_time: float | None = None  # share that was answered by its deadline
    shed: int = 0


def batchings(setting: Setting, *, padded: bool, deadline: bool = False) -> list[str]:
    """Ways to batch, ours first."""
    ours = [CELLULAR, FIFO]
    ours += [DEADLINE] if deadline else []
    ours += [OWN] if setting.policy is not None else []
    return [*ours, PADDED, buckets(setting), WHOLE] if padded else [*ours, WHOLE]


def buckets(setting: Setting) -> str:
    return f"buckets of {setting.width}"


def ours(batching: str) -> bool:
    return batching in OURS or batching == OWN


def simulate(
    batching: str, setting: Setting, work: Work, tell: Tell = lambda answered: None
) -> tuple[np.ndarray, Counts]:
    """Latencies in seconds of all requests (NaN: shed), and what was launched."""
    due = work.arrivals
    if setting.costs.host.lag:
        late = np.random.default_rng(setting.seed).choice(setting.costs.host.lag, len(due))
        work = replace(work, arrivals=np.sort(due + late))
    servers = [_server(batching, setting, work, k) for k in range(setting.devices)]
    calls = np.array([plan.num_calls for plan in work.plans])
    latencies = Clock(work.arrivals, calls[work.chosen], servers, tell).run() + work.arrivals - due
    counts = Counts()
    for server in servers:
        counts.add(server.counts)
    return latencies, counts


def _server(batching: str, setting: Setting, work: Work, number: int) -> Server:
    what = work, setting.costs, setting.max_batch, setting.arithmetic
    if ours(batching):
        policy = setting.policy if batching == OWN else OURS[batching]
        assert policy is not None
        beside = setting.costs.host.apart > 0 and not takes_deadlines(policy)
        kind, seed = Beside if beside else Cellular, setting.seed + number
        return kind(*what, policy=copy.deepcopy(policy), seed=seed)
    if batching == WHOLE:
        return WholeRequests(*what)
    profiles = Profiles.of(work, len(setting.costs.curves), setting.max_batch, setting.arithmetic)
    width = None if batching == PADDED else setting.width
    how = BatchPolicy(setting.timeout_ms, width, setting.max_batch)
    return Padded(work, setting.costs, profiles, how)


def figure(
    batching: str,
    setting: Setting,
    work: Work,
    offered: float | None,
    share: float | None = None,
    tell: Tell = lambda answered: None,
) -> Figure:
    """Simulate, and sum up; all but `in_time` is of requests that were answered."""
    latencies, counts = simulate(batching, setting, work, tell)
    answered = ~np.isnan(latencies)
    ended = latencies[answered]
    last = float((work.arrivals[answered] + ended).max()) if len(ended) else 0.0
    timed = math.isfinite(work.deadline)
    return Figure(
        batching,
        share,
        offered,
        len(ended) / last if last > 0 else math.inf,
        *(percentiles(ended) if len(ended) else (math.nan,) * 3),
        counts.rows / max(counts.steps, 1),
        counts.largest,
        counts.launches,
        counts.busy / (setting.devices * last) if last > 0 else 0.0,
        len(latencies),
        float((ended <= work.deadline).sum() / len(latencies)) if timed else None,
        len(latencies) - len(ended),
    )


def draw_load(rate: float, count: int, pool: int, seed: int, variation: float = 1.0) -> Load:
    """Gamma gaps of this coefficient of variation: 1 is Poisson, 0 a request at equal distances;
    each is any of the pool. The same for a seed.
    """
    generator = np.random.default_rng(seed)
    if variation > 0:
        gaps = generator.gamma(variation**-2, variation**2 / rate, count)
    else:
        gaps = np.full(count, 1 / rate)
    return Load(np.cumsum(gaps), generator.integers(0, pool, count))


def at_once(work: Work, count: int, seed: int) -> Work:
    """That many requests at time 0."""
    chosen = np.random.default_rng(seed).integers(0, len(work.plans), count)
    return replace(work, arrivals=np.zeros(count), chosen=chosen)


def loaded(work: Work, load: Load) -> Work:
    return replace(work, arrivals=load.arrivals, chosen=load.chosen)


def best_other(figures: Sequence[Figure]) -> Figure:
    """The other way of batching that answers most a second."""
    return max((f for f in figures if not ours(f.batching)), key=lambda f: f.answered)
