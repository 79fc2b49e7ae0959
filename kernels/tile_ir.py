"""Tile programs: what a cell does to one row, as stages over explicit buffers.

Duty: the data that `cellc.kernels.tile.schedule` makes of a cell and that the C++ and the Triton
printers read. Every stage reads and writes contiguous rows: cell inputs, parameters, scratch
buffers (one row a call, or one a position of the call's vector) and cell outputs. Inside a stage, a
value lives at a point of an iteration space; an element is addressed by an `Index`, affine in the
coordinates of that space. A stage `over` a ragged input is done for every position of its vector:
what it reads of ragged inputs and of buffers along them is the row at that position. Stages are in
execution order; within one, points are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cellc.cells import Cell, Operand
from cellc.ops import RowType, Shape


@dataclass(frozen=True, order=True)
class Ref:
    """A contiguous row in memory: input, parameter, scratch buffer or output `index`."""

    kind: Literal["input", "param", "buffer", "output"]
    index: int


@dataclass(frozen=True)
class Index:
    """An element offset: const + sum of coefs[d] * coordinate d of the iteration space."""

    const: int
    coefs: tuple[int, ...]

    def __add__(self, other: Index) -> Index:
        coefs = tuple(a + b for a, b in zip(self.coefs, other.coefs, strict=True))
        return Index(self.const + other.const, coefs)

    def __mul__(self, factor: int) -> Index:
        return Index(self.const * factor, tuple(c * factor for c in self.coefs))

    def shift(self, const: int) -> Index:
        return Index(self.const + const, self.coefs)

    def text(self, names: Sequence[str]) -> str:
        terms = [
            f"{c} * {n}" if c != 1 else n for c, n in zip(self.coefs, names, strict=False) if c
        ]
        return " + ".join(terms + [str(self.const)] * (self.const != 0 or not terms))


@dataclass(frozen=True)
class Instr:
    """One value at a point.

    `op` is load (ref[index]), const (value), gather (ref[args[0] * scale + index], where args[0] is
    an integer that must lie in [0, limit)), or an operation of `ops.POINTWISE` on args, which are
    positions in the body. `source` is the cell operation it comes from, or -1.
    """

    op: str
    dtype: str
    args: tuple[int, ...] = ()
    ref: Ref | None = None
    index: Index | None = None
    value: bool | int | float = 0
    limit: int = 0
    scale: int = 0
    source: int = -1


Body: TypeAlias = tuple[Instr, ...]


@dataclass(frozen=True)
class Target:
    """Store: ref[index] = value (a position in the body)."""

    ref: Ref
    index: Index
    value: int


@dataclass(frozen=True)
class View:
    """A strided view of one row: element (i, ..) is ref[offset + i * strides[0] + ..]."""

    ref: Ref
    offset: int
    shape: Shape
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Map:
    """Every target at every point of `space`; dimensions are merged where all indices allow it."""

    space: Shape
    body: Body
    targets: tuple[Target, ...]
    over: int | None = None

    def reads(self) -> Iterator[tuple[Ref, Index]]:
        return _reads(self.body)

    def column_offsets(self, ref: Ref) -> tuple[int, ...] | None:
        """Offsets o of all reads of `ref`, if each is ref[o + flat coordinate]; else None."""
        flat = tuple(math.prod(self.space[d + 1 :]) for d in range(len(self.space)))
        offsets = set()
        for other, index in self.reads():
            if other == ref:
                if index.coefs != flat:
                    return None
                offsets.add(index.const)
        return tuple(sorted(offsets))


@dataclass(frozen=True)
class Product:
    """out[i, :] = x[i, :] @ weight (+ bias).

    x is [M, K] with unit stride in K, weight a parameter [K, N], bias one of [N].
    """

    x: View
    weight: int
    bias: int | None
    out: Ref
    dtype: str
    num_columns: int
    source: int

    @property
    def num_rows(self) -> int:
        return self.x.shape[0]

    @property
    def depth(self) -> int:
        return self.x.shape[1]


@dataclass(frozen=True)
class MatMul:
    """out[.., m, n] = sum over k of a[.., m, k] * b[.., k, n].

    out is contiguous; a and b have its leading dimensions, with stride 0 where they are broadcast.
    """

    a: View
    b: View
    out: Ref
    dtype: str
    shape: Shape
    source: int


@dataclass(frozen=True)
class Reduce:
    """out[flat kept coordinate] = op of `value` over the dimensions of `space` from `num_kept` on.

    `dtype` is the result's. argmax and argmin give the first flat position in these dimensions.
    """

    op: str
    space: Shape
    num_kept: int
    body: Body
    value: int
    out: Ref
    dtype: str
    source: int
    over: int | None = None

    def reads(self) -> Iterator[tuple[Ref, Index]]:
        return _reads(self.body)


@dataclass(frozen=True)
class RaggedReduce:
    """out[flat point of `space`] = op (sum, mean, ..) of `value` over the positions of the vectors
    of ragged input `over`.

    amax and amin of no positions make the row bad.
    """

    op: str
    over: int
    space: Shape
    body: Body
    value: int
    out: Ref
    dtype: str
    source: int

    @property
    def size(self) -> int:
        return math.prod(self.space)

    def reads(self) -> Iterator[tuple[Ref, Index]]:
        return _reads(self.body)


Stage: TypeAlias = Map | Product | MatMul | Reduce | RaggedReduce


@dataclass(frozen=True)
class Buffer:
    """Scratch for one row, or for one a position of the vectors of ragged input `over`."""

    name: str
    type: RowType
    over: int | None = None


@dataclass(frozen=True)
class TileProgram:
    """The stages of one cell, in order."""

    cell: Cell
    buffers: tuple[Buffer, ...]
    output_names: tuple[str, ...]
    stages: tuple[Stage, ...]

    def type_of(self, ref: Ref) -> RowType:
        if ref.kind == "buffer":
            return self.buffers[ref.index].type
        if ref.kind == "output":
            return self.cell.output_types[ref.index]
        return (self.cell.inputs if ref.kind == "input" else self.cell.params)[ref.index].type

    def vector_of(self, ref: Ref) -> int | None:
        """The ragged input along whose vectors there is a row a position; None: one a call."""
        if ref.kind == "buffer":
            return self.buffers[ref.index].over
        return self.cell.vector_of(Operand("input", ref.index)) if ref.kind == "input" else None

    def name_of(self, ref: Ref) -> str:
        if ref.kind == "output":
            return self.output_names[ref.index]
        if ref.kind == "buffer":
            return self.buffers[ref.index].name
        if ref.kind == "param":
            return f"@{self.cell.params[ref.index].name}"
        return self.cell.inputs[ref.index].name

    def producer(self, ref: Ref) -> int | None:
        """Position of the last stage that writes `ref`; None for inputs and parameters."""
        last = [i for i, stage in enumerate(self.stages) if ref in written(stage)]
        return last[-1] if last else None

    def __str__(self) -> str:
        return _text(self)


def written(stage: Stage) -> tuple[Ref, ...]:
    """The rows that a stage writes, without repetition."""
    if isinstance(stage, Map):
        return tuple(dict.fromkeys(t.ref for t in stage.targets))
    return (stage.out,)


def read(stage: Stage) -> tuple[Ref, ...]:
    """The rows, weights included, that a stage reads, without repetition."""
    if isinstance(stage, Product):
        params = [stage.weight] if stage.bias is None else [stage.weight, stage.bias]
        return (stage.x.ref, *(Ref("param", p) for p in params))
    if isinstance(stage, MatMul):
        return tuple(dict.fromkeys((stage.a.ref, stage.b.ref)))
    return tuple(dict.fromkeys(ref for ref, _ in stage.reads()))


def _reads(body: Body) -> Iterator[tuple[Ref, Index]]:
    for instr in body:
        if instr.ref is not None and instr.index is not None:
            yield instr.ref, instr.index


COORDINATES = "ijklmnpq"


def _text(program: TileProgram) -> str:
    cell = program.cell
    inputs = ", ".join(f"{i.name}: {'*' * i.ragged}{i.type}" for i in cell.inputs)
    outputs = ", ".join(
        f"{n}: {t}" for n, t in zip(program.output_names, cell.output_types, strict=True)
    )
    lines = [f"tile {cell.name}({inputs}) -> ({outputs}):"]
    for b in program.buffers:
        along = "" if b.over is None else f" along {cell.inputs[b.over].name}"
        lines.append(f"    buffer {b.name}: {b.type}{along}")
    for stage in program.stages:
        lines += ["    " + line for line in _stage_lines(program, stage)]
        origin = "" if isinstance(stage, Map) else cell.ops[stage.source].origin
        lines[-1] += f"  # {origin}" * bool(origin)
    return "\n".join(lines) + "\n"


def _stage_lines(program: TileProgram, stage: Stage) -> list[str]:
    name = program.name_of
    if isinstance(stage, Product):
        bias = "" if stage.bias is None else f" + {name(Ref('param', stage.bias))}"
        size, weight = f"[{stage.num_rows}, {stage.num_columns}]", name(Ref("param", stage.weight))
        return [f"product {name(stage.out)}{size} = {_view(name, stage.x)} @ {weight}{bias}"]
    if isinstance(stage, MatMul):
        shape = list(stage.shape)
        return [
            f"matmul {name(stage.out)}{shape} = {_view(name, stage.a)} @ {_view(name, stage.b)}"
        ]
    dims = [f"{c} < {size}" for c, size in zip(COORDINATES, stage.space, strict=False)]
    along = "" if stage.over is None else f" along {program.cell.inputs[stage.over].name}"
    if isinstance(stage, Map):
        stores = [
            f"    {name(t.ref)}[{t.index.text(COORDINATES)}] = v{t.value}" for t in stage.targets
        ]
        head = f"map {', '.join(dims)}{along}:"
        return [head, *_body_lines(program, stage.body), *stores]
    kept = stage.num_kept if isinstance(stage, Reduce) else len(stage.space)
    what = f"reduce {', '.join(dims[:kept])} over {', '.join(dims[kept:])}{along}:"
    head = what if isinstance(stage, Reduce) else f"reduce {', '.join(dims)}{along}:"
    flat = Index(0, tuple(math.prod(stage.space[d + 1 : kept]) for d in range(kept)))
    store = f"    {name(stage.out)}[{flat.text(COORDINATES)}] = {stage.op}(v{stage.value})"
    return [head, *_body_lines(program, stage.body), store]


def _view(name: Callable[[Ref], str], view: View) -> str:
    offset = f" + {view.offset}" if view.offset else ""
    return f"{name(view.ref)}{offset}{list(view.shape)}:{list(view.strides)}"


def _body_lines(program: TileProgram, body: Body) -> list[str]:
    lines = []
    for i, instr in enumerate(body):
        args = [f"v{a}" for a in instr.args]
        if instr.op == "const":
            text = repr(instr.value)
        elif instr.op in POINTS:
            assert instr.ref is not None and instr.index is not None
            row = f"{instr.scale} * {args[0]} + " if instr.op == "gather" else ""
            text = f"{program.name_of(instr.ref)}[{row}{instr.index.text(COORDINATES)}]"
        else:
            text = f"{instr.op}({', '.join(args)})"
        origin = program.cell.ops[instr.source].origin if instr.source >= 0 else ""
        lines.append(f"    v{i}: {instr.dtype} = {text}" + f"  # {origin}" * bool(origin))
    return lines


POINTS = ("load", "gather")
