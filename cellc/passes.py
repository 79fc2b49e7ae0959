"""Passes: named rewrites of a request's cells, between extraction and planning.

Duty: make cells smaller and their products fewer. Each pass takes a `CallGraph` and `Params`, and
changes groups in place; all are deterministic on a cell's content, so that every trace of a model
ends with the same cells. Order: simplify (common subexpressions, biases into products, dead code),
fuse products that share an input, fold embeddings into the product that follows, sink look-ups into
the cells that read them, name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cellc import calls, ops
from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.ops import RowType
from cellc.params import Params
from cellc.rows import RaggedRefs, Refs


@dataclass(frozen=True)
class PassOptions:
    """`fold_bytes`: largest table that folding an embedding may make (0 turns folding off)."""

    fold_bytes: int = 256 << 20


class _Editor:
    """A cell under rewriting: operations by new index, operands mapped as they go."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.inputs = list(cell.inputs)
        self.params = list(cell.params)
        self.ops: list[CellOp] = []
        self.mapped: dict[Operand, Operand] = {}

    def see(self, operand: Operand) -> Operand:
        return self.mapped.get(operand, operand)

    def add(self, op: CellOp, old: int | None = None) -> Operand:
        self.ops.append(op)
        for port in range(len(op.types)):
            if old is not None:
                self.mapped[Operand("op", old, port)] = Operand("op", len(self.ops) - 1, port)
        return Operand("op", len(self.ops) - 1)

    def copy(self, op: CellOp, old: int) -> Operand:
        return self.add(replace(op, operands=tuple(map(self.see, op.operands))), old)

    def param(self, name: str, type: RowType) -> Operand:
        param = Param(name, type)
        if param not in self.params:
            self.params.append(param)
        return Operand("param", self.params.index(param))

    def done(self) -> Cell:
        outputs = tuple(map(self.see, self.cell.outputs))
        return prune(
            replace(
                self.cell,
                inputs=tuple(self.inputs),
                params=tuple(self.params),
                ops=tuple(self.ops),
                outputs=outputs,
            )
        )


def prune(cell: Cell) -> Cell:
    """Drop operations and parameters that no output needs; inputs stay."""
    needed = {o.index for o in cell.outputs if o.kind == "op"}
    for i in range(len(cell.ops) - 1, -1, -1):
        if i in needed:
            needed |= {o.index for o in cell.ops[i].operands if o.kind == "op"}
    order = sorted(needed)
    where = {old: new for new, old in enumerate(order)}
    params: list[Param] = []
    remap: dict[int, int] = {}

    def move(operand: Operand) -> Operand:
        if operand.kind == "op":
            return replace(operand, index=where[operand.index])
        if operand.kind == "param":
            if operand.index not in remap:
                remap[operand.index] = len(params)
                params.append(cell.params[operand.index])
            return replace(operand, index=remap[operand.index])
        return operand

    made = tuple(
        replace(cell.ops[i], operands=tuple(map(move, cell.ops[i].operands))) for i in order
    )
    return replace(cell, ops=made, outputs=tuple(map(move, cell.outputs)), params=tuple(params))


def _use_counts(cell: Cell) -> dict[Operand, int]:
    counts: dict[Operand, int] = {}
    for _, operand in cell.uses():
        counts[operand] = counts.get(operand, 0) + 1
    return counts


def share(cell: Cell, params: Params | None = None) -> Cell:
    """Common subexpressions: an operation that is computed already is not computed again."""
    editor, seen = _Editor(cell), dict[object, Operand]()
    for i, op in enumerate(cell.ops):
        operands = tuple(map(editor.see, op.operands))
        key = (op.op, operands, op.attrs, op.types)
        if key in seen:
            for port in range(len(op.types)):
                editor.mapped[Operand("op", i, port)] = replace(seen[key], port=port)
        else:
            seen[key] = editor.copy(op, i)
    return editor.done()


def fold_weights(cell: Cell, params: Params) -> Cell:
    """Sums and products of weights alone become weights."""
    editor = _Editor(cell)
    for i, op in enumerate(cell.ops):
        operands = [editor.see(o) for o in op.operands]
        if op.op in ("add", "mul", "sub") and all(o.kind == "param" for o in operands):
            names = [editor.params[o.index].name for o in operands]
            name = params.define(f"aten.{op.op}.Tensor", (("t", 0), ("t", 1)), (), names)
            editor.mapped[Operand("op", i)] = editor.param(name, op.type)
        else:
            editor.copy(op, i)
    return editor.done()


def fuse_biases(cell: Cell, params: Params) -> Cell:
    """A weight added to a product of its own becomes the product's bias."""
    uses, editor = _use_counts(cell), _Editor(cell)
    for i, op in enumerate(cell.ops):
        fused = _biased(cell, op, uses) if op.op == "add" else None
        if fused is None:
            editor.copy(op, i)
            continue
        product, bias = fused
        operands = (*map(editor.see, product.operands), editor.see(bias))
        editor.add(replace(product, operands=operands), i)
    return editor.done()


def _biased(cell: Cell, op: CellOp, uses: dict[Operand, int]) -> tuple[CellOp, Operand] | None:
    for product, bias in (op.operands, op.operands[::-1]):
        if product.kind != "op" or bias.kind != "param" or uses[product] != 1:
            continue
        source = cell.ops[product.index]
        fits = cell.type_of(bias).shape == source.type.shape[-1:]
        if (
            source.op == "linear"
            and len(source.operands) == 2
            and fits
            and op.types == source.types
        ):
            return source, bias
    return None


def fuse_products(cell: Cell, params: Params) -> Cell:
    """Products that share their input become one product, cut afterwards."""
    tried: set[object] = set()
    while True:
        groups: dict[object, list[int]] = {}
        for i, op in enumerate(cell.ops):
            if op.op == "linear":
                key = (op.operands[0], len(op.operands), op.type.dtype)
                groups.setdefault(key, []).append(i)
        found = [m for k, m in groups.items() if len(m) > 1 and cell.ops[m[0]] not in tried]
        if not found:
            return cell
        tried.add(cell.ops[found[0][0]])
        cell = _fuse(cell, found[0], params)


def _fuse(cell: Cell, members: Sequence[int], params: Params) -> Cell:
    editor = _Editor(cell)
    first = cell.ops[members[0]]
    widths = [cell.ops[i].type.shape[-1] for i in members]
    weights = _joined(cell, members, 1, editor, params, sum(widths))
    if weights is None:
        return cell
    operands = [first.operands[0], weights]
    if len(first.operands) == 3:
        bias = _joined(cell, members, 2, editor, params, sum(widths))
        assert bias is not None
        operands.append(bias)
    shape = (*first.type.shape[:-1], sum(widths))
    starts = np.cumsum([0, *widths]).tolist()
    wide: Operand | None = None
    for i, op in enumerate(cell.ops):
        if i not in members:
            editor.copy(op, i)
            continue
        if wide is None:
            type = RowType(shape, first.type.dtype)
            seen = (editor.see(operands[0]), *operands[1:])
            wide = editor.add(replace(first, operands=seen, types=(type,)))
        k = members.index(i)
        attrs = (
            ("dim", len(shape) - 1),
            ("start", starts[k]),
            ("stop", starts[k + 1]),
            ("step", 1),
        )
        editor.add(CellOp("slice", (wide,), attrs, op.types, op.origin), i)
    return editor.done()


def _joined(
    cell: Cell, members: Sequence[int], operand: int, editor: _Editor, params: Params, width: int
) -> Operand | None:
    """One weight made of the members' weights (operand 1) or biases (operand 2), side by side."""
    parts = [cell.ops[i].operands[operand] for i in members]
    if any(p.kind != "param" for p in parts):
        return None
    specs = [cell.params[p.index] for p in parts]
    dim = len(specs[0].type.shape) - 1
    args = (("l", tuple(("t", k) for k in range(len(parts)))), ("v", dim))
    name = params.define("aten.cat.default", args, (), [s.name for s in specs])
    return editor.param(name, RowType((*specs[0].type.shape[:-1], width), specs[0].type.dtype))


def fold_embeddings(cell: Cell, params: Params, budget: int) -> Cell:
    """A look-up followed by a product becomes a look-up in a table of products, while it fits the
    budget.
    """
    uses, editor = _use_counts(cell), _Editor(cell)
    for i, op in enumerate(cell.ops):
        source = op.operands[0] if op.op == "linear" else None
        made = source is not None and source.kind == "op" and editor.ops[editor.see(source).index]
        if not made or made.op != "embedding" or uses[source] != 1:  # type: ignore[index]
            editor.copy(op, i)
            continue
        table = editor.params[made.operands[0].index]
        width = op.type.shape[-1]
        type = RowType((table.type.shape[0], width), op.type.dtype)
        plain = made.operands[0].kind == "param" and len(table.type.shape) == 2
        if not plain or type.nbytes > budget:
            editor.copy(op, i)
            continue
        names = [table.name, *(editor.params[editor.see(o).index].name for o in op.operands[1:])]
        if len(names) == 3:
            args = (("t", 2), ("t", 0), ("t", 1))
            name = params.define("aten.addmm.default", args, (), names)
        else:
            name = params.define("aten.mm.default", (("t", 0), ("t", 1)), (), names)
        folded = editor.param(name, type)
        editor.add(replace(op, op="embedding", operands=(folded, made.operands[1])), i)
    return editor.done()


def sink_lookups(graph: CallGraph) -> None:
    """A cell that only looks rows up is done inside the cells that read it: no row is copied."""
    source_of = np.full(graph.num_values, -1, np.int64)
    port_of = np.zeros(graph.num_values, np.int64)
    call_of = np.zeros(graph.num_values, np.int64)
    for g, group in enumerate(graph.groups):
        if _is_lookup(group.cell):
            for port, made in enumerate(group.outputs):
                source_of[made], port_of[made] = g, port
                call_of[made] = np.arange(group.num_calls)
    for group in graph.groups:
        if not _is_lookup(group.cell):
            _sink_into(group, graph, source_of, port_of, call_of)
    used = graph.used()
    graph.groups = [
        g for g in graph.groups if not _is_lookup(g.cell) or any(used[m].any() for m in g.outputs)
    ]


def _is_lookup(cell: Cell) -> bool:
    """One look-up in a weight, and views of it."""
    return (
        [op.op for op in cell.ops if op.op not in ("slice", "reshape")] == ["embedding"]
        and cell.ops[0].op == "embedding"
        and len(cell.inputs) == 1
        and cell.ops[0].operands[0].kind == "param"
        and cell.inputs[0].type.shape == ()
    )


def _sink_into(
    group: CallGroup, graph: CallGraph, source_of: Refs, port_of: Refs, call_of: Refs
) -> None:
    """Do the look-ups that a group's inputs come from inside its cell."""
    found: list[tuple[int, int, int]] = []  # input, source group, port
    for i, column in enumerate(group.inputs):
        if isinstance(column, RaggedRefs) or len(column) == 0:
            continue
        source, port = int(source_of[column[0]]), int(port_of[column[0]])
        if source >= 0 and ((source_of[column] == source) & (port_of[column] == port)).all():
            found.append((i, source, port))
    if not found:
        return
    editor = _Editor(group.cell)
    kept: dict[int, int] = {}  # source group: the input that holds its index now
    dropped = set()
    for i, source, port in found:
        lookup = graph.groups[source]
        column = group.inputs[i]
        assert isinstance(column, np.ndarray)
        index = calls.take(lookup.inputs[0], call_of[column])
        if source in kept and np.array_equal(_plain(group.inputs[kept[source]]), _plain(index)):
            dropped.add(i)
        else:
            kept[source] = i
            editor.inputs[i] = CellInput(group.cell.inputs[i].name, lookup.cell.inputs[0].type)
            group.inputs[i] = index
        made = _inline(editor, lookup.cell, Operand("input", kept[source]))
        editor.mapped[Operand("input", i)] = made[port]
    for i, op in enumerate(group.cell.ops):
        editor.copy(op, i)
    group.cell = _without(share(editor.done()), dropped)
    group.inputs = [c for i, c in enumerate(group.inputs) if i not in dropped]


def _plain(column: Refs | RaggedRefs) -> Refs:
    assert isinstance(column, np.ndarray)
    return column


def _inline(editor: _Editor, cell: Cell, index: Operand) -> list[Operand]:
    """Add a look-up cell's operations to a cell being rewritten; returns its outputs there."""
    made: list[Operand] = []
    for op in cell.ops:
        operands = []
        for operand in op.operands:
            if operand.kind == "param":
                param = cell.params[operand.index]
                operands.append(editor.param(param.name, param.type))
            else:
                operands.append(index if operand.kind == "input" else made[operand.index])
        made.append(editor.add(replace(op, operands=tuple(operands))))
    return [made[o.index] for o in cell.outputs]


def _without(cell: Cell, dropped: set[int]) -> Cell:
    """A cell without inputs that nothing reads."""
    kept = [i for i in range(len(cell.inputs)) if i not in dropped]
    where = {old: new for new, old in enumerate(kept)}

    def move(operand: Operand) -> Operand:
        return replace(operand, index=where[operand.index]) if operand.kind == "input" else operand

    made = tuple(replace(op, operands=tuple(map(move, op.operands))) for op in cell.ops)
    inputs = tuple(cell.inputs[i] for i in kept)
    return replace(cell, inputs=inputs, ops=made, outputs=tuple(map(move, cell.outputs)))


PASSES: tuple[tuple[str, Callable[[Cell, Params], Cell]], ...] = (
    ("share", share),
    ("fold_weights", fold_weights),
    ("fuse_biases", fuse_biases),
    ("fuse_products", fuse_products),
)


def run(
    graph: CallGraph, params: Params, options: PassOptions, cache: dict[str, Cell]
) -> CallGraph:
    """All passes. `cache` maps a cell's key to its rewritten form, over all traces of a model."""
    for group in graph.groups:
        key = group.cell.key
        if key not in cache:
            cell = group.cell
            for _, rewrite in PASSES:
                cell = rewrite(cell, params)
            cell = share(cell)
            cache[key] = (
                fold_embeddings(cell, params, options.fold_bytes) if options.fold_bytes else cell
            )
        group.cell = replace(cache[key], recurrent=group.cell.recurrent)
    graph.groups = calls.merge(graph.groups)
    sink_lookups(graph)
    graph.groups = calls.merge(graph.groups)
    return graph


def suggest_name(cell: Cell, base: Sequence[str]) -> str:
    """A readable name: the module that owns the cell's largest weight, else what it computes."""
    best, size = "", -1
    for param in cell.params:
        owner = next((b for b in base if _mentions(param.name, b)), None)
        weight = param.type.numel + (1 << 40 if "weight_hh" in param.name else 0)
        if owner is not None and weight > size:
            best, size = owner, weight
    if not best:
        names = [op.op for op in cell.ops if op.op not in ops.VIEWS and op.op != "cast"]
        return (
            "_".join(dict.fromkeys(names[:2])).replace("ragged_", "").replace("aten:", "") or "copy"
        )
    module, _, attribute = best.rpartition(".")
    suffix = re.search(r"_(l\d+(?:_reverse)?)$", attribute)
    return (module or attribute) + (f".{suffix.group(1)}" if suffix else "")


def _mentions(expression: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", expression) is not None
