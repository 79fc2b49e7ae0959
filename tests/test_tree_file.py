"""Trees in brackets: what is read, and what is refused where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cellc.bench.tree_file import TreeError, parse_trees, read_trees
from cellc.cli import main


@pytest.mark.parametrize(
    ("text", "trees"),
    [
        ("(A word)", [0]),
        ("(3 (2 a) (2 b))(2 (1 b) (1 a))", [(0, 1), (1, 0)]),
        ("( (S\n (NP (DT the) (NN cat))\n (VP sat)) )", [((0, 1), 2)]),  # no label, and unary
        ("(S (A a) (B b) (C c) (D d))", [(0, (1, (2, 3)))]),
        ("(S (NP (NN cat)))", [0]),
        ("", []),
        ("(A a) (B b) (C c) (D d)", [0, 1, 2, 0]),  # three words are numbered
    ],
)
def test_parsed(text: str, trees: list[Any]) -> None:
    assert parse_trees(text, 4 if "(NP" in text or "(S" in text else 3) == trees


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(S (A a)\n  (B b)", "line 1, column 1: this bracket is never closed"),
        ("(A a)\n )", "line 2, column 2: '\\)' stands outside"),
        ("word", "line 1, column 1: 'word' stands outside"),
        (
            "(S (A a)\n (B))",
            "line 2, column 2: a bracket holds a label and a word.*this one \\(B\\)",
        ),
        ("(A a b)", "line 1, column 1: a bracket holds a label and a word.*this one \\(A a b\\)"),
        ("()", "line 1, column 1: a bracket holds"),
        ("(S (A a) b)", "line 1, column 10: the word 'b' stands beside brackets"),
        ("(S b (A a))", "line 1, column 4: the word 'b' stands beside brackets"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(TreeError, match=said):
        parse_trees(text, 10)


def test_deep_trees() -> None:
    depth = 20_000
    (tree,) = parse_trees("(S (A a) " * depth + "(A a)" + ")" * depth, 10)
    for _ in range(depth):
        assert tree[0] == 0
        tree = tree[1]
    assert tree == 0


def test_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trees.txt"
    path.write_text("(S (A a) (B b))\n(A a)\n")
    assert sorted(map(str, read_trees(path, 3, 10)))[0] == "(0, 1)"
    assert len(read_trees(path, 3, 10)) == 3
    path.write_text("(S (A a)\n")
    assert main(["bench", "treelstm-256", "--trees", str(path)]) == 2
    assert "trees.txt, line 1, column 1: this bracket is never closed" in capsys.readouterr().err
    path.write_text("\n")
    assert main(["bench", "treelstm-256", "--trees", str(path)]) == 2
    assert "no trees in it" in capsys.readouterr().err
    assert main(["bench", "treelstm-256", "--trees", str(tmp_path / "none")]) == 2
