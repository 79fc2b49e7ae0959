"""Extraction: find a request's weight-shared cells.

Duty: group the operations of a `RowGraph` into calls of cells. Comes in from `frontends.lower`;
goes to `cellc.passes` as a `CallGraph`.

Method (ARCHITECTURE.md, "cells by roles"): every operation has a *role*: its program point,
operation, attributes and the weights it reads. In the graph of roles, strongly connected components
are the recurrences: each is cut, in trace order, into instances where a role repeats. Roles outside
them are feed-forward: those whose calls correspond one to one are fused. Whatever was grouped, an
instance is internally wired by one template; instances wired otherwise become calls of another
cell. What is known of roles is kept over all traces of a model (`Roles`), so that a request of one
position, where no recurrence shows, is cut like the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cellc import calls
from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.ops import RowType
from cellc.roles import Roles, Slot, networkx
from cellc.rows import ParamRef, RaggedRefs, Refs, RowGraph, RowNode, ScalarRef


@dataclass
class _Unit:
    """Calls that share one template: nodes[k][j] is the k-th operation's node of call batch j."""

    roles: tuple[int, ...]
    recurrent: bool
    nodes: list[RowNode]  # of the first call, in order: the template
    # per template operation, per operand: None (weight or number), an inner source, or a column of
    # references
    inner: list[list[tuple[int, int] | None]]
    columns: dict[tuple[int, int], Refs | RaggedRefs]
    outputs: dict[tuple[int, int], Refs]


class Extraction:
    """One request's extraction."""

    def __init__(self, rows: RowGraph, roles: Roles, *, late: bool = False) -> None:
        self.rows, self.roles, self.late = rows, roles, late
        self.node_of, self.port_of, self.lane_of = rows.producers()
        self.role_of = self._roles()
        self.live = self._live()
        self.edges: set[tuple[int, int]] = set()  # of roles, (who makes, who reads)

    def run(self) -> CallGraph:
        self._lift_scalars()
        self._connect()
        components = list(networkx().strongly_connected_components(self.roles.graph))
        recurrent = {
            role: i
            for i, component in enumerate(components)
            if len(component) > 1 or self.roles.graph.has_edge(*(list(component) * 2))
            for role in component
        }
        units = self._recurrent_units(recurrent)
        units += self._forward_units(recurrent)
        groups = self._groups(units)
        return CallGraph(
            calls.merge(groups),
            self.rows.data,
            dict(self.rows.constants),
            self.rows.outputs,
            self.rows.num_values,
        )

    # -- roles --

    def _roles(self) -> list[int]:
        """Every node's role; roles without weights are told apart by the weights they serve."""
        found: list[int] = []
        weighted: list[frozenset[int]] = []
        for node in self.rows.nodes:
            role = self.roles.role(node, self.rows.type_of)
            if any(isinstance(o, ParamRef) for o in node.operands):
                weighted.append(frozenset([role]))
            else:
                near = {weighted[s] for o in node.operands for s in self._producers(o)}
                weighted.append(near.pop() if len(near) == 1 else frozenset().union(*near))
                role = self.roles.refined(role, weighted[-1])
            found.append(role)
        return found

    def _producers(self, operand: object) -> list[int]:
        """Nodes that make what an operand reads."""
        if not isinstance(operand, (np.ndarray, RaggedRefs)):
            return []
        refs = _refs(operand)
        if len(refs) == 1:
            source = int(self.node_of[refs[0]])
            return [source] if source >= 0 else []
        return [s for s in np.unique(self.node_of[refs]).tolist() if s >= 0]

    def _live(self) -> list[bool]:
        """Dead code, by role: an operation is dropped only where all operations of its role are
        unused.
        """
        live = [False] * len(self.rows.nodes)
        needed = np.zeros(self.rows.num_values, bool)
        for output in self.rows.outputs:
            needed[output.refs.reshape(-1)] = True
        wanted: set[int] = set()
        changed = True
        while changed:
            changed = False
            for i in range(len(live) - 1, -1, -1):
                node = self.rows.nodes[i]
                if live[i]:
                    continue
                if self.role_of[i] in wanted or any(
                    needed[b : b + node.n].any() for b in node.bases
                ):
                    live[i] = changed = True
                    wanted.add(self.role_of[i])
                    for operand in node.operands:
                        if isinstance(operand, (np.ndarray, RaggedRefs)):
                            needed[_refs(operand)] = True
        return live

    def _lift_scalars(self) -> None:
        """Numbers that differ within a role (a loop counter) become constant rows."""
        known = self.roles.scalars
        for i, node in enumerate(self.rows.nodes):
            for j, operand in enumerate(node.operands):
                if isinstance(operand, ScalarRef):
                    seen = known[self.role_of[i], j]
                    if (value := repr(operand.value)) not in seen:  # 0.0 and -0.0 differ
                        seen.add(value)
                        if len(seen) == 2:
                            self.roles.version += self.role_of[i] in self.roles.graph
        for i, node in enumerate(self.rows.nodes):
            self.rows.nodes[i] = self._lifted(node, self.role_of[i])
        self.node_of, self.port_of, self.lane_of = self.rows.producers()

    def _lifted(self, node: RowNode, role: int) -> RowNode:
        operands = list(node.operands)
        for j, operand in enumerate(operands):
            if isinstance(operand, ScalarRef) and len(self.roles.scalars[role, j]) > 1:
                type = RowType((), operand.dtype)
                value = self.rows.constant(("full", (), operand.dtype, operand.value), type)
                operands[j] = np.full(node.n, value, np.int64)
        if all(a is b for a, b in zip(operands, node.operands, strict=True)):
            return node
        return RowNode(
            node.op,
            node.attrs,
            tuple(operands),
            node.types,
            node.bases,
            node.n,
            node.point,
            node.origin,
        )

    def _connect(self) -> None:
        edges = set()
        live = {role for role, is_live in zip(self.role_of, self.live, strict=True) if is_live}
        for i, node in enumerate(self.rows.nodes):
            if self.live[i]:
                sources = {s for operand in node.operands for s in self._producers(operand)}
                edges |= {(self.role_of[s], self.role_of[i]) for s in sources}
        self.edges = edges
        self.roles.connect(live, edges)

    # -- recurrences --

    def _recurrent_units(self, recurrent: dict[int, int]) -> list[_Unit]:
        open_nodes: dict[int, list[int]] = defaultdict(list)
        open_roles: dict[int, set[int]] = defaultdict(set)
        found: dict[Hashable, list[list[int]]] = {}
        for i in range(len(self.rows.nodes)):
            component = recurrent.get(self.role_of[i])
            if component is None or not self.live[i]:
                continue
            if self.role_of[i] in open_roles[component]:
                self._close(component, open_nodes[component], found)
                open_nodes[component], open_roles[component] = [], set()
            open_nodes[component].append(i)
            open_roles[component].add(self.role_of[i])
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
        out = []
        for operand in node.operands:
            if isinstance(operand, np.ndarray):
                first = int(self.node_of[operand[0]])
                if first >= 0 and self._lanes(operand, first):
                    out.append((first, True))
                else:
                    out += [(int(s), False) for s in np.unique(self.node_of[operand]) if s >= 0]
            elif isinstance(operand, RaggedRefs):
                out += [(int(s), False) for s in np.unique(self.node_of[operand.refs]) if s >= 0]
        return out

    def _lanes(self, refs: Refs, node: int) -> bool:
        """Is this column exactly one port of `node`, call by call?"""
        if len(refs) == 1:
            return self.rows.nodes[node].n == 1
        if len(refs) != self.rows.nodes[node].n:
            return False
        base = self.rows.nodes[node].bases[int(self.port_of[refs[0]])]
        return int(refs[0]) == base and bool((np.diff(refs) == 1).all())

    def _signature(self, part: Sequence[int]) -> Hashable:
        where = {node: k for k, node in enumerate(part)}
        out = []
        for i in part:
            node = self.rows.nodes[i]
            wires: list[Hashable] = []
            for operand in node.operands:
                wires.append(self._wire(operand, where))
            out.append((self.role_of[i], tuple(wires)))
        return tuple(out)

    def _wire(self, operand: object, where: dict[int, int]) -> Hashable:
        """An operand inside a part: its inner source, a weight, a number, or None for an input."""
        if isinstance(operand, ScalarRef):
            return operand
        if isinstance(operand, np.ndarray):
            source = int(self.node_of[operand[0]])
            if source in where and self._lanes(operand, source):
                return (where[source], int(self.port_of[operand[0]]))
        return None

    def _unit(self, parts: list[list[int]]) -> _Unit:
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
        unit = _Unit(tuple(self.role_of[i] for i in first), True, template, [], {}, {})
        for k, node in enumerate(template):
            wires: list[tuple[int, int] | None] = []
            for j, operand in enumerate(node.operands):
                wire = self._wire(operand, where)
                wires.append(wire if isinstance(wire, tuple) else None)
                if wires[-1] is None and isinstance(operand, (np.ndarray, RaggedRefs)):
                    column = _concat([self.rows.nodes[p[k]].operands[j] for p in parts])
                    unit.columns[k, j] = column if order is None else calls.take(column, order)
            unit.inner.append(wires)
            for port in range(len(node.types)):
                made = np.concatenate([_made(self.rows.nodes[p[k]], port) for p in parts])
                unit.outputs[k, port] = made if order is None else made[order]
        return unit

    # -- feed-forward --

    def _forward_units(self, recurrent: dict[int, int]) -> list[_Unit]:
        nodes: dict[int, list[RowNode]] = defaultdict(list)
        for i, role in enumerate(self.role_of):
            if self.live[i] and role not in recurrent:
                nodes[role].append(self.rows.nodes[i])
        columns = {
            (role, j): _concat([node.operands[j] for node in members])
            for role, members in nodes.items()
            for j, operand in enumerate(members[0].operands)
            if isinstance(operand, (np.ndarray, RaggedRefs))
        }
        made = {
            (role, port): np.concatenate([_made(node, port) for node in members])
            for role, members in nodes.items()
            for port in range(len(members[0].types))
        }
        position = np.zeros(self.rows.num_values, np.int64)
        for values in made.values():
            position[values] = np.arange(len(values))
        self._find_unpaired(columns, made)
        while True:
            clusters = self._clusters(nodes, recurrent)
            units = [self._forward_unit(c, nodes, columns, made, position) for c in clusters]
            if all(unit is not None for unit in units):
                return [unit for unit in units if unit is not None]

    def _role_of_values(self, refs: Refs) -> Refs:
        sources = np.unique(self.node_of[refs])
        return np.array([self.role_of[s] if s >= 0 else -1 for s in sources.tolist()])

    def _find_unpaired(
        self, columns: dict[Slot, Refs | RaggedRefs], made: dict[tuple[int, int], Refs]
    ) -> None:
        """Note the pairs of roles whose calls do not correspond one to one."""
        for (role, _), column in columns.items():
            refs = _refs(column)
            if len(refs) == 0:
                continue
            for source in set(self._role_of_values(refs).tolist()) - {-1}:
                paired = False
                if isinstance(column, np.ndarray):
                    port = int(self.port_of[refs[0]])
                    values = made.get((source, port))
                    paired = (
                        values is not None
                        and len(values) == len(refs)
                        and bool((np.sort(values) == np.sort(refs)).all())
                    )
                if not paired:
                    self.roles.note(self.roles.unpaired, (source, role), source, role)

    def _clusters(
        self, nodes: dict[int, list[RowNode]], recurrent: dict[int, int]
    ) -> list[list[int]]:
        """Feed-forward roles joined along one-to-one edges, such that clusters cannot depend in a
        circle.
        """
        graph, unpaired, nx = self.roles.graph, self.roles.unpaired, networkx()
        condensed = nx.condensation(graph)
        level: dict[int, int] = {}
        order: list[int] = []
        for component in nx.lexicographical_topological_sort(
            condensed, key=lambda c: min(condensed.nodes[c]["members"])
        ):
            members = condensed.nodes[component]["members"]
            best = 0
            for role in members:
                for source in graph.predecessors(role):
                    if source not in members:
                        joined = (
                            role not in recurrent
                            and source not in recurrent
                            and (source, role) not in unpaired
                        )
                        best = max(best, level[source] + (not joined))
            for role in members:
                level[role] = best
            order += [role for role in members if role in nodes]
        if self.late:
            self._delay(level, [role for role in order if role not in recurrent], recurrent)
        links = nx.Graph()
        links.add_nodes_from(order)
        for u, v in graph.edges():
            # an edge that only other requests have does not say which calls belong together here
            joined = (u, v) in self.edges and (u, v) not in unpaired
            if u in nodes and v in nodes and level[u] == level[v] and joined:
                links.add_edge(u, v)
        rank = {role: k for k, role in enumerate(order)}
        found = [sorted(c, key=rank.__getitem__) for c in nx.connected_components(links)]
        return sorted(found, key=lambda c: rank[c[0]])

    def _delay(self, level: dict[int, int], order: list[int], recurrent: dict[int, int]) -> None:
        """Move feed-forward roles to the level of who reads them, where that is possible."""
        returned = self._returned_roles()
        for role in reversed(order):
            readers = [r for r in self.roles.graph.successors(role) if r in level]
            latest = [
                level[r]
                - (
                    r in recurrent
                    or (role, r) in self.roles.unpaired
                    or (role, r) not in self.edges
                )
                for r in readers
            ]
            if latest and role not in returned:
                level[role] = max(level[role], min(latest))

    def _returned_roles(self) -> set[int]:
        """Roles whose values the request returns: they stay where they are."""
        values = [o.refs.reshape(-1) for o in self.rows.outputs]
        refs = np.concatenate([np.zeros(0, np.int64), *values])
        return set(self._role_of_values(refs).tolist())

    def _forward_unit(
        self,
        cluster: list[int],
        nodes: dict[int, list[RowNode]],
        columns: dict[Slot, Refs | RaggedRefs],
        made: dict[tuple[int, int], Refs],
        position: Refs,
    ) -> _Unit | None:
        """One cluster's calls, aligned; None (and the pair noted) where two edges disagree."""
        where = {role: k for k, role in enumerate(cluster)}
        order = self._alignment(cluster, columns, position, made)
        unit = _Unit(tuple(cluster), False, [nodes[r][0] for r in cluster], [], {}, {})
        for k, role in enumerate(cluster):
            wires: list[tuple[int, int] | None] = []
            for j, _ in enumerate(nodes[role][0].operands):
                wire: tuple[int, int] | None = None
                if (role, j) in columns:
                    column = calls.take(columns[role, j], order[role])
                    refs = _refs(column)
                    sources = set(self._role_of_values(refs).tolist()) if len(refs) else {-1}
                    source = sources.pop() if len(sources) == 1 else -1
                    if source in where and (source, role) not in self.roles.unpaired:
                        if not (position[refs] == order[source]).all():
                            self.roles.note(self.roles.unpaired, (source, role), source, role)
                            return None
                        wire = (where[source], int(self.port_of[refs[0]]))
                    elif any(s in where for s in [*sources, source]):
                        self._split(cluster, role)
                        return None
                    else:
                        unit.columns[k, j] = column
                wires.append(wire)
            unit.inner.append(wires)
            for port in range(len(nodes[role][0].types)):
                unit.outputs[k, port] = made[role, port][order[role]]
        return unit

    def _split(self, cluster: list[int], role: int) -> None:
        """A call of the cluster reads another call of it: cut the cluster at this role."""
        for source in cluster:
            if source != role:
                self.roles.note(self.roles.unpaired, (source, role), source, role)

    def _alignment(
        self,
        cluster: list[int],
        columns: dict[Slot, Refs | RaggedRefs],
        position: Refs,
        made: dict[tuple[int, int], Refs],
    ) -> dict[int, Refs]:
        """For each role of a cluster, which of its calls belongs to the cluster's call g."""
        members = set(cluster)
        edges = defaultdict(list)
        for (role, _), column in columns.items():
            if role in members and isinstance(column, np.ndarray) and len(column):
                for source in set(self._role_of_values(column).tolist()) & members:
                    if (source, role) not in self.roles.unpaired:
                        reads = position[column]
                        edges[source].append((role, reads, True))
                        edges[role].append((source, reads, False))
        first = cluster[0]
        order = {first: np.arange(len(made[first, 0]))}
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

    # -- cells --

    def _groups(self, units: list[_Unit]) -> list[CallGroup]:
        outside = np.zeros(self.rows.num_values, bool)
        for output in self.rows.outputs:
            outside[output.refs.reshape(-1)] = True
        for unit in units:
            for column in unit.columns.values():
                outside[_refs(column)] = True
        groups = [self._group(unit, outside) for unit in units]
        return [g for g in groups if g is not None]

    def _group(self, unit: _Unit, outside: np.ndarray) -> CallGroup | None:
        inputs, slots = self._inputs(unit)
        params: dict[str, int] = {}
        ops = []
        declared = []
        for k, node in enumerate(unit.nodes):
            operands = []
            for j, operand in enumerate(node.operands):
                wire = unit.inner[k][j]
                if wire is not None:
                    operands.append(Operand("op", *wire))
                elif isinstance(operand, ParamRef):
                    if operand.name not in params:
                        declared.append(Param(operand.name, operand.type))
                    operands.append(Operand("param", params.setdefault(operand.name, len(params))))
                elif isinstance(operand, ScalarRef):
                    operands.append(Operand("scalar", value=operand.value))
                else:
                    operands.append(Operand("input", slots[k, j]))
            ops.append(CellOp(node.op, tuple(operands), node.attrs, node.types, node.origin))
        outputs = []
        made = []
        for (k, port), values in unit.outputs.items():
            if outside[values].any():
                self.roles.note(self.roles.escaping, (unit.roles[k], port), unit.roles[k])
            if (unit.roles[k], port) in self.roles.escaping:
                outputs.append(Operand("op", k, port))
                made.append(values)
        if not outputs:
            return None
        specs = tuple(
            CellInput(f"x{i}", self._input_type(unit, i, c, slots), isinstance(c, RaggedRefs))
            for i, c in enumerate(inputs)
        )
        cell = Cell("", specs, tuple(declared), tuple(ops), tuple(outputs), unit.recurrent)
        return CallGroup(cell, inputs, made)

    def _input_type(
        self, unit: _Unit, index: int, column: Refs | RaggedRefs, slots: dict[tuple[int, int], int]
    ) -> RowType:
        refs = _refs(column)
        if len(refs):
            return self.rows.type_of(int(refs[0]))
        return _ragged_type(unit, index, slots)

    def _inputs(self, unit: _Unit) -> tuple[list[Refs | RaggedRefs], dict[tuple[int, int], int]]:
        """Columns of the unit's inputs, one for slots that always read the same value."""
        columns: list[Refs | RaggedRefs] = []
        owners: list[Slot] = []
        slots: dict[tuple[int, int], int] = {}
        for (k, j), column in unit.columns.items():
            slot = (unit.roles[k], j)
            for i, other in enumerate(columns):
                if _same(column, other) and (owners[i], slot) not in self.roles.distinct:
                    slots[k, j] = i
                    break
                if not _same(column, other) and (owners[i], slot) not in self.roles.distinct:
                    self.roles.distinct.add((owners[i], slot))
                    self.roles.version += (
                        owners[i][0] in self.roles.old and slot[0] in self.roles.old
                    )
            else:
                slots[k, j] = len(columns)
                columns.append(column)
                owners.append(slot)
        return columns, slots


def _ragged_type(unit: _Unit, index: int, slots: dict[tuple[int, int], int]) -> RowType:
    """Row type of an input whose vectors are all empty: what its reduction makes."""
    k, _ = next(slot for slot, i in slots.items() if i == index)
    return unit.nodes[k].types[0]


def _refs(column: object) -> Refs:
    if isinstance(column, RaggedRefs):
        return column.refs
    assert isinstance(column, np.ndarray)
    return column


def _concat(columns: Sequence[object]) -> Refs | RaggedRefs:
    first = columns[0]
    if isinstance(first, RaggedRefs):
        lengths = np.concatenate([np.diff(c.offsets) for c in columns if isinstance(c, RaggedRefs)])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return RaggedRefs(offsets, np.concatenate([_refs(c) for c in columns]))
    return np.concatenate([_refs(c) for c in columns])


def _made(node: RowNode, port: int) -> Refs:
    return np.arange(node.bases[port], node.bases[port] + node.n, dtype=np.int64)


def _same(a: Refs | RaggedRefs, b: Refs | RaggedRefs) -> bool:
    if isinstance(a, RaggedRefs) or isinstance(b, RaggedRefs):
        return (
            isinstance(a, RaggedRefs)
            and isinstance(b, RaggedRefs)
            and np.array_equal(a.offsets, b.offsets)
            and np.array_equal(a.refs, b.refs)
        )
    return np.array_equal(a, b)


def extract(rows: RowGraph, roles: Roles, *, late: bool = False) -> CallGraph:
    """Group a request's row operations into calls of cells; `roles` is kept by the model. `late`:
    what only later cells read is computed in them.
    """
    return Extraction(rows, roles, late=late).run()
