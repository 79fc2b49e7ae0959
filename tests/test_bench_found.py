"""What is made of figures: targets and claims judged, figures kept, a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cellc.bench import paper, targets
from cellc.bench.case import Figure, Outcome
from cellc.bench.found import Found, Lacking, Measured
from cellc.bench.page import page
from cellc.bench.recurrent import BUCKETS, CELLC, ONNX_BUCKETS
from cellc.bench.sheets import as_markdown, number
from cellc.bench.trees import RECURSION, UNFOLD
from cellc.bench.workloads import NAMES
from cellc.cli import main


def measured(
    workload: str,
    rates: dict[str, list[float]],
    name: str = "",
    others: float = 0.0,
    facts: dict[str, float] | None = None,
) -> Measured:
    figures = [Figure(w, r[0], min(r), max(r), 1.0, len(r), r) for w, r in rates.items()]
    title, base = f"{workload} {name}".strip(), next(iter(rates), "")
    missing = {ONNX_BUCKETS: "not installed: pip install onnx"}
    outcome = Outcome(
        title, base, "requests", 0.0, figures, others, 0, missing, name, [], facts or {}
    )
    command = f"cellc bench {workload} --rounds 3"
    return Measured(workload, command, "2026-01-02", 512, None, "some lengths", outcome)


def found() -> Found:
    tokens = {BUCKETS: [100.0, 100.0, 100.0], CELLC: [260.0, 240.0, 300.0]}
    vectors = {BUCKETS: [100.0, 100.0, 100.0], CELLC: [90.0, 95.0, 80.0]}
    result = Found("a machine", 2, "2.0")
    result.add([measured("lstm-256", tokens, "tokens"), measured("lstm-256", vectors, "vectors")])
    result.add([measured("lstm-1024", tokens, "tokens", others=0.5)])
    result.add([measured("treelstm-256", {}, facts={UNFOLD.format(RECURSION): 3.5})])
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


def test_claims_need_figures() -> None:
    rows = paper.sheet(found()).rows
    assert all(row[3] == "" for row in rows)  # disturbed, or not measured
    quiet = found()
    quiet.noisy = True
    assert paper.sheet(quiet).rows[0][2:] == ["2.60x", "holds"]
    assert set(paper.WORKLOADS) <= set(NAMES)


def test_kept_and_read(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    found().write(path)
    again = Found("a machine", 2, "2.0")
    again.read(path)
    assert [m.as_json() for m in again.cases] == [m.as_json() for m in found().cases]
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
    ours.write(figures)
    given = ["--from", str(figures), "--targets", "--paper"]
    assert main(["bench", *given, "--markdown", str(table), "--json", str(figures)]) == 0
    assert "not held" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert len(written["cases"]) == 2 and len(written["targets"]) == len(targets.TARGETS)
    text = table.read_text()
    assert "## Targets" in text and "## BatchMaker's claims" in text
    assert f"- lstm-256 vectors: {BUCKETS} 1.11x" in text
    assert "- lstm-256 tokens" not in text


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
