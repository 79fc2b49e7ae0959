"""`cellc bench --online`: arrivals, the peer's batcher, figures, a small run. Nothing is timed."""

from __future__ import annotations

import builtins
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellc.bench import online_command, plots
from cellc.bench.arrivals import LEAST, make_load, read_trace
from cellc.bench.batch_server import Batcher, BatchServer, Policy
from cellc.bench.case import Figure, Outcome
from cellc.bench.measure import percentiles
from cellc.bench.online import differ
from cellc.bench.online_figures import OnlineOutcome, Run, figures_of
from cellc.bench.online_workloads import (
    BATCHED,
    DecodeWorkload,
    RecurrentWorkload,
    TargetWorkload,
    Workload,
)
from cellc.bench.sheets import as_table, online_sheet
from cellc.bench.user_model import target_case
from cellc.cli import main
from cellc.errors import UsageError

LENGTHS = (3, 12, 1, 8, 25, 11)
SMALL = "--requests 6 --rounds 1 --seconds 0.02 --patience 0.1 --noisy".split()


# -- arrivals --------------------------------------------------------------------------------------


def test_poisson_arrivals() -> None:
    load = make_load(500.0, 40.0, 9, seed=3)
    gaps = np.diff(load.arrivals, prepend=0.0)
    assert len(gaps) == 20_000 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 500, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 500, rel=0.03)  # an exponential's
    assert np.bincount(load.chosen, minlength=9).min() > 2000
    same, other = make_load(500.0, 40.0, 9, seed=3), make_load(500.0, 40.0, 9, seed=4)
    assert np.array_equal(load.arrivals, same.arrivals)
    assert np.array_equal(load.chosen, same.chosen)
    assert not np.array_equal(load.arrivals, other.arrivals)
    assert len(make_load(1.0, 0.1, 9, seed=0).arrivals) == LEAST


def test_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('# from a server\n5.0 3\n5.25 1\n\n{"seconds": 5.25, "length": 40}\n6 2\n')
    trace = read_trace(path)
    assert list(trace.lengths) == [3, 1, 40, 2] and trace.rate == pytest.approx(3.0)
    load = trace.load(3)
    assert load.arrivals.tolist() == [0.0, 0.25, 0.25, 1.0] and load.chosen.tolist() == [0, 1, 2, 0]
    assert trace.load(4, rate=6.0).arrivals.tolist() == [0.0, 0.125, 0.125, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 3\n0.1\n", "line 2: expected `seconds length`, found '0.1'"),
        ("0 3\nx 4\n", "line 2: expected `seconds length`"),
        ("# one\n1 3\n0.5 4\n", "line 3: 0.5 s is before 1 s"),
        ("0 0\n", "line 1: a length of 0"),
        ("nan 4\n", "line 1: nan is no time"),
        ('{"seconds": 0, "length": 3\n', "line 1: no JSON"),
        ('{"seconds": 0, "length": 3.5}\n', 'line 1: expected {"seconds": s, "length": n}'),
        ("0 3\n", "at least two requests at different times"),
        ("", "at least two requests at different times"),
    ],
)
def test_wrong_traces(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_trace(path)
    assert message in str(error.value) and "--trace" in str(error.value)


# -- the peer --------------------------------------------------------------------------------------


def test_batcher_waits_for_its_timeout_and_no_longer() -> None:
    batcher: Batcher[str] = Batcher(Policy(timeout_ms=10.0, width=10, max_batch=3))
    assert batcher.take(0.0) == ([], None)
    batcher.add("a", 10, now=1.000)
    batcher.add("b", 11, now=1.004)  # another bucket
    batcher.add("c", 1, now=1.006)
    batch, wait = batcher.take(1.007)
    assert batch == [] and wait == pytest.approx(0.003)
    assert batcher.take(1.011) == (["a", "c"], None)
    assert batcher.take(1.011)[1] == pytest.approx(0.003)
    assert batcher.take(1.011, all_due=True) == (["b"], None)
    assert batcher.take(9.0) == ([], None)


def test_batcher_fills_batches() -> None:
    batcher: Batcher[int] = Batcher(Policy(timeout_ms=10.0, width=10, max_batch=3))
    batcher.add(100, 50, now=0.0)
    for i in range(7):
        batcher.add(i, 5, now=0.001)
    assert batcher.take(0.002) == ([0, 1, 2], None)  # full, though another is older
    assert batcher.take(0.010) == ([100], None)  # overdue comes first
    assert batcher.take(0.010) == ([3, 4, 5], None)
    assert batcher.take(0.010)[0] == []
    assert batcher.take(0.011) == ([6], None)


def test_batcher_without_waiting_or_buckets() -> None:
    batcher: Batcher[int] = Batcher(Policy(timeout_ms=0.0, width=None, max_batch=4))
    for i, length in enumerate((3, 90, 40)):
        batcher.add(i, length, now=0.0)
    assert batcher.take(0.0) == ([0, 1, 2], None)
    assert str(batcher.policy) == "one queue, no waiting"
    assert str(Policy(10.0)) == "buckets of 10, waits 10 ms"
    assert str(Policy(max_batch=1)) == "one at a time"


@pytest.mark.parametrize(
    "policy", [Policy(0.0), Policy(2.0), Policy(0.0, None), Policy(1.0, 10, 2)]
)
@pytest.mark.parametrize(
    "workload",
    [
        RecurrentWorkload(LENGTHS, "lstm", 16, True),
        RecurrentWorkload(LENGTHS, "gru", 16, False),
        DecodeWorkload(LENGTHS, 16),
    ],
    ids=["lstm", "gru", "decode"],
)
@torch.inference_mode()
def test_batch_server_equals_the_model(workload: Workload, policy: Policy) -> None:
    made = workload.make()
    sizes: list[int] = []

    def run(requests: Any) -> Any:
        sizes.append(len(requests))
        with torch.inference_mode():
            return made.run_batch(requests)

    with BatchServer(run, made.length, policy) as server:
        results = [f.result(30) for f in [server.submit(x) for x in [*made.requests] * 3]]
    for result, request in zip(results, [*made.requests] * 3, strict=True):
        assert differ(result, made.alone(request)) is not None
    assert sum(sizes) == 18 and max(sizes) <= policy.max_batch
    assert not any(t.name == "batch-server" for t in threading.enumerate())


def test_batch_server_fails_alone() -> None:
    def run(requests: Any) -> Any:
        if "short" in requests:
            return []
        return [1 / len(x) for x in requests]

    with BatchServer(run, None, Policy(width=None, max_batch=1)) as server:
        futures = [server.submit(x) for x in ("ab", "", "short", "a")]
        assert futures[0].result(30) == 0.5 and futures[3].result(30) == 1.0
        with pytest.raises(ZeroDivisionError):
            futures[1].result(30)
        with pytest.raises(ValueError):
            futures[2].result(30)
    with pytest.raises(RuntimeError, match="closed"):
        server.submit("a")


# -- figures ---------------------------------------------------------------------------------------


def test_percentiles_of_known_latencies() -> None:
    assert percentiles(np.arange(1001) / 1e6) == pytest.approx((0.5, 0.9, 0.99))
    assert percentiles(np.array([0.004])) == pytest.approx((4.0, 4.0, 4.0))


def outcome(others: float | None = 0.01) -> OnlineOutcome:
    rounds = [
        (Run(1.0, 2.0, 3.0, 99.0, 50), Run(2.0, 8.0, 9.0, 98.0, 50)),
        (Run(1.5, 4.0, 5.0, 97.0, 50), Run(2.5, 8.0, 9.5, 96.0, 50)),
        (Run(1.2, 3.0, 4.0, 98.0, 50), Run(2.2, 6.0, 9.2, 97.0, 50)),
    ]
    figures = figures_of(0.7, 100.0, ["cellc", "peer, a"], rounds)
    return OnlineOutcome("t", "peer", "a", 6, 143.0, 300.0, 1e-7, figures, others, 1)


def test_figures_are_medians_over_runs() -> None:
    own, peer = outcome().figures
    assert (own.p50, own.p90, own.p99, own.p90_least, own.p90_most) == (1.2, 3.0, 4.0, 2.0, 4.0)
    assert (own.best, peer.best) == (False, True) and own.requests == 150
    assert own.p90_to_cellc == 1.0 and peer.p90_to_cellc == 2.0  # of 4, 2 and 2
    assert peer.achieved == 97.0 and peer.rounds == 3


def test_disturbed_figures_are_not_quoted() -> None:
    disturbed = online_sheet(outcome(0.5))
    assert [row[2] for row in disturbed.rows] == ["disturbed"] * 2
    assert "not quoted" in disturbed.notes
    assert [row[5] for row in online_sheet(outcome(0.5), anyway=True).rows] == ["3", "8"]
    table = as_table(online_sheet(outcome()))
    assert list(table.columns[0].cells) == ["70%", ""]
    assert list(table.columns[5].cells) == ["3", "8"] and table.columns[5].justify == "right"
    assert list(table.columns[1].cells) == ["cellc", "peer, a (best)"]


def test_differ() -> None:
    x = torch.tensor([1.0, 2.0])
    assert differ((x, [3]), (x + 1e-6, [3])) == pytest.approx(1e-6, rel=0.2)
    assert differ((x, [3]), (x, [4])) is None
    assert differ(x, x + 0.1) is None
    assert differ((x,), [x]) is None
    assert differ(torch.tensor([1, 2]), torch.tensor([1, 3])) is None
    assert differ(x, x.double()) is None


# -- plots -----------------------------------------------------------------------------------------


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    figures = [
        Figure("PyTorch", 10.0, 9.0, 11.0, 1.0, 3),
        Figure("cellc", 30.0, 29.0, 33.0, 3.0, 3),
    ]
    case = Outcome("t", "PyTorch", "requests", 0.0, figures, 0.0, 0, {})
    plots.check(path)
    costs = replace(case, figures=[], facts={"us a launch": 3.0})
    more = [replace(f, share=0.9, offered=130.0) for f in outcome().figures]
    loads = replace(outcome(), figures=[*outcome().figures, *more])
    plots.draw(path, [case, costs], [loads, outcome(0.5)])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000
    for wrong in (tmp_path / "plot.txt", tmp_path / "none" / "plot.png"):
        with pytest.raises(UsageError, match="--plot"):
            plots.check(wrong)
    with pytest.raises(UsageError, match="nothing"):
        plots.draw(path, [costs], [])


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["bench", "lstm-256", "--plot", "plot.png"]) == 2
    assert "pip install 'cellc[bench]'" in capsys.readouterr().err


# -- the command -----------------------------------------------------------------------------------

MODEL = """\
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 8)

    def forward(self, x, scale=1.0):
        states, last = self.rnn(x)
        return {"all": states * scale, "last": last[0], "n": len(x)}


model = Model()


def example_inputs():
    return [(torch.randn(n, 4),) for n in (3, 1, 6)] + [{"x": torch.randn(2, 4), "scale": 2.0}]
"""


def test_target_goes_to_another_process_with_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights_model.py"
    path.write_text(MODEL)
    workload = TargetWorkload(f"{path}:model")
    made = workload.make()
    with torch.no_grad():
        for parameter in made.model.parameters():  # type: ignore[attr-defined]
            parameter.add_(1.0)
        del sys.modules[type(made.model).__module__]  # the other process has none
        again = workload.as_made(made).make()
        for a, b in zip(made.requests, again.requests, strict=True):
            assert differ(again.alone(b), made.alone(a)) == 0.0


def test_target_offline(tmp_path: Path) -> None:
    path = tmp_path / "offline_model.py"
    path.write_text(MODEL)
    case = target_case(f"{path}:model", None, 6)
    with torch.no_grad():
        want, got = (way.run() for way in case.ways)
    case.close()
    assert len(got) == 6 and got[1].shape == (1 * 8 + 8 + 1,)
    torch.testing.assert_close(list(got), list(want), rtol=1e-4, atol=1e-5)


def test_command_of_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model, trace = tmp_path / "bench_model.py", tmp_path / "trace.txt"
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    model.write_text(MODEL)
    trace.write_text("".join(f"{i / 200} 4\n" for i in range(9)))
    wanted = ["--json", str(figures), "--plot", str(plot), "--trace", str(trace)]
    assert main(["bench", f"{model}:model", *SMALL, *wanted]) == 0
    printed = capsys.readouterr().out
    assert "6 requests at once" in printed and "requests as they come" in printed
    found = json.loads(figures.read_text())
    (case,), (online,) = found["cases"], found["online"]
    assert [f["way"] for f in case["figures"]] == ["PyTorch, one at a time", "cellc"]
    assert [f["server"] for f in online["figures"]] == ["cellc", "PyTorch, one at a time"]
    assert all(f["requests"] == 9 for f in online["figures"])
    assert online["figures"][0]["offered"] == pytest.approx(200.0)
    assert online["arrivals"] == "as in trace.txt" and online["lengths"] == "lengths from trace.txt"
    assert "--trace trace.txt" in online["command"] and "--online" not in case["command"]
    assert plot.stat().st_size > 0


def test_command_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(hidden: int, lengths: Sequence[int]) -> list[Workload]:
        return [RecurrentWorkload(lengths, "lstm", hidden, True)]

    monkeypatch.setitem(online_command.WORKLOADS, "lstm-256", (256, small))
    monkeypatch.setattr(RecurrentWorkload, "policies", BATCHED[::2])
    figures = tmp_path / "figures.json"
    wanted = ["--online", "--units", "16", "--loads", "0.8", "--json", str(figures)]
    assert main(["bench", "lstm-256", *SMALL, *wanted]) == 0
    found = json.loads(figures.read_text())
    assert found["cases"] == []
    (online,) = found["online"]
    assert online["workload"] == "lstm-256" and online["distinct"] == 6
    assert online["name"] == "tokens" and online["arrivals"] == "Poisson"
    assert "LSTM, 16 units" in online["title"]
    command = "cellc bench lstm-256 --online --loads 0.8 --requests 6 --units 16 --rounds 1"
    assert online["command"].startswith(command)
    assert online["largest_difference"] < 1e-5 and online["peak"] > 0 and online["own_peak"] > 0
    own, *others = online["figures"]
    assert own["server"] == "cellc" and [f["best"] for f in others].count(True) == 1
    assert others[0]["server"].removeprefix("PyTorch, padded, ") in map(str, BATCHED)
    for f in online["figures"]:
        assert f["share"] == 0.8 and f["offered"] == pytest.approx(0.8 * online["peak"])
        assert 0 < f["p50"] <= f["p90"] <= f["p99"] and f["rounds"] == 1
        assert f["requests"] >= LEAST and f["achieved"] > 0
    names = {t.name for t in threading.enumerate()}
    assert not names & {"batch-server", "cellc-engine"}


def test_a_wrong_peer_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "unstable_model.py"
    path.write_text(
        "import os, torch\n"
        "def model(x):\n    return x * 2.0\n"
        "def example_inputs():\n    return [torch.full((2,), float(os.getpid()))]\n"
    )
    assert main(["bench", f"{path}:model", *SMALL, "--online"]) == 1
    assert "PyTorch differs from PyTorch at request 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sessions", "--online"], "sessions is not served online"),
        (["lstm-256", "--loads", "0.5"], "--loads is for --online"),
        (["lstm-256", "--trace", "t"], "--trace is for --online"),
        (["lstm-256", "--input", "a.py:b"], "--input is for one TARGET"),
        (["lstm-256", "--online", "--loads", "0.5,x"], "0.5,x is not as"),
        (["lstm-256", "--online", "--loads", "0"], "0 is not as"),
        (["lstm-256", "--online", "--trace", "none.txt"], "--trace none.txt"),
        (["none.py:model"], "there is no file none.py"),
    ],
)
def test_wrong_use(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given]) == 2
    assert message in capsys.readouterr().err
