"""Flow: who reads whose values, in and between segments.

Duty: learn from recorded runs who reads what of whom. A place that feeds itself is a recurrence;
what segments give to others is what their templates return. Used by `cellc.unfolder`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellc.digraph import Digraph
from cellc.frontends.segments import Segment
from cellc.frontends.stub import StubType
from cellc.frontends.unfold import Recorder
from cellc.templates import Templates
from cellc.unfolded import Unfolded


class Flow:
    """What all runs of a model have shown."""

    def __init__(self, recorder: Recorder, templates: Templates) -> None:
        self.recorder, self.templates = recorder, templates
        self._edges: set[tuple[int, int]] = set()  # of places: (who makes, who reads)
        # of the last runs: for every row that an operation made, the number of that output, which
        # are counted through all segments
        self._output_of = self._first_output = np.zeros(0, np.int64)

    def learn(self, runs: Sequence[Unfolded]) -> bool:
        """Take in who feeds whom, and which values are read elsewhere; True if nothing is new."""
        recorder = self.recorder
        total = recorder.next_row
        rows_of = [segment.num_rows for segment in recorder.used]
        first = self._first_output = np.cumsum([0, *rows_of])
        maker = np.zeros(total, np.int64)  # its place in the code, counted from 1
        output_of = self._output_of = np.full(total, -1, np.int64)
        for segment, start in zip(recorder.used, first.tolist(), strict=False):
            _, made = segment.instances()
            rows = made[:, None] + np.arange(segment.num_rows)
            maker[rows] = np.repeat(
                [op.site + 1 for op in segment.ops], [op.num_rows for op in segment.ops]
            )
            output_of[rows] = np.arange(start, start + segment.num_rows)
        edges: set[tuple[int, int]] = set()
        read = np.zeros(first[-1] + 1, bool)  # outputs; the last stands for rows of no operation
        for segment in recorder.used:
            reads, _ = segment.instances()
            for op, wiring in zip(segment.ops, segment.wirings, strict=True):
                for w in wiring:
                    if w >= 0:
                        edges.add((self._site_at(segment, w), op.site))
                    else:
                        column = reads[:, ~w]
                        makers = np.flatnonzero(np.bincount(maker[column[column >= 0]])[1:])
                        edges.update((m, op.site) for m in makers.tolist())
            read[output_of[reads[reads >= 0]]] = True
        rows_out = [
            r for run in runs for given in run.given for rows, _ in given.tensors for r in rows
        ]
        rows_out += [question.row for run in runs for question in run.asked]
        read[output_of[[r for r in rows_out if r >= 0]]] = True
        stable = True
        for number in np.flatnonzero(read[:-1]).tolist():
            segment, offset = self._place_of(number)
            output = _output_of(segment, offset)
            if output not in segment.escaping:
                segment.escaping.add(output)
                self.templates.escapes(segment)
        if not edges <= self._edges:
            self._edges |= edges
            stable = not self._components()
        return stable

    @staticmethod
    def _site_at(segment: Segment, row: int) -> int:
        for op in segment.ops:
            if row < op.num_rows:
                return op.site
            row -= op.num_rows
        raise AssertionError(row)

    def _components(self) -> bool:
        """Find the places in the code that feed themselves; True if that changed."""
        graph = Digraph(self._edges)
        component: dict[int, int] = {}
        for members in graph.components():
            if len(members) > 1 or any(graph.has_edge(m, m) for m in members):
                component.update(dict.fromkeys(members, 1 + min(members)))
        changed = False
        for op in self.recorder.all_ops:
            if op.component != component.get(op.site, 0):
                op.component, changed = component.get(op.site, 0), True
        self.recorder.components = component
        if changed:
            for op in self.recorder.all_ops:
                op.alone = None
            self.recorder.roots.clear()
            self.recorder.memos.clear()
            self.recorder.sites.clear()
            self.templates.forget()
            self.templates.generation += 1
        return changed

    def _place_of(self, number: int) -> tuple[Segment, int]:
        """The segment of an output, and where it is among its rows."""
        k = int(np.searchsorted(self._first_output, number, "right")) - 1
        return self.recorder.used[k], number - int(self._first_output[k])

    def type_of(self, row: int) -> StubType | None:
        """Type of a row that an operation made, where its value is kept."""
        if self._output_of[row] < 0:
            return None
        segment, offset = self._place_of(int(self._output_of[row]))
        output = _output_of(segment, offset)
        if output not in segment.escaping:
            return None
        kind, count = segment.outputs[output]
        return kind if count < 0 else StubType.of(kind.shape[1:], kind.dtype, kind.device)


def _output_of(segment: Segment, row: int) -> int:
    for i, out in enumerate(segment.outputs):
        if row < max(1, out.rows):
            return i
        row -= max(1, out.rows)
    raise AssertionError(row)
