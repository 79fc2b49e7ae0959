"""Rows: a traced request as operations on rows, with indexing already done.

Duty: the IR between tracing and extraction. A tensor with a time (or node) dimension has become a
vector of row references, so stacking, slicing and reversing along it left no trace but different
references. One `RowNode` is one traced operation at one or more positions. Comes in from
`frontends.lower`; goes to `cellc.extract`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cellc.ops import RowType

Refs = npt.NDArray[np.int64]  # value ids


@dataclass(frozen=True)
class ParamRef:
    """An operand that is the same weight (or expression of weights) at every call."""

    name: str
    type: RowType


@dataclass(frozen=True)
class ScalarRef:
    """An operand that is a Python number of the given dtype."""

    value: bool | int | float
    dtype: str


@dataclass(frozen=True)
class RaggedRefs:
    """Call j reads the vector of rows refs[offsets[j]:offsets[j + 1]]."""

    offsets: Refs
    refs: Refs


RowOperand: TypeAlias = "Refs | ParamRef | ScalarRef | RaggedRefs"


@dataclass(frozen=True)
class RowNode:
    """One operation at `n` positions: call j of it reads operand[j] and makes values bases[port] +
    j.
    """

    op: str
    attrs: tuple[tuple[str, Hashable], ...]
    operands: tuple[RowOperand, ...]
    types: tuple[RowType, ...]
    bases: tuple[int, ...]
    n: int
    point: Hashable
    origin: str


class Windows(NamedTuple):
    """Pieces along a tensor's first dimension: piece i is x[start + i step :][:size]."""

    start: int
    step: int
    size: int

    def count(self, length: int) -> int:
        """How many fit into a tensor that is so long."""
        return max(0, (length - self.start - self.size) // self.step + 1)


@dataclass(frozen=True)
class DataSource:
    """A request tensor: its rows are values base..base + count - 1, in row-major order. With
    `windows` its pieces are, each a row.
    """

    leaf: int  # which tensor leaf of the request
    name: str
    base: int
    count: int
    type: RowType
    row_dims: tuple[bool, ...]  # per tensor dimension: part of a row, or a position
    windows: Windows | None = None


@dataclass(frozen=True)
class RowOutput:
    """A returned tensor: `refs` has the shape of its position dimensions."""

    refs: Refs
    type: RowType
    shape: tuple[int, ...]
    row_dims: tuple[bool, ...]


@dataclass
class RowGraph:
    """A request's row operations in dependency order. Values are numbered; constants have keys."""

    nodes: list[RowNode] = field(default_factory=list)
    data: list[DataSource] = field(default_factory=list)
    constants: dict[Hashable, int] = field(default_factory=dict)
    outputs: list[RowOutput] = field(default_factory=list)
    num_values: int = 0
    _starts: list[int] = field(default_factory=list)
    _types: list[RowType] = field(default_factory=list)

    def allocate(self, count: int, type: RowType) -> int:
        """Ids for `count` values of one type."""
        base = self.num_values
        self.num_values += count
        if count:
            self._starts.append(base)
            self._types.append(type)
        return base

    def type_of(self, value: int) -> RowType:
        return self._types[bisect_right(self._starts, value) - 1]

    def constant(self, key: Hashable, type: RowType) -> int:
        """Value id of a constant row; one id a key."""
        key = _exact(key)
        if key not in self.constants:
            self.constants[key] = self.allocate(1, type)
        return self.constants[key]

    def add(
        self,
        op: str,
        attrs: tuple[tuple[str, Hashable], ...],
        operands: Sequence[RowOperand],
        types: Sequence[RowType],
        n: int,
        point: Hashable,
        origin: str,
    ) -> RowNode:
        bases = tuple(self.allocate(n, t) for t in types)
        node = RowNode(op, attrs, tuple(operands), tuple(types), bases, n, point, origin)
        self.nodes.append(node)
        return node

    def producers(self) -> tuple[Refs, Refs, Refs]:
        """For every value: (node, or -1 for data and constants; port; position in the node)."""
        node = np.full(self.num_values, -1, np.int64)
        port = np.zeros(self.num_values, np.int64)
        lane = np.zeros(self.num_values, np.int64)
        for i, row in enumerate(self.nodes):
            for p, base in enumerate(row.bases):
                node[base : base + row.n] = i
                port[base : base + row.n] = p
                lane[base : base + row.n] = np.arange(row.n)
        return node, port, lane

    def __str__(self) -> str:
        lines = [f"# rows: {len(self.nodes)} operations, {self.num_values} values"]
        for s in self.data:
            lines.append(f"%{s.base}..{s.base + s.count - 1} = data {s.name}: {s.count} x {s.type}")
        for key, value in self.constants.items():
            lines.append(f"%{value} = constant {key}: {self.type_of(value)}")
        lines += [_print(node) for node in self.nodes]
        return "\n".join(lines)


def _exact(key: Any) -> Hashable:
    """A constant's key; -0.0 and NaN, which do not compare as they act, get their text in it."""
    values = key[-1] if isinstance(key[-1], tuple) else (key[-1],)
    if key[0] not in ("full", "rows") or not any(
        v != v or (v == 0 and isinstance(v, float) and math.copysign(1, v) < 0) for v in values
    ):
        exact: Hashable = key
        return exact
    return (*key[:-1], repr(values), key[-1] if key[-1] == key[-1] else math.nan)


def _print(node: RowNode) -> str:
    attrs = "".join(f", {k}={v}" for k, v in node.attrs)
    operands = ", ".join(map(_operand, node.operands))
    types = ", ".join(map(str, node.types))
    out = ", ".join(_span(np.arange(b, b + node.n)) for b in node.bases)
    return f"{out}: {node.n} x {types} = {node.op}({operands}{attrs})  # {node.origin}"


def _operand(operand: RowOperand) -> str:
    if isinstance(operand, ParamRef):
        return f"@{operand.name}"
    if isinstance(operand, ScalarRef):
        return repr(operand.value)
    if isinstance(operand, RaggedRefs):
        return f"ragged({_span(operand.refs)})"
    return _span(operand)


def _span(refs: Refs) -> str:
    if len(refs) > 1 and (np.diff(refs) == 1).all():
        return f"%{refs[0]}..{refs[-1]}"
    if len(refs) > 4:
        return f"[%{refs[0]}, %{refs[1]}, .., %{refs[-1]}]"
    return (
        ", ".join(f"%{r}" for r in refs)
        if len(refs) == 1
        else f"[{', '.join(f'%{r}' for r in refs)}]"
    )
