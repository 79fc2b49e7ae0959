"""Trees for the tree benchmark."""

from __future__ import annotations

import random
from typing import Any

from cellc.bench.tree_models import VOCABULARY


def draw_tree(draw: random.Random, leaves: int | None = None) -> Any:
    """Nested pairs of tokens, shaped like the parses of the Stanford Sentiment Treebank: 19 leaves
    and 11 levels on average, at most 56 leaves; or of as many leaves as said.
    """
    if leaves is None:
        leaves = min(56, max(1, round(draw.gammavariate(3.6, 5.3))))
    return _split(leaves, draw)


def _split(leaves: int, draw: random.Random) -> Any:
    if leaves == 1:
        return draw.randrange(VOCABULARY)
    left = 1 + int((leaves - 1) * draw.betavariate(0.2, 0.5))
    left = min(left, leaves - 1)
    return _split(left, draw), _split(leaves - left, draw)
