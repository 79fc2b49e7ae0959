"""Cell passes: rewrites of one cell.

Duty: make a cell smaller and its products fewer. Each pass is deterministic on the cell's content,
so that every trace of a model ends with the same cells; weights that it makes of others are defined
in `Params`. Run, in their order, by `cellc.passes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cellc.cell_editor import CellEditor
from cellc.cells import Cell, CellOp, Operand
from cellc.ops import RowType
from cellc.params import Params


def share(cell: Cell, params: Params | None = None) -> Cell:
    """Common subexpressions: an operation that is computed already is not computed again."""
    editor, seen = CellEditor(cell), dict[object, Operand]()
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
    editor = CellEditor(cell)
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
    uses, editor = _use_counts(cell), CellEditor(cell)
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
    editor = CellEditor(cell)
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
    cell: Cell, members: Sequence[int], operand: int, editor: CellEditor, params: Params, width: int
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
    uses, editor = _use_counts(cell), CellEditor(cell)
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


def _use_counts(cell: Cell) -> dict[Operand, int]:
    counts: dict[Operand, int] = {}
    for _, operand in cell.uses():
        counts[operand] = counts.get(operand, 0) + 1
    return counts
