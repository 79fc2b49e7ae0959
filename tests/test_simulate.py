"""`cellc simulate`: the clock, the servers, the command. Nothing is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellc import pacing
from cellc.arithmetic import Numpy
from cellc.bench.arrivals import Load
from cellc.bench.lengths import draw_lengths
from cellc.cli import main
from cellc.costs import Curve
from cellc.entry import compile
from cellc.kernels.triton_devices import DEVICES
from cellc.plan import CELL, CHAIN, EDGES, MISSING, NUM_SUCCESSORS, SUCCESSOR
from cellc.simulation import applications, measured, runs
from cellc.simulation.command import work_of
from cellc.simulation.curves import CostTable, Host, roofline_curves
from cellc.simulation.fitting import fit, least_squares
from cellc.simulation.servers import Cellular, Work, alone
from cellc.simulation.tape import Tape
from cellc.simulation.watch import Seen, Watch

NAMES = ("lstm", "seq2seq", "treelstm")
HOST = Host(turn=50e-6, request=20e-6)
NOTHING = Host(0.0, 0.0)
GRAPH = [CELL, MISSING, CHAIN, EDGES, SUCCESSOR, NUM_SUCCESSORS]


@cache
def app(name: str) -> applications.Application:
    return applications.make(name, draw_lengths(24), 16)


def setting(name: str, host: Host = HOST, scale: float = 1.0, **given: Any) -> runs.Setting:
    """Steps of 20 us and 0.5 us a row."""
    rows = (1, 8, 64, 512)
    curve = Curve(rows, tuple(scale * (20e-6 + 0.5e-6 * n) for n in rows))
    curves = dict.fromkeys(range(len(app(name).cells)), curve)
    max_batch = given.get("max_batch", 512)
    return runs.Setting(CostTable(curves, host, max_batch), Numpy(), **given)


def loaded(name: str, rate: float, count: int = 150, seed: int = 0) -> Work:
    work = work_of(app(name))
    return runs.loaded(work, runs.draw_load(rate, count, len(work.plans), seed))


def ways(name: str) -> list[str]:
    return runs.batchings(setting(name), padded=app(name).padded)


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_answered_after_what_it_takes(name: str) -> None:
    """No sooner than its own launches take at one row a step."""
    how, work = setting(name), loaded(name, 2000.0)
    least = np.array([_least(name, how, work, plan) for plan in work.plans])[work.chosen]
    for way in ways(name):
        for devices in (1, 3):
            latencies, counts = runs.simulate(way, replace(how, devices=devices), work)
            assert len(latencies) == 150 and not np.isnan(latencies).any()
            assert (latencies >= least * (1 - 1e-9)).all(), way
            assert counts.busy > 0


def _least(name: str, how: runs.Setting, work: Work, plan: Any) -> float:
    """Seconds of the steps that one after the other must take: rows cost what one row does."""
    launches = alone(work, plan, len(app(name).cells), how.max_batch, Numpy())
    curve = how.costs.curves[0]
    return HOST.turn + sum((len(b.steps) - 1) * curve(1) for b in launches)


@pytest.mark.parametrize("name", NAMES)
def test_all_calls_run_once(name: str) -> None:
    work = loaded(name, 3000.0)
    calls = sum(work.plans[i].num_calls for i in work.chosen)
    for way in (runs.CELLULAR, runs.FIFO, runs.WHOLE):
        for devices in (1, 2):
            _, counts = runs.simulate(way, setting(name, devices=devices), work)
            assert counts.rows == calls


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same(name: str) -> None:
    for way in ways(name):
        first, again, other = (
            runs.simulate(way, setting(name, devices=2), loaded(name, 2500.0, seed=seed))[0]
            for seed in (1, 1, 2)
        )
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_without_costs_arrivals_are_the_bound(name: str) -> None:
    how = setting(name, NOTHING, scale=1e-9)
    work = loaded(name, 1000.0)
    for way in ways(name):
        found = runs.figure(way, how, work, 1000.0)
        assert found.p99 < 1e-3
        assert found.answered == pytest.approx(len(work.arrivals) / work.arrivals[-1], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_batch", [8, 64])
def test_batches_are_never_larger_than_said(name: str, max_batch: int) -> None:
    how = setting(name, max_batch=max_batch)
    work = runs.at_once(work_of(app(name)), 300, 0)
    for way in ways(name):
        _, counts = runs.simulate(way, how, work)
        assert counts.largest == max_batch, way


@pytest.mark.parametrize("name", ["lstm", "seq2seq"])
def test_few_requests_are_sooner_answered_than_in_padded_batches(name: str) -> None:
    how = setting(name, scale=3.0)
    peak = runs.figure(runs.PADDED, how, runs.at_once(work_of(app(name)), 400, 0), None).answered
    work = loaded(name, 0.3 * peak, count=400)
    ours, padded = (runs.figure(way, how, work, None) for way in (runs.CELLULAR, runs.PADDED))
    assert ours.p50 < padded.p50 and ours.p90 < padded.p90


def test_more_devices_answer_more() -> None:
    work = runs.at_once(work_of(app("lstm")), 1500, 0)
    one, four = (
        runs.figure(runs.CELLULAR, setting("lstm", max_batch=64, devices=d), work, None).answered
        for d in (1, 4)
    )
    assert 3 * one < four <= 4.2 * one


def test_a_timeout_waits_for_more() -> None:
    work = loaded("lstm", 200.0)
    now, later = (
        runs.figure(runs.PADDED, setting("lstm", timeout_ms=ms), work, None) for ms in (0.0, 20.0)
    )
    assert later.batch > 2 * now.batch and later.p50 > now.p50 + 5


def test_two_chains_are_what_the_compiler_makes() -> None:
    model = applications.Seq2Seq(8, 20)
    compiled, plans = applications._compiled(
        model, [applications._sentence(3, 2), applications._sentence(5, 4)]
    )
    made = applications.two_chains(plans[0], 5, 4)
    want = plans[1]
    assert np.array_equal(made.calls[:, GRAPH], want.calls[:, GRAPH])
    assert np.array_equal(made.successors, want.successors)
    assert np.array_equal(made.ready, want.ready)
    assert (made.cells, made.priority) == (want.cells, want.priority)
    compiled.close()


@pytest.mark.parametrize("name", NAMES)
def test_applications_run(name: str) -> None:
    """What is simulated can be run, and gives what PyTorch does."""
    requests = [r if isinstance(r, tuple) else (r,) for r in app(name).requests[:4]]
    model = app(name).model
    with torch.no_grad(), compile(model, backend="eager") as compiled:
        for got, request in zip(compiled.map(requests), requests, strict=True):
            torch.testing.assert_close(got, model(*request))


def test_a_roofline_is_below_its_curve() -> None:
    cells = app("lstm").cells
    half, whole = (roofline_curves(cells, DEVICES["cuda:90"], e) for e in (0.5, 1.0))
    for number in range(len(cells)):
        assert whole[number](512) < half[number](512) < 2 * whole[number](512)
        assert half[number](512) < half[number](4096)


def test_bursts_vary_more() -> None:
    even, poisson, bursts = (
        np.diff(runs.draw_load(100.0, 5000, 10, 0, v).arrivals) for v in (0.0, 1.0, 3.0)
    )
    assert np.ptp(even) < 1e-9
    assert poisson.std() / poisson.mean() == pytest.approx(1.0, rel=0.1)
    assert bursts.std() / bursts.mean() == pytest.approx(3.0, rel=0.2)


def test_launches_are_sized_by_what_steps_cost() -> None:
    assert pacing.num_steps(1e-3, 0.0, shared=True) == 1
    assert pacing.num_steps(1e-4, 1e-3, shared=True) == 30
    assert pacing.num_steps(1e-4, 1.0, shared=True) == 80


# -- the command -----------------------------------------------------------------------------------

GIVEN = ["simulate", "lstm", "--device", "v100", "--hidden", "16", "--requests", "200"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN, "--devices", "2", "--loads", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 2 and len(found["figures"]) == 10
    first = found["figures"][5]
    assert first["batching"] == "cellular" and first["share"] == 0.5 and first["requests"] == 200
    assert first["p50"] <= first["p90"] <= first["p99"]
    assert [c["name"] for c in found["cells"]] == ["rnn.l0", "rnn.l0_2"]


def test_ours_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN, "--cellular-only", "--rate", "900", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [(f["batching"], f["offered"]) for f in figures] == [("cellular", 900.0)]
    assert main([*GIVEN, "--cellular-only"]) == 2


def test_deadlines_and_a_policy_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Far more requests than can be answered: some are, if others are shed."""
    policy = str(Path(__file__).parents[1] / "examples" / "policy.py") + ":Oldest"
    command = [*GIVEN, "--cellular-only", "--rate", "60000", "--deadline-ms", "5"]
    assert main([*command, "--requests", "1500", "--policy", policy, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [f["batching"] for f in figures] == [runs.CELLULAR, runs.DEADLINE, runs.OWN]
    first, timed, own = figures
    assert timed["in_time"] > 2 * first["in_time"] and timed["shed"] > 100 > first["shed"] == 0
    assert 0 <= own["in_time"] < 1
    assert main([*command, "--policy", policy.replace("Oldest", "PATIENCE")]) == 2
    assert main([*command, "--policy", policy.replace("Oldest", "Latest")]) == 2
    assert main([*GIVEN, "--deadline-ms", "0"]) == 2


def test_all_are_answered_or_shed() -> None:
    for name in NAMES:
        work = replace(loaded(name, 30_000.0), deadline=4e-3)
        for devices in (1, 2):
            latencies, counts = runs.simulate(runs.DEADLINE, setting(name, devices=devices), work)
            assert 0 < np.isnan(latencies).sum() < len(latencies)
            assert counts.rows <= sum(work.plans[i].num_calls for i in work.chosen)


def test_requests_that_come_meanwhile_cost_kernels_time() -> None:
    work, times = loaded("lstm", 2000.0), []
    for beside in (0.0, 1e-4):
        host = replace(HOST, beside=beside)
        times.append(runs.simulate(runs.CELLULAR, setting("lstm", host), work)[1].busy)
    assert times[0] < times[1] <= times[0] + 2 * 150 * 1e-4


def test_requests_that_come_late_are_late() -> None:
    """Latencies count from when they were due; what disturbs turns makes them longer, too."""
    work, now_and_then = loaded("lstm", 2000.0), Tape((1e-3,) * 3, (1e-3, 1e-3, 3e-3))
    plain, lagging, disturbed = (
        runs.simulate(runs.CELLULAR, setting("lstm", replace(HOST, **given)), work)[0]
        for given in ({}, {"lag": (5e-3,)}, {"tape": now_and_then})
    )
    assert lagging == pytest.approx(plain + 5e-3)
    assert np.quantile(disturbed, 0.9) > np.quantile(plain, 0.9) + 5e-4


def test_who_comes_after_a_kernel_waits_for_the_next() -> None:
    """Python's lock is taken: the third request comes while the first turn ends, and is sent while
    the kernel of the second runs. Nobody else is there then.
    """
    work, after = work_of(app("lstm")), 1e-3
    shortest = int(work.lengths.argmin())
    host = replace(NOTHING, turn=2e-3, after=after / 2e-3)
    alone = runs.loaded(work, Load(np.zeros(1), np.array([shortest])))
    took = runs.simulate(runs.CELLULAR, setting("lstm", host), alone)[0][0]
    turns = runs.simulate(runs.CELLULAR, setting("lstm", host), alone)[1].launches
    late = took / turns - after / 2  # of the first turn, its kernel has run
    both = runs.loaded(work, Load(np.array([0.0, late]), np.array([shortest] * 2)))
    told, locked = (
        runs.simulate(runs.CELLULAR, setting("lstm", replace(host, locked=given)), both)[0][1]
        for given in (0.0, 1e-9)
    )
    assert told + 2e-3 < locked < told + 2.5e-3


def test_who_comes_after_the_last_kernel_is_served() -> None:
    """The thread that sends it gets Python's lock when there is nothing left to do."""
    work, after = work_of(app("lstm")), 1e-3
    shortest = int(work.lengths.argmin())
    host = replace(NOTHING, turn=2e-3, after=after / 2e-3, locked=1e-9)
    alone = runs.loaded(work, Load(np.zeros(1), np.array([shortest])))
    took = runs.simulate(runs.CELLULAR, setting("lstm", host), alone)[0][0]
    both = runs.loaded(work, Load(np.array([0.0, took - after / 2]), np.array([shortest] * 2)))
    latencies = runs.simulate(runs.CELLULAR, setting("lstm", host), both)[0]
    assert latencies[1] == pytest.approx(took + after / 2, rel=0.01)


def test_who_can_make_it_is_told_by_turns_as_they_were() -> None:
    """As the engine does: with what requests cost in them, not with that of a launch alone."""
    how, work = (
        setting("lstm", replace(HOST, request=1e-3)),
        runs.at_once(work_of(app("lstm")), 8, 0),
    )
    server = Cellular(work, how.costs, 512, Numpy(), "deadline")
    before = server._seconds(0, 8)
    server.add(np.arange(8))
    server.turn(0.0)
    turn = HOST.turn + 0.5e-3  # of one, which is half of it: more would hold up the others
    averaged = HOST.turn + (turn - HOST.turn) / pacing.SMOOTH
    assert server._pacer.host_seconds == pytest.approx(averaged)
    assert server._seconds(0, 8) > before


def test_turns_of_some_length_are_slower() -> None:
    work = loaded("lstm", 2000.0)
    plain, disturbed = (
        runs.simulate(runs.CELLULAR, setting("lstm", replace(HOST, slower=slower)), work)[0]
        for slower in (((1.0, 1.0),) * 5, ((1.0, 1.0),) * 4 + ((1.0, 9.0),))
    )
    assert np.array_equal(plain, disturbed)


def _seen(turns: int, seed: int = 0) -> list[Seen]:
    """50 us a launch, 20 a request, 30 of the host and 10 of kernels for each that is sent; a
    launch of 70 us; steps of some sizes take twice, others three times what their curve says; every
    tenth turn 5 ms more.
    """
    draw, found = np.random.default_rng(seed), []
    for turn in range(turns):
        told = draw.uniform(0, 1e-3, 5) * (draw.integers(0, 5) == np.arange(5))
        requests, sent = (int(n) for n in draw.integers(0, 20, 2))
        host = 50e-6 + requests * 20e-6 + sent * 30e-6
        kernels = 70e-6 + float(told @ (2, 2, 3, 3, 3)) + sent * 10e-6
        disturbed = 5e-3 if turn % 10 == 0 else 0.0
        found.append(Seen(host, host / 4, kernels + disturbed, told, float(requests), sent, sent))
    return found


def test_turns_are_taken_apart() -> None:
    """Each part is found; what is left stands in the order it was seen, and sums to nothing."""
    turns = [t._replace(kernels=t.kernels - 5e-3 * (i % 10 == 0)) for i, t in enumerate(_seen(400))]
    curve = Curve((1, 8, 512), (1e-5, 2e-5, 4e-4), 1e-6)
    found = fit(turns, {0: curve})
    host = found.host
    assert (host.turn, host.request, host.locked, host.beside) == pytest.approx(
        (50e-6, 20e-6, 30e-6, 10e-6)
    )
    assert host.after == pytest.approx(0.25)
    assert found.curves[0].launch == pytest.approx(70e-6)
    assert found.curves[0].seconds == pytest.approx((2e-5, 4e-5, 12e-4))
    assert found.tape.took == pytest.approx(found.tape.should)
    assert np.array(host.slower) == pytest.approx(1.0)


def test_what_disturbs_is_kept_in_its_order() -> None:
    """Every tenth turn stalls; of other loads, turns take as long on average as they should."""
    loads = [0] * 200 + [1] * 200
    found = fit(_seen(400), {0: Curve((1, 512), (1e-5, 4e-4))}, loads=loads)
    tape, calm = found.tape, found.host.tape
    more = np.array(tape.took) - np.array(tape.should)
    assert len(more) == 400 and np.flatnonzero(more > 3e-3).tolist() == list(range(0, 400, 10))
    for part in (slice(0, 200), slice(200, 400)):
        assert sum(tape.took[part]) == pytest.approx(sum(tape.should[part]))
    paces = np.array(calm.took) / np.array(calm.should)
    assert np.array_equal(np.array(calm.took)[::10], np.array(tape.took)[::10])
    assert np.ptp(np.delete(paces, np.arange(0, 400, 10))) < 1e-9


def test_steps_of_a_size_never_seen_are_as_the_nearest() -> None:
    turns = [t for t in _seen(400) if t.told[:3].sum() == 0 and t.told.sum() > 0]
    turns = [t._replace(kernels=70e-6 + float(t.told.sum()) * 3 + t.sent * 10e-6) for t in turns]
    found = fit(turns, {0: Curve((1, 512), (1e-5, 4e-4))})
    assert found.curves[0].seconds == pytest.approx((3e-5, 12e-4))


def test_an_engine_is_watched() -> None:
    """Every request is sent once, admitted once and answered once; kernels are all counted."""
    name = "lstm"
    cells = {cell.key: number for number, cell in enumerate(app(name).cells)}
    curves = dict.fromkeys(cells.values(), Curve((1, 8), (1e-5, 2e-5)))
    with torch.no_grad(), compile(app(name).model, max_batch=512, backend="eager") as compiled:
        compiled.map(list(app(name).requests))
        submit = measured.submitting(compiled)
        watch = Watch(compiled, cells, curves)
        before = compiled._engine.counters.seconds
        for future in [submit(request) for request in app(name).requests]:
            future.result()
        compiled.close()
        count = len(app(name).requests)
        assert sum(t.sent for t in watch.turns) == sum(t.requests for t in watch.turns) == count
        assert watch.kernels == pytest.approx(compiled._engine.counters.seconds - before)
        assert sum(t.kernels for t in watch.turns) == pytest.approx(watch.kernels)
        assert all(t.host > t.after > 0 and t.told.sum() > 0 for t in watch.turns)


def test_the_host_is_measured_by_least_squares() -> None:
    draw = np.random.default_rng(0)
    columns = draw.uniform(0, 1, (50, 3))
    assert least_squares(columns, columns @ (2.0, 0.5, 3.0)) == pytest.approx((2.0, 0.5, 3.0))
    assert least_squares(columns, columns @ (2.0, -0.5, 3.0))[1] == 0.0


def test_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert main([*GIVEN, "--rate", "500,1000", "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "whole requests" in shown.out and "200 requests, 500 a second" in shown.err
    assert picture.stat().st_size > 1000


def test_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("".join(f"{i / 100} {1 + i % 7}\n" for i in range(50)))
    command = ["simulate", "treelstm", "--device", "h100", "--hidden", "16", "--json"]
    assert main([*command, "--trace", str(trace)]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert {f["requests"] for f in figures[3:]} == {50}
    assert figures[3]["offered"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--rate", "5", "--loads", "0.5"],
        ["--validate"],
        ["--loads", "0.5,x"],
        ["--efficiency", "1.5"],
        ["--lengths", "nowhere.txt"],
        ["--trace", "nowhere.txt"],
    ],
)
def test_wrong_use(wrong: list[str]) -> None:
    assert main([*GIVEN, *wrong]) == 2
