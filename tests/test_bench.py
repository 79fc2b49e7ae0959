"""`cellc bench`: that every workload runs and its ways agree. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cellc.bench import command
from cellc.bench.case import Case, Differs, Way, check, measure, table_of
from cellc.bench.lengths import LONGEST, draw_lengths
from cellc.bench.measure import Patience
from cellc.bench.others import decode_case, sessions_case, tagger_case
from cellc.bench.recurrent import alone_case, recurrent_case
from cellc.cli import main


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_ways_agree(kind: str, tokens: bool) -> None:
    case = recurrent_case(kind, 16, tokens, draw_lengths(20))  # type: ignore[arg-type]
    with torch.no_grad():
        assert check(case) < 1e-5
    case.close()
    assert not case.missing and len(case.ways) == 8


def test_other_ways_agree() -> None:
    cases = [
        alone_case("lstm", 16, 24),
        tagger_case(16, draw_lengths(12)),
        decode_case(16, 12),
        sessions_case(16, 6),
    ]
    with torch.no_grad():
        for case in cases:
            check(case)
            case.close()


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
    disturbed = table_of(
        type(outcome)(**{**vars(outcome), "others": 0.5}),
    )
    assert list(disturbed.columns[1].cells) == ["disturbed"] * 2
    assert "not quoted" in str(disturbed.caption)


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
    assert "there are lstm-256" in capsys.readouterr().err


def test_help_names_every_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in command.NAMES)
