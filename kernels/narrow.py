"""Weights of products in fewer bits: bf16, or int8 with one f32 scale an output column.

Duty: rewrite a cell so that its products read narrower weights, and make these weights. Comes in: a
cell as the compiler made it, its weights; goes out: the cell that the printers print, and what its
parameters are. bf16 is the nearest one of every weight. int8 is w / scale rounded, where a column's
scale is its largest |w| / 127; the product is then scaled, and its bias added, which the kernel
does where it would add the bias anyway. Rows, sums, biases, tables that are looked up in, and
weights that are multiplied with every position of a vector stay what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from cellc.cell_editor import CellEditor
from cellc.cells import Cell, CellOp, Operand
from cellc.errors import UnsupportedError
from cellc.ops import RowType

WEIGHTS = ("bf16", "int8")
"""What weights may be, other than what the model has."""
CLOSE = {"bf16": 3e-3, "int8": 6e-3}
"""How far a step is off, as a share of its norm, at most: with weights as torch draws them."""
_SCALE = ".scale"
_FLOATS = ("f32", "bf16", "f16")  # of products whose weights are narrowed


@dataclass(frozen=True)
class Narrowed:
    """A cell with narrower weights, and whose they are: names of the old cell's parameters."""

    cell: Cell
    kind: str
    names: frozenset[str]

    def params(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The new cell's parameters."""
        made: dict[str, torch.Tensor] = {}
        for param in self.cell.params:
            if param.name in self.names:
                made |= _narrow(param.name, given[param.name], self.kind)
            elif param.name not in made and param.name in given:
                made[param.name] = given[param.name]
        return made

    def widened(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The old cell's parameters, with the numbers that products multiply with."""
        made, one = self.params(given), torch.ones(())
        wide = {
            name: (made[name].float() * made.get(name + _SCALE, one.to(made[name].device)))
            for name in self.names
        }
        return {name: wide[name].to(p.dtype) if name in wide else p for name, p in given.items()}


def check_weights(kind: str | None) -> None:
    """Raises UnsupportedError for weights that there are none of."""
    if kind is not None and kind not in WEIGHTS:
        raise UnsupportedError(
            what=f"weights={kind!r}", remedy=f"use {' or '.join(map(repr, WEIGHTS))}, or None"
        )


def narrowed(cell: Cell, kind: str | None) -> Narrowed:
    """The cell with the weights of its products as `kind`; itself where that is None, or where it
    has no products with weights that are wider.
    """
    names = _names(cell, kind) if kind else frozenset()
    if kind is None or not names:
        return Narrowed(cell, "", frozenset())
    if kind == "bf16":
        changed = [
            replace(p, type=RowType(p.type.shape, "bf16")) if p.name in names else p
            for p in cell.params
        ]
        return Narrowed(replace(cell, params=tuple(changed)), kind, names)
    return Narrowed(_scaled(cell, names), kind, names)


def _names(cell: Cell, kind: str | None) -> frozenset[str]:
    """Weights that only products of rows read."""
    uses, products = Counter[int](), Counter[int]()
    for i, op in enumerate(cell.ops):
        uses.update(x.index for x in op.operands if x.kind == "param")
        if op.op == "linear" and cell.vectors[i] is None and _wider(op, kind):
            weight = op.operands[1]
            same = weight.kind == "param" and cell.type_of(weight).dtype == op.type.dtype
            products.update([weight.index] * same)
    uses.update(x.index for x in cell.outputs if x.kind == "param")
    return frozenset(cell.params[i].name for i, n in products.items() if uses[i] == n)


def _wider(op: CellOp, kind: str | None) -> bool:
    return op.type.dtype == "f32" or (kind == "int8" and op.type.dtype in _FLOATS)


def _scaled(cell: Cell, names: frozenset[str]) -> Cell:
    """Every product with a weight of these as the product with an int8 one, scaled, and biased."""
    editor = CellEditor(cell)
    for i, op in enumerate(cell.ops):
        weight = op.operands[1] if op.op == "linear" else None
        if weight is None or weight.kind != "param" or cell.params[weight.index].name not in names:
            editor.copy(op, i)
            continue
        param, (x, _, *bias) = cell.params[weight.index], map(editor.see, op.operands)
        whole = editor.param(param.name, RowType(param.type.shape, "i8"))
        scale = editor.param(param.name + _SCALE, RowType((op.type.shape[-1],), "f32"))
        one = replace(op, name="")
        value = editor.add(replace(one, operands=(x, whole)))
        terms: list[tuple[str, Operand]] = [("mul", scale), *(("add", b) for b in bias)]
        for name, other in terms[:-1]:
            value = editor.add(replace(one, op=name, operands=(value, other), attrs=()))
        name, other = terms[-1]
        editor.add(replace(op, op=name, operands=(value, other), attrs=()), i)
    return editor.done()


def _narrow(name: str, weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    if kind == "bf16":
        return {name: weight.detach().to(torch.bfloat16)}
    wide = weight.detach().float()
    scale = wide.abs().amax(0) / 127
    whole = (wide / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return {name: whole, name + _SCALE: scale}
