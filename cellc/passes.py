"""Passes: named rewrites of a request's cells, between extraction and planning.

Duty: make cells smaller and their products fewer. Each pass takes a `CallGraph` and `Params`, and
changes groups in place; all are deterministic on a cell's content, so that every trace of a model
ends with the same cells. Order: simplify (common subexpressions, biases into products, dead code),
fuse products that share an input, fold embeddings into the product that follows
(`cellc.cell_passes`), do maps over vectors in the cells that reduce these (`cellc.fusion`), join
cells whose calls then follow each other in pairs (`cellc.joining`), sink look-ups into the cells
that read them (`cellc.lookups`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cellc import calls
from cellc.calls import CallGraph
from cellc.cell_passes import fold_embeddings, fold_weights, fuse_biases, fuse_products, share
from cellc.cells import Cell
from cellc.fusion import Facts, fuse_maps
from cellc.joining import join_calls
from cellc.lookups import sink_lookups
from cellc.params import Params


@dataclass(frozen=True)
class PassOptions:
    """`fold_bytes`: largest table that folding an embedding may make (0 turns folding off)."""

    fold_bytes: int = 256 << 20


PASSES: tuple[tuple[str, Callable[[Cell, Params], Cell]], ...] = (
    ("share", share),
    ("fold_weights", fold_weights),
    ("fuse_biases", fuse_biases),
    ("fuse_products", fuse_products),
)


@dataclass
class Rewritten:
    """What all traces of one model share: a cell's rewritten form by its key, and facts."""

    cells: dict[str, Cell] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)


def run(graph: CallGraph, params: Params, options: PassOptions, known: Rewritten) -> CallGraph:
    """All passes."""
    _simplify(graph, params, options, known.cells)
    join_calls(graph, fuse_maps(graph, known.facts), known.facts)
    _simplify(graph, params, options, known.cells)
    sink_lookups(graph)
    graph.groups = calls.merge(graph.groups)
    return graph


def _simplify(
    graph: CallGraph, params: Params, options: PassOptions, cache: dict[str, Cell]
) -> None:
    """The passes on one cell, on every cell."""
    for group in graph.groups:
        key = group.cell.key
        if key not in cache:
            cell = group.cell
            for _, rewrite in PASSES:
                cell = rewrite(cell, params)
            cell = share(cell)
            cache[key] = (
                fold_embeddings(cell, params, options.fold_bytes) if options.fold_bytes else cell
            )
        group.cell = replace(cache[key], recurrent=group.cell.recurrent)
    graph.groups = calls.merge(graph.groups)
