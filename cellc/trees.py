"""Trees and DAGs as index arrays: structure for those who have it in arrays already.

Duty: hold a structure, check it, and fold over it. `fold` is plain Python on tensors wherever it
runs in eager mode; while cellc unfolds a request, the calls of all nodes are written by numpy alone
(`frontends.fold`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.errors import RequestError
from cellc.frontends import stub as stubs
from cellc.kernels.native import found_arithmetic

Indices = npt.NDArray[np.int64]


class Dag:
    """A directed acyclic graph whose nodes read their children.

    children: for node i, the indices of the nodes it reads: a list of lists, or an int array [n, k]
    with -1 where there is none. Nodes may be in any order; any number of nodes may read one.

    Raises RequestError for an index that is no node, for a circle, and for no node at all.
    """

    structured = True  # a request that holds it is unfolded
    array_names = frozenset(  # of attributes that say nothing but the structure
        "num_nodes counts flat starts num_readers order results root _key _hash _layouts".split()
    )

    def __init__(self, children: Any) -> None:
        self._set(*_compressed(children))

    def _set(self, counts: Indices, flat: Indices) -> None:
        self.num_nodes = n = len(counts)
        if n == 0:
            raise RequestError(argument="children", got="no nodes", expected="at least one node")
        outside = flat.view(np.uint64) >= n  # below 0, too
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            node = int(np.searchsorted(np.cumsum(counts), at, "right"))
            raise RequestError(
                argument="children",
                got=f"child {flat[at]} of node {node}",
                expected=f"indices of nodes, in [0, {n})",
            )
        self.counts, self.flat = counts, flat
        self._check()

    def _check(self) -> None:
        parents = np.arange(self.num_nodes).repeat(self.counts)
        if not ((self.flat < parents).all() or (self.flat > parents).all()):
            self.order  # noqa: B018  raises where there is a circle

    @cached_property
    def _key(self) -> tuple[type, bytes, bytes]:
        return type(self), self.counts.tobytes(), self.flat.tobytes()

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    @cached_property
    def starts(self) -> Indices:
        """Where the children of every node begin in `flat`."""
        starts: Indices = self.counts.cumsum() - self.counts
        return starts

    @cached_property
    def num_readers(self) -> Indices:
        """How many nodes read each node (twice, where one reads it twice)."""
        return np.bincount(self.flat, minlength=self.num_nodes)

    @cached_property
    def order(self) -> list[int]:
        """Nodes, children first."""
        parents = np.repeat(np.arange(self.num_nodes), self.counts)
        if (self.flat < parents).all():
            return list(range(self.num_nodes))
        left = self.counts.tolist()
        readers: list[list[int]] = [[] for _ in left]
        for child, parent in zip(self.flat.tolist(), parents.tolist(), strict=True):
            readers[child].append(parent)
        found = [i for i, n in enumerate(left) if n == 0]
        for node in found:
            for reader in readers[node]:
                left[reader] -= 1
                if left[reader] == 0:
                    found.append(reader)
        if len(found) != self.num_nodes:
            node = next(i for i, n in enumerate(left) if n)
            raise RequestError(
                argument="children",
                got=f"a circle through or above node {node}",
                expected="nodes that read others, never themselves in the end",
            )
        return found

    @cached_property
    def results(self) -> Indices:
        """Nodes that no other reads, ascending."""
        return np.flatnonzero(self.num_readers == 0)

    def children_of(self, node: int) -> list[int]:
        start = int(self.starts[node])
        return self.flat[start : start + int(self.counts[node])].tolist()  # type: ignore[no-any-return]

    def fold(
        self,
        node: Callable[..., Any],
        leaf: Callable[..., Any] | None = None,
        *,
        nodes: Sequence[torch.Tensor] | torch.Tensor = (),
        leaves: Sequence[torch.Tensor] | torch.Tensor = (),
    ) -> Any:
        """States of the nodes that no other reads (of a `Tree`: the root's state), from the leaves
        up.

        A node's state is node(*its rows of `nodes`, [states of its children]). With `leaf`, a node
        without children has leaf(*its rows of `leaves`) instead, and `nodes` has rows for the
        others only, both in the order of the nodes. A state is a tensor or nested tuples of
        tensors, of one form for all nodes.
        """
        nodes = (nodes,) if isinstance(nodes, torch.Tensor) else tuple(nodes)
        leaves = (leaves,) if isinstance(leaves, torch.Tensor) else tuple(leaves)
        inner = int(np.count_nonzero(self.counts))
        num_leaves = self.num_nodes - inner if leaf is not None else 0
        self._check_rows("nodes", nodes, self.num_nodes - num_leaves)
        self._check_rows("leaves", leaves, num_leaves)
        target = stubs.current.target
        if (
            target is not None
            and (made := target.fold(self, node, leaf, nodes, leaves)) is not None
        ):
            return self._returned(made[0])
        return self._returned(self.fold_eagerly(node, leaf, nodes, leaves))

    def _check_rows(self, name: str, given: Sequence[torch.Tensor], count: int) -> None:
        kinds = {
            "nodes": "one a node, or where `leaf` is given one a node with children",
            "leaves": "one a node without children",
        }
        for tensor in given:
            if len(tensor) != count:
                raise RequestError(
                    argument=name,
                    got=f"{len(tensor)} rows",
                    expected=f"{count}, {kinds[name]}",
                )

    def _returned(self, states: Sequence[Any]) -> Any:
        return list(states)

    def fold_eagerly(
        self,
        node: Callable[..., Any],
        leaf: Callable[..., Any] | None,
        nodes: Sequence[torch.Tensor],
        leaves: Sequence[torch.Tensor],
    ) -> list[Any]:
        """`fold`, one node after the other; the states of `results`."""
        states: list[Any] = [None] * self.num_nodes
        is_leaf = self.counts == 0 if leaf is not None else np.zeros(self.num_nodes, bool)
        rank = np.where(is_leaf, np.cumsum(is_leaf), np.cumsum(~is_leaf)) - 1
        for i in self.order:
            k = int(rank[i])
            if leaf is not None and is_leaf[i]:
                states[i] = leaf(*[t[k] for t in leaves])
            else:
                states[i] = node(*[t[k] for t in nodes], [states[j] for j in self.children_of(i)])
        return [states[i] for i in self.results.tolist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dag) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_nodes} nodes)"


class Tree(Dag):
    """A tree, by the children of every node (see `Dag`) or by the parent of every node.

    parents: int array [n], -1 at the root; children are in the order of their indices.

    Raises RequestError as `Dag` does, and where a node has two parents or there are two roots.
    """

    folds_to_one = True  # state, whatever the nodes

    def __init__(self, children: Any = None, *, parents: Any = None) -> None:
        if (children is None) == (parents is None):
            raise RequestError(
                argument="children, parents", got="both or neither", expected="one of them"
            )
        if children is not None:
            if not self._set_plain(children):
                super().__init__(children)
            return
        given = np.asarray(parents, np.int64).reshape(-1)
        n = len(given)
        if ((given < -1) | (given >= n)).any():
            at = int(np.flatnonzero((given < -1) | (given >= n))[0])
            raise RequestError(
                argument="parents",
                got=f"parent {given[at]} of node {at}",
                expected=f"indices of nodes, in [0, {n}), or -1 at the root",
            )
        inner = np.flatnonzero(given >= 0)
        order = inner[np.argsort(given[inner], kind="stable")]
        self._set(np.bincount(given[inner], minlength=n).astype(np.int64), order)

    def _set_plain(self, children: Any) -> bool:
        """Take an array of a tree whose children come first, as they mostly do; False where it is
        anything else.
        """
        if not (type(children) is np.ndarray and children.dtype == np.int64 and children.ndim == 2):
            return False
        found = found_arithmetic().tree(children)
        if found is None:
            return False
        known = self.__dict__
        self.counts, known["num_readers"], self.flat, self.root = found
        self.num_nodes = len(children)
        return True

    @cached_property
    def root(self) -> int:
        """The node that no other reads."""
        # each other one is a child once
        return self.num_nodes * (self.num_nodes - 1) // 2 - int(self.flat.sum())

    @cached_property
    def results(self) -> Indices:
        """The root."""
        return np.array([self.root])

    def _check(self) -> None:
        super()._check()
        if self.num_readers.max() > 1:
            shared = int(np.flatnonzero(self.num_readers > 1)[0])
            raise RequestError(
                argument="children",
                got=f"node {shared} as a child twice",
                expected="one parent a node; a cellc.Dag may share nodes",
            )
        if len(self.flat) != self.num_nodes - 1:  # each a child once
            raise RequestError(
                argument="children",
                got=f"{np.count_nonzero(self.num_readers == 0)} roots",
                expected="one node that is no child",
            )

    def _returned(self, states: Sequence[Any]) -> Any:
        return states[0]


def _compressed(children: Any) -> tuple[Indices, Indices]:
    """(number of children of every node, all of them in a row)."""
    if isinstance(children, np.ndarray) and children.ndim == 2:
        there = children != -1
        counts = there.sum(1)
        return counts, children[there].astype(counts.dtype, copy=False)
    rows = [np.asarray(row, np.int64).reshape(-1) for row in children]
    counts = np.array([len(row) for row in rows], np.int64)
    return counts, np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
