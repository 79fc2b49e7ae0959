"""Folds: the calls of all nodes of a tree or DAG given as arrays, written by numpy.

Duty: `cellc.Tree.fold` while a request is unfolded. What the node function does on a node of k
children is learned by running it once on stubs; the calls of all nodes of all requests of a batch
are then copies with other rows. Comes in from `frontends.unfold`, goes out as instances of its
segments. A function whose calls are not alike is run node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.utils import _pytree as pytree

from cellc.frontends import memo
from cellc.frontends.segments import SPARE, Segment
from cellc.frontends.stub import Stack, Stub, StubType

if TYPE_CHECKING:
    from cellc.frontends.repeats import Repeats

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
    build: Callable[[Sequence[int]], Any]  # its state from (0, first made row)
    pending: list[tuple[I64, I64]] = field(default_factory=list)  # (arguments, first made row)

    def expand(self) -> None:
        """Write its pending calls into the segments."""
        arguments = np.concatenate([a for a, _ in self.pending])
        made = np.concatenate([m for _, m in self.pending])
        self.pending = []
        table = np.concatenate([arguments, made[:, None], np.zeros((len(made), 1), np.int64)], 1)
        width = arguments.shape[1]
        for segment, kinds, offsets, first in self.instances:
            column = np.where(kinds == ARGUMENT, offsets, np.where(kinds == MADE, width, width + 1))
            added = np.where(kinds == ARGUMENT, 0, offsets)
            segment.use()
            segment.more_reads.append((table[:, column] + added).reshape(-1))
            segment.more_made.append(made + first)


class Layout:
    """How many nodes of each kind a structure has, and which its results are: kinds are leaves
    (where they are one) and numbers of children.
    """

    def __init__(self, structure: Any, has_leaves: bool) -> None:
        counts = structure.counts
        sizes = np.bincount(counts).tolist()
        self.sizes = {k: size for k, size in enumerate(sizes) if size}
        if has_leaves and 0 in self.sizes:
            self.sizes = {LEAF: self.sizes.pop(0), **self.sizes}
        self.results: list[tuple[int, int]] = []  # (kind, rank among nodes of the kind)
        for node in structure.results.tolist():
            count = int(counts[node])
            kind = LEAF if has_leaves and count == 0 else count
            last = node == len(counts) - 1  # as a root mostly is
            before = sizes[count] - 1 if last else np.count_nonzero(counts[:node] == count)
            self.results.append((kind, int(before)))

    @classmethod
    def of(cls, structure: Any, has_leaves: bool) -> Layout:
        place = structure.__dict__.setdefault("_layouts", {})
        found: Layout | None = place.get(has_leaves)
        if found is None:
            found = place[has_leaves] = cls(structure, has_leaves)
        return found


@dataclass
class Site:
    """One pair of functions with rows of one form: their rules, by kind of node."""

    rules: dict[int, Rule] = field(default_factory=dict)
    folds: list[tuple[Any, Layout, dict[int, int], list[int], list[int]]] = field(
        default_factory=list
    )  # (structure, layout, first row by kind, first rows of nodes, of leaves)

    def expand(self) -> None:
        """Give every call of the pending folds its rows."""
        folds, self.folds = self.folds, []
        sizes = np.array([f[0].num_nodes for f in folds])
        starts = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(folds)), sizes)
        counts = np.concatenate([f[0].counts for f in folds])
        kind = np.where(counts == 0, LEAF, counts) if LEAF in self.rules else counts
        row_rank = _ranks(kind == LEAF, owner, starts)
        edges = np.array([len(f[0].flat) for f in folds])
        children = np.concatenate([f[0].flat for f in folds]) + np.repeat(starts, edges)
        edge_starts = np.cumsum(counts) - counts
        some = next(iter(self.rules.values()))
        states = np.zeros((len(kind), len(some.state)), np.int64)
        made = np.zeros(len(kind), np.int64)
        members: dict[int, I64] = {}
        for k, rule in self.rules.items():
            nodes = members[k] = np.flatnonzero(kind == k)
            first = np.array([f[2].get(k, 0) for f in folds])
            of = owner[nodes]
            rank = np.arange(len(nodes)) - np.searchsorted(of, np.arange(len(folds)))[of]
            made[nodes] = first[of] + rank * rule.rows
            states[nodes] = made[nodes, None] + rule.state
        for k, rule in self.rules.items():
            nodes = members[k]
            if not len(nodes):
                continue
            first_rows = np.array([f[4] if k == LEAF else f[3] for f in folds], np.int64)
            first_rows = first_rows.reshape(len(folds), -1)
            columns = [first_rows[owner[nodes]] + row_rank[nodes, None]]
            if k > 0:
                index = edge_starts[nodes, None] + np.arange(k)
                columns.append(states[children[index]].reshape(len(nodes), -1))
            rule.pending.append((np.concatenate(columns, 1), made[nodes]))
            rule.expand()


def _ranks(is_leaf: npt.NDArray[np.bool_], owner: I64, starts: I64) -> I64:
    """Of every node, its place among the leaves, or among the other nodes, of its structure."""
    leaves, others = np.cumsum(is_leaf), np.cumsum(~is_leaf)
    before = np.where(is_leaf, leaves - 1, others - 1)
    first_leaf: I64 = (leaves - is_leaf)[starts]
    first_other: I64 = (others - ~is_leaf)[starts]
    return before - np.where(is_leaf, first_leaf[owner], first_other[owner])


def fold(
    recorder: Repeats,
    sites: dict[Hashable, Site],
    structure: Any,
    node: Callable[..., Any],
    leaf: Callable[..., Any] | None,
    nodes: Sequence[Any],
    leaves: Sequence[Any],
) -> list[Any] | None:
    """The states of a structure's results, its calls noted; None where they have to be run."""
    rows = [*nodes, *leaves]
    if not all(type(t) is Stack and t.first is not None for t in rows):
        for tensor in rows:
            if type(tensor) is Stub:
                recorder.take_apart.add(tensor.id)
                recorder.relearn = True
        return None
    keys = (_identity(node), _identity(leaf))
    if None in keys:
        return None
    key = (*keys, *[t.inner for t in nodes], None, *[t.inner for t in leaves])
    site = sites.get(key)
    if site is None:
        site = sites[key] = Site()
    layout = Layout.of(structure, leaf is not None)
    for kind in layout.sizes:
        if kind not in site.rules and not _learn(recorder, site, kind, node, leaf, nodes, leaves):
            return None
    first: dict[int, int] = {}
    recorder._cut()
    at = recorder.next_row
    for kind, size in layout.sizes.items():
        first[kind] = at
        at += size * site.rules[kind].rows
    recorder.next_row = at
    site.folds.append(
        (structure, layout, first, [t.first for t in nodes], [t.first for t in leaves])
    )
    recorder.folding.add(key)
    results = []
    for kind, rank in layout.results:
        rule = site.rules[kind]
        base = first[kind] + rank * rule.rows
        results.append(rule.build((0, base)))
    return results


def _learn(
    recorder: Repeats,
    site: Site,
    kind: int,
    node: Callable[..., Any],
    leaf: Callable[..., Any] | None,
    nodes: Sequence[Any],
    leaves: Sequence[Any],
) -> bool:
    """Run a function once, and keep what it did; False where it has to be run at every node."""
    given = leaves if kind == LEAF else nodes
    arguments = [Stub(recorder.spare_row(), t.items[0].type) for t in given]
    flat = list(arguments)
    states = []
    for _ in range(max(kind, 0)):
        known = next(iter(site.rules.values()), None)
        if known is None:
            return False  # no leaf whose state is known: a structure without leaves
        state = [Stub(recorder.spare_row(), type) for type in known.types]
        flat += state
        states.append(pytree.tree_unflatten(state, known.spec))
    run = leaf if kind == LEAF else node
    assert run is not None
    noted = recorder.observe(lambda: run(*arguments) if kind == LEAF else run(*arguments, states))
    if noted is None:
        return False
    events, start, rows, result = noted
    place = {stub.id: k for k, stub in enumerate(flat)}
    instances = []
    for segment, reads, first in events:
        kinds, offsets = [], []
        for row in reads:
            if row in place:
                kinds.append(ARGUMENT)
                offsets.append(place[row])
            elif start <= row < SPARE:
                kinds.append(MADE)
                offsets.append(row - start)
            elif row < 0:
                kinds.append(CONSTANT)
                offsets.append(row)
            else:
                return False
        instances.append(
            (segment, np.array(kinds, np.int64), np.array(offsets, np.int64), first - start)
        )
    stubs, spec = pytree.tree_flatten(result)
    if not all(type(s) is Stub and start <= s.id < SPARE for s in stubs):
        return False  # a row that is handed on is not made here
    types = tuple([s.type for s in stubs])
    for other in site.rules.values():
        if other.types != types or other.spec != spec:
            return False
    state_rows = np.array([s.id - start for s in stubs], np.int64)
    leaves_of = tuple([(s.type, (memo.MADE, s.id - start)) for s in stubs])
    build = memo.builder((spec, leaves_of))
    site.rules[kind] = Rule(instances, rows, state_rows, spec, types, build)
    return True


def _identity(run: Any) -> Hashable | None:
    """What stands for a function whose calls do the same each time; None where that is unsure."""
    if run is None:
        return ("none",)
    if isinstance(run, nn.Module):
        return ("module", id(run))
    callee = getattr(run, "callee", None)
    if callee is not None:
        return ("callee", callee.key)
    owner = getattr(run, "__self__", None)
    function = getattr(run, "__func__", run)
    code = getattr(function, "__code__", None)
    if code is None or function.__defaults__ or function.__kwdefaults__:
        return None
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    if owner is not None:
        held.append(owner)
    if not all(isinstance(x, nn.Module) for x in held):
        return None
    return ("function", id(code), *map(id, held))
