"""Joining: cells whose calls follow each other in pairs, as one cell.

Duty: after `cellc.fusion` has taken the maps between them away, a step, the reductions over a
memory and what is made of them are calls one to one: they become one call. One of `cellc.passes`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cellc.calls import CallGraph, CallGroup, take
from cellc.cell_editor import CellEditor
from cellc.cell_passes import share
from cellc.cells import Operand
from cellc.fusion import Facts, inlined, without_unread
from cellc.rows import RaggedRefs, Refs


def join_calls(graph: CallGraph, fused: list[CallGroup], facts: Facts) -> None:
    """Join groups in pairs, as long as there are some of which one is `fused`: a step with the
    reductions in it, or what does not recur with what does not.
    """
    while True:
        pair = _pair(graph, fused)
        if pair is None:
            return
        first, second, order = pair
        joined = _joined(graph, first, second, order, facts)
        at = next(i for i, g in enumerate(graph.groups) if g is first)
        graph.groups[at] = joined
        graph.groups = [g for g in graph.groups if g is not second]
        if any(g is first or g is second for g in fused):
            fused = [joined, *(g for g in fused if g is not first and g is not second)]


def _pair(graph: CallGraph, fused: list[CallGroup]) -> tuple[CallGroup, CallGroup, Refs] | None:
    """Two groups to join, and for each call of the first the one of the second."""
    edges = _Edges(graph)
    marked = {id(g) for g in fused}
    for a, b in sorted(edges.read):
        first, second = graph.groups[a], graph.groups[b]
        if a == b or first.cell.recurrent != second.cell.recurrent:
            continue
        order = None if marked.isdisjoint((id(first), id(second))) else edges.order(a, b)
        if order is not None and not edges.between(a, b):
            return first, second, order
    return None


class _Edges:
    """Which groups read which."""

    def __init__(self, graph: CallGraph) -> None:
        self.groups = graph.groups
        self.maker = np.full(graph.num_values, -1, np.int64)
        self.port = np.zeros(graph.num_values, np.int64)
        self.call = np.zeros(graph.num_values, np.int64)
        for g, group in enumerate(graph.groups):
            for port, made in enumerate(group.outputs):
                self.maker[made], self.port[made] = g, port
                self.call[made] = np.arange(len(made))
        self.read: set[tuple[int, int]] = set()
        for g, group in enumerate(graph.groups):
            for i in range(len(group.inputs)):
                makers = np.unique(self.maker[group.input_values(i)])
                self.read |= {(m, g) for m in makers.tolist() if m >= 0}

    def order(self, a: int, b: int) -> Refs | None:
        """For each call of a, the call of b that reads it, where they correspond one to one."""
        if self.groups[a].num_calls != self.groups[b].num_calls:
            return None
        found: Refs | None = None
        for i, column in enumerate(self.groups[b].inputs):
            makers = self.maker[self.groups[b].input_values(i)]
            if not (makers == a).any():
                continue
            if isinstance(column, RaggedRefs) or (makers != a).any():
                return None
            calls = self.call[column]
            if len(np.unique(self.port[column])) > 1 or (
                found is not None and (calls != found).any()
            ):
                return None
            found = calls
        if found is None or (np.bincount(found, minlength=len(found)) != 1).any():
            return None
        order = np.empty_like(found)
        order[found] = np.arange(len(found))
        return order

    def between(self, a: int, b: int) -> bool:
        """May calls wait for each other in a circle, if each of a is one with one of b?

        Not where nothing leads from a to b but b's own reads, and of the two only one may lead to
        itself without the other.
        """
        after = {g: [t for s, t in self.read if s == g] for g in range(len(self.groups))}

        def leads(source: int, target: int) -> bool:
            seen, stack = set[int](), [g for g in after[source] if g not in (a, b)]
            while stack:
                g = stack.pop()
                if g in seen:
                    continue
                seen.add(g)
                stack += [t for t in after[g] if t not in (a, b)]
                if target in after[g]:
                    return True
            return False

        alone = [(g, g) in self.read or leads(g, g) for g in (a, b)]
        return leads(a, b) or all(alone)


def _joined(
    graph: CallGraph, first: CallGroup, second: CallGroup, order: Refs, facts: Facts
) -> CallGroup:
    """The first group with the work of the second in it; outputs that only the second read are
    dropped, unless other graphs of the model need them.
    """
    made = {int(column[0]): port for port, column in enumerate(first.outputs)}
    editor = CellEditor(first.cell)
    for i, op in enumerate(first.cell.ops):
        editor.copy(op, i)
    columns = list(first.inputs)
    operands, passed = [], set[int]()
    for k, column in enumerate(second.inputs):
        taken = take(column, order)
        port = made.get(int(taken[0])) if isinstance(taken, np.ndarray) else None
        if port is not None:
            passed.add(port)
            operands.append(first.cell.outputs[port])
            continue
        key = (first.cell.key, second.cell.key, k)
        index = facts.add_input(editor.inputs, columns, second.cell.inputs[k], taken, key)
        operands.append(Operand("input", index))
    added = inlined(editor, second.cell, operands)
    kept = _kept(graph, first, second, passed, facts)
    outputs = [first.cell.outputs[p] for p in kept]
    whole = replace(
        first.cell,
        inputs=tuple(editor.inputs),
        params=tuple(editor.params),
        ops=tuple(editor.ops),
        outputs=(*outputs, *added),
    )
    cell, columns = without_unread(share(whole), columns)
    values = [first.outputs[p] for p in kept] + [made_by[order] for made_by in second.outputs]
    return CallGroup(cell, columns, values)


def _kept(
    graph: CallGraph, first: CallGroup, second: CallGroup, passed: set[int], facts: Facts
) -> list[int]:
    """The outputs of the first group that others than the second read."""
    others = CallGraph(
        [g for g in graph.groups if g is not second], [], {}, graph.outputs, graph.num_values
    ).used()
    kept = []
    for port, made in enumerate(first.outputs):
        key = (first.cell.key, port, second.cell.key)
        if others[made].any():
            facts.learn("needed", key)
        if port not in passed or facts.has("needed", key):
            kept.append(port)
    return kept
