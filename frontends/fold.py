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
from cellc.frontends.grove import ARGUMENT, CONSTANT, LEAF, MADE, Grove, Rule, fold_rows
from cellc.frontends.segments import SPARE
from cellc.frontends.stub import Stack, Stub, StubType

if TYPE_CHECKING:
    from cellc.frontends.repeats import Repeats

I64 = npt.NDArray[np.int64]


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
    pairs: set[tuple[int, int]] = field(default_factory=set)  # kinds, of child and parent

    def expand(self) -> None:
        """Give every call of the pending folds its rows."""
        folds, self.folds = self.folds, []
        has_leaves = LEAF in self.rules
        grove = Grove([f[0] for f in folds])
        self.pairs |= grove.pairs(has_leaves)
        first_of = {
            kind: np.array([f[2].get(kind, 0) for f in folds], np.int64) for kind in self.rules
        }
        nodes, leaves = (np.array([f[k] for f in folds], np.int64) for k in (3, 4))
        shape = len(folds), -1
        fold_rows(grove, self.rules, first_of, nodes.reshape(shape), leaves.reshape(shape))


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
    key = site_key(node, leaf, [t.inner for t in nodes], [t.inner for t in leaves])
    if key is None:
        return None
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


def site_key(
    node: Any, leaf: Any, nodes: Sequence[StubType], leaves: Sequence[StubType]
) -> Hashable | None:
    """What stands for two functions with rows of these types; None where that is unsure."""
    keys = (_identity(node), _identity(leaf))
    return None if None in keys else (*keys, *nodes, None, *leaves)


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
