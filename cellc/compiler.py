"""The compiler: from a request never seen to a plan, and from a cell to a kernel.

Duty: keep, for one model, everything that is learned from traced requests: roles, cells, plans by
structure, families of structures. Comes in from `cellc.compiled`: requests; goes out: plans and
kernels, to `cellc.engine`.

The life of a structure: `trace` (frontends.tracer), `lower` (frontends.lower), `extract`, `passes`,
`plan`; each leaves a printable stage.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cellc import env, log, passes, verify
from cellc.calls import CallGraph, Forest
from cellc.cells import Cell
from cellc.errors import CellcError, ForwardError, RequestError, UnsupportedError
from cellc.extract import extract
from cellc.family import Family, same_graph
from cellc.forests import Unfolded, Wanted
from cellc.frontends.lower import lower
from cellc.frontends.reads import Answer
from cellc.frontends.stub import CannotUnfold
from cellc.frontends.tracer import Trace, reading, trace
from cellc.graph import Graph
from cellc.kernels.eager import EagerBackend
from cellc.launch import Backend, Kernel
from cellc.legs import Branch, Entry, Result, Root, make_branch, make_leg
from cellc.marks import has_marks
from cellc.modules import (
    evaluating,
    module_names,
    named_modules,
    named_tensors,
    without_collecting,
)
from cellc.ops import RowType
from cellc.params import Params
from cellc.paths import Ask, Paths, Replan
from cellc.plan import Plan, Tables, record_length
from cellc.planner import make_plan, make_plans
from cellc.printer import print_cell, print_graph
from cellc.request import Arguments, Request, Structure, describe, kind_of, unlike
from cellc.roles import Roles
from cellc.rows import RowGraph
from cellc.skeleton import Copier, Steering
from cellc.state import constant_row
from cellc.unfolder import Steers, Unfolder

MAX_PLANS = 16384
MAX_FAILURES = 1024  # requests of which is known that they cannot be unfolded
_CHANNELS = {
    "graph": "graph",
    "rows": "graph",
    "extract": "cells",
    "passes": "cells",
    "plan": "plan",
}

_TRACING = threading.RLock()  # tracing turns modules to eval mode, which others must not see


@dataclass
class Stage:
    """One step of the last traced request, as text."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass
class _FamilyState:
    family: Family = field(default_factory=Family)
    entry: Entry | None = None
    shaped: bool = True  # may sizes between traced ones be derived?


class Compiler:
    """Everything cellc knows about one model."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        backend: Backend,
        device: torch.device,
        options: passes.PassOptions,
    ) -> None:
        self.model, self.backend, self.device = model, backend, device
        self.forward = model.forward if isinstance(model, nn.Module) else model
        self.arguments = Arguments(self.forward)
        self.params = Params(named_tensors(model), device)
        self._weights = _forms(named_tensors(model))
        self.tables = Tables()
        self.cells: dict[str, Cell] = {}  # by key
        self.kernels: dict[int, Kernel] = {}  # by cell number
        self.by_number: dict[int, Cell] = {}
        self.priority: dict[int, int] = {}
        self.record_lengths: dict[int, int] = {}
        self.graph: Graph | None = None
        self.calls: CallGraph | None = None
        self.stages: list[Stage] = []
        self.counts = {"plan_hits": 0, "plans_traced": 0, "plans_derived": 0, "plans_unfolded": 0}
        self.reads_weights = False
        self._options = options
        self._roles = Roles()
        self._data_points: set[Hashable] = set()
        self._rewritten: dict[str, Cell] = {}
        self._plans: OrderedDict[Hashable, Entry] = OrderedDict()
        self._families: dict[Hashable, _FamilyState] = {}
        self._good: dict[str, tuple[Any, ...]] | None = None  # kinds of arguments that worked
        self._lock = threading.RLock()
        self.paths = Paths()
        self.paths.on = inspect.isgeneratorfunction(self.forward)
        self.unfolder = Unfolder(
            self, self.forward, self.arguments.names, named_modules(model), device
        )
        if self.unfolder.reason is None:
            self.arguments.steering = Steering(everywhere=self.unfolder.numbers_stay)
        self._last: tuple[Any, Any] | None = None  # request that was unfolded
        self._unfolds = False  # was a request seen that holds structure
        self._not_unfolded: dict[Hashable, str] = {}  # requests, with why
        self._marked = has_marks(model)  # every request is unfolded
        self._unfolded_cells: set[str] = set()

    # -- plans --

    def entry(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The planned structure of a request: cached, derived from its family, or traced now."""
        with self._lock:
            entry = self._plans.get(structure.key)
            if entry is None:
                entry = self._derived(structure) or self._traced(structure, args, kwargs)
                self._plans[structure.key] = entry
                if len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
            return entry

    def cached(self, key: Hashable, *, count: bool = True) -> Entry | None:
        """The entry of a structure key that was planned already."""
        entry = self._plans.get(key)
        if entry is not None and count:
            self.counts["plan_hits"] += 1
        return entry

    def known(self, args: tuple[Any, ...]) -> Entry | None:
        """The entry of a call with all arguments given and nothing but tensors, if it has one."""
        if not self.arguments.takes(len(args)):
            return None
        key: list[Any] = [len(args)]
        for x in args:
            if type(x) is not torch.Tensor:
                return None
            key.append((x.shape, x.dtype))
        return self.cached(tuple(key))

    # -- unfolding --

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
            if steering is None or any(
                w.request.steering != steering for w in requests if w.request.nested
            ):
                return False  # another thread learned something
            before = self.unfolder.generation
            start = time.perf_counter()
            try:
                with _TRACING, evaluating(self.model), without_collecting():
                    self.unfolder.recorder.habits = self.paths.habits
                    guesses, plain = self.paths.guesses((), None), self.unfolder.plain
                    runs = self.unfolder.unfold(
                        [w._replace(guesses=guesses, plain=plain) for w in requests],
                        steering,
                    )
                    forest = self.unfolder.forest(runs)
            except Steers as error:
                if error.place in steering:
                    self.distrust(f"numbers at {error.place} decide, and are data")
                    return False
                self._steered_by(steering, error.place)
                return False
            except CannotUnfold as error:
                self.distrust(str(error))
                return False
            if any(isinstance(run.error, TypeError) for run in runs) and self.read_plainly():
                return False
            try:
                self._check_constants(forest.graph)
            except ForwardError as error:  # one by one, so that it fails alone
                self._not_unfolded.update((w.request.key, error.reason) for w in requests)
                return True
            if self.unfolder.generation != before and self._plans:
                self._forget()
            self._plan_unfolded(requests, runs, forest)
            self._drop_cells()
            stats = self.unfolder.stats
            stats.seconds += time.perf_counter() - start
            return True

    def _steered_by(self, steering: Steering, place: Hashable) -> None:
        """Numbers at a place decide: from now on they are part of a request's structure."""
        log.info("plan", f"numbers at {place} decide: they are structure")
        self.arguments.steering = replace(steering, places=steering.places | {place})
        self.unfolder.epoch += 1

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

    def traced_instead(self, request: Request) -> None:
        """A request that could not be unfolded was traced: so are all, if none ever could be."""
        reason = self._not_unfolded.pop(request.key, None)
        if reason is not None and self.unfolder.stats.requests == 0:
            self.distrust(reason)

    # -- forwards that read values --

    def explained(self, error: Any, key: Hashable) -> CellcError:
        """Why a forward that reads values, or yields, could not be run."""
        reason = self.unfolder.reason or self._not_unfolded.get(key)
        if reason is None:
            return error  # type: ignore[no-any-return]
        place = str(error.origin or "").strip() or "a yield"
        return self._reads_and(reason, place)

    def plan_anew(self) -> None:
        """Make plans again when next asked for, with all that is known of answers by now."""
        with self._lock:
            self._forget()

    def steer(self, key: Hashable) -> bool:
        """A forward turned out to read values: from now on it is unfolded, if it can be. False
        where that was tried with this request.
        """
        if self.unfolder.reason is not None or key in self._not_unfolded:
            return False
        log.info("plan", "the forward reads values: requests run in legs")
        self.paths.on = True
        return True

    def onward(self, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]:
        """Where requests go on whose answers are not those that their legs expected."""
        with self._lock:
            found: dict[Ask, Branch | Exception] = {}
            for ask in asks:
                request = ask.leg.root.wanted.request
                branch = self.paths.known(ask)
                if request.nested and request.steering != self.arguments.steering:
                    found[ask] = Replan()  # its numbers were data, and are not any more
                elif branch is not None:
                    found[ask] = branch
            new = [ask for ask in dict.fromkeys(asks) if ask not in found]
            for ask in new:
                self.paths.answered(ask)
            if new:
                found.update(self._learned_alone(new))
            return found

    def _learned_alone(self, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]:
        """`_learned`, where what goes wrong with one is that one's error."""
        try:
            return self._learned(asks)
        except Exception as error:
            if len(asks) == 1:
                return {asks[0]: error}
        found: dict[Ask, Branch | Exception] = {}
        for ask in asks:
            found.update(self._learned_alone([ask]))
        return found

    def _learned(
        self, asks: Sequence[Ask], *, plainly: bool = False
    ) -> dict[Ask, Branch | Exception]:
        """Run the forward on along answers never seen; `plainly`: from its start, with no
        stand-in for what it reads.
        """
        found: dict[Ask, Branch | Exception] = {}
        wanted, roots, lost, doubtful = [], [], [], []
        for ask in asks:
            root = ask.leg.root.plain() if plainly else ask.leg.root
            script = () if plainly else ask.leg.script_to(ask.number, ask.answer)
            start = 0 if ask.again else len(script)
            guesses = self.paths.guesses(script, ask)
            roots.append(root)
            wanted.append(self._wanted(root, script, guesses, start))
        before = self.unfolder.generation
        steering = self.arguments.steering
        try:
            if steering is None:
                raise CannotUnfold(self.unfolder.reason or "it cannot be unfolded")
            with _TRACING, evaluating(self.model), without_collecting():
                self.unfolder.recorder.habits = self.paths.habits
                runs = self.unfolder.unfold(wanted, steering)
                forest = self.unfolder.forest(runs)
        except Steers as error:
            if steering is None or error.place in steering:
                raise self._reads_and("numbers decide", asks[0].place) from error
            self._steered_by(steering, error.place)
            self._forget()
            found.update({ask: Replan() for ask in asks if ask.leg.root.wanted.request.nested})
            others = [ask for ask in asks if ask not in found]
            return {**found, **self._learned_alone(others)} if others else found
        except CannotUnfold as error:
            raise self._reads_and(str(error), asks[0].place) from error
        if self.unfolder.generation != before:
            self._forget()
        plans = make_plans(forest, self.tables)
        self._number_cells(forest.graph)
        for ask, run, want, root, plan in zip(asks, runs, wanted, roots, plans, strict=True):
            if isinstance(run.error, TypeError) and not run.plain:
                doubtful.append(ask)  # of a stand-in, it may be
                continue
            if run.failed and not run.raises:
                reason = run.reason or "recurses too deep"
                found[ask] = run.error or self._reads_and(reason, ask.place)
                continue
            leg = make_leg(run, root, want.script, plan, self.unfolder.epoch)
            self.paths.learned += 1
            branch = make_branch(ask.leg, ask.number, leg, again=ask.again or plainly)
            if branch is None:
                lost.append(ask)
                continue
            found[ask] = branch
            if leg.error is None:
                self.paths.keep(ask, branch)
            self._use(plan)
        if doubtful:
            self.read_plainly()
            found.update(self._learned(doubtful, plainly=True))
        if lost:
            again = self.onward([ask._replace(again=True) for ask in lost])
            found.update({ask: again[ask._replace(again=True)] for ask in lost})
        self._drop_cells()
        return found

    def _wanted(self, root: Root, script: tuple[Answer, ...], guesses: int, start: int) -> Wanted:
        _, args, kwargs, *_ = root.wanted
        request = self.arguments.flatten(args, kwargs)
        return Wanted(request, args, kwargs, script, guesses, start, root.wanted.plain)

    def read_plainly(self) -> bool:
        """From now on what new requests read is asked for, and no stand-in; False where it is."""
        if self.unfolder.plain or not self.unfolder.recorder.stands_in:
            return False
        log.info("plan", "numbers that are read have to be Python's own: they are asked for")
        with self._lock:
            self.unfolder.plain, self.unfolder.to_check = True, 2
            self._forget()
        return True

    @staticmethod
    def _reads_and(reason: str, place: str) -> CellcError:
        """Why a forward that reads values cannot be run."""
        return UnsupportedError(
            what=f"a forward that reads a value ({place}) and where {reason}",
            remedy="move what is named into a method without reads, or return new values instead "
            "of changing old ones",
        )

    def _use(self, plan: Plan) -> None:
        for cell, depth in zip(plan.cells, plan.priority, strict=True):
            self.priority[cell] = max(self.priority.get(cell, 0), depth)
        self.make_kernels(plan)

    def distrust(self, reason: str) -> None:
        """From now on requests are traced by operators."""
        log.info("plan", f"requests are traced by operators: {reason}")
        with self._lock:
            self.unfolder.reason = reason
            self.arguments.steering = None
            self._forget()
            self.unfolder.forget()
            self._drop_cells()

    def _plan_unfolded(
        self,
        requests: Sequence[Wanted],
        runs: Sequence[Unfolded],
        forest: Forest,
    ) -> None:
        start = time.perf_counter()
        plans = make_plans(forest, self.tables)
        self.unfolder.stats.planning += time.perf_counter() - start
        self._number_cells(forest.graph)
        self.calls, self.graph = forest.graph, None
        self._last = requests[-1].args, requests[-1].kwargs
        stats = self.unfolder.stats
        for run, wanted, plan in zip(runs, requests, plans, strict=True):
            if run.failed and not run.raises:
                reason = run.reason or (f"it raises {run.error!r}" if self.paths.on else None)
                if reason is not None:
                    if len(self._not_unfolded) >= MAX_FAILURES:
                        self._not_unfolded.clear()
                    self._not_unfolded[run.request.key] = reason
                continue
            if run.asked or run.generates or run.draws:
                self.paths.on = True
                shapes = _shapes_of(wanted.args, wanted.kwargs)
                root = Root(Wanted(run.request, *shapes, plain=run.plain))
                entry: Entry = make_leg(run, root, (), plan, self.unfolder.epoch)
            else:
                assert run.returned is not None
                entry = Entry(plan, Result.of(run.returned), (), self._roles.version)
            run.request.entry = entry
            if run.error is None:
                self._plans[run.request.key] = entry
            stats.requests += 1
            stats.cells += plan.num_calls
        while len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        self.counts["plans_unfolded"] += len(runs)
        self.stages = []
        self._stage("graph", self._print_traced)
        self._stage("passes", lambda: "\n\n".join(map(_print_calls, self.unfolder.graphs())))
        self._stage("plan", plans[-1])
        for plan in {plan.cells: plan for plan in plans}.values():
            self._use(plan)

    def _drop_cells(self) -> None:
        """Forget cells that unfolding made and would not make now."""
        live = self.unfolder.cells()
        for key in self._unfolded_cells - live:
            self.cells.pop(key, None)
        self._unfolded_cells = live

    def traced_graph(self) -> Graph | None:
        """The graph of the last planned request's operations."""
        if self.graph is None and self._last is not None:
            args, kwargs = self._last
            names = self.arguments.leaf_names(args, kwargs)
            values = self._values_read(args, kwargs) if self.paths.on else None
            self.graph = self._trace(args, kwargs, names, values).graph
        return self.graph

    def _values_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the model itself reads of a request."""
        with reading() as values:
            self.own_result(args, kwargs)
        return values

    def _print_traced(self) -> str:
        try:
            graph = self.traced_graph()
        except CellcError as error:  # it unfolds, but cannot be traced: too deep
            return f"# not traced: {error}"
        return print_graph(graph) if graph is not None else ""

    def own_result(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model itself gives, on a copy of the request on the device."""
        call = Copier(lambda leaf, _: leaf.to(self.device, copy=True)).call(args, kwargs)
        with _TRACING, evaluating(self.model), torch.no_grad(), self._placing():
            result = self.forward(*call[0], **call[1])
            if not inspect.isgenerator(result):
                return result
            return [pytree.tree_map(_as_yielded, piece) for piece in result]

    def _placing(self) -> AbstractContextManager[Any]:
        """Inside, tensors made without a device are on the model's."""
        return nullcontext() if self.device.type == "cpu" else self.device

    def trace_alone(self, run: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Trace:
        names = [f"x{i}" for i in range(len(tensors))]
        traced = trace(run, self.params.base, module_names(self.model), tuple(tensors), {}, names)
        self.params.base.update(traced.captured)
        self.reads_weights = self.reads_weights or traced.reads_weights
        return traced

    def lower_alone(self, traced: Trace, stacks: Sequence[bool] | int) -> RowGraph:
        if env.verify():
            verify.verify_graph(traced.graph)
        return lower(traced.graph, self.params, set(), whole=True, stacks=stacks)

    def extract_alone(self, rows: RowGraph, roles: Roles) -> CallGraph:
        calls = extract(rows, roles, late=True)
        self._check_cells(calls)
        return calls

    def rewrite_alone(self, calls: CallGraph) -> None:
        if log.enabled("cells"):
            log.info("cells", _print_calls(calls))
        passes.run(calls, self.params, self._options, self._rewritten)
        self._check_cells(calls)
        self._name(calls)
        if log.enabled("cells"):
            log.info("cells", _print_calls(calls))

    def constant_value(self, key: Hashable, type: RowType) -> bool | int | float:
        """The value of a constant that a forward reads."""
        value = constant_row(self.params, self.device, type, key)
        if isinstance(value, torch.Tensor):
            self.reads_weights = True
            return value.item()
        return value

    def _derived(self, structure: Structure) -> Entry | None:
        state = self._families.get(structure.family)
        if state is None or state.entry is None or not state.shaped:
            return None
        graph = state.family.predict(structure.sizes, structure.shapes)
        if graph is None:
            return None
        self.counts["plans_derived"] += 1
        return replace(state.entry, plan=self._plan(graph))

    def _traced(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        names = self.arguments.leaf_names(args, kwargs)
        traced = self._trace(args, kwargs, names)
        self.params.base.update(traced.captured)
        self.reads_weights = self.reads_weights or traced.reads_weights
        before = self._roles.version
        graph = self._extract(traced.graph)
        if self._roles.version != before and self._plans:
            self._forget()
        self.calls, self.graph = graph, traced.graph
        self.counts["plans_traced"] += 1
        self._good = {n: kind_of(v) for n, v in self.arguments.by_name(args, kwargs).items()}
        kept, spec = traced.outputs
        bare = (
            spec == pytree.treespec_leaf() if hasattr(pytree, "treespec_leaf") else spec.is_leaf()
        )
        one = bare and bool(kept) and kept[0][0] == "t"
        plan = self._plan(graph)
        self._stage("plan", plan)
        self.make_kernels(plan)
        result = Result(tuple(kept), None if one else spec)
        entry = Entry(plan, result, tuple(names), self._roles.version)
        self._learn(structure, graph, entry, traced.may_branch)
        return entry

    def _forget(self) -> None:
        """A trace changed what is known of roles: earlier plans may use other cells, so make them
        again.
        """
        log.info("plan", "roles changed: plans are made again when next asked for")
        self._plans.clear()
        self.paths.forget()
        self._families.clear()

    def _learn(
        self, structure: Structure, graph: CallGraph, entry: Entry, may_branch: bool
    ) -> None:
        state = self._families.setdefault(structure.family, _FamilyState())
        state.family.learn(structure.sizes, graph)
        if state.entry is not None:
            same = state.entry.result == entry.result
            state.shaped = state.shaped and same
        state.shaped = state.shaped and not may_branch
        state.entry = entry

    def check_family(
        self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Is the derived call graph of a structure the one that tracing gives? For tests and
        `cellc.check`.
        """
        state = self._families.get(structure.family)
        derived = state.family.predict(structure.sizes, structure.shapes) if state else None
        if derived is None:
            return False
        names = self.arguments.leaf_names(args, kwargs)
        return same_graph(derived, self._extract(self._trace(args, kwargs, names).graph))

    def _plan(self, graph: CallGraph) -> Plan:
        self._check_constants(graph)
        plan = make_plan(graph, self.tables)
        self._number_cells(graph)
        for cell, depth in zip(plan.cells, plan.priority, strict=True):
            self.priority[cell] = max(self.priority.get(cell, 0), depth)
        return plan

    def _check_constants(self, graph: CallGraph) -> None:
        """Compute the weight expressions that constants are rows of: a number that indexes a table
        may be out of range. Raises ForwardError.
        """
        for key in graph.constants:
            if isinstance(key, tuple) and key[0] == "param":
                try:
                    self.params[key[1]]
                except Exception as error:
                    raise ForwardError(str(error), kind=type(error).__name__) from error

    def _number_cells(self, graph: CallGraph) -> None:
        for group in graph.groups:
            number = self.tables.cell(group.cell)
            self.by_number.setdefault(number, self.cells.get(group.cell.key, group.cell))
            self.record_lengths[number] = record_length(group.cell)

    # -- stages --

    def _trace(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: list[str],
        values: list[Any] | None = None,
    ) -> Trace:
        modules = module_names(self.model)
        try:
            with _TRACING, evaluating(self.model):
                return trace(self.forward, self.params.base, modules, args, kwargs, names, values)
        except ForwardError as error:
            raise self._blame(error, args, kwargs) from error

    def output_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
        """Shapes of the returned leaves (() where one is no tensor), from a trace on shapes."""
        traced = self._trace(args, kwargs, self.arguments.leaf_names(args, kwargs))
        kept, _ = traced.outputs
        graph = traced.graph
        values = [graph.outputs[v] if kind == "t" else None for kind, v in kept]
        return [graph.node(v[0]).outputs[v[1]][0] if v is not None else () for v in values]

    def _blame(
        self, error: ForwardError, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CellcError:
        """Say which argument is wrong, where one visibly is: empty, or unlike those that worked."""
        reason = str(error).splitlines()[0]
        given = self.arguments.by_name(args, kwargs)
        for name, value in given.items():
            good = self._good.get(name) if self._good is not None else None
            expected = unlike(value, good) if good is not None else None
            if isinstance(value, torch.Tensor) and value.numel() == 0:
                expected = "at least one element"
            if expected is not None:
                return RequestError(
                    argument=name,
                    got=describe(value),
                    expected=f"{expected} ({reason})",
                    origin=error.origin,
                )
        listed = ", ".join(f"{name}: {describe(value)}" for name, value in given.items())
        if self._good is None:
            return ForwardError(
                f"{error.reason} (called with {listed})", kind=error.kind, origin=error.origin
            )
        return RequestError(
            argument=", ".join(given),
            got=listed,
            expected=f"sizes and values that the forward accepts ({reason})",
            origin=error.origin,
        )

    def _extract(self, graph: Graph) -> CallGraph:
        self.stages = []
        self._stage("graph", lambda: print_graph(graph))
        if env.verify():
            verify.verify_graph(graph)
        rows = lower(graph, self.params, self._data_points)
        self._stage("rows", rows)
        calls = extract(rows, self._roles, late=True)
        self._check_cells(calls)
        if env.verify():
            verify.verify_reads(calls, rows.type_of)
        self._stage("extract", lambda: _print_calls(calls))
        passes.run(calls, self.params, self._options, self._rewritten)
        self._check_cells(calls)
        self._name(calls)
        self._stage("passes", lambda: _print_calls(calls))
        return calls

    def _check_cells(self, calls: CallGraph) -> None:
        if env.verify():
            for group in calls.groups:
                verify.verify_cell(group.cell)

    def _name(self, calls: CallGraph) -> None:
        for group in calls.groups:
            key = group.cell.key
            if key not in self.cells:
                taken = {c.name for c in self.cells.values()}
                name = base = passes.suggest_name(group.cell, list(self.params.base))
                count = 1
                while name in taken:
                    count += 1
                    name = f"{base}_{count}"
                self.cells[key] = group.cell.named(name)
            elif group.cell.recurrent and not self.cells[key].recurrent:
                self.cells[key] = replace(self.cells[key], recurrent=True)
            group.cell = self.cells[key]

    def _stage(self, name: str, text: Any) -> None:
        stage = _LazyStage(name, text)
        self.stages.append(stage)
        channel = _CHANNELS[name]
        if log.enabled(channel) or env.dump() is not None:
            log.info(channel, str(stage))
            log.dump(name, str(stage))

    # -- kernels --

    def kernel(self, number: int) -> Kernel:
        """The kernel of a cell, made on first use."""
        kernel = self.kernels.get(number)
        if kernel is None:
            with self._lock:
                if number not in self.kernels:
                    self.kernels[number] = self._make_kernel(self.by_number[number])
                kernel = self.kernels[number]
        return kernel

    def _make_kernel(self, cell: Cell) -> Kernel:
        """From the backend, or from the eager one for a cell that it cannot generate."""
        try:
            moves = cell.flops_per_row == 0 and not cell.params and len(cell.ops) < 4
            kernel = (EagerBackend() if moves else self.backend).kernel(cell, self.params)
        except UnsupportedError as error:
            log.info("kernel", f"{cell.name}: {error}; it runs on the eager backend")
            kernel = EagerBackend().kernel(cell, self.params)
        if log.enabled("kernel"):
            log.info("kernel", kernel.source)
        log.dump(f"kernel_{cell.name}", kernel.source)
        return kernel

    def make_kernels(self, plan: Plan) -> None:
        """Make all kernels of a plan at once: compilers run side by side."""
        missing = [n for n in dict.fromkeys(plan.cells) if n not in self.kernels]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
                made = pool.map(lambda n: self._make_kernel(self.by_number[n]), missing)
                self.kernels.update(zip(missing, made, strict=True))

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
            if self.reads_weights:
                self._forget()


def _shapes_of(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A copy of a request's structure, its tensors without memory."""

    def shape(leaf: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)

    return Copier(shape).call(args, kwargs)


def _as_yielded(leaf: Any) -> Any:
    """A part of a piece, which a generator may change after it yielded it."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _forms(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


class _LazyStage(Stage):
    """A stage whose text is made when it is first read."""

    def __init__(self, name: str, source: Any) -> None:
        self.name = name
        self._source = source

    @property
    def text(self) -> str:  # type: ignore[override]
        return str(self._source() if callable(self._source) else self._source)


def _print_calls(calls: CallGraph) -> str:
    return "\n".join([str(calls), *(print_cell(group.cell) for group in calls.groups)])
