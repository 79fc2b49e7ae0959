"""Recurrences: the operations that feed themselves, as calls.

Duty: cut what a request does of every recurrence into instances, in trace order, where a role
repeats, and file together those that are wired alike. A step of `cellc.extract`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from cellc import calls
from cellc.request_roles import RequestRoles
from cellc.rows import RaggedRefs, RowNode, ScalarRef
from cellc.units import Unit, concat, made_by


class Recurrences:
    """One request's recurrences. `component`: the recurrence that a role belongs to, if any."""

    def __init__(self, request: RequestRoles, component: dict[int, int]) -> None:
        self.request, self.rows, self.component = request, request.rows, component

    def units(self) -> list[Unit]:
        """One for each way that instances of a recurrence are wired."""
        open_nodes: dict[int, list[int]] = defaultdict(list)
        open_roles: dict[int, set[int]] = defaultdict(set)
        found: dict[Hashable, list[list[int]]] = {}
        for i in range(len(self.rows.nodes)):
            role = self.request.role_of[i]
            component = self.component.get(role)
            if component is None or not self.request.live[i]:
                continue
            if role in open_roles[component]:
                self._close(component, open_nodes[component], found)
                open_nodes[component], open_roles[component] = [], set()
            open_nodes[component].append(i)
            open_roles[component].add(role)
        for component, nodes in open_nodes.items():
            self._close(component, nodes, found)
        return [self._unit(instances) for instances in found.values()]

    def _close(
        self, component: int, nodes: list[int], found: dict[Hashable, list[list[int]]]
    ) -> None:
        """Split an instance into parts of one width, and file each with those wired alike."""
        level: dict[int, int] = {}
        parts: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in nodes:
            node = self.rows.nodes[i]
            level[i] = 0
            for source, joined in self._sources(node):
                if source in level:
                    same = joined and self.rows.nodes[source].n == node.n
                    level[i] = max(level[i], level[source] + (not same))
            parts[node.n, level[i]].append(i)
        for part in parts.values():
            found.setdefault((component, self._signature(part)), []).append(part)

    def _sources(self, node: RowNode) -> list[tuple[int, bool]]:
        """(producing node, does call j read exactly its call j) for every row operand."""
        out, node_of = [], self.request.node_of
        for operand in node.operands:
            if isinstance(operand, np.ndarray):
                first = int(node_of[operand[0]])
                if first >= 0 and self.request.lanes(operand, first):
                    out.append((first, True))
                else:
                    out += [(int(s), False) for s in np.unique(node_of[operand]) if s >= 0]
            elif isinstance(operand, RaggedRefs):
                out += [(int(s), False) for s in np.unique(node_of[operand.refs]) if s >= 0]
        return out

    def _signature(self, part: Sequence[int]) -> Hashable:
        where = {node: k for k, node in enumerate(part)}
        out = []
        for i in part:
            node = self.rows.nodes[i]
            wires: list[Hashable] = []
            for operand in node.operands:
                wires.append(self._wire(operand, where))
            out.append((self.request.role_of[i], tuple(wires)))
        return tuple(out)

    def _wire(self, operand: object, where: dict[int, int]) -> Hashable:
        """An operand inside a part: its inner source, a weight, a number, or None for an input."""
        if isinstance(operand, ScalarRef):
            return operand
        if isinstance(operand, np.ndarray):
            source = int(self.request.node_of[operand[0]])
            if source in where and self.request.lanes(operand, source):
                return (where[source], int(self.request.port_of[operand[0]]))
        return None

    def _unit(self, parts: list[list[int]]) -> Unit:
        """All calls of one template: call j of occurrence k is call (j, k), so that a chain is
        contiguous.
        """
        first = parts[0]
        template = [self.rows.nodes[i] for i in first]
        where = {node: k for k, node in enumerate(first)}
        n = template[0].n
        even = all(self.rows.nodes[part[0]].n == n for part in parts)
        order = (
            np.arange(len(parts) * n).reshape(len(parts), n).T.reshape(-1)
            if even and n > 1
            else None
        )
        unit = Unit(tuple(self.request.role_of[i] for i in first), True, template, [], {}, {})
        for k, node in enumerate(template):
            wires: list[tuple[int, int] | None] = []
            for j, operand in enumerate(node.operands):
                wire = self._wire(operand, where)
                wires.append(wire if isinstance(wire, tuple) else None)
                if wires[-1] is None and isinstance(operand, (np.ndarray, RaggedRefs)):
                    column = concat([self.rows.nodes[p[k]].operands[j] for p in parts])
                    unit.columns[k, j] = column if order is None else calls.take(column, order)
            unit.inner.append(wires)
            for port in range(len(node.types)):
                made = np.concatenate([made_by(self.rows.nodes[p[k]], port) for p in parts])
                unit.outputs[k, port] = made if order is None else made[order]
        return unit
