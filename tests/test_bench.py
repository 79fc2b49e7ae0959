"""`cellc bench`: that every workload runs and its ways agree. No timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cellc.bench import command, memory
from cellc.bench.batch_server import MAX_BATCH, bucket_of
from cellc.bench.case import Case, Differs, Outcome, Way, check, measure
from cellc.bench.decode import Translator
from cellc.bench.decode import make_requests as decode_requests
from cellc.bench.lengths import LONGEST, draw_lengths
from cellc.bench.measure import Patience
from cellc.bench.recurrent import (
    CELLC,
    ONNX_BUCKETS,
    LastState,
    make_requests,
    recurrent_case,
    small_buckets,
)
from cellc.bench.sheets import sheets_of
from cellc.bench.shrinking import Product, Shrinking, linear, packed
from cellc.bench.tree_data import num_leaves
from cellc.bench.trees import Forest
from cellc.bench.workloads import NAMES
from cellc.cli import main
from cellc.entry import compile

TINY = "--units 8 --requests 3 --rounds 1 --seconds 0.001 --patience 0.001 --noisy".split()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_ways_agree(kind: str, tokens: bool) -> None:
    case = recurrent_case(kind, 16, tokens, draw_lengths(20))  # type: ignore[arg-type]
    with torch.no_grad():
        assert check(case) < 1e-5
    case.close()
    names = [way.name for way in case.ways]
    assert len(names) + len(case.missing) == (11 if kind == "lstm" else 8)
    assert ONNX_BUCKETS in names and names[-1] == CELLC


@pytest.mark.parametrize("product", [linear, packed])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_batches_that_shrink(kind: str, product: Callable[..., Product]) -> None:
    """More batches than one, the last of one sequence; lengths that are alike, and of one step."""
    model = LastState(kind, 16, tokens=True).eval().requires_grad_(False)  # type: ignore[arg-type]
    requests = make_requests([5, 1, 9, 5, 2, 2, 7], 16, tokens=True)
    with torch.no_grad():
        results = Shrinking(model.rnn, model.embedding, 2, product)(requests)
        wanted = [model(request) for request in requests]
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-6)


def test_buckets_in_small_batches() -> None:
    """No batch is larger than said, none spans two buckets, nobody is left out."""
    requests = make_requests(draw_lengths(500), 1, tokens=False)
    batches = small_buckets(requests)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert max(map(len, batches)) == MAX_BATCH
    for batch in batches:
        assert len({bucket_of(len(requests[i])) for i in batch}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_workload(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BATCHED", ("gru-256", "treelstm-256"))
    path = tmp_path / "figures.json"
    assert main(["bench", name, *TINY, "--json", str(path)]) == 0
    cases = [Outcome.from_json(case) for case in json.loads(path.read_text())["cases"]]
    assert cases
    for outcome in cases:
        ours = any(f.way.startswith("cellc") for f in outcome.figures)
        assert outcome.facts or ours or name == "variants"
        assert outcome.largest_difference < 1e-4
        assert all(f.rate > 0 for f in outcome.figures)


def test_a_wrong_way_is_found() -> None:
    ways = [Way("right", lambda: [torch.ones(2)]), Way("wrong", lambda: [torch.zeros(2)])]
    with pytest.raises(Differs, match="wrong differs from right at 0"):
        check(Case("a case", 1, ways, "right"))


def test_figures() -> None:
    def work() -> list[Tensor]:
        return [torch.ones(2)] * 4

    case = Case("a case", 4, [Way("one", work), Way("part", lambda: work()[:2], 2)], "one")
    outcome = measure(case, 2, 0.01, Patience(0.0))
    assert [f.way for f in outcome.figures] == ["one", "part"]
    assert outcome.figures[0].ratio == 1.0
    for f in outcome.figures:
        assert 0 < f.least <= f.rate <= f.most and f.rounds == 2
    (sheet,) = sheets_of(replace(outcome, others=0.5))
    assert [row[1] for row in sheet.rows] == ["disturbed"] * 2
    assert "not quoted" in sheet.notes


def test_fresh_requests_and_facts() -> None:
    now, ran, checked = [0], [0], [0]

    def fresh() -> None:
        now[0] += 1

    def run() -> list[Tensor]:
        ran[0] += 1
        return [torch.ones(())]

    def again() -> None:
        checked[0] += 1
        assert now[0] == 0 and ran[0] == 1  # checks run on the shared requests

    case = Case(
        "a case",
        1,
        [Way("one", lambda: [torch.ones(())]), Way("two", run, fresh=fresh)],
        "one",
        again=again,
        facts=lambda: {"answers": 42.0},
    )
    outcome = measure(case, 1, 0.0, Patience(0.0))
    assert checked == [1] and now[0] == ran[0] - 2 > 0
    assert outcome.facts == {"answers": 42.0}
    assert [sheet.rows[0][0] for sheet in sheets_of(outcome, anyway=True)] == ["one", "answers"]


def test_results_beyond_a_sample_are_checked() -> None:
    ways = [
        Way("sample", lambda: [torch.ones(1)], 1),
        Way("all", lambda: [torch.ones(1)] * 2),
        Way("wrong", lambda: [torch.ones(1), torch.zeros(1)]),
    ]
    with pytest.raises(Differs, match="wrong differs from sample at 1"):
        check(Case("a case", 2, ways, "all"))
    with pytest.raises(Differs, match="all gives 2 results"):
        check(Case("a case", 3, ways, "all"))


def test_results_that_differ_end_in_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> Case:
        ways = [Way("right", lambda: [torch.ones(2)]), Way("wrong", lambda: [torch.zeros(2)])]
        return Case("a case", 1, ways, "right")

    def right() -> Case:
        return Case("another case", facts=lambda: {"answers": 42.0})

    monkeypatch.setattr(command, "_cases", lambda name, settings: [wrong, right])
    assert main(["bench", "host", *TINY]) == 1
    said = capsys.readouterr().out
    assert "wrong differs from right at 0" in said and "another case" in said


@pytest.mark.parametrize("text", ["", "(S (A a) (B (C c) (D d)) (E (F f)))\n(A one)"])
def test_forest(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trees.txt"
    path.write_text(text)
    forest = Forest(9, path if text else None)
    sizes = [num_leaves(t) for t in forest.now.nested]
    fresh = [forest.fresh() for _ in range(4)]
    assert all([num_leaves(t) for t in batch.nested] == sizes for batch in fresh)
    assert any(batch.nested != forest.now.nested for batch in fresh)


def test_lengths() -> None:
    lengths = draw_lengths(20000)
    assert lengths == draw_lengths(20000) != draw_lengths(20000, seed=1)
    assert 23 < sum(lengths) / len(lengths) < 24 and max(lengths) <= LONGEST and min(lengths) >= 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths, figures = tmp_path / "lengths.txt", tmp_path / "figures.json"
    lengths.write_text("3\n1\n7\n")
    given = "bench seq2seq-256 --requests 8 --rounds 1 --seconds 0.01 --patience 0.1 --noisy"
    assert main([*given.split(), "--lengths", str(lengths), "--json", str(figures)]) == 0
    assert "paths seen" in capsys.readouterr().out
    (case,) = json.loads(figures.read_text())["cases"]
    assert case["workload"] == "seq2seq-256" and len(case["figures"]) == 3


@pytest.mark.parametrize("text", ["", "3\nx\n", "0\n"])
def test_wrong_lengths(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    assert main(["bench", "lstm-256", "--lengths", str(path)]) == 2
    assert "--lengths" in capsys.readouterr().err


def test_unknown_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "lstm-257"]) == 2
    assert "did you mean lstm-256" in capsys.readouterr().err


def test_help_names_every_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)


def test_the_benchmarks_own_models_are_traced_as_a_users() -> None:
    torch.manual_seed(0)
    model = Translator(8, bias=1.6).eval().requires_grad_(False)
    requests = decode_requests(6)
    with torch.no_grad(), compile(model, backend="eager") as compiled:
        for got, x in zip(compiled.map(requests), requests, strict=True):
            assert got.tolist() == model(x).tolist()
        kinds = {name.split("_")[0] for name in compiled.cells}
        assert kinds == {"decoder", "encoder"}
