"""Unfolding: plans of new structures from calls of cells alone.

Duty: keep what is learned of a model's segments (see `frontends.unfold`): which feed themselves,
which of their values are read elsewhere, and the call graph that each becomes; and write the calls
of many new requests at once, by numpy. Comes in from `cellc.compiler`: requests; goes out: a
`Forest` for `cellc.plan`.

A segment is traced, lowered, extracted and rewritten once, as if it were a model of its own; its
instances in a request are copies of that call graph with other values.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import networkx as nx
import numpy as np
import torch
from torch import nn

from cellc import log
from cellc.calls import CallGraph, Forest
from cellc.dtypes import DTYPE_NAMES, TORCH_DTYPES
from cellc.forests import Template, Unfolded, Wanted, make_forest
from cellc.frontends.asking import Asked
from cellc.frontends.callees import RefusedCell
from cellc.frontends.dims import Dims
from cellc.frontends.effects import asks_for_types, asks_what_it_is, holds, why_not
from cellc.frontends.reads import OPEN
from cellc.frontends.segments import LEAF, OutType, Segment, Study
from cellc.frontends.stub import (
    CannotUnfold,
    FloatNumber,
    IntNumber,
    NumberSteers,
    Stack,
    Stub,
    StubType,
)
from cellc.frontends.stubbing import MAX_SHAPES, Shapes, Stubber
from cellc.frontends.tracing import Trace
from cellc.frontends.unfold import Recorder
from cellc.ops import RowType
from cellc.request import Request
from cellc.roles import Roles
from cellc.rows import RowGraph
from cellc.skeleton import Copier, Steering

SAMPLE = 3  # requests from which a model's segments are first learned
ROUNDS = 12  # of learning, at most
ROOM = 1 << 29  # bytes of stack for structures deeper than Python's limit
DEPTH = 100_000  # frames that fit in it

_MOVES = frozenset("embedding slice cat reshape cast permute".split())

T = TypeVar("T")


class Steers(Exception):
    """Python code decides by the numbers at a place."""

    def __init__(self, place: Hashable) -> None:
        super().__init__(place)
        self.place = place


class Tools(Protocol):
    """What the compiler lends: how one stretch of operations becomes a call graph."""

    def trace_alone(self, run: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Trace: ...

    def lower_alone(self, traced: Trace, stacks: Sequence[bool] | int) -> RowGraph: ...

    def extract_alone(self, rows: RowGraph, roles: Roles) -> CallGraph: ...

    def rewrite_alone(self, calls: CallGraph) -> None: ...

    def constant_value(self, key: Hashable, type: RowType) -> bool | int | float: ...


@dataclass
class Stats:
    requests: int = 0
    cells: int = 0
    seconds: float = 0.0
    planning: float = 0.0  # of these


@dataclass
class Unfolder:
    """What is known of one model's unfolding."""

    tools: Tools
    forward: Callable[..., Any]
    names: list[str]  # of its arguments
    modules: dict[str, nn.Module]
    device: torch.device
    reason: str | None = None  # why requests are traced instead, once that was found
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self._study, self.device)
        self.recorder.constant_value = self._constant_value
        self.reason = why_not(self.modules.values())
        self.numbers_stay = asks_for_types(self.modules.values())
        self.plain = asks_what_it_is(self.forward, self.modules.values())
        self.generation = 0  # of what was learned: older plans hold other cells
        self.epoch = 0  # of how rows are numbered
        self._roomy = False  # is there room for deep recursion
        self.to_check = 2  # requests whose results are still compared with the model's own
        self._stacks: set[Hashable] = set()  # places of tensors that are taken apart
        self._shapes = Shapes({})
        self._edges: set[tuple[int, int]] = set()
        self._templates: dict[Hashable, Template] = {}
        self._live: dict[Hashable, Template] = {}
        self._roles: dict[Hashable, Roles] = {}  # by places in the code: alike whatever their sizes

    def _constant_value(self, key: Hashable, kind: StubType) -> Any:
        return self.tools.constant_value(key, RowType(kind.shape, DTYPE_NAMES[kind.dtype]))

    # -- one request on stubs --

    def _stubbed(self, request: Request, args: Any, kwargs: Any) -> Unfolded:
        """A request as stubs; its rows are taken."""
        recorder = self.recorder
        out = Unfolded(request)
        at = request.given
        starts = []
        inside = ", ".join(self.names)
        for present, form in ((request.ints, IntNumber), (request.floats, FloatNumber)):
            starts.append(recorder.next_row)
            if present:
                count = len(request.tensors[at])
                out.data.append((at, recorder.next_row, form.type, count, f"a number in {inside}"))
                recorder.next_row += count
                at += 1
        starts.append(recorder.next_row)
        leaf = 0

        def tensor(value: torch.Tensor, place: Hashable, row: int) -> Any:
            nonlocal leaf
            leaf += 1
            return self._data(out, leaf - 1, value, place, row)

        stubber = Stubber(self._shapes, self.steering, (starts[0], starts[1], starts[2]), tensor)
        out.call, out.parts = stubber.call(args, kwargs), stubber.parts
        out.shells = stubber.shells
        recorder.next_row = stubber.tensors
        out.rows = (starts[0], starts[1], starts[2], stubber.tensors)
        return out

    def _run(self, out: Unfolded, wanted: Wanted) -> None:
        recorder = self.recorder
        recorder.parts, recorder.data = out.parts, out.rows
        out.start, out.plain = wanted.start, wanted.plain
        recorder.plain = wanted.plain
        recorder.begin(wanted.script, wanted.guesses, wanted.start - 1)
        try:
            out.returned = recorder.run(self.forward, *out.call)
        except NumberSteers as error:
            raise Steers(self._place_of(error.row, out, wanted.args, wanted.kwargs)) from error
        except (Exception, CannotUnfold) as error:
            if not _unsaid(recorder.asked):
                raise
            log.info("plan", f"what was guessed of an answer raises: {error!r}")
        finally:
            out.asked, out.yields = recorder.asked, recorder.yields
            out.generates, out.draws = recorder.generates, recorder.draws
            if out.open:
                out.yields = [y for y in out.yields if y[0] < len(out.asked)]
            recorder.holdings.check()
        if len(out.asked) < len(wanted.script):
            raise CannotUnfold("it asks other questions when it runs again")
        if recorder.repeating and not all(holds(*shell) for shell in out.shells):
            recorder.repeating, recorder.relearn = False, True
            recorder.memos.clear()

    def _place_of(self, row: int, out: Unfolded, args: Any, kwargs: Any) -> Hashable:
        """Place of the number that is row `row`."""
        places: dict[type, list[Hashable]] = {int: [], float: []}

        def number(value: Any, place: Hashable) -> Any:
            if place not in self.steering:
                places[type(value)].append(place)
            return value

        Copier(lambda leaf, _: leaf, number).call(args, kwargs)
        for _, first, form, count, _ in out.data:
            if first <= row < first + count:
                return places[int if form is IntNumber.type else float][row - first]
        raise AssertionError(row)

    def _name(self, place: Any) -> str:
        """A tensor's name in error messages."""
        if type(place) is tuple and place[0] == "argument":
            k = place[1]
            return self.names[k] if isinstance(k, int) and k < len(self.names) else str(k)
        return f"a tensor in {', '.join(self.names)}"

    def _data(
        self, out: Unfolded, leaf: int, value: torch.Tensor, place: Hashable, row: int
    ) -> Any:
        if value.dtype not in DTYPE_NAMES:
            raise CannotUnfold(f"a tensor of {value.dtype}")
        device = self.recorder.device
        shape = tuple(value.shape)
        if 0 in shape:
            raise CannotUnfold("an empty tensor")
        apart = place in self._stacks or (
            len(shape) > 0 and not value.dtype.is_floating_point and value.dtype is not torch.bool
        )
        if apart and len(shape) > 0:
            inner = StubType.of(shape[1:], value.dtype, device)
            out.data.append((leaf, row, inner, shape[0], self._name(place)))
            return Stack.of_rows(row, shape[0], inner)
        kind = StubType.of(shape, value.dtype, device)
        out.data.append((leaf, row, kind, -1, self._name(place)))
        if len(shape) > 0:
            self._whole[row] = place
        return Stub(row, kind)

    # -- learning --

    def _study(
        self,
        alone: Callable[..., Any],
        rows: Sequence[tuple[StubType, int]],
        is_cell: bool,
        lists: bool,
        called: bool,
    ) -> Study | None:
        traced = self.tools.trace_alone(alone, [_example(t, self.device) for t, _ in rows])
        if called and traced.escaped:  # its body keeps tensors elsewhere: it has to run each time
            return None
        kept, spec = traced.outputs
        for kind, value in kept:
            if kind == "v" and not isinstance(value, (int, float, bool, str, type(None))):
                return None
        lowered = self.tools.lower_alone(traced, 1 if lists else 2)
        device = self.recorder.device
        keys = {value: key for key, value in lowered.constants.items()}
        refs = [int(r) for out in lowered.outputs for r in out.refs.reshape(-1)]
        constant = None
        if all(r in keys for r in refs):  # whole, whatever it is used for
            lowered = self.tools.lower_alone(traced, [False] * len(lowered.outputs))
            keys = {value: key for key, value in lowered.constants.items()}
            refs = [int(r) for out in lowered.outputs for r in out.refs.reshape(-1)]
            constant = tuple(keys.get(r) for r in refs) if all(r in keys for r in refs) else None
        outputs = []
        for out in lowered.outputs:
            kind = StubType.of(out.shape, TORCH_DTYPES[out.type.dtype], device)
            outputs.append(OutType(kind, -1 if all(out.row_dims) else out.shape[0]))
        if is_cell:
            groups = self.tools.extract_alone(lowered, Roles()).groups
            if any(group.cell.recurrent for group in groups):
                return None
        dims = Dims(traced.graph)
        inputs = [node for node in traced.graph if node.kind == "input"]
        positions = []
        for node in inputs:
            form = dims.row_dims(node.id)
            positions.append(len(form) > 1 and not form[0] and all(form[1:]))
        spec = None if spec == LEAF else spec
        moves = all(node.op in _MOVES for node in lowered.nodes)
        return Study(tuple(outputs), tuple(kept), spec, constant, tuple(positions), moves)

    def unfold(self, requests: Sequence[Wanted], steering: Steering) -> list[Unfolded]:
        """Run new requests on stubs; what they did is in the recorder's segments.

        Raises Steers where a number turned out to decide, CannotUnfold where tracing has to
        do it.
        """
        self.steering = steering
        size = len(requests) if self._live else min(SAMPLE, len(requests))
        for _ in range(ROUNDS):
            runs, stable = self._record(requests[:size])
            if stable and size == len(requests):
                return runs
            if stable:
                size = len(requests)
        raise CannotUnfold("its structure looks different each time")

    def _record(self, requests: Sequence[Wanted]) -> tuple[list[Unfolded], bool]:
        recorder = self.recorder
        recorder.reset()
        recorder.relearn = False
        if len(self._shapes.numbers) > MAX_SHAPES:
            self._shapes.numbers.clear()
            recorder.memos.clear()
        try:
            return self._recorded(requests)
        except RecursionError:
            recorder.reset()
            return self._with_room(lambda: self._recorded(requests))

    def _with_room(self, work: Callable[[], T]) -> T:
        """Work in a thread with a large stack: deep structures need one."""
        self._roomy = True
        limit, size = sys.getrecursionlimit(), threading.stack_size(ROOM)
        sys.setrecursionlimit(max(limit, DEPTH))
        try:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(work).result()
        finally:
            self._roomy = False
            threading.stack_size(size)
            sys.setrecursionlimit(limit)

    def _recorded(self, requests: Sequence[Wanted]) -> tuple[list[Unfolded], bool]:
        recorder = self.recorder
        self._whole: dict[int, Hashable] = {}
        known = len(recorder.all_ops)
        runs = []
        for request in requests:
            try:
                runs.append(self._stubbed(*request[:3]))
            except CannotUnfold as error:
                runs.append(Unfolded(request[0], reason=str(error)))
        with recorder.watching(self.modules):
            for run, wanted in zip(runs, requests, strict=True):
                run.base = recorder.next_row
                if run.reason is not None:
                    continue
                try:
                    self._run(run, wanted)
                except (Steers, RefusedCell):
                    raise
                except CannotUnfold as error:
                    run.reason = str(error)
                    log.info("plan", f"a request cannot be unfolded: {error}")
                except RecursionError:
                    if not self._roomy:
                        raise
                    run.over_deep = True
                    log.info("plan", "a request recurses too deep")
                except Exception as error:
                    run.error = error
                    log.info("plan", f"a request fails: {error!r}")
        recorder.expand()
        recorder.leaks()
        recorder.spans = []
        stable = not recorder.relearn
        if self._take_apart(known):
            stable = False
        self.epoch += not stable
        return runs, self._learn(runs) and stable

    def _take_apart(self, known: int) -> bool:
        """Were tensors met whole that tracing takes apart along their first dimension?"""
        found = False
        for row in self.recorder.take_apart:
            if (place := self._whole.get(row)) is not None and place not in self._stacks:
                self._stacks.add(place)
                found = True
        self.recorder.take_apart.clear()
        for segment in self.recorder.used:
            reads = None
            for op, wiring in zip(segment.ops, segment.wirings, strict=True):
                if op.number < known and not any(op.study.positions):
                    continue
                for apart, w in zip(op.study.positions, wiring, strict=True):
                    if not apart or w >= 0:
                        continue
                    if reads is None:
                        reads, _ = segment.instances()
                    for row in reads[:, ~w].tolist():
                        place = self._whole.get(row)
                        if place is not None and place not in self._stacks:
                            self._stacks.add(place)
                            found = True
        return found

    def _learn(self, runs: Sequence[Unfolded]) -> bool:
        """Take in who feeds whom, and which values are read elsewhere; True if nothing is new."""
        recorder = self.recorder
        total = recorder.next_row
        maker = np.full(total, -1, np.int64)
        segment_of = self.segment_of = np.full(total, -1, np.int64)
        offset_of = self.offset_of = np.zeros(total, np.int64)
        for k, segment in enumerate(recorder.used):
            _, made = segment.instances()
            rows = made[:, None] + np.arange(segment.num_rows)
            maker[rows] = np.repeat(
                [op.site for op in segment.ops], [op.num_rows for op in segment.ops]
            )
            segment_of[rows] = k
            offset_of[rows] = np.arange(segment.num_rows)
        edges: set[tuple[int, int]] = set()
        read = [np.zeros(0, np.int64)]
        for segment in recorder.used:
            reads, _ = segment.instances()
            for op, wiring in zip(segment.ops, segment.wirings, strict=True):
                for w in wiring:
                    if w >= 0:
                        edges.add((self._site_at(segment, w), op.site))
                    else:
                        column = reads[:, ~w]
                        makers = np.unique(maker[column[column >= 0]])
                        edges.update((m, op.site) for m in makers.tolist() if m >= 0)
            read.append(reads[reads >= 0])
        for run in runs:
            rows_out = [r for given in run.given for rows, _ in given.tensors for r in rows]
            rows_out += [question.row for question in run.asked]
            read.append(np.array([r for r in rows_out if r >= 0], np.int64))
        used = np.concatenate(read)
        used = used[segment_of[used] >= 0]
        stable = True
        grown = np.unique(segment_of[used] * (1 << 32) + offset_of[used])
        for number in grown.tolist():
            segment = recorder.used[number >> 32]
            output = _output_of(segment, number & 0xFFFFFFFF)
            if output not in segment.escaping:
                segment.escaping.add(output)
                self.generation += segment.sites in self._roles  # there are plans without it
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
        graph = nx.DiGraph(self._edges)
        component: dict[int, int] = {}
        for members in nx.strongly_connected_components(graph):
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
            self._live.clear()
            self.generation += 1
        return changed

    # -- call graphs --

    def forest(self, runs: Sequence[Unfolded]) -> Forest:
        """Calls of the recorded requests."""
        recorder = self.recorder
        for _ in range(ROUNDS):  # what one template teaches may change another
            if not sum([self._template(segment)[1] for segment in recorder.used]):
                break
        return make_forest(
            recorder, runs, lambda segment: self._template(segment)[0], self._type_of
        )

    def _type_of(self, row: int) -> StubType | None:
        """Type of a row that an operation made, where its value is kept."""
        if self.segment_of[row] < 0:
            return None
        segment = self.recorder.used[int(self.segment_of[row])]
        offset = int(self.offset_of[row])
        output = _output_of(segment, offset)
        if output not in segment.escaping:
            return None
        kind, count = segment.outputs[output]
        return kind if count < 0 else StubType.of(kind.shape[1:], kind.dtype, kind.device)

    def _template(self, segment: Segment) -> tuple[Template, bool]:
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
        stale = template is None or template.version != roles.version
        if template is None or stale:
            if template is not None:
                self.generation += 1
            template = self._made(segment, escaping, recurrent, roles)
            template = self._templates[key] = replace(template, version=roles.version)
        self._live[key[:2]] = template
        return template, stale

    def _made(
        self, segment: Segment, escaping: Sequence[int], recurrent: bool, roles: Roles
    ) -> Template:
        def run(*tensors: Any) -> list[Any]:
            made = segment.compute(tensors)
            return [made[i] for i in escaping]

        kinds = segment.external_types()
        traced = self.tools.trace_alone(run, [_example(t, self.device) for t in kinds])
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

    def explain(self) -> list[str]:
        """Segments that feed themselves though they are no call: lines to move into a method."""
        return sorted(
            {
                f"{op.origin}: {op.name}"
                for op in self.recorder.all_ops
                if op.component and not op.is_call
            }
        )


def _unsaid(asked: list[Asked]) -> bool:
    """Forget what followed the last answer that was guessed; False where none was."""
    at = next((i for i in range(len(asked) - 1, -1, -1) if asked[i].guessed), None)
    if at is None:
        return False
    del asked[at + 1 :]
    asked[at].answer, asked[at].guessed = OPEN, False
    return True


def _example(kind: StubType, device: torch.device) -> torch.Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device=device)


def _output_of(segment: Segment, row: int) -> int:
    for i, out in enumerate(segment.outputs):
        if row < max(1, out.rows):
            return i
        row -= max(1, out.rows)
    raise AssertionError(row)
