"""Groves: structures given as arrays, side by side in one.

Duty: the nodes of many `cellc.Dag`s at once, and the rows that all calls of a fold over them read
and make, by numpy alone. Comes in from `frontends.fold` and `frontends.pattern`, goes out as
instances of the segments of rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellc.frontends.segments import Segment
from cellc.frontends.stub import StubType

CONSTANT, MADE, ARGUMENT = range(3)
LEAF = -1

I64 = npt.NDArray[np.int64]


@dataclass
class Rule:
    """What a function does on a node of one kind: instances of segments, whose rows are constant,
    made here, or arguments; and the rows of its state.
    """

    instances: list[tuple[Segment, I64, I64, int]]  # (segment, kinds, offsets, first made)
    rows: int  # made by a call
    state: I64  # offset of every row of its state
    spec: Any
    types: tuple[StubType, ...]
    build: Any  # its state from (0, first made row)

    def write(self, arguments: I64, made: I64) -> None:
        """Its calls into the segments: [calls, arguments], and the first rows that they make."""
        table = np.concatenate([arguments, made[:, None], np.zeros((len(made), 1), np.int64)], 1)
        width = arguments.shape[1]
        for segment, kinds, offsets, first in self.instances:
            column = np.where(kinds == ARGUMENT, offsets, np.where(kinds == MADE, width, width + 1))
            added = np.where(kinds == ARGUMENT, 0, offsets)
            segment.use()
            segment.more_reads.append((table[:, column] + added).reshape(-1))
            segment.more_made.append(made + first)


@dataclass(eq=False)
class Grove:
    """Structures side by side: node i of structure s is node starts[s] + i."""

    structures: Sequence[Any]
    _kinds: dict[bool, I64] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> I64:
        return np.array([s.num_nodes for s in self.structures], np.int64)

    @cached_property
    def starts(self) -> I64:
        starts: I64 = self.sizes.cumsum() - self.sizes
        return starts

    @cached_property
    def owner(self) -> I64:
        """The structure of every node."""
        return np.arange(len(self.structures)).repeat(self.sizes)

    @cached_property
    def counts(self) -> I64:
        """How many children every node has."""
        counts: I64 = np.concatenate([s.counts for s in self.structures])
        return counts

    @cached_property
    def children(self) -> I64:
        """Of all nodes, in a row."""
        flat = [s.flat for s in self.structures]
        edges = np.array([len(f) for f in flat], np.int64)
        children: I64 = np.concatenate(flat) + self.starts.repeat(edges)
        return children

    @cached_property
    def first_child(self) -> I64:
        """Where the children of every node begin."""
        first: I64 = self.counts.cumsum() - self.counts
        return first

    @cached_property
    def roots(self) -> I64:
        """Of trees."""
        return np.array([s.root for s in self.structures], np.int64)

    @cached_property
    def num_leaves(self) -> I64:
        """Of every structure, nodes without children."""
        return np.bincount(self.owner[self.counts == 0], minlength=len(self.structures))

    def kinds(self, has_leaves: bool) -> I64:
        """Leaves, where they are a kind, and numbers of children."""
        known = self._kinds.get(has_leaves)
        if known is None:
            counts = self.counts
            known = self._kinds[has_leaves] = np.where(has_leaves & (counts == 0), LEAF, counts)
        return known

    def pairs(self, has_leaves: bool) -> set[tuple[int, int]]:
        """Kinds of children and of their parents."""
        kinds = self.kinds(has_leaves)
        width = int(kinds.max()) + 2
        found = np.unique((kinds[self.children] + 1) * width + kinds.repeat(self.counts) + 1)
        return {(at // width - 1, at % width - 1) for at in found.tolist()}

    def ranks(self, has_leaves: bool) -> I64:
        """Of every node, its place among the leaves, or among the other nodes, of its structure."""
        is_leaf = self.kinds(has_leaves) == LEAF
        leaves, others = is_leaf.cumsum(), (~is_leaf).cumsum()
        first_leaf: I64 = (leaves - is_leaf)[self.starts]
        first_other: I64 = (others - ~is_leaf)[self.starts]
        before = np.where(is_leaf, leaves, others) - 1
        ranks: I64 = before - np.where(is_leaf, first_leaf[self.owner], first_other[self.owner])
        return ranks


def fold_rows(
    grove: Grove,
    rules: Mapping[int, Rule],
    first_of: Mapping[int, I64],
    nodes: I64,
    leaves: I64,
) -> I64:
    """Write the calls of all nodes; returns the rows of their states, [nodes, rows of a state].

    first_of: for every kind of node, the first row that each structure's nodes of it make. nodes,
    leaves: of each structure the first rows of what is given a node, [structures, tensors].
    """
    has_leaves = LEAF in rules
    kinds, ranks, owner = grove.kinds(has_leaves), grove.ranks(has_leaves), grove.owner
    some = next(iter(rules.values()))
    states = np.zeros((len(kinds), len(some.state)), np.int64)
    made = np.zeros(len(kinds), np.int64)
    members: dict[int, I64] = {}
    for kind, rule in rules.items():
        mine = members[kind] = np.flatnonzero(kinds == kind)
        if not len(mine):
            continue
        of = owner[mine]
        rank = np.arange(len(mine)) - np.searchsorted(of, np.arange(len(grove.structures)))[of]
        made[mine] = first_of[kind][of] + rank * rule.rows
        states[mine] = made[mine, None] + rule.state
    for kind, rule in rules.items():
        mine = members[kind]
        if not len(mine):
            continue
        given = leaves if kind == LEAF else nodes
        columns = [given[owner[mine]] + ranks[mine, None]]
        if kind > 0:
            index = grove.first_child[mine, None] + np.arange(kind)
            columns.append(states[grove.children[index]].reshape(len(mine), -1))
        rule.write(np.concatenate(columns, 1), made[mine])
    return states
