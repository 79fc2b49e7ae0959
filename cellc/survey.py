"""Surveys: what is to be said of a model's cells, for `cellc inspect` and `cellc demo`.

Duty: run example requests, trace the largest of them again, and read off cells, calls, coverage,
the cost of a new structure, and the graph of cells. Comes in: a compiled model and requests; goes
out: a `Survey`, plain data.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, TypeVar

from cellc import ops
from cellc.calls import CallGraph
from cellc.cells import Cell, CellOp
from cellc.compiled import Compiled
from cellc.compiler import Compiler
from cellc.errors import UnsupportedError, ValueReadError
from cellc.export import CellBox, CellEdge, CellGraph
from cellc.kernels.tile_roots import unsupported
from cellc.legs import Entry
from cellc.plan import CELL
from cellc.request import as_call
from cellc.unfolded import Wanted
from cellc.views import Cells, CellView

T = TypeVar("T")


@dataclass(frozen=True)
class CellReport:
    """One cell; `calls` are those of the largest request."""

    name: str
    recurrent: bool
    parameters: list[str]
    calls: int
    ops: list[str]
    inputs: list[str]
    outputs: list[str]
    flops_per_row: int
    kernels: list[str]  # backends


@dataclass(frozen=True)
class Unfold:
    """How a request of a new structure becomes a plan, and what that took for the largest one."""

    kind: str
    us_per_cell: float
    reason: str = ""  # why it is not unfolded by cells
    lines: list[str] = field(default_factory=list)  # of recurrent operations that are no call


@dataclass(frozen=True)
class Survey:
    """`nodes` and `edges` are those of the traced graph; `coverage` is a share of its FLOPs."""

    model: str
    nodes: int
    edges: int
    coverage: float
    cells: list[CellReport]
    unfold: Unfold
    bytes_per_row: dict[str, int]
    leftovers: dict[str, list[str]]  # operations that run through torch, by cell
    weights: dict[str, str]  # what products read where it is narrower than the model's, by cell
    graph: CallGraph

    def as_json(self) -> dict[str, Any]:
        """What `cellc inspect --json` prints."""
        return {
            "model": self.model,
            "nodes": self.nodes,
            "edges": self.edges,
            "coverage": round(self.coverage, 4),
            "cells": [asdict(cell) for cell in self.cells],
            "unfold": {"kind": self.unfold.kind, "us_per_cell": round(self.unfold.us_per_cell, 2)},
        }


def survey(compiled: Compiled, requests: Sequence[Any]) -> Survey:
    """Run the requests, then trace the one with the most calls once more."""
    compiled.map(requests)
    compiler = compiled._compiler
    if compiler.paths.on:  # now that it is known where they lead
        compiler.plan_anew()
        compiled.map(requests)
    plans = [ticket.entry.plan for ticket in compiled._tickets([as_call(r) for r in requests])]
    largest = max(range(len(plans)), key=lambda i: plans[i].num_calls)
    entry, unfold = _unfolded(compiled, requests[largest])
    calls = Counter({n: 0 for p in plans for n in p.calls[:, CELL].tolist()})
    calls.update(entry.plan.calls[:, CELL].tolist())
    views = {number: Cells(compiler).of(number) for number in calls}
    reports = [_report(compiler, number, view, calls[number]) for number, view in views.items()]
    cells = {view.name: view.cell for view in views.values()}
    assert compiler.calls is not None
    nodes, edges = _size(compiled)
    return Survey(
        model_name(compiler.model),
        nodes,
        edges,
        coverage([(v.cell, calls[n], _generated(compiler, n, v.cell)) for n, v in views.items()]),
        reports,
        unfold,
        {name: cell.bytes_per_row for name, cell in cells.items()},
        {name: left for name, cell in cells.items() if (left := leftovers(cell))},
        {view.name: kind for number, view in views.items() if (kind := _weights(compiler, number))},
        compiler.calls,
    )


def _weights(compiler: Compiler, number: int) -> str:
    """Of a kernel that was generated."""
    kind: str = getattr(compiler.kernel(number), "weights", "")
    return kind


def _size(compiled: Compiled) -> tuple[int, int]:
    """Nodes and edges of the traced request; of its cell calls, where no trace can show it: its
    values decide shapes, or it draws random numbers.
    """
    try:
        graph = compiled.graph
    except (ValueReadError, UnsupportedError):
        calls = compiled._compiler.calls
        assert calls is not None
        groups = calls.groups
        return (
            sum(g.num_calls for g in groups),
            sum(g.num_calls * len(g.inputs) for g in groups),
        )
    return graph.number_of_nodes(), graph.number_of_edges()


def model_name(model: Any) -> str:
    """`Tagger`, or the name of a function."""
    return getattr(model, "__name__", type(model).__name__)


def _report(compiler: Compiler, number: int, view: CellView, calls: int) -> CellReport:
    return CellReport(
        view.name,
        view.recurrent,
        list(view.parameters),
        calls,
        list(view.ops),
        list(view.inputs),
        list(view.outputs),
        view.flops_per_row,
        [type(compiler.kernel(number)).__name__.removesuffix("Kernel").lower()],
    )


# -- the cost of a new structure -------------------------------------------------------------------


def _unfolded(compiled: Compiled, request: Any) -> tuple[Entry, Unfold]:
    """Plan a request once more, as if its structure were new."""
    compiler = compiled._compiler
    args, kwargs = compiler.arguments.bind(*as_call(request))
    flat = compiler.arguments.flatten(args, kwargs)
    known = compiler.cached(flat.key, count=False)
    if compiler.unfolds(flat) and known is not None:
        _, seconds = _fastest(lambda: compiler.unfold([Wanted(flat, args, kwargs)]))
        slow = compiler.unfolder.explain()
        known = compiler.cached(flat.key, count=False) or known
        return known, Unfold("cell-level unfolding", _a_call(seconds, known), "", slow)
    structure = compiler.arguments.flatten(args, kwargs, exact=True).structure
    entry, seconds = _fastest(lambda: compiler.traced(structure, args, kwargs))
    derived, derived_seconds = _fastest(lambda: compiler.derived(structure))
    if derived is not None:
        return derived, Unfold("closed form", _a_call(derived_seconds, derived))
    reason = compiler.unfolder.reason or ""
    cost = _a_call(seconds, entry)
    return entry, Unfold("operator-level tracing", cost, reason, _recurrent_lines(compiled))


def _recurrent_lines(compiled: Compiled) -> list[str]:
    """file:line of the operations of recurrent cells."""
    cells = [view.cell for view in compiled.cells.values() if view.cell.recurrent]
    return sorted({op.origin for cell in cells for op in cell.ops if op.origin})


def _a_call(seconds: float, entry: Entry) -> float:
    return seconds * 1e6 / max(1, entry.plan.num_calls)


def _fastest(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the least seconds of two runs: another program may have disturbed one."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return result, min(times)


# -- coverage --------------------------------------------------------------------------------------


def coverage(calls: Sequence[tuple[Cell, int, bool]]) -> float:
    """Share of the FLOPs that lies in cells with weights whose kernel is generated; 1 of nothing.
    One operation without a rule is enough for all of its cell to run through torch.
    """
    total = covered = 0
    for cell, count, generated in calls:
        cost = count * sum(op_flops(cell, op) for op in cell.ops)
        total += cost
        covered += cost if cell.params and generated else 0
    return covered / total if total else 1.0


def _generated(compiler: Compiler, number: int, cell: Cell) -> bool:
    """Is its kernel? Where all run through torch, since no other backend is there or was asked
    for: could it be?
    """
    if compiler.backend.name == "eager":
        return unsupported(cell) is None
    kind: str = getattr(compiler.kernel(number), "backend", compiler.backend.name)
    return kind != "eager"


def op_flops(cell: Cell, op: CellOp) -> int:
    """FLOPs of one call of an operation; of a leftover that is no product, one for each element
    read or made.
    """
    shapes = [cell.shape_of(operand) for operand in op.operands]
    cost = ops.flops(op.op, shapes, op.type.shape)
    if cost or not _left(op):
        return cost
    return max(prod(shape) for shape in [*shapes, *(t.shape for t in op.types)])


def leftovers(cell: Cell) -> list[str]:
    """Operations that no kernel is generated for: they run through torch."""
    return list(dict.fromkeys(op.op.removeprefix("aten:") for op in cell.ops if _left(op)))


def _left(op: CellOp) -> bool:
    return op.op.startswith("aten:")


# -- the graph of cells ----------------------------------------------------------------------------


def cell_graph(found: Survey) -> CellGraph:
    """Cells of the largest request and what flows between them, to draw."""
    boxes = [
        CellBox(
            cell.name,
            cell.calls,
            cell.recurrent,
            tuple(cell.parameters),
            cell.flops_per_row,
            (short_ops(cell.ops), f"kernel: {', '.join(cell.kernels)}"),
        )
        for cell in found.cells
        if cell.calls
    ]
    calls = sum(cell.calls for cell in found.cells)
    title = f"{found.model}: {calls} calls of {len(boxes)} cell{'' if len(boxes) == 1 else 's'}"
    return CellGraph(title, boxes, _edges(found.graph))


def _edges(graph: CallGraph) -> list[CellEdge]:
    """One edge for each pair of ends, labelled with the types that flow."""
    made: dict[int, str] = {}
    for data in graph.data:
        made.update(dict.fromkeys(range(data.base, data.base + data.count), data.name))
    for group in graph.groups:
        for values in group.outputs:
            made.update(dict.fromkeys(values.tolist(), group.cell.name))
    labels: dict[tuple[str, str], dict[str, None]] = {}
    for source, target, label in _flows(graph, made):
        labels.setdefault((source, target), {})[label] = None
    return [CellEdge(*ends, ", ".join(texts)) for ends, texts in labels.items()]


def _flows(graph: CallGraph, made: dict[int, str]) -> Iterator[tuple[str, str, str]]:
    for group in graph.groups:
        for i, spec in enumerate(group.cell.inputs):
            label = f"{'ragged ' if spec.ragged else ''}{spec.type}"
            for source in dict.fromkeys(made.get(int(v)) for v in group.input_values(i)):
                if source is not None:  # constants come from nowhere
                    yield source, group.cell.name, label
    for number, output in enumerate(graph.outputs):
        name = "output" if len(graph.outputs) == 1 else f"output {number}"
        for source in dict.fromkeys(made.get(int(v)) for v in output.refs.reshape(-1)):
            if source is not None:
                yield source, name, str(output.type)


def short_ops(names: Sequence[str]) -> str:
    """`linear, sigmoid x3, mul x2`, in order of first use."""
    counts = Counter(names)
    return ", ".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())
