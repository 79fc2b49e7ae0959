"""Dependencies: which calls wait for which.

Duty: from call groups, numbered, the chains of calls that follow each other, whom a call tells, and
how deep each cell lies. By numpy alone. Used by `cellc.planner`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellc.arithmetic import Arithmetic, by_source
from cellc.calls import CallGraph
from cellc.errors import VerifyError
from cellc.plan import I64
from cellc.rows import RaggedRefs


class Dependencies:
    """Of the calls of `graph`: `calls_of[g]` are the numbers of group g's, `group_of` is a call's
    group, `producer` the call that makes a value (-1: none).
    """

    def __init__(
        self, graph: CallGraph, calls_of: Sequence[I64], group_of: I64, producer: I64
    ) -> None:
        self._graph, self._group_of = graph, group_of
        self._total = len(group_of)
        self._sources, self._targets = _edges(graph, calls_of, producer)
        same = group_of[self._sources] == group_of[self._targets]
        self._chained = (self._sources == self._targets - 1) & same

    def chains(self) -> tuple[I64, I64]:
        """For every call: length of the chain from it on, and how many reads link it to the call
        before.
        """
        total = self._total
        edges = np.bincount(self._targets[self._chained], minlength=total)
        ends = np.flatnonzero(np.append(edges[1:] == 0, True)) if total else np.zeros(0, np.int64)
        chain = ends[np.searchsorted(ends, np.arange(total))] - np.arange(total) + 1
        return chain, edges

    def successors(self) -> tuple[I64, I64, I64, I64]:
        """(successors but for chains, where each call's begin, how many, what a call waits for)."""
        others = ~self._chained
        missing = np.bincount(self._targets, minlength=self._total)
        told = by_source(self._sources[others], self._targets[others], self._total)
        return *told, missing

    def depths(self, arithmetic: Arithmetic) -> list[int]:
        """A depth a cell; raises VerifyError where calls wait for each other in a circle."""
        groups, total = len(self._graph.groups), self._total
        depth, seen = arithmetic.depths(self._sources, self._targets, self._group_of, groups)
        if seen != total:
            raise VerifyError(stage="plan", message=f"{total - seen} calls wait for each other")
        return list(depth.tolist())


def _edges(graph: CallGraph, calls_of: Sequence[I64], producer: I64) -> tuple[I64, I64]:
    """(producing call, reading call) for every read of a made value."""
    sources, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for calls, group in zip(calls_of, graph.groups, strict=True):
        for column in group.inputs:
            readers = calls
            if isinstance(column, RaggedRefs):
                readers = np.repeat(calls, np.diff(column.offsets))
                column = column.refs
            made = producer[column]
            sources.append(made[made >= 0])
            targets.append(readers[made >= 0])
    return np.concatenate(sources), np.concatenate(targets)
