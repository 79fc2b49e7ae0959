"""Units: operations of a request that are calls of one template, before they are a cell.

Duty: the data between the steps of `cellc.extract`, and columns of references. Made by
`cellc.recurrences` and `cellc.feedforward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellc.rows import RaggedRefs, Refs, RowNode


@dataclass
class Unit:
    """Calls that share one template: nodes[k][j] is the k-th operation's node of call batch j."""

    roles: tuple[int, ...]
    recurrent: bool
    nodes: list[RowNode]  # of the first call, in order: the template
    # per template operation, per operand: None (weight or number), an inner source, or a column of
    # references
    inner: list[list[tuple[int, int] | None]]
    columns: dict[tuple[int, int], Refs | RaggedRefs]
    outputs: dict[tuple[int, int], Refs]


def refs_of(column: object) -> Refs:
    if isinstance(column, RaggedRefs):
        return column.refs
    assert isinstance(column, np.ndarray)
    return column


def concat(columns: Sequence[object]) -> Refs | RaggedRefs:
    first = columns[0]
    if isinstance(first, RaggedRefs):
        lengths = np.concatenate([np.diff(c.offsets) for c in columns if isinstance(c, RaggedRefs)])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return RaggedRefs(offsets, np.concatenate([refs_of(c) for c in columns]))
    return np.concatenate([refs_of(c) for c in columns])


def made_by(node: RowNode, port: int) -> Refs:
    return np.arange(node.bases[port], node.bases[port] + node.n, dtype=np.int64)


def same_columns(a: Refs | RaggedRefs, b: Refs | RaggedRefs) -> bool:
    if isinstance(a, RaggedRefs) or isinstance(b, RaggedRefs):
        return (
            isinstance(a, RaggedRefs)
            and isinstance(b, RaggedRefs)
            and np.array_equal(a.offsets, b.offsets)
            and np.array_equal(a.refs, b.refs)
        )
    return np.array_equal(a, b)
