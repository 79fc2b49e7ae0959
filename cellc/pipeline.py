"""The pipeline: a forward traced, lowered, extracted and rewritten into calls of cells.

Duty: run the steps that turn a model into call graphs, for a whole request or for one segment of it
(`cellc.templates.Tools`), and keep what all traces have shown. Comes in from `cellc.compiler`:
requests; goes out: `CallGraph`s, to `cellc.planner`.

The steps: `trace` (frontends.tracing), `lower` (frontends.lower), `extract`, `passes`; each leaves
a printable stage.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cellc import env, log, passes, verify
from cellc.calls import CallGraph
from cellc.cell_store import CellStore
from cellc.copier import Copier
from cellc.errors import CellcError, ForwardError, RequestError, UnsupportedError
from cellc.extract import extract
from cellc.frontends.lower import lower
from cellc.frontends.overhearing import reading
from cellc.frontends.tracing import Trace, trace
from cellc.graph import Graph
from cellc.modules import evaluating, module_names
from cellc.ops import RowType
from cellc.params import Params
from cellc.printer import print_graph
from cellc.request import Arguments, describe, kind_of, unlike
from cellc.roles import Roles
from cellc.rows import RowGraph
from cellc.stages import Stages, print_calls
from cellc.state import constant_row

TRACING = threading.RLock()  # tracing turns modules to eval mode, which others must not see


def check_outside() -> None:
    """Raises in a forward that is run to learn of it: what stands for tensors there is nobody's."""
    if TRACING._is_owned():  # type: ignore[attr-defined]
        raise UnsupportedError(
            what="a compiled model that is called in a forward which is compiled, too,",
            remedy="call the model that it was compiled from",
        )


class Pipeline:
    """The steps for one model."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        params: Params,
        device: torch.device,
        options: passes.PassOptions,
        store: CellStore,
    ) -> None:
        self.model, self.params, self.device, self.store = model, params, device, store
        self.forward = model.forward if isinstance(model, nn.Module) else model
        self.arguments = Arguments(self.forward)
        self.stages = Stages()
        self.roles = Roles()
        self.reads_weights = False  # is what was traced another graph when weights change?
        self._options = options
        self._data_points: set[Hashable] = set()
        self._rewritten = passes.Rewritten()
        self._good: dict[str, tuple[Any, ...]] | None = None  # kinds of arguments that worked

    @property
    def shown(self) -> int:
        """Version of what call graphs have shown, beyond roles: cells of older ones may differ."""
        return self._rewritten.facts.version

    # -- whole requests --

    def calls(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
    ) -> tuple[Trace, CallGraph]:
        """A request's trace and what became of it."""
        traced = self.trace(args, kwargs, names)
        self._note(traced)
        graph = self.extract(traced.graph)
        self._good = {n: kind_of(v) for n, v in self.arguments.by_name(args, kwargs).items()}
        return traced, graph

    def trace(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: list[str],
        values: list[Any] | None = None,
    ) -> Trace:
        modules = module_names(self.model)
        try:
            with TRACING, evaluating(self.model):
                given = self.forward, self.params.base, modules, args, kwargs, names, values
                return trace(*given, identity=self.arguments.identity)
        except ForwardError as error:
            raise self._blame(error, args, kwargs) from error.__cause__

    def _note(self, traced: Trace) -> None:
        self.params.base.update(traced.captured)
        self.reads_weights = self.reads_weights or traced.reads_weights

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

    def extract(self, graph: Graph) -> CallGraph:
        """A traced graph as calls of cells that have their names."""
        self.stages.begin()
        self.stages.add("graph", lambda: print_graph(graph))
        if env.verify():
            verify.verify_graph(graph)
        rows = lower(graph, self.params, self._data_points)
        self.stages.add("rows", rows)
        calls = extract(rows, self.roles)
        _check_cells(calls)
        if env.verify():
            verify.verify_reads(calls, rows.type_of)
        self.stages.add("extract", lambda: print_calls(calls))
        self._rewrite(calls)
        self.stages.add("passes", lambda: print_calls(calls))
        return calls

    def _rewrite(self, calls: CallGraph) -> None:
        passes.run(calls, self.params, self._options, self._rewritten)
        _check_cells(calls)
        self.store.name(calls)

    def check_constants(self, graph: CallGraph) -> None:
        """Compute the weight expressions that constants are rows of: a number that indexes a table
        may be out of range. Raises ForwardError.
        """
        for key in graph.constants:
            if isinstance(key, tuple) and key[0] == "param":
                try:
                    self.params[key[1]]
                except Exception as error:
                    raise ForwardError(str(error), kind=type(error).__name__) from error

    # -- segments: `cellc.templates.Tools` --

    def trace_alone(self, run: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Trace:
        names = [f"x{i}" for i in range(len(tensors))]
        traced = trace(run, self.params.base, module_names(self.model), tuple(tensors), {}, names)
        self._note(traced)
        return traced

    def lower_alone(self, traced: Trace, stacks: Sequence[bool] | int) -> RowGraph:
        if env.verify():
            verify.verify_graph(traced.graph)
        return lower(traced.graph, self.params, set(), whole=True, stacks=stacks)

    def extract_alone(self, rows: RowGraph, roles: Roles) -> CallGraph:
        calls = extract(rows, roles)
        _check_cells(calls)
        return calls

    def rewrite_alone(self, calls: CallGraph) -> None:
        if log.enabled("cells"):
            log.info("cells", print_calls(calls))
        self._rewrite(calls)
        if log.enabled("cells"):
            log.info("cells", print_calls(calls))

    def constant_value(self, key: Hashable, type: RowType) -> bool | int | float:
        """The value of a constant that a forward reads."""
        value = constant_row(self.params, self.device, type, key)
        if isinstance(value, torch.Tensor):
            self.reads_weights = True
            return value.item()
        return value

    # -- the model itself --

    def own_result(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model itself gives, on a copy of the request on the device."""
        made: dict[int, torch.Tensor] = {}

        def copy(leaf: torch.Tensor, _: Any) -> torch.Tensor:
            if id(leaf) not in made:  # else it is one in the copy, too
                made[id(leaf)] = leaf.to(self.device, copy=True)
            return made[id(leaf)]

        call = Copier(copy).call(args, kwargs)
        with TRACING, evaluating(self.model), torch.no_grad(), self._placing():
            result = self.forward(*call[0], **call[1])
            if not inspect.isgenerator(result):
                return result
            return [pytree.tree_map(_as_yielded, piece) for piece in result]

    def values_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the model itself reads of a request."""
        with reading() as values:
            self.own_result(args, kwargs)
        return values

    def _placing(self) -> AbstractContextManager[Any]:
        """Inside, tensors made without a device are on the model's."""
        return nullcontext() if self.device.type == "cpu" else self.device


def _as_yielded(leaf: Any) -> Any:
    """A part of a piece, which a generator may change after it yielded it."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _check_cells(calls: CallGraph) -> None:
    if env.verify():
        for group in calls.groups:
            verify.verify_cell(group.cell)
