"""Structures: which new requests are unfolded, and the plans of those that are.

Duty: decide whether a new request is unfolded or traced by operators, plan those that are, and note
what that shows of the model: numbers that decide, reasons to trace instead. The upper half of it,
where answers lead, is `cellc.branches`; both are parts of `cellc.compiler.Compiler`.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cellc import log
from cellc.calls import CallGraph, Forest
from cellc.cell_store import CellStore
from cellc.copier import Copier
from cellc.errors import CellcError, ForwardError, UnsupportedError
from cellc.frontends.effects import asks_for_identity
from cellc.frontends.stub import CannotUnfold
from cellc.graph import Graph
from cellc.kernels.native import find_arithmetic
from cellc.launch import Backend
from cellc.legs import Entry, Result, Root, make_leg
from cellc.marks import has_marks
from cellc.modules import evaluating, named_modules, named_tensors, without_collecting
from cellc.params import Params
from cellc.passes import PassOptions
from cellc.paths import Paths
from cellc.pipeline import TRACING, Pipeline
from cellc.plan import Plan
from cellc.plan_cache import PlanCache
from cellc.planner import make_plans
from cellc.printer import print_graph
from cellc.request import Request
from cellc.skeleton import Steering
from cellc.stages import print_calls
from cellc.unfolded import Wanted
from cellc.unfolder import Steers, Unfolder, Unfolding

MAX_FAILURES = 1024  # requests of which is known that they cannot be unfolded


class Structures:
    """What is known of one model, as far as new structures need it."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        backend: Backend,
        device: torch.device,
        options: PassOptions,
    ) -> None:
        self.model, self.backend, self.device = model, backend, device
        self._lock = threading.RLock()
        self.params = Params(named_tensors(model), device)
        self.store = CellStore(backend, self.params, self._lock)
        self.pipeline = Pipeline(model, self.params, device, options, self.store)
        self.forward, self.arguments = self.pipeline.forward, self.pipeline.arguments
        self.asks = asks_for_identity(self.forward, named_modules(model).values())
        self.arguments.identity = self.asks.identity is not None
        self._stages = self.pipeline.stages
        self.plans = PlanCache()
        self.paths = Paths()
        self.paths.on = inspect.isgeneratorfunction(self.forward)
        self.counts = {"plan_hits": 0, "plans_traced": 0, "plans_derived": 0, "plans_unfolded": 0}
        self.graph: Graph | None = None  # of the last request
        self._calls: CallGraph | Forest | None = None
        self.unfolder = Unfolder(
            self.pipeline, self.forward, self.arguments.names, named_modules(model), device
        )
        if self.unfolder.reason is None:
            self.arguments.steering = Steering(everywhere=self.unfolder.numbers_stay)
        self._last: tuple[Any, Any] | None = None  # request that was unfolded
        self._unfolds = False  # was a request seen that holds structure
        self._not_unfolded: dict[Hashable, str] = {}  # requests, with why
        self._marked = has_marks(model)  # every request is unfolded

    # -- new requests --

    def cached(self, key: Hashable, *, count: bool = True) -> Entry | None:
        """The entry of a structure key that was planned already."""
        entry = self.plans.get(key)
        if entry is not None and count:
            self.counts["plan_hits"] += 1
            self.plans.used(entry)
        return entry

    def unfolds(self, request: Request) -> bool:
        """Is a new request's forward run on stubs, rather than traced by operators?"""
        if self.unfolder.reason is not None:
            return False
        if self._not_unfolded and request.key in self._not_unfolded:
            return False
        self._unfolds = self._unfolds or request.structured
        steered = self._marked or self.paths.on or bool(request.generators)
        return steered or (self._unfolds and request.nested)

    def unfold(self, requests: Sequence[Wanted]) -> bool:
        """Plan new requests at once. False where something was learned of the model that keys
        requests otherwise: flatten them again. Requests that failed are left unplanned.
        """
        with self._lock:
            steering = self.arguments.steering
            others = {id(w.request.steering): w.request for w in requests if w.request.nested}
            if steering is None or any(r.steering != steering for r in others.values()):
                return False  # another thread learned something
            before = self.unfolder.generation
            begin = time.perf_counter()
            try:
                start = self.paths.guesses((), None), self.unfolder.plain
                found, forest = self._runs(requests, start)
            except Steers as error:
                if error.place in steering:
                    self.distrust(f"numbers at {error.place} decide, and are data")
                    return False
                self._steered_by(steering, error.place)
                return False
            except CannotUnfold as error:
                self.distrust(str(error))
                return False
            if any(isinstance(run.error, TypeError) for run in found.runs) and self.read_plainly():
                return False
            try:
                self.pipeline.check_constants(forest.graph)
            except ForwardError as error:  # one by one, so that it fails alone
                for wanted in requests:
                    self._note_failure(wanted.request.key, error.reason)
                return True
            if self.unfolder.generation != before and self.plans:
                self._forget()
            self._plan_unfolded(requests, found, forest)
            self.store.keep_unfolded(self.unfolder.templates.cells())
            stats = self.unfolder.stats
            stats.seconds += time.perf_counter() - begin
            return True

    def planned_anew(self, args: Any, kwargs: Any) -> tuple[Entry, Sequence[torch.Tensor]]:
        """The entry and the tensors of a request in flight, now that its numbers decide."""
        while True:
            request = self.arguments.flatten(args, kwargs)
            entry = self.cached(request.key)
            if entry is None and self.unfold([Wanted(request, args, kwargs)]):
                entry = request.entry
                if entry is None:
                    raise self._reads_and("a request cannot be unfolded", "its numbers decide")
            if entry is not None:
                return entry, request.tensors
            if self.unfolder.reason is not None:
                raise self._reads_and(self.unfolder.reason, "its numbers decide")

    def _runs(
        self, requests: Sequence[Wanted], start: tuple[int, bool] | None = None
    ) -> tuple[Unfolding, Forest]:
        """Run forwards on stand-ins. Raises Steers and CannotUnfold."""
        if self.arguments.steering is None:
            raise CannotUnfold(self.unfolder.reason or "it cannot be unfolded")
        with TRACING, evaluating(self.model), without_collecting():
            self.unfolder.recorder.habits = self.paths.habits
            self.unfolder.templates.trim()
            found = self.unfolder.unfold(requests, self.arguments.steering, start=start)
            return found, self.unfolder.forest(found.runs, found.stamped)

    def _steered_by(self, steering: Steering, place: Hashable) -> None:
        """Numbers at a place decide: from now on they are part of a request's structure."""
        log.info("plan", f"numbers at {place} decide: they are structure")
        self.arguments.steering = replace(steering, places=steering.places | {place})
        self.unfolder.epoch += 1

    def _plan_unfolded(
        self,
        requests: Sequence[Wanted],
        found: Unfolding,
        forest: Forest,
    ) -> None:
        start = time.perf_counter()
        plans = make_plans(forest, self.store.tables, find_arithmetic())
        self.unfolder.stats.planning += time.perf_counter() - start
        self.store.number(forest.graph)
        self._calls, self.graph = forest, None
        self._last = requests[-1].args, requests[-1].kwargs
        stats = self.unfolder.stats
        count = len(found.runs)
        for run, wanted, plan in zip(found.runs, found.wanted, plans[:count], strict=True):
            if run.failed and not run.raises:
                reason = run.reason or (f"it raises {run.error!r}" if self.paths.on else None)
                if reason is not None:
                    self._note_failure(run.request.key, reason)
                continue
            if run.asked or run.generates or run.draws:
                self.paths.on = True
                shapes = _shapes_of(wanted.args, wanted.kwargs)
                root = Root(Wanted(run.request, *shapes, plain=run.plain))
                entry: Entry = make_leg(run, root, (), plan, self.unfolder.epoch)
            else:
                assert run.returned is not None
                entry = Entry(plan, Result.of(run.returned), (), self.pipeline.roles.version)
            run.request.entry = entry
            if run.error is None:
                self.plans.keep(run.request.key, entry)
            stats.requests += 1
            stats.cells += plan.num_calls
        following = iter(plans[count:])
        for stamped in found.stamped:
            result, version = Result.of(stamped.pattern.returned), self.pipeline.roles.version
            for request, plan in zip(stamped.requests, following, strict=False):
                entry = request.entry = Entry(plan, result, (), version)
                self.plans.keep(request.key, entry)
                stats.cells += plan.num_calls
            stats.requests += len(stamped.requests)
        self.counts["plans_unfolded"] += len(plans)
        self._stages.begin()
        self._stages.add("graph", self._print_traced)
        self._stages.add(
            "passes", lambda: "\n\n".join(map(print_calls, self.unfolder.templates.graphs()))
        )
        self._stages.add("plan", plans[-1])
        for plan in {plan.cells: plan for plan in plans}.values():
            self._use(plan)

    def _note_failure(self, key: Hashable, reason: str) -> None:
        if len(self._not_unfolded) >= MAX_FAILURES:
            self._not_unfolded.clear()
        self._not_unfolded[key] = reason

    def _use(self, plan: Plan) -> None:
        self.store.note_priority(plan)
        self.store.make_kernels(plan)

    def _print_traced(self) -> str:
        try:
            graph = self.traced_graph()
        except CellcError as error:  # it unfolds, but cannot be traced: too deep
            return f"# not traced: {error}"
        return print_graph(graph) if graph is not None else ""

    def traced_graph(self) -> Graph | None:
        """The graph of the last planned request's operations."""
        if self.graph is None and self._last is not None:
            args, kwargs = self._last
            names = self.arguments.leaf_names(args, kwargs)
            values = self.pipeline.values_read(args, kwargs) if self.paths.on else None
            self.graph = self.pipeline.trace(args, kwargs, names, values).graph
        return self.graph

    @property
    def calls(self) -> CallGraph | None:
        """Those of the requests that were planned last."""
        if isinstance(self._calls, Forest):
            self._calls = self._calls.whole()
        return self._calls

    # -- what was learned --

    def cache_sizes(self) -> dict[str, int]:
        """How much is kept, by kind."""
        tables = self.store.tables
        return {
            "plans": len(self.plans),
            "families": self.plans.num_families,
            "branches": len(self.paths),
            "templates": len(self.unfolder.templates),
            "memos": len(self.unfolder.recorder.memos),
            "kernels": len(self.store.kernels),
            "cells": len(tables.cells),
            "row_types": len(tables.types),
            "constants": len(tables.constants),
        }

    def distrust(self, reason: str) -> None:
        """From now on requests are traced by operators."""
        log.info("plan", f"requests are traced by operators: {reason}")
        with self._lock:
            self.unfolder.reason = reason
            self.arguments.steering = None
            self._forget()
            self.unfolder.templates.forget()
            self.store.keep_unfolded(self.unfolder.templates.cells())

    def steer(self, key: Hashable) -> bool:
        """A forward turned out to read values: from now on it is unfolded, if it can be. False
        where that was tried with this request.
        """
        if self.unfolder.reason is not None or key in self._not_unfolded:
            return False
        log.info("plan", "the forward reads values: requests run in legs")
        self.paths.on = True
        return True

    def traced_instead(self, request: Request) -> None:
        """A request that could not be unfolded was traced: so are all, if none ever could be."""
        reason = self._not_unfolded.pop(request.key, None)
        if reason is not None and self.unfolder.stats.requests == 0:
            self.distrust(reason)

    def read_plainly(self) -> bool:
        """From now on what new requests read is asked for, and no stand-in; False where it is."""
        if self.unfolder.plain or not self.unfolder.recorder.stands_in:
            return False
        log.info("plan", "numbers that are read have to be Python's own: they are asked for")
        with self._lock:
            self.unfolder.plain, self.unfolder.to_check = True, 2
            self._forget()
        return True

    def plan_anew(self) -> None:
        """Make plans again when next asked for, with all that is known of answers by now."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        """A trace changed what is known of roles: earlier plans may use other cells, so make them
        again.
        """
        log.info("plan", "roles changed: plans are made again when next asked for")
        self.plans.forget()
        self.paths.forget()

    def explained(self, error: Any, key: Hashable) -> CellcError:
        """Why a forward that reads values, or yields, could not be run."""
        reason = self.unfolder.reason or self._not_unfolded.get(key)
        if reason is None:
            return error  # type: ignore[no-any-return]
        place = str(error.origin or "").strip() or "a yield"
        return self._reads_and(reason, place)

    @staticmethod
    def _reads_and(reason: str, place: str) -> CellcError:
        """Why a forward that reads values cannot be run."""
        for words, remedy in _REMEDIES.items():
            if words in reason:
                return UnsupportedError(what=f"a forward where {reason}", remedy=remedy)
        return UnsupportedError(
            what=f"a forward that reads a value ({place}) and where {reason}",
            remedy="do what is named before the call and pass what it gives, move it into a method "
            "without reads, or return new values instead of changing old ones",
        )


_REMEDIES = {
    "numpy()": "take numbers out by item() or tolist(), write it with torch operations, or do it "
    "with what the forward returns",
    "reads a value": "the shape of what it gives depends on data: do it before the call and pass "
    "what it gives, or take a mask or torch.sort, whose results have known shapes",
}


def _shapes_of(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A copy of a request's structure, its tensors without memory."""

    def shape(leaf: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)

    return Copier(shape).call(args, kwargs)
