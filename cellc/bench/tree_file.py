"""Trees from a file of brackets, as treebanks write them: `(S (NP (DT the) (NN cat)) (VP sat))`.

Duty: text to nested pairs of token numbers. A bracket holds an optional label, then one word or any
number of brackets; labels are dropped, a bracket around one bracket is that one, more than two are
paired from the right. Mistakes are errors that name line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellc.errors import UsageError

_TOKEN = re.compile(r"[()]|[^\s()]+")


@dataclass
class _Token:
    text: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


@dataclass
class _Open:
    """A bracket that is not closed yet."""

    start: _Token
    atoms: list[_Token] = field(default_factory=list)
    children: list[Any] = field(default_factory=list)


class TreeError(UsageError):
    """The text is no tree."""


def parse_trees(text: str, vocabulary: int) -> list[Any]:
    """Nested pairs of numbers under `vocabulary`: words are numbered as they come, and again from 0
    where there are more. Raises TreeError.
    """
    numbers: dict[str, int] = {}
    trees: list[Any] = []
    opened: list[_Open] = []
    for token in _tokens(text):
        if token.text == "(":
            opened.append(_Open(token))
        elif not opened:
            raise TreeError(f"{token}: {token.text!r} stands outside of any bracket")
        elif token.text == ")":
            tree = _close(opened.pop(), numbers, vocabulary)
            (opened[-1].children if opened else trees).append(tree)
        elif opened[-1].children:
            raise TreeError(f"{token}: the word {token.text!r} stands beside brackets")
        else:
            opened[-1].atoms.append(token)
    if opened:
        raise TreeError(f"{opened[-1].start}: this bracket is never closed")
    return trees


def _tokens(text: str) -> Iterator[_Token]:
    for number, line in enumerate(text.split("\n"), 1):
        for match in _TOKEN.finditer(line):
            yield _Token(match.group(), number, match.start() + 1)


def _close(node: _Open, numbers: dict[str, int], vocabulary: int) -> Any:
    """The tree of a bracket."""
    if node.children:
        if len(node.atoms) > 1:
            raise TreeError(
                f"{node.atoms[1]}: the word {node.atoms[1].text!r} stands beside brackets"
            )
        tree = node.children.pop()
        for child in reversed(node.children):
            tree = (child, tree)
        return tree
    if len(node.atoms) != 2:
        held = " ".join(a.text for a in node.atoms)
        raise TreeError(
            f"{node.start}: a bracket holds a label and a word, or brackets; this one ({held})"
        )
    word = node.atoms[1].text
    return numbers.setdefault(word, len(numbers)) % vocabulary


def read_trees(path: Path, count: int, vocabulary: int, seed: int = 0) -> list[Any]:
    """`count` trees out of a file, in an order of the seed's; again from the start where there are
    fewer. Raises UsageError.
    """
    try:
        trees = parse_trees(path.read_text(encoding="utf-8"), vocabulary)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trees {path}: {error}") from error
    except TreeError as error:
        raise UsageError(f"--trees {path}, {error}") from error
    if not trees:
        raise UsageError(f"--trees {path}: no trees in it")
    order = np.random.default_rng(seed).permutation(len(trees))
    return [trees[order[i % len(trees)]] for i in range(count)]
