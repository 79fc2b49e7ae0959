"""Extraction: find a request's weight-shared cells.

Duty: group the operations of a `RowGraph` into calls of cells. Comes in from `frontends.lower`;
goes to `cellc.passes` as a `CallGraph`.

Method (ARCHITECTURE.md, "Roles"): every operation has a *role*: its program point,
operation, attributes and the weights it reads. In the graph of roles, strongly connected components
are the recurrences: each is cut, in trace order, into instances where a role repeats. Roles outside
them are feed-forward: those whose calls correspond one to one are fused. Whatever was grouped, an
instance is internally wired by one template; instances wired otherwise become calls of another
cell. What is known of roles is kept over all traces of a model (`Roles`), so that a request of one
position, where no recurrence shows, is cut like the others.
"""

from __future__ import annotations

import numpy as np

from cellc import calls
from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.feedforward import FeedForward
from cellc.ops import RowType
from cellc.recurrences import Recurrences
from cellc.request_roles import RequestRoles
from cellc.roles import Roles, Slot
from cellc.rows import ParamRef, RaggedRefs, Refs, RowGraph, ScalarRef
from cellc.units import Unit, refs_of, same_columns


def extract(rows: RowGraph, roles: Roles) -> CallGraph:
    """Group a request's row operations into calls of cells; `roles` is kept by the model."""
    request = RequestRoles(rows, roles)
    recurrent = _recurrences(roles)
    units = Recurrences(request, recurrent).units() + FeedForward(request, recurrent).units()
    groups = _Cells(rows, roles).groups(units)
    return CallGraph(
        calls.merge(groups), rows.data, dict(rows.constants), rows.outputs, rows.num_values
    )


def _recurrences(roles: Roles) -> dict[int, int]:
    """The recurrence of every role that is in one."""
    components = roles.graph.components()
    return {
        role: i
        for i, component in enumerate(components)
        if len(component) > 1 or roles.graph.has_edge(*(list(component) * 2))
        for role in component
    }


class _Cells:
    """Units as cells and their calls."""

    def __init__(self, rows: RowGraph, roles: Roles) -> None:
        self.rows, self.roles = rows, roles

    def groups(self, units: list[Unit]) -> list[CallGroup]:
        outside = np.zeros(self.rows.num_values, bool)
        for output in self.rows.outputs:
            outside[output.refs.reshape(-1)] = True
        for unit in units:
            for column in unit.columns.values():
                outside[refs_of(column)] = True
        groups = [self._group(unit, outside) for unit in units]
        return [g for g in groups if g is not None]

    def _group(self, unit: Unit, outside: np.ndarray) -> CallGroup | None:
        inputs, slots = self._inputs(unit)
        params: dict[str, int] = {}
        ops = []
        declared = []
        for k, node in enumerate(unit.nodes):
            operands = []
            for j, operand in enumerate(node.operands):
                wire = unit.inner[k][j]
                if wire is not None:
                    operands.append(Operand("op", *wire))
                elif isinstance(operand, ParamRef):
                    if operand.name not in params:
                        declared.append(Param(operand.name, operand.type))
                    operands.append(Operand("param", params.setdefault(operand.name, len(params))))
                elif isinstance(operand, ScalarRef):
                    operands.append(Operand("scalar", value=operand.value))
                else:
                    operands.append(Operand("input", slots[k, j]))
            ops.append(CellOp(node.op, tuple(operands), node.attrs, node.types, node.origin))
        outputs = []
        made = []
        for (k, port), values in unit.outputs.items():
            if outside[values].any():
                self.roles.note(self.roles.escaping, (unit.roles[k], port), unit.roles[k])
            if (unit.roles[k], port) in self.roles.escaping:
                outputs.append(Operand("op", k, port))
                made.append(values)
        if not outputs:
            return None
        specs = tuple(
            CellInput(f"x{i}", self._input_type(unit, i, c, slots), isinstance(c, RaggedRefs))
            for i, c in enumerate(inputs)
        )
        cell = Cell("", specs, tuple(declared), tuple(ops), tuple(outputs), unit.recurrent)
        return CallGroup(cell, inputs, made)

    def _input_type(
        self, unit: Unit, index: int, column: Refs | RaggedRefs, slots: dict[tuple[int, int], int]
    ) -> RowType:
        refs = refs_of(column)
        if len(refs):
            return self.rows.type_of(int(refs[0]))
        return _ragged_type(unit, index, slots)

    def _inputs(self, unit: Unit) -> tuple[list[Refs | RaggedRefs], dict[tuple[int, int], int]]:
        """Columns of the unit's inputs, one for slots that always read the same value."""
        columns: list[Refs | RaggedRefs] = []
        owners: list[Slot] = []
        slots: dict[tuple[int, int], int] = {}
        for (k, j), column in unit.columns.items():
            slot = (unit.roles[k], j)
            for i, other in enumerate(columns):
                if same_columns(column, other) and (owners[i], slot) not in self.roles.distinct:
                    slots[k, j] = i
                    break
                if not same_columns(column, other) and (owners[i], slot) not in self.roles.distinct:
                    self.roles.distinct.add((owners[i], slot))
                    self.roles.version += (
                        owners[i][0] in self.roles.old and slot[0] in self.roles.old
                    )
            else:
                slots[k, j] = len(columns)
                columns.append(column)
                owners.append(slot)
        return columns, slots


def _ragged_type(unit: Unit, index: int, slots: dict[tuple[int, int], int]) -> RowType:
    """Row type of an input whose vectors are all empty: what its reduction makes."""
    k, _ = next(slot for slot, i in slots.items() if i == index)
    return unit.nodes[k].types[0]
