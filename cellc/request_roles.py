"""Request roles: the operations of one request and their roles.

Duty: give every operation of a `RowGraph` its role, drop what no output needs, and tell the model's
`Roles` who reads whom. The first step of `cellc.extract`; what the later ones look things up in.
"""

from __future__ import annotations

import numpy as np

from cellc.ops import RowType
from cellc.roles import Roles
from cellc.rows import ParamRef, RaggedRefs, Refs, RowGraph, RowNode, ScalarRef
from cellc.units import refs_of


class RequestRoles:
    """One request's operations by role. Numbers that differ within a role become constant rows of
    `rows`.
    """

    def __init__(self, rows: RowGraph, roles: Roles) -> None:
        self.rows, self.roles = rows, roles
        self.node_of, self.port_of, _ = rows.producers()
        self.role_of = self._roles()  # of every node
        self.live = self._live()
        self._lift_scalars()
        self.edges = self._connect()  # of roles, (who makes, who reads)

    # -- looking up --

    def producers(self, operand: object) -> list[int]:
        """Nodes that make what an operand reads."""
        if not isinstance(operand, (np.ndarray, RaggedRefs)):
            return []
        refs = refs_of(operand)
        if len(refs) == 1:
            source = int(self.node_of[refs[0]])
            return [source] if source >= 0 else []
        return [s for s in np.unique(self.node_of[refs]).tolist() if s >= 0]

    def of_values(self, refs: Refs) -> Refs:
        """Roles that make these values; -1 for data and constants."""
        sources = np.unique(self.node_of[refs])
        return np.array([self.role_of[s] if s >= 0 else -1 for s in sources.tolist()])

    def lanes(self, refs: Refs, node: int) -> bool:
        """Is this column exactly one port of `node`, call by call?"""
        if len(refs) == 1:
            return self.rows.nodes[node].n == 1
        if len(refs) != self.rows.nodes[node].n:
            return False
        base = self.rows.nodes[node].bases[int(self.port_of[refs[0]])]
        return int(refs[0]) == base and bool((np.diff(refs) == 1).all())

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
                near = {weighted[s] for o in node.operands for s in self.producers(o)}
                weighted.append(near.pop() if len(near) == 1 else frozenset().union(*near))
                role = self.roles.refined(role, weighted[-1])
            found.append(role)
        return found

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
                            needed[refs_of(operand)] = True
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
        self.node_of, self.port_of, _ = self.rows.producers()

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

    def _connect(self) -> set[tuple[int, int]]:
        edges: set[tuple[int, int]] = set()
        live = {role for role, is_live in zip(self.role_of, self.live, strict=True) if is_live}
        for i, node in enumerate(self.rows.nodes):
            if self.live[i]:
                sources = {s for operand in node.operands for s in self.producers(operand)}
                edges |= {(self.role_of[s], self.role_of[i]) for s in sources}
        self.roles.connect(live, edges)
        return edges
