"""Schedule a cell as a tile program: which values get memory, and which stages compute them.

Duty: the one place that decides how a cell is executed, shared by the C++ and the Triton printers.
Comes in: a `Cell`; goes out: a `TileProgram` (see `cellc.kernels.tile_ir`). Pointwise operations,
views and embeddings are lazy: they are inlined, by index arithmetic, into the stage that needs
them. Memory is given to outputs, products, reductions, concatenations, operands of products that
are not plain views of memory, values that are expensive and needed by several stages, and values
whose index arithmetic would not be affine.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from cellc import ops
from cellc.cells import Cell, CellOp, Operand
from cellc.kernels.tile_bodies import MapBody, StageBody, closed, merged, merged_space, reduced
from cellc.kernels.tile_index import (
    flat_index,
    moved_back,
    offset_of,
    strides_of,
)
from cellc.kernels.tile_ir import (
    COORDINATES,
    POINTS,
    Body,
    Buffer,
    Index,
    Instr,
    Map,
    MatMul,
    Product,
    RaggedReduce,
    Reduce,
    Ref,
    Stage,
    Target,
    TileProgram,
    View,
    read,
    written,
)
from cellc.kernels.tile_roots import choose_roots, unsupported
from cellc.ops import Shape

__all__ = [
    "COORDINATES", "POINTS", "Body", "Buffer", "Index", "Instr", "Map", "MatMul", "Product",
    "RaggedReduce", "Reduce", "Ref", "Stage", "Target", "TileProgram", "View", "read", "schedule",
    "unsupported", "written",
]  # fmt: skip


def schedule(cell: Cell) -> TileProgram:
    """The tile program of a cell that is not `unsupported`."""
    roots = choose_roots(cell)
    while True:
        try:
            return _Scheduler(cell, roots).run()
        except _Materialize as need:
            assert need.op not in roots
            roots |= {need.op}


class _Materialize(Exception):
    """Operation `op` must have memory; schedule again."""

    def __init__(self, op: int) -> None:
        super().__init__(op)
        self.op = op


@dataclass(frozen=True)
class _Store:
    """What a map stores at ref[index]: `operand`, computed here (`compute`) or read."""

    ref: Ref
    index: Index
    operand: Operand
    compute: bool


class _Scheduler:
    """One attempt with a given set of materialised operations."""

    def __init__(self, cell: Cell, roots: Collection[int]) -> None:
        self.cell, self.roots = cell, roots
        self.buffers: list[Buffer] = []
        self.refs: dict[int, Ref] = {}
        self.stages: list[MapBody | Stage] = []
        self.position: dict[Ref, int] = {}
        self.names: dict[str, int] = {}

    def run(self) -> TileProgram:
        names = [self._name(o, f"out{k}") for k, o in enumerate(self.cell.outputs)]
        for k, operand in enumerate(self.cell.outputs):
            if operand.kind == "op":
                self.refs.setdefault(operand.index, Ref("output", k))
        for i in range(len(self.cell.ops)):
            if i in self.roots:
                self._emit(i)
        for k, operand in enumerate(self.cell.outputs):
            if operand.kind != "op" or self.refs[operand.index] != Ref("output", k):
                shape = self.cell.shape_of(operand)
                self._map(shape, _Store(Ref("output", k), flat_index(shape), operand, False))
        stages = tuple(closed(s) if isinstance(s, MapBody) else s for s in self.stages)
        return TileProgram(self.cell, tuple(self.buffers), tuple(names), stages)

    def _name(self, operand: Operand, default: str) -> str:
        """A printable name, distinct from those given before."""
        if not self.names:
            self.names = {i.name: 1 for i in self.cell.inputs}
        name = (self.cell.ops[operand.index].name if operand.kind == "op" else "") or default
        name = "".join(c if c.isalnum() else "_" for c in name)
        self.names[name] = count = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def _ref(self, i: int) -> Ref:
        if i not in self.refs:
            op = self.cell.ops[i]
            self.refs[i] = Ref("buffer", len(self.buffers))
            name = self._name(Operand("op", i), f"{op.op}_{i}")
            self.buffers.append(Buffer(name, op.type, self.cell.vectors[i]))
        return self.refs[i]

    # Stages

    def _emit(self, i: int) -> None:
        op, ref, over = self.cell.ops[i], self._ref(i), self.cell.vectors[i]
        if op.op in ("linear", "matmul") and over is not None:
            self._product_along(i, op, ref)
        elif op.op == "linear" and op.operands[1].kind == "param":
            self._add(self._product(i, op, ref), ref)
        elif op.op in ("linear", "matmul"):
            self._add(self._matmul(i, op, ref), ref)
        elif op.op in ops.REDUCE:
            self._add(self._reduce(i, op, ref), ref)
        elif op.op in ops.RAGGED:
            self._add(self._ragged(i, op, ref), ref)
        elif op.op == "cat":
            self._cat(op, ref, over)
        else:
            shape = op.type.shape
            self._map(shape, _Store(ref, flat_index(shape), Operand("op", i), True), over)

    def _add(self, stage: Stage, ref: Ref) -> None:
        self.position[ref] = len(self.stages)
        self.stages.append(stage)

    def _product(self, i: int, op: CellOp, ref: Ref) -> Product:
        x = self._view(op.operands[0])
        depth, strides = x.shape[-1], x.strides
        lead = [(n, s) for n, s in zip(x.shape[:-1], strides[:-1], strict=True) if n != 1]
        regular = all(s == t * n for (_, s), (n, t) in zip(lead, lead[1:], strict=False))
        if not regular or (depth > 1 and strides[-1] != 1) or x.ref.kind == "param":
            raise _Materialize(op.operands[0].index)
        stride = lead[-1][1] if lead else depth
        x = View(x.ref, x.offset, (math.prod(x.shape[:-1]), depth), (stride, 1))
        bias = op.operands[2].index if len(op.operands) > 2 else None
        return Product(x, op.operands[1].index, bias, ref, op.type.dtype, op.type.shape[-1], i)

    def _matmul(self, i: int, op: CellOp, ref: Ref) -> MatMul:
        batch, a, b = op.type.shape[:-2], self._view(op.operands[0]), self._view(op.operands[1])
        if op.op == "linear":  # the weight is a row: one matrix for all leading dimensions of x
            batch, shape = op.type.shape[:-1], (*op.type.shape[:-1], 1, op.type.shape[-1])
            a = View(a.ref, a.offset, (*batch, 1, a.shape[-1]), (*a.strides[:-1], 0, a.strides[-1]))
        else:
            shape = op.type.shape
        return MatMul(_spread(a, batch), _spread(b, batch), ref, op.type.dtype, shape, i)

    def _reduce(self, i: int, op: CellOp, ref: Ref) -> Reduce:
        shape, dims = self.cell.shape_of(op.operands[0]), op.attributes["dims"]
        assert isinstance(dims, tuple)
        order = [d for d in range(len(shape)) if d not in dims] + sorted(dims)
        body = StageBody(tuple(shape[d] for d in order), self.cell.vectors[i])
        point = body.coordinates()
        index = tuple(point[order.index(d)] for d in range(len(shape)))
        value = self._value(body, op.operands[0], index, self._dtype(op.operands[0], op.type.dtype))
        return reduced(op.op, body, len(shape) - len(dims), value, ref, op.type.dtype, i)

    def _product_along(self, i: int, op: CellOp, ref: Ref) -> None:
        """A product at every position of a vector: sums of products of its elements."""
        shapes, dtype = [self.cell.shape_of(x) for x in op.operands], op.type.dtype
        body = StageBody((*op.type.shape, shapes[0][-1]), self.cell.vectors[i])
        *batch, n, k = body.coordinates()
        rows = (*batch, k)  # of a
        columns = (k, n) if op.op == "linear" else (*batch[:-1], k, n)
        values = []
        for operand, shape, at in zip(op.operands, shapes, (rows, columns), strict=False):
            near = at[len(at) - len(shape) :]
            point = tuple(body.zero if s == 1 else x for s, x in zip(shape, near, strict=True))
            values.append(self._value(body, operand, point, dtype))
        value = body.add(Instr("mul", dtype, tuple(values), source=i))
        biased = len(op.operands) > 2
        out = ref
        if biased:
            out = Ref("buffer", len(self.buffers))
            name = self._name(Operand("op", i), "product")
            self.buffers.append(Buffer(name, op.type, self.cell.vectors[i]))
        self._add(reduced("sum", body, len(op.type.shape), value, out, dtype, i), out)
        if biased:
            self._bias(i, op, out, ref)

    def _bias(self, i: int, op: CellOp, product: Ref, ref: Ref) -> None:
        body = MapBody(op.type.shape, self.cell.vectors[i])
        point, shape = body.coordinates(), self.cell.shape_of(op.operands[2])
        bias = self._value(body, op.operands[2], point[len(point) - len(shape) :], op.type.dtype)
        flat = flat_index(op.type.shape)
        total = body.add(Instr("load", op.type.dtype, ref=product, index=flat))
        value = body.add(Instr("add", op.type.dtype, (total, bias), source=i))
        body.targets.append(Target(ref, flat, value))
        self.stages.append(body)
        self._placed(ref, len(self.stages) - 1)

    def _ragged(self, i: int, op: CellOp, ref: Ref) -> RaggedReduce:
        operand = op.operands[0]
        over = self.cell.vector_of(operand)
        assert over is not None
        body = StageBody(op.type.shape, over)
        value = self._value(body, operand, body.coordinates(), self._dtype(operand, ""))
        space, groups = merged_space(body, [range(len(body.space))])
        name, instrs = op.op.removeprefix("ragged_"), merged(body, groups)
        return RaggedReduce(name, over, space, instrs, value, ref, op.type.dtype, i)

    def _dtype(self, operand: Operand, default: str) -> str:
        return default if operand.kind == "scalar" else self.cell.type_of(operand).dtype

    def _cat(self, op: CellOp, ref: Ref, over: int | None) -> None:
        dim, start = op.attributes["dim"], 0
        assert isinstance(dim, int)
        strides = strides_of(op.type.shape)
        for part in op.operands:
            shape = self.cell.shape_of(part)
            self._map(shape, _Store(ref, Index(start * strides[dim], strides), part, False), over)
            start += shape[dim]

    def _view(self, operand: Operand) -> View:
        """The operand as a strided view of memory, or Materialize."""
        body = StageBody(self.cell.shape_of(operand))
        value = self._value(body, operand, body.coordinates(), self._dtype(operand, ""))
        instr = body.instrs[value]
        if instr.op != "load":
            raise _Materialize(operand.index)
        assert instr.ref is not None and instr.index is not None
        return View(instr.ref, instr.index.const, body.space, instr.index.coefs)

    def _map(self, space: Shape, store: _Store, over: int | None = None) -> None:
        """Put a store into the first map that can hold it, or into a new one."""
        trial = MapBody(space, over)
        self._store(trial, store)
        needs = {x.ref for x in trial.instrs if x.ref is not None and x.ref in self.position}
        last = max((self.position[ref] for ref in needs), default=-1)
        for k in range(max(last, 0), len(self.stages)):
            stage = self.stages[k]
            if isinstance(stage, MapBody) and (stage.space, stage.over) == (space, over):
                local = [ref for ref in needs if self.position[ref] == k]
                if all(_reads_here(trial, stage, ref) for ref in local):
                    self._store(stage, store)
                    self._placed(store.ref, k)
                    return
        self.stages.append(trial)
        self._placed(store.ref, len(self.stages) - 1)

    def _placed(self, ref: Ref, k: int) -> None:
        self.position[ref] = max(k, self.position.get(ref, -1))

    def _store(self, body: MapBody, store: _Store) -> None:
        point = body.coordinates()
        if store.compute:
            value = self._compute(body, store.operand.index, point)
            body.here[store.ref] = value
        else:
            dtype = self._dtype(store.operand, "")
            value = self._value(body, store.operand, point, dtype)
        body.targets.append(Target(store.ref, store.index, value))

    # Values at a point

    def _value(
        self, body: StageBody, operand: Operand, index: tuple[Index, ...], dtype: str
    ) -> int:
        if operand.kind == "scalar":
            return body.add(Instr("const", dtype, value=operand.value))
        if operand.kind == "op" and operand.index not in self.roots:
            return self._compute(body, operand.index, index)
        type_ = self.cell.type_of(operand)
        flat = offset_of(index, type_.shape, body.zero)
        return self._load(body, self._memory(operand), type_.dtype, flat)

    def _memory(self, operand: Operand) -> Ref:
        if operand.kind == "input":
            return Ref("input", operand.index)
        if operand.kind == "param":
            return Ref("param", operand.index)
        if operand.index not in self.roots:
            raise _Materialize(operand.index)
        return self._ref(operand.index)

    def _compute(self, body: StageBody, i: int, index: tuple[Index, ...]) -> int:
        op = self.cell.ops[i]
        if op.op in ops.POINTWISE:
            return self._pointwise(body, i, op, index)
        if op.op == "embedding":
            return self._gather(body, i, op, index)
        if op.op not in ops.VIEWS:
            raise _Materialize(i)
        operand = op.operands[0]
        if op.op == "reshape" and (operand.kind != "op" or operand.index in self.roots):
            flat = offset_of(index, op.type.shape, body.zero)
            return self._load(body, self._memory(operand), op.type.dtype, flat)
        moved = moved_back(op, index, self.cell.shape_of(operand), body.space)
        if moved is None:
            raise _Materialize(operand.index)
        return self._value(body, operand, moved, op.type.dtype)

    def _load(self, body: StageBody, ref: Ref, dtype: str, flat: Index) -> int:
        if ref in body.here and flat == flat_index(body.space):
            return body.here[ref]
        return body.add(Instr("load", dtype, ref=ref, index=flat))

    def _pointwise(self, body: StageBody, i: int, op: CellOp, index: tuple[Index, ...]) -> int:
        args = []
        kind = next(
            (self.cell.type_of(x).dtype for x in op.operands if x.kind != "scalar"), op.type.dtype
        )
        by_type = op.op in ops.COMPARE or op.op in ("isnan", "cast") or op.op.startswith("logical")
        for n, x in enumerate(op.operands):
            shape = self.cell.shape_of(x)
            aligned = index[len(index) - len(shape) :]
            point = tuple(
                body.zero if size == 1 else at for size, at in zip(shape, aligned, strict=True)
            )
            dtype = "bool" if op.op == "where" and n == 0 else kind if by_type else op.type.dtype
            args.append(self._value(body, x, point, dtype))
        return body.add(Instr(op.op, op.type.dtype, tuple(args), source=i))

    def _gather(self, body: StageBody, i: int, op: CellOp, index: tuple[Index, ...]) -> int:
        table, rows = op.operands
        shape, rank = self.cell.shape_of(table), len(self.cell.shape_of(rows))
        row = self._value(body, rows, index[:rank], "i64")
        offset = offset_of(index[rank:], shape[1:], body.zero)
        return body.add(
            Instr(
                "gather",
                op.type.dtype,
                (row,),
                self._memory(table),
                offset,
                0,
                shape[0],
                math.prod(shape[1:]),
                i,
            )
        )


def _reads_here(trial: StageBody, stage: MapBody, ref: Ref) -> bool:
    """Whether `trial` reads `ref` only at the very point where `stage` computes it."""
    reads = [x for x in trial.instrs if x.ref == ref]
    here = flat_index(stage.space)
    return ref in stage.here and all(x.op == "load" and x.index == here for x in reads)


def _spread(view: View, batch: Shape) -> View:
    """The view with its leading dimensions broadcast to `batch`."""
    own, matrix = view.shape[:-2], view.shape[-2:]
    padded = (*(1,) * (len(batch) - len(own)), *own)
    strides = (*(0,) * (len(batch) - len(own)), *view.strides[:-2])
    spread = tuple(0 if n == 1 else s for n, s in zip(padded, strides, strict=True))
    return View(view.ref, view.offset, (*batch, *matrix), (*spread, *view.strides[-2:]))
