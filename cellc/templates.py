"""Templates: segments as call graphs.

Duty: trace, lower, extract and rewrite a segment once, as if it were a model of its own, and keep
what came of it: its instances in requests are copies with other values (`cellc.forests`). Used by
`cellc.unfolder`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from cellc.calls import CallGraph
from cellc.forests import Template
from cellc.frontends.segments import Segment
from cellc.frontends.stub import CannotUnfold, StubType
from cellc.frontends.tracing import Trace
from cellc.ops import RowType
from cellc.roles import Roles
from cellc.rows import RowGraph


class Tools(Protocol):
    """What the compiler lends: how one stretch of operations becomes a call graph."""

    @property
    def shown(self) -> int: ...

    def trace_alone(self, run: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Trace: ...

    def lower_alone(self, traced: Trace, stacks: Sequence[bool] | int) -> RowGraph: ...

    def extract_alone(self, rows: RowGraph, roles: Roles) -> CallGraph: ...

    def rewrite_alone(self, calls: CallGraph) -> None: ...

    def constant_value(self, key: Hashable, type: RowType) -> bool | int | float: ...


MAX_TEMPLATES = 1 << 12


class Templates:
    """Templates of one model's segments."""

    def __init__(self, tools: Tools, device: torch.device) -> None:
        self.tools, self.device = tools, device
        self.generation = 0  # of what was learned: older plans hold other cells
        self._templates: dict[Hashable, Template] = {}
        self._live: dict[Hashable, Template] = {}
        self._roles: dict[Hashable, Roles] = {}  # by places in the code: alike whatever their sizes

    def __bool__(self) -> bool:
        """Are there any in use?"""
        return bool(self._live)

    def __len__(self) -> int:
        return len(self._templates)

    def trim(self) -> None:
        """Forget all where there are too many: those in use are made again, the same."""
        if len(self._templates) > MAX_TEMPLATES:
            self._templates.clear()
            self._live.clear()

    def escapes(self, segment: Segment) -> None:
        """A value of a segment is read elsewhere, which was not known."""
        self.generation += segment.sites in self._roles  # there are plans without it

    def of(self, segment: Segment) -> tuple[Template, bool]:
        """(a segment's template, was it made now)."""
        escaping = tuple(sorted(segment.escaping))
        recurrent = any(op.component for op in segment.ops)
        key = (
            tuple(op.number for op in segment.ops),
            segment.wirings,
            escaping,
            recurrent,
        )
        roles = self._roles.setdefault(segment.sites, Roles())
        template = self._templates.get(key)
        versions = roles.version, self.tools.shown
        stale = template is None or template.versions != versions
        if template is None or stale:
            if template is not None:
                self.generation += 1
            template = self._made(segment, escaping, recurrent, roles)
            template = self._templates[key] = replace(
                template, versions=(roles.version, self.tools.shown)
            )
        self._live[key[:2]] = template
        return template, stale

    def _made(
        self, segment: Segment, escaping: Sequence[int], recurrent: bool, roles: Roles
    ) -> Template:
        def run(*tensors: Any) -> list[Any]:
            made = segment.compute(tensors)
            return [made[i] for i in escaping]

        kinds = segment.external_types()
        traced = self.tools.trace_alone(run, [example(t, self.device) for t in kinds])
        stacks = [segment.outputs[i].rows >= 0 for i in escaping]
        lowered = self.tools.lower_alone(traced, stacks)
        graph = self.tools.extract_alone(lowered, roles)
        if recurrent:
            for group in graph.groups:
                group.cell = replace(group.cell, recurrent=True)
        self.tools.rewrite_alone(graph)
        rows = np.cumsum([0, *[max(1, o.rows) for o in segment.outputs]]).tolist()
        results = []
        for i, out in zip(escaping, graph.outputs, strict=True):
            expected = 1 if segment.outputs[i].rows < 0 else segment.outputs[i].rows
            if out.refs.size != expected:
                raise CannotUnfold(f"{segment} gives other rows than its parts")
            results += [(rows[i] + k, int(v)) for k, v in enumerate(out.refs.reshape(-1))]
        inner = [v for g in graph.groups for column in g.outputs for v in column.tolist()]
        inputs = [source.base for source in graph.data]
        if any(s.count != 1 for s in graph.data) or len(inputs) != len(kinds):
            raise CannotUnfold(f"{segment} takes its inputs apart")
        constants = [(value, key) for key, value in graph.constants.items()]
        return Template(graph, inputs, constants, results, np.array(inner, np.int64))

    def forget(self) -> None:
        """Its cells are not used any more."""
        self._live.clear()

    def graphs(self) -> list[CallGraph]:
        """Call graphs of the segments that are in use."""
        return [template.graph for template in self._live.values()]

    def cells(self) -> set[str]:
        """Keys of the cells that plans made now would hold."""
        return {g.cell.key for t in self._live.values() for g in t.graph.groups}


def example(kind: StubType, device: torch.device) -> torch.Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device=device)
