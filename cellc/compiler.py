"""The compiler: from a request never seen to a plan, and from a cell to a kernel.

Duty: keep, for one model, everything that is learned from traced requests: roles, cells, plans by
structure, families of structures. Comes in from `cellc.compiled`: requests; goes out: plans and
kernels, to `cellc.engine`.

A structure never seen is *derived* from its family, *unfolded* (`cellc.structures`), or *traced* by
operators, here: `cellc.pipeline` makes its calls, `cellc.planner` their plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cellc.branches import Branches
from cellc.calls import CallGraph
from cellc.errors import UnsupportedError
from cellc.garbage import put_off
from cellc.launch import Backend
from cellc.legs import Entry, Result
from cellc.modules import named_tensors
from cellc.passes import PassOptions
from cellc.plan import Plan
from cellc.planner import make_plan
from cellc.request import Structure
from cellc.stages import Stage


class Compiler(Branches):
    """Everything cellc knows about one model."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        backend: Backend,
        device: torch.device,
        options: PassOptions,
    ) -> None:
        super().__init__(model, backend, device, options)
        self._weights = _forms(named_tensors(model))
        self.tables, self.kernel = self.store.tables, self.store.kernel
        self.cells, self.by_number = self.store.cells, self.store.by_number
        self.kernels, self.priority = self.store.kernels, self.store.priority
        self.record_lengths = self.store.record_lengths

    def entry(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The planned structure of a request: cached, derived from its family, or traced now."""
        with self._lock:
            entry = self.plans.get(structure.key)
            if entry is None:
                entry = self.derived(structure) or self.traced(structure, args, kwargs)
                self.plans.keep(structure.key, entry)
            return entry

    def known(self, args: tuple[Any, ...]) -> Entry | None:
        """The entry of a call with positional arguments and nothing but tensors, if it has one."""
        if self.arguments.identity or not self.arguments.fits(len(args)):
            return None
        key: list[Any] = [len(args)]
        for x in args:
            if type(x) is not torch.Tensor:
                return None
            key.append((x.shape, x.dtype))
        return self.cached(tuple(key))

    def derived(self, structure: Structure) -> Entry | None:
        """From sizes of its family that were traced."""
        found = self.plans.derive(structure)
        if found is None:
            return None
        graph, entry = found
        self.counts["plans_derived"] += 1
        return replace(entry, plan=self._plan(graph))

    def traced(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """By operators."""
        return put_off(lambda: self._traced(structure, args, kwargs))

    def _traced(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        names = self.arguments.leaf_names(args, kwargs)
        roles = self.pipeline.roles
        before = roles.version, self.pipeline.shown
        traced, graph = self.pipeline.calls(args, kwargs, names)
        if (roles.version, self.pipeline.shown) != before and self.plans:
            self._forget()
        self._calls, self.graph = graph, traced.graph
        self.counts["plans_traced"] += 1
        kept, spec = traced.outputs
        bare = (
            spec == pytree.treespec_leaf() if hasattr(pytree, "treespec_leaf") else spec.is_leaf()
        )
        one = bare and bool(kept) and kept[0][0] == "t"
        plan = self._plan(graph)
        self._stages.add("plan", plan)
        self.store.make_kernels(plan)
        result = Result(tuple(kept), None if one else spec)
        entry = Entry(plan, result, tuple(names), roles.version)
        self.plans.learn(structure, graph, entry, traced.may_branch)
        return entry

    def _plan(self, graph: CallGraph) -> Plan:
        self.pipeline.check_constants(graph)
        plan = make_plan(graph, self.tables)
        self.store.number(graph)
        self.store.note_priority(plan)
        return plan

    @property
    def stages(self) -> list[Stage]:
        """Every step of the last request."""
        return self._stages.all

    def own_result(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model itself gives, on a copy of the request on the device."""
        return self.pipeline.own_result(args, kwargs)

    def output_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
        """Shapes of the returned leaves (() where one is no tensor), from a trace on shapes."""
        traced = self.pipeline.trace(args, kwargs, self.arguments.leaf_names(args, kwargs))
        kept, _ = traced.outputs
        graph = traced.graph
        values = [graph.outputs[v] if kind == "t" else None for kind, v in kept]
        return [graph.node(v[0]).outputs[v[1]][0] if v is not None else () for v in values]

    def refresh(self) -> None:
        """The weights changed: take them again, keep cells; kernels repack."""
        with self._lock:
            tensors = named_tensors(self.model)
            if _forms(tensors) != self._weights:
                raise UnsupportedError(
                    what="refresh after weights changed their names, shapes or dtypes",
                    remedy="call cellc.compile again",
                )
            self.params.base.update(tensors)
            self.params.refresh()
            self.kernels.clear()
            if self.pipeline.reads_weights:
                self._forget()


def _forms(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
