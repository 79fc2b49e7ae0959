"""Graphs of numbers, against networkx."""

from __future__ import annotations

import random

import networkx
import pytest

from cellc.digraph import Digraph, joined


@pytest.mark.parametrize("seed", range(60))
def test_as_networkx(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randrange(1, 30)
    edges = [(rng.randrange(n), rng.randrange(n)) for _ in range(rng.randrange(2 * n))]
    ours, theirs = Digraph(edges), networkx.DiGraph(edges)
    for node in range(n):
        ours.add_node(node)
        theirs.add_node(node)
    assert set(ours) == set(theirs) and list(ours.edges()) == list(theirs.edges())
    assert all(ours.has_edge(u, v) == theirs.has_edge(u, v) for u in range(n) for v in range(n))
    components = ours.components()
    assert sorted(map(sorted, components)) == sorted(
        map(sorted, networkx.strongly_connected_components(theirs))
    )
    condensed = networkx.condensation(theirs)
    members = {c: condensed.nodes[c]["members"] for c in condensed}
    order = networkx.lexicographical_topological_sort(condensed, key=lambda c: min(members[c]))
    assert ours.ordered(min) == [members[c] for c in order]
    whole = networkx.connected_components(theirs.to_undirected())
    assert sorted(map(sorted, joined(range(n), edges))) == sorted(map(sorted, whole))
