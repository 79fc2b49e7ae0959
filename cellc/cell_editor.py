"""The cell editor: a cell rewritten operation by operation.

Duty: copy a cell with other operations in place of some of its own; what no output needs any more
is dropped. Used by `cellc.cell_passes` and `cellc.lookups`.
"""

from __future__ import annotations

from dataclasses import replace

from cellc.cells import Cell, CellOp, Operand, Param
from cellc.ops import RowType


class CellEditor:
    """A cell under rewriting: operations by new index, operands mapped as they go."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.inputs = list(cell.inputs)
        self.params = list(cell.params)
        self.ops: list[CellOp] = []
        self.mapped: dict[Operand, Operand] = {}

    def see(self, operand: Operand) -> Operand:
        """What an operand of the old cell is now."""
        return self.mapped.get(operand, operand)

    def add(self, op: CellOp, old: int | None = None) -> Operand:
        """`old`: the operation that it stands for."""
        self.ops.append(op)
        for port in range(len(op.types)):
            if old is not None:
                self.mapped[Operand("op", old, port)] = Operand("op", len(self.ops) - 1, port)
        return Operand("op", len(self.ops) - 1)

    def copy(self, op: CellOp, old: int) -> Operand:
        """The old cell's operation, with its operands as they are now."""
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
