"""Trees for the tree benchmark: drawn, or read from a file of bracketed parses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cellc.bench.tree_models import VOCABULARY


def draw_tree(draw: random.Random) -> Any:
    """Nested pairs of tokens, shaped like the parses of the Stanford Sentiment Treebank: 19 leaves
    and 11 levels on average, at most 56 leaves.
    """
    leaves = min(56, max(1, round(draw.gammavariate(3.6, 5.3))))
    return _split(leaves, draw)


def _split(leaves: int, draw: random.Random) -> Any:
    if leaves == 1:
        return draw.randrange(VOCABULARY)
    left = 1 + int((leaves - 1) * draw.betavariate(0.2, 0.5))
    left = min(left, leaves - 1)
    return _split(left, draw), _split(leaves - left, draw)


def read_trees(path: Path, draw: random.Random) -> list[Any]:
    """Binary trees of a file in Penn Treebank brackets, `(2 (2 a) (3 b))`; tokens are drawn."""
    return [_parse(line, draw) for line in path.read_text().splitlines() if line.strip()]


def _parse(line: str, draw: random.Random) -> Any:
    stack: list[list[Any]] = [[]]
    for word in line.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            stack.append([])
        elif word == ")":
            node = stack.pop()
            parts = [x for x in node if isinstance(x, (tuple, int))]
            stack[-1].append(
                tuple(parts) if len(parts) == 2 else (parts or [draw.randrange(VOCABULARY)])[0]
            )
        else:
            stack[-1].append(word)
    return stack[0][0]


def num_leaves(tree: Any) -> int:
    return 1 if isinstance(tree, int) else num_leaves(tree[0]) + num_leaves(tree[1])


def height(tree: Any) -> int:
    return 1 if isinstance(tree, int) else 1 + max(height(tree[0]), height(tree[1]))
