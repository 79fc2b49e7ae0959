"""`cellc simulate` of a machine whose turns vary: tapes, queues with known answers, draws by seed;
and that what makes many requests fast changes no result. Nothing is timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulate import HOST, NAMES, loaded, setting

from cellc.arithmetic import Numpy
from cellc.costs import Curve
from cellc.kernels.native import find_arithmetic
from cellc.scheduler import Batch
from cellc.simulation import applications, runs
from cellc.simulation.clock import REST, Clock, Counts, Turn
from cellc.simulation.command import work_of
from cellc.simulation.curves import CostTable, Host
from cellc.simulation.measured import _wait
from cellc.simulation.servers import Cellular, Work
from cellc.simulation.tape import STALL, Player, Tape
from cellc.simulation.validation import Check, Spread
from cellc.urgency import Wish

positive = st.floats(1e-5, 1e-2)
tapes = st.lists(st.tuples(positive, positive), min_size=1, max_size=8)


@given(turns=tapes, parts=st.lists(positive, min_size=1, max_size=20), seed=st.integers(0, 9))
def test_a_tape_takes_what_it_took(turns: list[Any], parts: list[float], seed: int) -> None:
    """However it is cut: what parts take adds up to what the whole does."""
    should, took = zip(*turns, strict=True)
    tape = Tape(should, took)
    whole, pieces, again = Player(tape, seed), Player(tape, seed), Player(tape, seed)
    each = [pieces.next(part) for part in parts]
    assert sum(each) == pytest.approx(whole.next(sum(parts)), rel=1e-6, abs=1e-12)
    assert each == [again.next(part) for part in parts]
    assert whole.next(3 * sum(should)) == pytest.approx(3 * sum(took), rel=1e-6)


@given(turns=tapes)
def test_calm_tapes_take_as_long_on_the_whole(turns: list[Any]) -> None:
    should, took = (list(values) for values in zip(*turns, strict=True))
    calm = Tape(should, took).calm()
    assert sum(calm.took) == pytest.approx(sum(took))
    kept = [a == b for a, b in zip(calm.took, took, strict=True)]
    paces = {
        round(c / s, 6) for c, s, same in zip(calm.took, should, kept, strict=True) if not same
    }
    assert len(paces) <= 1


def test_stalls_stay() -> None:
    took = [1e-3, 1.2e-3, 1e-3 + 3 * STALL, 0.8e-3]
    calm = Tape([1e-3] * 4, took).calm()
    assert calm.took == pytest.approx([1e-3, 1e-3, took[2], 1e-3])
    assert Tape().calm() == Tape() and Player(Tape()).next(0.25) == 0.25


class _OneByOne:
    """A queue with one server: each request should take `seconds`, and takes what a tape says."""

    def __init__(self, seconds: float, tape: Tape, seed: int) -> None:
        self.counts, self._seconds, self._player = Counts(), seconds, Player(tape, seed)
        self._waiting: list[int] = []

    def add(self, requests: np.ndarray) -> None:
        self._waiting += requests.tolist()

    def turn(self, now: float) -> Turn:
        if not self._waiting:
            return REST
        return Turn(now + self._player.next(self._seconds), [self._waiting.pop(0)])


@pytest.mark.parametrize("spread", ["fixed", "exponential", "stalls"])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waiting_is_as_pollaczek_and_khinchine_say(spread: str, load: float) -> None:
    """Of service times S and Poisson arrivals at a rate r, r E[S^2] / (2 (1 - r E[S]))."""
    draw, count, seconds = np.random.default_rng(0), 200_000, 1e-3
    took = {
        "fixed": np.full(50_000, seconds),
        "exponential": draw.exponential(seconds, 50_000),
        "stalls": np.where(np.arange(50_000) % 10 < 9, 0.5 * seconds, 5.5 * seconds),
    }[spread]
    took = draw.permutation(took) * seconds / took.mean()
    rate = load / seconds
    arrivals = np.cumsum(draw.exponential(1 / rate, count))
    server = _OneByOne(seconds, Tape([seconds] * 50_000, took.tolist()), seed=1)
    latencies = Clock(arrivals, np.ones(count, np.int64), [server]).run()
    want = rate * (took**2).mean() / (2 * (1 - load))
    assert latencies.mean() - seconds == pytest.approx(want, rel=0.1)


def test_the_scheduler_is_such_a_queue_where_requests_do_not_meet() -> None:
    """One row a step, one launch a request."""
    single = applications.make("lstm", [1], 16)
    work, count, load = work_of(single), 40_000, 0.7
    assert work.plans[0].num_calls == 1
    curve, seconds = Curve((1, 8), (0.5e-3, 0.5e-3)), 0.3e-3 + 0.5e-3
    costs = CostTable({0: curve}, Host(turn=0.3e-3, request=0.0), 1)
    arrivals = np.cumsum(np.random.default_rng(3).exponential(seconds / load, count))
    how = runs.Setting(costs, find_arithmetic(), max_batch=1)
    load_of = replace(work, arrivals=arrivals, chosen=np.zeros(count, np.int64))
    latencies, counts = runs.simulate(runs.CELLULAR, how, load_of)
    assert counts.launches == count
    wait = load * seconds / (2 * (1 - load))
    assert latencies.mean() - seconds == pytest.approx(wait, rel=0.05)


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_a_seed_draws_what_disturbs(apart: float) -> None:
    draw = np.random.default_rng(0)
    tape = Tape([1e-3] * 200, draw.exponential(1e-3, 200).tolist())
    lag = tuple(draw.exponential(1e-4, 20))
    host = replace(HOST, tape=tape, lag=lag, apart=apart, waits=1e-4, waits_beside=1e-4)
    how = setting("lstm", replace(host, locked=1e-5, waking=1e-5))
    first, again, other = (
        runs.simulate(runs.CELLULAR, replace(how, seed=seed), loaded("lstm", 2000.0))[0]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_slower_machines_answer_later() -> None:
    work = loaded("lstm", 50.0)
    plain, slower = (
        runs.simulate(runs.CELLULAR, setting("lstm", replace(HOST, tape=tape)), work)
        for tape in (Tape(), Tape((1e-3,), (2e-3,)))
    )
    assert slower[1].busy == pytest.approx(2 * plain[1].busy, rel=0.05)
    assert np.quantile(slower[0], 0.9) > np.quantile(plain[0], 0.9)


def test_who_sends_waits_for_the_lock() -> None:
    """Of three loads: 2 ms of work a time, in which it sleeps 1 ms, sends 4 for 50 us each."""
    spans = [(2e-3, 4, 1, 1e-3)] * 30 + [(0.0, 0, 0, 1e-3)]
    assert _wait(spans, 50e-6) == pytest.approx(0.8e-3)


class _Plain(Cellular):
    """As the lines would be that are written for one request, and one launch, after the other."""

    def _admit(self, most: int) -> np.ndarray:
        waiting = np.concatenate([*self._waiting, np.zeros(0, np.int64)])
        taken, left = waiting[:most], waiting[most:]
        self._waiting.clear()
        self._num_waiting = 0
        if len(left):
            self.add(left)
        if len(taken):
            plans = [self._work.plans[self._work.chosen[i]] for i in taken]
            wishes = [Wish(self._work.arrivals[i] + self._work.deadline) for i in taken]
            bases = np.zeros((len(taken), 0), np.int64)
            self._scheduler.add(plans, [int(i) for i in taken], bases, wishes)
        return taken

    def _run(self, batch: Batch) -> float:
        sizes = [int(b - a) for a, b in zip(batch.steps[:-1], batch.steps[1:], strict=True)]
        self.counts.add(Counts(1, len(sizes), sum(sizes), max(sizes)))
        return self._costs.launch(batch.cell, np.array(sizes))


@given(
    name=st.sampled_from(NAMES),
    rate=st.floats(200.0, 100_000.0),
    count=st.integers(1, 80),
    seed=st.integers(0, 1000),
    most=st.sampled_from([1, 7, 512]),
    policy=st.sampled_from(["cellular", "fifo", "deadline"]),
)
@settings(max_examples=60, deadline=None)
def test_many_at_a_time_are_as_one_after_the_other(
    name: str, rate: float, count: int, seed: int, most: int, policy: str
) -> None:
    work: Work = loaded(name, rate, count, seed)
    calls = np.array([plan.num_calls for plan in work.plans])[work.chosen]
    found = []
    for kind, arithmetic in ((Cellular, find_arithmetic()), (_Plain, Numpy())):
        server = kind(work, setting(name).costs, most, arithmetic, policy)
        found.append((Clock(work.arrivals, calls, [server]).run(), server.counts))
    assert np.array_equal(found[0][0], found[1][0])
    assert replace(found[0][1], busy=0) == replace(found[1][1], busy=0)
    assert found[0][1].busy == found[1][1].busy


def test_a_prediction_is_judged_by_how_real_runs_vary() -> None:
    def check(p90: float, answered: float = 100.0, steady: bool = True) -> Check:
        real = Spread.of([10.0, 12.0, 20.0, 30.0, 40.0])
        rates = Spread.of([100.0]), Spread.of([answered])
        return Check("85%", steady, 100.0, *rates, real, Spread.of([p90]), 5, None)

    assert Spread.of([10.0, 12.0, 20.0, 30.0, 40.0]) == Spread(20.0, 12.0, 30.0)
    assert check(24.0).good and not check(26.0).good
    assert check(26.0).within_spread and not check(31.0).within_spread
    assert not check(20.0, answered=80.0).good and not check(20.0, answered=80.0).within_spread
    assert check(31.0, steady=False).good
