"""The plan cache: structures whose plans are known, and families of them.

Duty: keep entries by structure while there is room, and derive call graphs of sizes between traced
ones (`cellc.family`). Filled and read by `cellc.compiler`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from cellc.calls import CallGraph
from cellc.family import Family
from cellc.legs import Entry
from cellc.request import Structure

MAX_PLANS = 16384


@dataclass
class _FamilyState:
    family: Family = field(default_factory=Family)
    entry: Entry | None = None
    shaped: bool = True  # may sizes between traced ones be derived?


class PlanCache(OrderedDict[Hashable, Entry]):
    """Entries by structure key."""

    def __init__(self) -> None:
        super().__init__()
        self._families: dict[Hashable, _FamilyState] = {}

    def keep(self, key: Hashable, entry: Entry) -> None:
        """The oldest entry goes where there is no room."""
        self[key] = entry
        if len(self) > MAX_PLANS:
            self.popitem(last=False)

    def forget(self) -> None:
        """All entries, and what was learned of families."""
        self.clear()
        self._families.clear()

    # -- families --

    def learn(self, structure: Structure, graph: CallGraph, entry: Entry, may_branch: bool) -> None:
        """A structure was traced. `may_branch`: another size might take another path."""
        state = self._families.setdefault(structure.family, _FamilyState())
        state.family.learn(structure.sizes, graph)
        if state.entry is not None:
            same = state.entry.result == entry.result
            state.shaped = state.shaped and same
        state.shaped = state.shaped and not may_branch
        state.entry = entry

    def derive(self, structure: Structure) -> tuple[CallGraph, Entry] | None:
        """A structure's call graph, and an entry of its family: as its own but for the plan."""
        state = self._families.get(structure.family)
        if state is None or state.entry is None or not state.shaped:
            return None
        graph = state.family.predict(structure.sizes, structure.shapes)
        return (graph, state.entry) if graph is not None else None
