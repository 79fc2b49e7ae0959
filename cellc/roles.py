"""Roles: what all traces of a model have shown about its operations.

Duty: give every row operation its role, the same over all traces, and remember who reads whom and
which calls do not correspond. Kept by `cellc.compiler`, one a model; used by `cellc.extract`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from cellc.digraph import Digraph
from cellc.ops import RowType
from cellc.rows import ParamRef, RaggedRefs, Refs, RowNode, ScalarRef

Slot: TypeAlias = "tuple[int, int]"  # role, operand number


def _row_type(refs: Refs, type_of: Callable[[int], RowType]) -> RowType | None:
    return type_of(int(refs[0])) if len(refs) else None


@dataclass
class Roles:
    """What all traces of a model have shown about its roles."""

    index: dict[Hashable, int] = field(default_factory=dict)
    graph: Digraph = field(default_factory=Digraph)
    unpaired: set[tuple[int, int]] = field(default_factory=set)
    escaping: set[tuple[int, int]] = field(default_factory=set)
    distinct: set[tuple[Slot, Slot]] = field(default_factory=set)
    scalars: dict[Slot, set[str]] = field(default_factory=lambda: defaultdict(set))  # repr
    served: dict[int, list[set[int]]] = field(default_factory=lambda: defaultdict(list))
    old: set[int] = field(default_factory=set)  # roles that earlier traces had shown
    version: int = 0

    def role(self, node: RowNode, type_of: Callable[[int], RowType]) -> int:
        """`type_of` gives the row type of a value."""
        kinds = tuple(
            ("param", o.name) if isinstance(o, ParamRef)
            else ("scalar", o.dtype) if isinstance(o, ScalarRef)
            else ("ragged", _row_type(o.refs, type_of)) if isinstance(o, RaggedRefs)
            else ("row", _row_type(o, type_of))
            for o in node.operands
        )  # fmt: skip
        return self._number((node.point, node.op, node.attrs, node.types, kinds))

    def _number(self, key: Hashable) -> int:
        return self.index.setdefault(key, len(self.index))

    def refined(self, role: int, weighted: frozenset[int]) -> int:
        """A role without weights, apart for occurrences that serve different weights.

        The same line may stand in a loop over layers: its occurrences there read results of
        disjoint sets of weighted roles, and belong to different cells. Sets that overlap belong
        together: a first step may read less, or more, than later ones.
        """
        groups = self.served[role]
        if not weighted:
            return role
        found = [k for k, group in enumerate(groups) if group & weighted]
        if not found:
            groups.append(set(weighted))
            found = [len(groups) - 1]
        for k in found[1:]:
            groups[found[0]] |= groups[k]
        groups[found[0]] |= weighted
        return role if found[0] == 0 else self._number((role, "serving", found[0]))

    def connect(self, roles: Iterable[int], edges: Iterable[tuple[int, int]]) -> None:
        """Add a request's live roles and who reads whom. New roles alone change nothing for old
        ones.
        """
        self.old = set(self.graph)
        for role in roles:
            self.graph.add_node(role)
        for u, v in edges:
            if not self.graph.has_edge(u, v):
                self.graph.add_edge(u, v)
                self.version += v in self.old

    def note(self, known: set[tuple[int, int]], item: tuple[int, int], *about: int) -> None:
        """Add a fact about roles; one about old roles changes what they are cut into."""
        if item not in known:
            known.add(item)
            self.version += all(role in self.old for role in about)
