"""Trees for the tree benchmark, drawn; and other trees as large as given ones."""

from __future__ import annotations

import random
from typing import Any

from cellc.bench.tree_models import VOCABULARY

DRAWN = "drawn trees shaped like parsed sentences (19 leaves and 11 levels on average)"


def draw_tree(draw: random.Random, leaves: int | None = None) -> Any:
    """Nested pairs of tokens, shaped like the parses of the Stanford Sentiment Treebank: 19 leaves
    and 11 levels on average, at most 56 leaves; or of as many leaves as said.
    """
    if leaves is None:
        leaves = min(56, max(1, round(draw.gammavariate(3.6, 5.3))))
    return split(leaves, draw)


def split(leaves: int, draw: random.Random) -> Any:
    """A tree of so many leaves, shaped likewise."""
    if leaves == 1:
        return draw.randrange(VOCABULARY)
    left = 1 + int((leaves - 1) * draw.betavariate(0.2, 0.5))
    left = min(left, leaves - 1)
    return split(left, draw), split(leaves - left, draw)


def num_leaves(tree: Any) -> int:
    return num_leaves(tree[0]) + num_leaves(tree[1]) if isinstance(tree, tuple) else 1


def mirrored(tree: Any, draw: random.Random) -> Any:
    """The tree with the children of nodes drawn by lot changed over: as many leaves and levels."""
    if not isinstance(tree, tuple):
        return tree
    one, two = (mirrored(child, draw) for child in tree)
    return (one, two) if draw.random() < 0.5 else (two, one)
