"""Cells: the weight-shared pieces of computation that are batched, and their IR.

Duty: the data that describes one cell. Comes in from `cellc.extract` and is rewritten by
`cellc.passes`; goes to `cellc.plan` (as an id) and to `kernels` (which print it). A cell is
immutable; two cells with the same `key` are the same cell, whatever request or place of the model
they were found in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from cellc import ops
from cellc.ops import RowType, Shape


@dataclass(frozen=True)
class Operand:
    """One operand: input `index` of the cell, parameter `index`, result `port` of operation
    `index`, or a scalar.
    """

    kind: Literal["input", "param", "op", "scalar"]
    index: int = 0
    port: int = 0
    value: bool | int | float = 0


@dataclass(frozen=True)
class CellInput:
    """One row a call, or (ragged) a variable-length vector of rows a call."""

    name: str
    type: RowType
    ragged: bool = False


@dataclass(frozen=True)
class Param:
    """A weight, or an expression of weights alone, by printable name (`rnn.weight_hh_l0.T`)."""

    name: str
    type: RowType


@dataclass(frozen=True)
class CellOp:
    """One row operation with its operands and attributes; `origin` is the user's file:line."""

    op: str
    operands: tuple[Operand, ...]
    attrs: tuple[tuple[str, Hashable], ...]
    types: tuple[RowType, ...]
    origin: str = field(default="", compare=False)
    name: str = field(default="", compare=False)

    @cached_property
    def attributes(self) -> dict[str, Hashable]:
        return dict(self.attrs)

    @property
    def type(self) -> RowType:
        return self.types[0]


@dataclass(frozen=True)
class Cell:
    """A batched unit: inputs and parameters in, operations, outputs out. Operations are in
    dependency order.
    """

    name: str
    inputs: tuple[CellInput, ...]
    params: tuple[Param, ...]
    ops: tuple[CellOp, ...]
    outputs: tuple[Operand, ...]
    recurrent: bool = False

    @cached_property
    def key(self) -> str:
        """Content hash: equal for equal computation, independent of names and of origins."""
        inputs = [(i.type, i.ragged) for i in self.inputs]
        parts = (
            inputs,
            self.params,
            [(o.op, o.operands, o.attrs, o.types) for o in self.ops],
            self.outputs,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def type_of(self, operand: Operand) -> RowType:
        """Row type of an operand that is not a scalar."""
        if operand.kind == "input":
            return self.inputs[operand.index].type
        if operand.kind == "param":
            return self.params[operand.index].type
        assert operand.kind == "op", operand
        return self.ops[operand.index].types[operand.port]

    def shape_of(self, operand: Operand) -> Shape:
        return () if operand.kind == "scalar" else self.type_of(operand).shape

    @cached_property
    def output_types(self) -> tuple[RowType, ...]:
        return tuple(self.type_of(o) for o in self.outputs)

    @cached_property
    def has_ragged(self) -> bool:
        """Is there a ragged input?"""
        return any(spec.ragged for spec in self.inputs)

    @cached_property
    def flops_per_row(self) -> int:
        return sum(
            ops.flops(o.op, [self.shape_of(x) for x in o.operands], o.type.shape) for o in self.ops
        )

    @cached_property
    def bytes_per_row(self) -> int:
        """Bytes of rows read and written a call, weights not counted."""
        return sum(i.type.nbytes for i in self.inputs) + sum(t.nbytes for t in self.output_types)

    @cached_property
    def weight_bytes(self) -> int:
        return sum(p.type.nbytes for p in self.params)

    @cached_property
    def vectors(self) -> tuple[int | None, ...]:
        """For every operation, the ragged input along whose vectors its result lies; None: a row.

        Inputs that one operation reads together have vectors of one length: the first of them
        stands for all (`lengths`).
        """
        return self._vectors[0]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """For every input, the first one whose vectors are known to be as long."""
        return self._vectors[1]

    @cached_property
    def _vectors(self) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
        same = list(range(len(self.inputs)))
        along: list[int | None] = []
        for op in self.ops:
            found = [
                along[x.index] if x.kind == "op" else x.index if self.is_ragged_input(x) else None
                for x in op.operands
            ]
            reads = {same[v] for v in found if v is not None}
            same = [min(reads) if s in reads else s for s in same]
            along.append(min(reads) if reads and op.op not in ops.RAGGED else None)
        return tuple(v if v is None else same[v] for v in along), tuple(same)

    def vector_of(self, operand: Operand) -> int | None:
        """As `vectors`, of any operand."""
        if operand.kind == "op":
            return self.vectors[operand.index]
        return self.lengths[operand.index] if self.is_ragged_input(operand) else None

    def is_ragged_input(self, operand: Operand) -> bool:
        return operand.kind == "input" and self.inputs[operand.index].ragged

    def uses(self) -> Iterator[tuple[int, Operand]]:
        """Every (operation index, operand), outputs last with index len(ops)."""
        for i, op in enumerate(self.ops):
            for operand in op.operands:
                yield i, operand
        for operand in self.outputs:
            yield len(self.ops), operand

    def named(self, name: str) -> Cell:
        return replace(self, name=name)
