"""What is made of figures: targets and claims judged, figures kept, a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cellc.bench import command, host, paper, reference, targets, trees
from cellc.bench.batch_server import Policy
from cellc.bench.case import Figure, Outcome
from cellc.bench.found import Found, Lacking, Measured
from cellc.bench.online_command import WORKLOADS, Online
from cellc.bench.online_figures import CELLC as SERVED
from cellc.bench.online_figures import POISSON, OnlineOutcome, Run, figures_of
from cellc.bench.online_workloads import STATED
from cellc.bench.page import page
from cellc.bench.recurrent import BUCKETS, CELLC, ONNX_BUCKETS, PACKED
from cellc.bench.sheets import as_markdown, number
from cellc.bench.trees import RECURSION, UNFOLD
from cellc.bench.workloads import NAMES
from cellc.cli import main

PEER = "PyTorch, padded"


def measured(
    workload: str,
    rates: dict[str, list[float]],
    name: str = "",
    others: float = 0.0,
    facts: dict[str, float] | None = None,
) -> Measured[Outcome]:
    figures = [Figure(w, r[0], min(r), max(r), 1.0, len(r), r) for w, r in rates.items()]
    title, base = f"{workload} {name}".strip(), next(iter(rates), "")
    missing = {ONNX_BUCKETS: "not installed: pip install onnx"}
    outcome = Outcome(
        title, base, "requests", 0.0, figures, others, 0, missing, name, [], facts or {}
    )
    command = f"cellc bench {workload} --rounds 3"
    return Measured(workload, command, "2026-01-02", 512, None, "some lengths", outcome)


def served(
    workload: str,
    p90: dict[str, float],
    name: str = "",
    arrivals: str = POISSON,
    share: float = 0.7,
) -> Measured[OnlineOutcome]:
    runs = [[Run(1.0, ms, 2 * ms, 99.0, 50) for ms in p90.values()]] * 3
    title = f"{workload} {name}, as they come".strip()
    figures = figures_of(0.7, 100.0, list(p90), runs)
    outcome = OnlineOutcome(
        title, PEER, "a", 512, 143.0, 300.0, 0.0, figures, 0.0, 0, name, arrivals
    )
    command = f"cellc bench {workload} --online"
    return Measured(workload, command, "2026-01-02", 512, None, "some lengths", outcome)


def found() -> Found:
    tokens = {BUCKETS: [100.0, 100.0, 100.0], CELLC: [260.0, 240.0, 300.0]}
    vectors = {BUCKETS: [100.0, 100.0, 100.0], CELLC: [90.0, 95.0, 80.0]}
    result = Found("a machine", 2, "2.0")
    result.add([measured("lstm-256", tokens, "tokens"), measured("lstm-256", vectors, "vectors")])
    result.add([measured("lstm-1024", tokens, "tokens", others=0.5)])
    result.add([measured("treelstm-256", {}, facts={UNFOLD.format(RECURSION): 3.5})])
    best, stated = f"{PEER}, {Policy(1.0)}", f"{PEER}, {STATED}"
    result.add_online(
        [
            served("lstm-256", {SERVED: 10.0, best: 30.0, stated: 40.0}, "tokens"),
            served("lstm-256", {SERVED: 10.0, best: 9.0, stated: 60.0}, "vectors"),
        ]
    )
    result.add_online([served("lstm-1024", {SERVED: 5.0, best: 4.0, stated: 9.0}, "tokens", "x")])
    return result


def test_targets() -> None:
    held = {v.what: v for v in targets.judge(found())}
    tokens = held["LSTM, 256 units, 512 requests at once, tokens in, to PyTorch in buckets"]
    assert tokens.measured == pytest.approx(2.6) and tokens.held  # the median of rounds' ratios
    vectors = held["LSTM, 256 units, 512 requests at once, vectors in, to PyTorch in buckets"]
    assert vectors.measured == pytest.approx(0.9) and vectors.held is False
    onnx = held["the same on vectors, to onnxruntime in buckets"]
    assert onnx.held is None and "pip install onnx" in onnx.why
    disturbed = held["LSTM, 1024 units, 512 requests at once, tokens in, to PyTorch in buckets"]
    assert disturbed.held is None and disturbed.why.startswith("disturbed")
    assert held["a cell of a new tree unfolded from plain recursion"].held
    memory = held["memory beyond weights and the arenas of rows, the most of all workloads"]
    assert memory.why == "not measured: cellc bench memory"
    assert set(targets.workloads()) <= set(NAMES)


def test_targets_online() -> None:
    held = {v.what: v for v in targets.judge(found())}
    load = "256 units, Poisson, 70% of the padded server's peak: p90 to that of"
    waiting = held[f"LSTM, tokens in, {load} waiting 10 ms"]
    assert waiting.measured == pytest.approx(0.25) and waiting.held is False
    best = held[f"LSTM, tokens in, {load} its best timeout"]
    assert best.measured == pytest.approx(1 / 3) and best.held
    assert held[f"LSTM, vectors in, {load} waiting 10 ms"].held
    assert held[f"LSTM, vectors in, {load} its best timeout"].measured == pytest.approx(10 / 9)
    lacks = held[f"greedy decoding, {load} its best timeout"]
    assert lacks.why == "not measured: cellc bench seq2seq-256 --online"
    assert set(targets.workloads(online=True)) <= set(WORKLOADS)


def test_figures_of_another_size_are_named() -> None:
    ours = found()
    assert targets.sheet(ours).notes == ""
    small = [replace(m, requests=8, units=16) for m in found().of("lstm-256")]
    ours.add(small)
    ours.add_online([replace(m, requests=8, units=16) for m in ours.online[:2]])
    ours.add([replace(small[0], workload="a.py:model"), *ours.cases])
    said = "lstm-256 tokens: 8 requests, 16 units; lstm-256 vectors: 8 requests, 16 units"
    assert targets.sheet(ours).notes == f"not as targets are meant: {said}"


def test_latency_needs_its_load() -> None:
    with pytest.raises(Lacking, match="cellc bench lstm-1024 --online --loads 0.7"):
        found().latency("lstm-1024 tokens")  # arrivals of a trace
    with pytest.raises(Lacking, match="--loads 0.95"):
        found().latency("lstm-256 tokens", share=0.95)
    ours = found()
    ours.add_online([served("lstm-1024", {SERVED: 5.0, f"{PEER}, b": 4.0}, "tokens")])
    assert ours.latency("lstm-1024 tokens") == pytest.approx(1.25)
    rows = {row[0] + row[1]: row[2:] for row in paper.sheet(ours).rows}
    (row,) = (v for k, v in rows.items() if "tokens in" in k and "p90" in k)
    assert row == ["0.80x", "does not hold"]


def measured_by(given: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command measures, and how."""
    asked: list[str] = []

    def served(self: command.Bench, name: str, online: Online) -> None:
        asked.append(f"{name} at {', '.join(f'{x:g}' for x in online.conditions.shares)}")

    monkeypatch.setattr(command.Bench, "at_once", lambda self, name: asked.append(name))
    monkeypatch.setattr(command.Bench, "served", served)
    assert main(["bench", *given]) == 0
    return asked


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (["gru-256", "host"], ["gru-256", "host"]),
        (["gru-256", "--online"], ["gru-256 at 0.3, 0.7, 0.95"]),
        (["--online"], ["lstm-256 at 0.3, 0.7, 0.95", "seq2seq-256 at 0.3, 0.7, 0.95"]),
        (["--online", "--loads", "0.5"], ["lstm-256 at 0.5", "seq2seq-256 at 0.5"]),
        (["a.py:model"], ["a.py:model", "a.py:model at 0.3, 0.7, 0.95"]),
        (["a.py:model", "--online"], ["a.py:model at 0.3, 0.7, 0.95"]),
        (
            ["--paper"],
            ["lstm-1024", "lstm-1024 at 0.7", "seq2seq-1024", "seq2seq-1024 at 0.7"]
            + ["treelstm-1024"],
        ),
        ([], list(NAMES)),
    ],
)
def test_what_is_measured(
    given: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured_by(given, monkeypatch) == asked


def test_what_targets_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured_by(["--targets"], monkeypatch)
    assert [x for x in asked if " at " in x] == ["lstm-256 at 0.7", "seq2seq-256 at 0.7"]
    assert [x for x in asked if " at " not in x] == targets.workloads()


def test_claims_need_figures() -> None:
    rows = paper.sheet(found()).rows
    assert all(row[3] == "" for row in rows)  # disturbed, or not measured
    quiet = found()
    quiet.noisy = True
    assert paper.sheet(quiet).rows[0][2:] == ["2.60x", "holds"]
    assert set(paper.WORKLOADS) <= set(NAMES)


def test_peers_beside_those_of_another_machine() -> None:
    """Rates are compared at the speed of this machine's products."""
    ours = found()
    assert all(p.share is None and p.why for p in reference.compare(ours))
    facts = {host.PEAK: reference.THEIR_PRODUCT / 2}
    ours.add([measured("saturation", {}, facts=facts)])
    ours.add([measured("lstm-256", {BUCKETS: [3650.0], PACKED: [1500.0]}, "vectors")])
    peers = {(p.workload, p.way): p for p in reference.compare(ours)}
    buckets, packed = (peers["lstm-256 vectors", way] for way in (BUCKETS, PACKED))
    assert buckets.share == pytest.approx(1.0) and buckets.holds
    assert packed.share == pytest.approx(1500 * 2 / 3629) and packed.holds is False
    assert "not measured" in peers["treelstm-256", trees.EAGER].why
    rows = {row[1]: row[2:] for row in reference.sheet(ours).rows if row[0] == "lstm-256 vectors"}
    assert rows[PACKED] == ["below 0.9", "3,629", "1,500", "0.83"]
    ours.add([replace(m, requests=16) for m in ours.of("lstm-256")])
    assert "lstm-256 vectors: 16 requests" in reference.sheet(ours).notes
    assert set(reference.WORKLOADS) <= set(NAMES)


def test_kept_and_read(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    found().write(path)
    again = Found("a machine", 2, "2.0")
    again.read(path)
    assert [m.as_json() for m in again.cases] == [m.as_json() for m in found().cases]
    assert again.online == found().online
    with pytest.raises(Lacking, match="not measured: cellc bench gru-256"):
        again.ratio("gru-256 tokens", CELLC, BUCKETS)
    again.add([measured("lstm-256", {CELLC: [1.0]}, "alone")])
    assert [m.key for m in again.of("lstm-256")] == ["lstm-256 alone"]  # in place of the others
    assert len(again.cases) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"cases": [{}]}', '{"cases": []}'])
def test_other_files_are_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    path.write_text(text)
    assert main(["bench", "--from", str(path)]) == 2
    assert "no figures of cellc bench" in capsys.readouterr().err


def test_another_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    found().write(path)
    assert main(["bench", "--from", str(path)]) == 2
    assert "a machine" in capsys.readouterr().err


def test_files_from_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, table = tmp_path / "figures.json", tmp_path / "page.md"
    ours = Found()
    ours.add(found().cases[:2])
    ours.add_online(found().online[:2])
    ours.write(figures)
    given = ["--from", str(figures), "--targets", "--paper"]
    assert main(["bench", *given, "--markdown", str(table), "--json", str(figures)]) == 0
    assert "not held" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert len(written["cases"]) == 2 and len(written["targets"]) == len(targets.TARGETS)
    assert len(written["online"]) == 2
    text = table.read_text()
    assert "## Targets" in text and "## BatchMaker's claims" in text
    assert f"- lstm-256 vectors: {BUCKETS} 1.11x" in text
    assert "- lstm-256 tokens" not in text
    assert f"- lstm-256 vectors, as they come, 70% of the peer's peak: {PEER}, buckets" in text
    assert "p90 0.90x of cellc's" in text and "- lstm-256 tokens, as they come" not in text
    assert "## Requests as they come" in text and "`cellc bench lstm-256 --online`" in text


def test_picture_from_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures, table, plot = (tmp_path / name for name in ("f.json", "page.md", "all.png"))
    ours = Found()
    ours.add(found().cases)
    ours.add_online(found().online)
    ours.write(figures)
    wanted = ["--plot", str(plot), "--markdown", str(table)]
    assert main(["bench", "--from", str(figures), *wanted]) == 0
    everything = plot.stat().st_size
    assert table.read_text().count("(all.png)") == 1
    assert main(["bench", "--from", str(figures), "--online", *wanted]) == 0
    assert 0 < plot.stat().st_size < everything  # latencies only


def test_page() -> None:
    text = page(found(), [])
    assert "`cellc bench lstm-256 --rounds 3`, 2026-01-02" in text
    assert f"| {CELLC} | 260 | 240 to 300 | 2.60x |" in text
    assert f"; {ONNX_BUCKETS}: not installed: pip install onnx." in text
    assert f"| {BUCKETS} | disturbed |  |  |" in text
    assert as_markdown(targets.sheet(found())).count("\n") == 2 + len(targets.TARGETS) - 1


def test_numbers() -> None:
    given = (1234.5, 3.14159, 0.0, 0.85, 2.0)
    assert [number(x) for x in given] == ["1,234", "3.14", "0", "0.85", "2"]
