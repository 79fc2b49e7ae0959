"""Trees: cellc against eager recursion, levels batched by hand, DyNet and torchfold.

Ways whose trees are new get others of the same sizes before every run: drawn again with as many
leaves, or, where trees come from a file, with children changed over at random. Facts of the case
are what a cell of a structure never seen costs to unfold and to plan.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellc.bench.case import Case, Way
from cellc.bench.peers import why_not
from cellc.bench.place import HERE, PROCESSORS_ONLY, Place
from cellc.bench.tree_data import draw_tree, mirrored, num_leaves, split
from cellc.bench.tree_file import read_trees
from cellc.bench.tree_models import (
    VOCABULARY,
    ArrayTreeLSTM,
    TreeLSTM,
    as_arrays,
    run_levels,
    with_packed_weights,
)
from cellc.bench.tree_peers import DynetTreeLSTM, TorchfoldTreeLSTM
from cellc.compiled import Compiled
from cellc.request import as_call
from cellc.trees import Tree

EAGER_SAMPLE = 96  # trees of a round that run eagerly: it takes long
EAGER, LEVELS = "eager recursion, one tree at a time", "PyTorch, levels batched by hand"
PACKED_BATCH = 256
EAGER_PACKED = "eager recursion, weights in oneDNN's layout"
LEVELS_PACKED = f"levels by hand, {PACKED_BATCH} at once, weights in oneDNN's layout"
DYNET, TORCHFOLD = "DyNet autobatching", "torchfold"
SEEN, NEW = "cellc, plain recursion, structures seen", "cellc, plain recursion, every tree new"
TREE_SEEN, TREE_NEW = "cellc.Tree, structures seen", "cellc.Tree, every tree new"
UNFOLD = "us a cell call to unfold, {}, never seen"
PLAN = "us a cell call to plan, {}, never seen"
RECURSION, ARRAYS = "plain recursion", "cellc.Tree"
Peer = Callable[[Sequence[Any]], Tensor]


class Batch:
    """Trees in every form that a way takes."""

    def __init__(self, trees: Sequence[Any], place: Place = HERE) -> None:
        self.nested = list(trees)
        arrays = [as_arrays(t) for t in trees]
        self.arrays = [
            (children, torch.tensor(tokens, device=place.device)) for children, tokens in arrays
        ]

    @property
    def requests(self) -> list[Any]:
        return [(tree,) for tree in self.nested]

    @property
    def array_requests(self) -> list[Any]:
        return [(Tree(children), tokens) for children, tokens in self.arrays]


class Forest:
    """The batch that ways share, and batches never seen as large as it."""

    def __init__(self, count: int, path: Path | None, place: Place = HERE) -> None:
        self._draw, self._path, self._place = random.Random(0), path, place
        if path:
            trees = read_trees(path, count, VOCABULARY)
        else:
            trees = [draw_tree(self._draw) for _ in range(count)]
        self._sizes = [num_leaves(t) for t in trees]
        self.now = Batch(trees, place)

    def fresh(self) -> Batch:
        if self._path:
            return Batch([mirrored(t, self._draw) for t in self.now.nested], self._place)
        return Batch([split(n, self._draw) for n in self._sizes], self._place)

    def renew(self) -> None:
        self.now = self.fresh()


class New:
    """A way on the shared batch while results are checked, and on new ones while it is timed."""

    def __init__(self, forest: Forest, run: Callable[[Batch], Sequence[Tensor]]) -> None:
        self._forest, self._run = forest, run
        self._own: Batch | None = None

    def fresh(self) -> None:
        self._own = self._forest.fresh()

    def __call__(self) -> Sequence[Tensor]:
        return self._run(self._own or self._forest.now)


def tree_case(hidden: int, count: int, path: Path | None = None, place: Place = HERE) -> Case:
    """A binary TreeLSTM, every way that runs here."""
    torch.manual_seed(0)
    model = place.ready(TreeLSTM(hidden))
    forest, sample = Forest(count, path, place), min(EAGER_SAMPLE, count)
    recursion, arrays = map(place.compiled, (model, ArrayTreeLSTM(model).eval()))
    others, missing = _other_ways(model, forest, place.on_cpu)
    new = New(forest, lambda batch: recursion.map(batch.requests))
    new_arrays = New(forest, lambda batch: arrays.map(batch.array_requests))
    ways = [
        Way(EAGER, partial(_eagerly, model, forest, sample), sample),
        Way(LEVELS, partial(_by_levels, model, forest, count)),
        *(_packed_ways(model, forest, sample) if place.on_cpu else ()),
        *others,
        Way(NEW, new, fresh=new.fresh),
        Way(SEEN, lambda: recursion.map(forest.now.requests)),
        Way(TREE_NEW, new_arrays, fresh=new_arrays.fresh),
        Way(TREE_SEEN, lambda: arrays.map(forest.now.array_requests)),
    ]

    def facts() -> dict[str, float]:
        batch = forest.fresh()
        return {
            **_unfold_cost(recursion, batch.requests, RECURSION),
            **_unfold_cost(arrays, batch.array_requests, ARRAYS),
        }

    given = f", from {path.name}" if path else ""
    return Case(
        f"binary TreeLSTM, {hidden} units, {count} trees at once{given}",
        count,
        ways,
        EAGER,
        unit="trees",
        missing=missing,
        compiled=[recursion, arrays],
        against=[way.name for way in ways if way.name in (LEVELS, LEVELS_PACKED, DYNET)],
        again=forest.renew,
        facts=facts,
    )


def _other_ways(model: TreeLSTM, forest: Forest, on_cpu: bool) -> tuple[list[Way], dict[str, str]]:
    """(what is installed, what is not and why)."""
    peers: Sequence[tuple[str, str, Callable[[], Peer]]] = [
        (DYNET, "dynet", cache(lambda: DynetTreeLSTM(model))),
        (TORCHFOLD, "torchfold", cache(lambda: TorchfoldTreeLSTM(model))),
    ]
    ways, missing = [], {}
    for name, module, peer in peers:
        if why := why_not(module) if on_cpu else PROCESSORS_ONLY:
            missing[name] = why
        else:
            ways.append(Way(name, partial(_unbound, peer, forest)))
    return ways, missing


def _packed_ways(model: TreeLSTM, forest: Forest, sample: int) -> list[Way]:
    alone, packed = with_packed_weights(model, rows=1), with_packed_weights(model)
    return [
        Way(EAGER_PACKED, partial(_eagerly, alone, forest, sample), sample),
        Way(LEVELS_PACKED, partial(_by_levels, packed, forest, PACKED_BATCH)),
    ]


@torch.inference_mode()  # a tenth faster than no_grad: operations are small
def _eagerly(model: TreeLSTM, forest: Forest, sample: int) -> Sequence[Tensor]:
    return [model(tree) for tree in forest.now.nested[:sample]]


@torch.inference_mode()
def _by_levels(model: TreeLSTM, forest: Forest, batch: int) -> Sequence[Tensor]:
    trees = forest.now.arrays
    parts = [run_levels(model, trees[at : at + batch]) for at in range(0, len(trees), batch)]
    return torch.cat(parts).unbind()


def _unbound(peer: Callable[[], Peer], forest: Forest) -> Sequence[Tensor]:
    return peer()(forest.now.nested).unbind()


def _unfold_cost(compiled: Compiled, requests: Sequence[Any], name: str) -> dict[str, float]:
    """Microseconds a cell call: from requests of new structures to calls, and on to plans."""
    calls = [as_call(r) for r in requests]
    stats = compiled._compiler.unfolder.stats
    start, planning = time.perf_counter(), stats.planning
    tickets = compiled._tickets(calls)
    seconds, planning = time.perf_counter() - start, stats.planning - planning
    cells = sum(t.entry.plan.num_calls for t in tickets)
    return {
        UNFOLD.format(name): (seconds - planning) * 1e6 / cells,
        PLAN.format(name): planning * 1e6 / cells,
    }
