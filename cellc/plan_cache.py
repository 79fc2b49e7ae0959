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

MAX_PLANS = 1 << 14
MAX_CALLS = 1 << 21  # of all plans kept: about 300 bytes each
MAX_FAMILIES = 1 << 10
MAX_SAMPLES = 1 << 9  # of one family


@dataclass
class _FamilyState:
    family: Family = field(default_factory=Family)
    entry: Entry | None = None
    shaped: bool = True  # may sizes between traced ones be derived?


class PlanCache(OrderedDict[Hashable, Entry]):
    """Entries by structure key."""

    def __init__(self) -> None:
        super().__init__()
        self._families: OrderedDict[Hashable, _FamilyState] = OrderedDict()
        self._calls = 0  # of all plans
        self._used: set[int] = set()  # ids of entries, since they were last looked at
        self.dropped = 0  # moves when an entry goes: one that was found before may be gone

    @property
    def num_families(self) -> int:
        return len(self._families)

    def used(self, entry: Entry) -> None:
        """It was asked for: others go before it. (Moving its key would take a hash of it.)"""
        self._used.add(id(entry))

    def keep(self, key: Hashable, entry: Entry) -> None:
        """Where there is no room, the oldest entry goes that nobody asked for lately."""
        if self.setdefault(key, entry) is not entry:
            self._drop(key)
            self[key] = entry
        self._calls += entry.plan.num_calls
        while len(self) > MAX_PLANS or (self._calls > MAX_CALLS and len(self) > 1):
            oldest, found = next(iter(self.items()))
            if id(found) in self._used:
                self._used.remove(id(found))
                self.move_to_end(oldest)
            else:
                self._drop(oldest)

    def _drop(self, key: Hashable) -> None:
        entry = self.pop(key, None)
        if entry is not None:
            self.dropped += 1
            self._calls -= entry.plan.num_calls
            self._used.discard(id(entry))

    def refuse(self, structure: Structure) -> None:
        """Forget a structure, and what its family showed."""
        self._drop(structure.key)
        self._families.pop(structure.family, None)

    def forget(self) -> None:
        """All entries, and what was learned of families."""
        self.clear()
        self.dropped += 1
        self._calls = 0
        self._used.clear()
        self._families.clear()

    # -- families --

    def learn(self, structure: Structure, graph: CallGraph, entry: Entry, may_branch: bool) -> None:
        """A structure was traced. `may_branch`: another size might take another path."""
        state = self._family(structure)
        if state is None or len(state.family) >= MAX_SAMPLES:
            state = self._families[structure.family] = _FamilyState()
            if len(self._families) > MAX_FAMILIES:
                self._families.popitem(last=False)
        state.family.learn(structure.sizes, graph)
        if state.entry is not None:
            same = state.entry.result == entry.result
            state.shaped = state.shaped and same
        state.shaped = state.shaped and not may_branch
        state.entry = entry

    def _family(self, structure: Structure) -> _FamilyState | None:
        state = self._families.get(structure.family)
        if state is not None:
            self._families.move_to_end(structure.family)
        return state

    def derive(self, structure: Structure) -> tuple[CallGraph, Entry] | None:
        """A structure's call graph, and an entry of its family: as its own but for the plan."""
        state = self._family(structure)
        if state is None or state.entry is None or not state.shaped:
            return None
        graph = state.family.predict(structure.sizes, structure.shapes)
        return (graph, state.entry) if graph is not None else None
