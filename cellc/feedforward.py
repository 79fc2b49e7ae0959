"""Feed-forward: the operations outside recurrences, as calls.

Duty: fuse roles whose calls correspond one to one, such that what is fused cannot depend on itself
in a circle, and align their calls. A step of `cellc.extract`.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from cellc import calls, digraph
from cellc.request_roles import RequestRoles
from cellc.roles import Slot
from cellc.rows import RaggedRefs, Refs, RowNode
from cellc.units import Unit, concat, made_by, refs_of


class FeedForward:
    """One request's operations that are in none of the recurrences."""

    def __init__(self, request: RequestRoles, recurrent: dict[int, int]) -> None:
        self.request, self.roles, self.recurrent = request, request.roles, recurrent
        self._nodes: dict[int, list[RowNode]] = defaultdict(list)  # by role
        for i, role in enumerate(request.role_of):
            if request.live[i] and role not in recurrent:
                self._nodes[role].append(request.rows.nodes[i])
        self._columns: dict[Slot, Refs | RaggedRefs] = {
            (role, j): concat([node.operands[j] for node in members])
            for role, members in self._nodes.items()
            for j, operand in enumerate(members[0].operands)
            if isinstance(operand, (np.ndarray, RaggedRefs))
        }
        self._made = {  # by role and port
            (role, port): np.concatenate([made_by(node, port) for node in members])
            for role, members in self._nodes.items()
            for port in range(len(members[0].types))
        }
        self._position = np.zeros(request.rows.num_values, np.int64)  # of values among their role's
        for values in self._made.values():
            self._position[values] = np.arange(len(values))

    def units(self) -> list[Unit]:
        """One for each cluster of roles; what contradicts one is noted, and all are formed anew."""
        self._find_unpaired()
        while True:
            units = [self._unit(cluster) for cluster in self._clusters()]
            if all(unit is not None for unit in units):
                return [unit for unit in units if unit is not None]

    def _find_unpaired(self) -> None:
        """Note the pairs of roles whose calls do not correspond one to one."""
        for (role, _), column in self._columns.items():
            refs = refs_of(column)
            if len(refs) == 0:
                continue
            for source in set(self.request.of_values(refs).tolist()) - {-1}:
                paired = False
                if isinstance(column, np.ndarray):
                    port = int(self.request.port_of[refs[0]])
                    values = self._made.get((source, port))
                    paired = (
                        values is not None
                        and len(values) == len(refs)
                        and bool((np.sort(values) == np.sort(refs)).all())
                    )
                if not paired:
                    self.roles.note(self.roles.unpaired, (source, role), source, role)

    def _clusters(self) -> list[list[int]]:
        """Feed-forward roles joined along one-to-one edges, such that clusters cannot depend in a
        circle.
        """
        level, order = self._levels()
        self._delay(level, [role for role in order if role not in self.recurrent])
        unpaired, links = self.roles.unpaired, list[tuple[int, int]]()
        for u, v in self.roles.graph.edges():
            # an edge that only other requests have does not say which calls belong together here
            joined = (u, v) in self.request.edges and (u, v) not in unpaired
            if u in self._nodes and v in self._nodes and level[u] == level[v] and joined:
                links.append((u, v))
        rank = {role: k for k, role in enumerate(order)}
        found = [sorted(c, key=rank.__getitem__) for c in digraph.joined(order, links)]
        return sorted(found, key=lambda c: rank[c[0]])

    def _levels(self) -> tuple[dict[int, int], list[int]]:
        """How many edges that do not join lead to each role; this request's roles by dependence."""
        graph, unpaired = self.roles.graph, self.roles.unpaired
        level: dict[int, int] = {}
        order: list[int] = []
        for members in graph.ordered(min):
            best = 0
            for role in members:
                for source in graph.predecessors[role]:
                    if source not in members:
                        joined = (
                            role not in self.recurrent
                            and source not in self.recurrent
                            and (source, role) not in unpaired
                        )
                        best = max(best, level[source] + (not joined))
            for role in members:
                level[role] = best
            order += [role for role in members if role in self._nodes]
        return level, order

    def _delay(self, level: dict[int, int], order: list[int]) -> None:
        """Move feed-forward roles to the level of who reads them, where that is possible."""
        returned = self._returned_roles()
        for role in reversed(order):
            readers = [r for r in self.roles.graph.successors[role] if r in level]
            latest = [
                level[r]
                - (
                    r in self.recurrent
                    or (role, r) in self.roles.unpaired
                    or (role, r) not in self.request.edges
                )
                for r in readers
            ]
            if latest and role not in returned:
                level[role] = max(level[role], min(latest))

    def _returned_roles(self) -> set[int]:
        """Roles whose values the request returns: they stay where they are."""
        values = [o.refs.reshape(-1) for o in self.request.rows.outputs]
        refs = np.concatenate([np.zeros(0, np.int64), *values])
        return set(self.request.of_values(refs).tolist())

    def _unit(self, cluster: list[int]) -> Unit | None:
        """One cluster's calls, aligned; None (and the pair noted) where two edges disagree."""
        where = {role: k for k, role in enumerate(cluster)}
        order, nodes = self._alignment(cluster), self._nodes
        unit = Unit(tuple(cluster), False, [nodes[r][0] for r in cluster], [], {}, {})
        for k, role in enumerate(cluster):
            wires: list[tuple[int, int] | None] = []
            for j, _ in enumerate(nodes[role][0].operands):
                wire: tuple[int, int] | None = None
                if (role, j) in self._columns:
                    column = calls.take(self._columns[role, j], order[role])
                    refs = refs_of(column)
                    sources = set(self.request.of_values(refs).tolist()) if len(refs) else {-1}
                    source = sources.pop() if len(sources) == 1 else -1
                    if source in where and (source, role) not in self.roles.unpaired:
                        if not (self._position[refs] == order[source]).all():
                            self.roles.note(self.roles.unpaired, (source, role), source, role)
                            return None
                        wire = (where[source], int(self.request.port_of[refs[0]]))
                    elif any(s in where for s in [*sources, source]):
                        self._split(cluster, role)
                        return None
                    else:
                        unit.columns[k, j] = column
                wires.append(wire)
            unit.inner.append(wires)
            for port in range(len(nodes[role][0].types)):
                unit.outputs[k, port] = self._made[role, port][order[role]]
        return unit

    def _split(self, cluster: list[int], role: int) -> None:
        """A call of the cluster reads another call of it: cut the cluster at this role."""
        for source in cluster:
            if source != role:
                self.roles.note(self.roles.unpaired, (source, role), source, role)

    def _alignment(self, cluster: list[int]) -> dict[int, Refs]:
        """For each role of a cluster, which of its calls belongs to the cluster's call g."""
        members = set(cluster)
        edges = defaultdict(list)
        for (role, _), column in self._columns.items():
            if role in members and isinstance(column, np.ndarray) and len(column):
                for source in set(self.request.of_values(column).tolist()) & members:
                    if (source, role) not in self.roles.unpaired:
                        reads = self._position[column]
                        edges[source].append((role, reads, True))
                        edges[role].append((source, reads, False))
        first = cluster[0]
        order = {first: np.arange(len(self._made[first, 0]))}
        stack = [first]
        while stack:
            role = stack.pop()
            for other, reads, forward in edges[role]:
                if other in order:
                    continue
                if forward:
                    inverse = np.empty_like(reads)
                    inverse[reads] = np.arange(len(reads))
                    order[other] = inverse[order[role]]
                else:
                    order[other] = reads[order[role]]
                stack.append(other)
        return order
