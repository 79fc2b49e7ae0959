"""`cellc simulate` of an engine whose launches run beside the host's work. Nothing is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulate import NAMES, app, loaded, setting

from cellc import pacing
from cellc.arithmetic import Numpy
from cellc.bench.arrivals import Load
from cellc.costs import Curve
from cellc.scheduler import Batch
from cellc.simulation import runs
from cellc.simulation.beside import Beside
from cellc.simulation.clock import Clock
from cellc.simulation.command import work_of
from cellc.simulation.curves import Host
from cellc.simulation.fitting import fit
from cellc.simulation.servers import Work
from cellc.simulation.watch import Seen

HOST = Host(turn=50e-6, request=20e-6, apart=0.5)
SCALE = 30.0  # steps of 0.6 ms, and 15 us a row: worth it


class Noting(Beside):
    """Knows what its kernels took, if all threads ran them; and its launches."""

    kernels = 0.0
    launched: tuple[Batch, ...] = ()

    def _run(self, batch: Batch) -> float:
        seconds = super()._run(batch)
        self.kernels += seconds
        self.launched = (*self.launched, batch)
        return seconds


def served(name: str, host: Host, work: Work, scale: float = SCALE) -> tuple[Any, Noting]:
    """Latencies, and the server."""
    costs = setting(name, host, scale).costs
    server = Noting(work, costs, 512, Numpy())
    calls = np.array([plan.num_calls for plan in work.plans])
    return Clock(work.arrivals, calls[work.chosen], [server]).run(), server


def shortest(name: str = "lstm") -> Work:
    """One request, at time 0."""
    work = work_of(app(name))
    return runs.loaded(work, Load(np.zeros(1), np.array([int(work.lengths.argmin())])))


seconds = st.floats(0.0, 2e-4)


@given(
    name=st.sampled_from(NAMES),
    rate=st.floats(100.0, 50_000.0),
    count=st.integers(1, 60),
    seed=st.integers(0, 100),
    scale=st.sampled_from([0.1, 1.0, SCALE]),
    apart=st.floats(0.01, 1.0),
    each=st.tuples(seconds, seconds, seconds, seconds, seconds, seconds),
)
@settings(max_examples=60)
def test_all_are_answered_and_nothing_is_run_twice(
    name: str,
    rate: float,
    count: int,
    seed: int,
    scale: float,
    apart: float,
    each: tuple[float, ...],
) -> None:
    """And no time is lost or won: turns take at least what kernels, or the host, do, and at most
    both and what sending takes.
    """
    names = ("wake", "beside", "locked", "waking", "admitting", "starting")
    host = replace(HOST, apart=apart, **dict(zip(names, each, strict=True)))
    work = loaded(name, rate, count, seed)
    latencies, server = served(name, host, work, scale)
    assert (latencies > 0).all()
    counts = server.counts
    assert counts.rows == sum(work.plans[i].num_calls for i in work.chosen)
    on_host = counts.launches * host.turn + count * host.request
    assert counts.busy >= max(server.kernels, on_host) * (1 - 1e-9)
    sending = count * (host.beside + 2 * (host.locked + host.waking))
    each_launch = counts.launches * (host.starting + host.wake + host.admitting)
    most = server.kernels / apart if apart < 1 else server.kernels
    assert counts.busy <= (most + on_host + sending + each_launch) * (1 + 1e-9)
    again, _ = served(name, host, work, scale)
    assert np.array_equal(latencies, again)


@pytest.mark.parametrize("apart", [0.25, 0.5, 1.0])
def test_the_host_works_while_a_kernel_runs(apart: float) -> None:
    """While a launch runs the next one is scheduled."""
    host = replace(HOST, apart=apart)
    (latency,), server = served("lstm", host, shortest())
    took = [server._costs.launch(b.cell, np.diff(b.steps)) for b in server.launched]
    assert min(took) > 2 * host.turn and len(took) > 1
    hidden = (len(took) - 1) * apart * host.turn
    assert latency == pytest.approx(len(took) * host.turn + host.request + sum(took) - hidden)


def test_a_short_launch_ends_before_the_next_is_scheduled() -> None:
    """More may be ready then: the engine's rule. Its own time the host does not get back."""
    host = replace(HOST, turn=1e-2)
    (latency,), server = served("lstm", host, shortest())
    turns = len(server.launched) * host.turn
    assert latency == pytest.approx(turns + host.request + server.kernels)


def test_what_takes_less_than_waking_a_thread_runs_at_once() -> None:
    (latency,), server = served("lstm", replace(HOST, starting=1.0), shortest(), scale=1e-2)
    assert latency < 1.0 and server.counts.launches >= 2


def test_a_kernel_that_ends_alone_is_waited_for_no_longer() -> None:
    """Where the host takes longer than kernels do, these take no time."""
    host = replace(HOST, turn=1e-3, apart=1.0)
    latencies, server = served("lstm", host, runs.at_once(work_of(app("lstm")), 600, 0), 2.0)
    on_host = server.counts.launches * host.turn + 600 * host.request
    assert server.kernels > 10e-3
    assert float(latencies.max()) < on_host + 0.9 * server.kernels


def test_so_many_are_admitted_a_turn() -> None:
    work = runs.at_once(work_of(app("lstm")), 3 * pacing.ADMITTED, 0)
    server = Beside(work, setting("lstm", HOST, SCALE).costs, 512, Numpy())
    server.add(np.arange(len(work.arrivals)))
    at, admitted = 0.0, []
    for _ in range(3):
        at = server.turn(at).until
        admitted.append(server._scheduler.num_requests)
    assert admitted == [pacing.ADMITTED, 2 * pacing.ADMITTED, 3 * pacing.ADMITTED]


def test_one_request_is_sent_after_the_other() -> None:
    """Sending takes Python's lock: of many at once, few are there when the host begins."""
    work = runs.at_once(work_of(app("lstm")), 500, 0)
    host = replace(HOST, locked=1e-4, wake=1e-3)
    server = Beside(work, setting("lstm", host, SCALE).costs, 512, Numpy())
    server.add(np.arange(500))
    server.turn(0.0)
    assert 10 <= server._scheduler.num_requests <= 12
    plain, sending = (
        served("lstm", replace(HOST, **given), work)[0] for given in ({}, {"locked": 1e-4})
    )
    assert plain.max() < sending.max() <= plain.max() + 500 * 2e-4


def test_who_slept_wakes_first() -> None:
    """Each that is due after the one before was sent."""
    host = replace(HOST, waking=1e-4, locked=1e-5)
    work = replace(loaded("lstm", 20.0), arrivals=np.arange(1, 151) * 0.05)
    server = Beside(work, setting("lstm", host).costs, 512, Numpy())
    assert server._on_host(0.0, 2.49) == pytest.approx(2.49 + 49 * 1e-5 + 49 * 1e-4)
    assert server._on_host(2.5, 30.0) == pytest.approx(32.5 + 101 * 1e-5 + 101 * 1e-4)
    server._note_host()
    assert server._on_host(32.5, 1.0) == 33.5
    assert server._waited(33.5, 1.0) == 34.5 and server._spent > 0.0


def test_the_policy_for_deadlines_runs_nothing_beside() -> None:
    """Neither does the engine under it."""
    work, how = replace(loaded("lstm", 3000.0), deadline=0.05), setting("lstm", HOST)
    without = setting("lstm", replace(HOST, apart=0.0))
    told, want = (runs.simulate(runs.DEADLINE, given, work)[0] for given in (how, without))
    assert np.array_equal(told, want, equal_nan=True)


def test_steps_are_known_as_launches_took() -> None:
    """As the engine measures them: those that ran alone for a while took longer."""
    _, server = served("lstm", replace(HOST, apart=0.5), shortest())
    cell, rows = server.launched[0].cell, int(server.launched[0].steps[1])
    assert server._step(cell, rows) > server._costs.step(cell, rows)


def _seen(turns: int) -> list[Seen]:
    """Kernels go at half of their speed while the host works, and those that are begun so take
    40 us more; turns that admit any take 100 us more, those that answer any 200; who
    slept before sending takes 50 us more, and 25 of kernels.
    """
    draw, found = np.random.default_rng(1), []
    for _ in range(turns):
        told = draw.uniform(0.5e-3, 1e-3, 5) * (draw.integers(0, 5) == np.arange(5))
        requests, sent, met = (int(n) for n in draw.integers(0, 20, 3))
        admits, answers, begun = (bool(n) for n in draw.integers(0, 2, 3))
        woke, woke_met = (int(draw.integers(0, n + 1)) for n in (sent, met))
        host = 50e-6 + requests * 20e-6 + sent * 30e-6 + woke * 50e-6
        host += admits * 100e-6 + answers * 200e-6
        work = 70e-6 + 2 * float(told.sum()) + met * 10e-6 + woke_met * 25e-6 + begun * 40e-6
        asked = begun * float(draw.uniform(0.0, 2e-3))
        apart = min(asked, 2 * work)
        found.append(
            Seen(
                host, 0.0, work + 0.5 * apart, told, float(requests), sent, met, 1, 1, admits,
                answers, apart, asked < 2 * work, int(begun), woke, woke_met,
            )
        )  # fmt: skip
    return found


def test_turns_with_launches_beside_them_are_taken_apart() -> None:
    turns = _seen(400)
    found = fit(turns, {0: Curve((1, 8, 512), (1e-5, 2e-5, 4e-4))}, threads=2)
    host = found.host
    assert (host.turn, host.request, host.locked, host.waking) == pytest.approx(
        (50e-6, 20e-6, 30e-6, 50e-6)
    )
    assert (host.admitting, host.answering) == pytest.approx((100e-6, 200e-6))
    assert (host.apart, host.starting, host.beside) == pytest.approx((0.5, 40e-6, 10e-6))
    assert found.curves[0].launch == pytest.approx(70e-6)
    assert found.curves[0].seconds == pytest.approx((2e-5, 4e-5, 8e-4))
    assert host.waking_beside == pytest.approx(25e-6)
    joined = [i for i, t in enumerate(turns) if t.joined]
    assert np.array(found.tape.took)[joined] == pytest.approx(np.array(found.tape.should)[joined])
