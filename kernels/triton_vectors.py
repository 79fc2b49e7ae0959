"""Triton text of stages along the vectors of ragged inputs.

Duty: one kernel for consecutive stages: a program has one call, and goes through the positions of
its vector in blocks, once a stage; what a stage leaves for the next lies in scratch that no other
program touches. In a tile, axis 0 is positions (or positions with the kept coordinates of a
reduction), axis 1 is the other coordinates. Blocks are counted from a vector's own begin: a
result does not depend on the vectors beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from cellc.kernels.tile_ir import Map, RaggedReduce, Reduce, Ref, Stage, written
from cellc.kernels.triton_body import (
    COL_COORDINATES,
    ROW_COORDINATES,
    BodyPrinter,
    Kernel,
    Tile,
    coordinates,
    pointer_at,
)
from cellc.kernels.triton_reduce import Reducer
from cellc.kernels.triton_tiles import TILE_ELEMENTS, Grid, PrintedKernel, padded

POSITIONS = 64  # of a block, at most
COLUMNS = 256  # of a map or of what is reduced over positions, at once
_OWN = re.compile(
    r"\b(acc|best|best_at|first|none|value|s|unit|cols|j\d+)\b"
)  # a stage's own names


def is_along(stage: Stage) -> bool:
    """Is it done at the positions of vectors?"""
    return isinstance(stage, Map | Reduce | RaggedReduce) and stage.over is not None


def is_plain(stages: Sequence[Stage]) -> bool:
    """Do stages do nothing but reduce the very rows of inputs?"""
    return all(
        isinstance(s, RaggedReduce)
        and len(s.body) == 1
        and s.body[0].ref is not None
        and s.body[0].ref.kind == "input"
        and s.body[0].index is not None
        and s.body[0].index.const == 0
        and s.body[0].index.coefs == (1,) * (s.size > 1)
        for s in stages
    )


def print_vectors(kernel: Kernel, stages: Sequence[Stage]) -> PrintedKernel:
    """All of them, one after another."""
    vectors: list[Ref] = []
    for number, stage in enumerate(stages):
        if number:  # other threads read what was written
            kernel.add("tl.debug_barrier()")
        printer = _Printer(kernel, number, vectors)
        if isinstance(stage, Map):
            printer.map(stage)
        elif isinstance(stage, Reduce):
            printer.reduce(stage)
        else:
            assert isinstance(stage, RaggedReduce)
            printer.reduce_positions(stage)
    head = ["row = tl.program_id(0) + tl.zeros((1,), tl.int32)"]
    for ref in vectors:
        name = kernel.names[ref]
        bound = f"tables + {name}_offsets + start + row"
        head.append(f"{name}_first = tl.load({bound})")
        head.append(f"{name}_size = tl.load({bound} + 1) - {name}_first")
    kernel.lines[:0] = [f"    {line}" for line in head] + kernel.addresses()
    return PrintedKernel("", Grid(1, 1), {}, ragged=tuple(vectors))


class _Printer:
    """One stage."""

    def __init__(self, kernel: Kernel, number: int, vectors: list[Ref]) -> None:
        self.kernel, self.number, self.vectors = kernel, number, vectors

    def map(self, stage: Map) -> None:
        size = math.prod(stage.space)
        columns = padded(size, most=COLUMNS)
        block = _positions(columns)
        depth = self._columns(size, columns)
        tile = self._tile(stage.space, size, columns)
        self._add(coordinates(tile.along_cols, stage.space, "unit"), depth)
        depth = self._loop(stage, block, depth)
        body = BodyPrinter(self.kernel, stage.body, tile, depth, {})
        values = body.run([t.value for t in stage.targets])
        mask = "more[:, None]" + f" & {tile.mask}" * bool(tile.mask)
        for target, value in zip(stage.targets, values, strict=True):
            pointer, across = pointer_at(self.kernel, target.ref, target.index, tile)
            pointer += "" if across else self._own(" + 0 * unit[None, :]")
            self.kernel.add(f"tl.store({pointer}, {value}, mask={mask})", depth)
        self._next(block, depth)

    def reduce(self, stage: Reduce) -> None:
        """Over coordinates, at every position."""
        kept, reduced = stage.space[: stage.num_kept], stage.space[stage.num_kept :]
        mult, size = math.prod(kept), math.prod(reduced)
        columns = padded(size, most=TILE_ELEMENTS)
        block = _positions(columns)
        outer = ("q",) if len(kept) == 1 else ROW_COORDINATES[: len(kept)]
        inner = ("s",) if len(reduced) == 1 else COL_COORDINATES[: len(reduced)]
        own = self._own
        mask = own("cols") if size % columns else ""
        tile = Tile(outer, tuple(map(own, inner)), mask, "more", "row + 0 * j")
        shape = f"({block}, {columns})"
        source = stage.body[stage.value].dtype
        reducer = Reducer(stage.op, source, stage.dtype, size, mask, shape)
        depth = self._loop(stage, block, 1, mult)
        for line in coordinates(outer, kept, "q"):
            self.kernel.add(line, depth)
        self._add(reducer.start(), depth)
        inside = depth + (size > columns)
        if size > columns:
            self.kernel.add(f"for k0 in range(0, {size}, {columns}):", depth)
        start = "k0 + " * (size > columns)
        self.kernel.add(own(f"s = {start}tl.arange(0, {columns})"), inside)
        if mask:
            self.kernel.add(own(f"cols = (s < {size})[None, :]"), inside)
        self._add(coordinates(inner, reduced, "s"), inside)
        (value,) = BodyPrinter(self.kernel, stage.body, tile, inside, {}).run([stage.value])
        self._add(reducer.step(value), inside)
        self._add(reducer.finish(), depth)
        out, at = self.kernel.pointer(stage.out), self.kernel.address(stage.out)
        where = f"{out} + {at}" + " + q" * bool(kept)
        origin = self.kernel.origin(stage.source)
        self.kernel.add(own(f"tl.store({where}, value, mask=more)"), depth, origin)
        self._next(block, depth)

    def reduce_positions(self, stage: RaggedReduce) -> None:
        kernel, own = self.kernel, self._own
        size, columns = stage.size, padded(stage.size, most=COLUMNS)
        block = _positions(columns)
        depth = self._columns(size, columns)
        tile = self._tile(stage.space, size, columns)
        self._add(coordinates(tile.along_cols, stage.space, "unit"), depth)
        mask = "more[:, None]" + f" & {tile.mask}" * bool(tile.mask)
        vector = self._vector(stage.over)
        source = stage.body[stage.value].dtype
        shape = f"({block}, {columns})"
        reducer = Reducer(stage.op, source, stage.dtype, f"{vector}_size", mask, shape, 0)
        self._add(reducer.start(), depth)
        inside = self._loop(stage, block, depth)
        (value,) = BodyPrinter(kernel, stage.body, tile, inside, {}).run([stage.value])
        self._add(reducer.step(value), inside)
        self._next(block, inside)
        self._add(reducer.finish(), depth)
        if stage.op in ("amax", "amin"):
            kernel.add(f"report(bad_ptr + start + row, ({vector}_size == 0)[:, None])", depth)
            kernel.reports = True
        out, at = kernel.pointer(stage.out), kernel.address(stage.out)
        keep = f", mask=unit < {size}" if tile.mask else ""
        line = own(f"tl.store({out} + {at} + unit, value{keep})")
        kernel.add(line, depth, kernel.origin(stage.source))

    # Parts

    def _own(self, text: str) -> str:
        """Names that no other stage has: one may not have two types in a loop."""
        return _OWN.sub(rf"\g<1>_of{self.number}", text)

    def _add(self, lines: Sequence[str], depth: int) -> None:
        for line in lines:
            self.kernel.add(self._own(line), depth)

    def _tile(self, space: Sequence[int], size: int, columns: int) -> Tile:
        names = ("unit",) if len(space) == 1 else COL_COORDINATES[: len(space)]
        mask = self._own("cols") if size % columns else ""
        return Tile((), tuple(map(self._own, names)), mask, "more", "row + 0 * j")

    def _columns(self, size: int, columns: int) -> int:
        """A loop over blocks of columns, if there are several; returns the depth inside."""
        looped = size > columns
        if looped:
            self.kernel.add(f"for c0 in range(0, {size}, {columns}):")
        depth = 1 + looped
        lines = [f"unit = {'c0 + ' * looped}tl.arange(0, {columns})"]
        lines += [f"cols = (unit < {size})[None, :]"] * (size % columns != 0)
        self._add(lines, depth)
        return depth

    def _vector(self, over: int) -> str:
        ref = Ref("input", over)
        if ref not in self.vectors:
            self.vectors.append(ref)
        return self.kernel.names[ref]

    def _loop(
        self, stage: Map | Reduce | RaggedReduce, block: int, depth: int, mult: int = 1
    ) -> int:
        """A loop over blocks of positions, and the addresses of what is there."""
        kernel = self.kernel
        assert stage.over is not None
        vector = self._vector(stage.over)
        kernel.add(f"begin, longest = 0, tl.max({vector}_size){f' * {mult}' * (mult > 1)}", depth)
        kernel.add("while begin < longest:", depth, self._origin(stage))
        depth += 1
        line = f"j = begin + tl.arange(0, {block})"
        if mult > 1:
            kernel.add(line.replace("j =", "p ="), depth)
            kernel.add(f"j, q = p // {mult}, p % {mult}", depth)
        else:
            kernel.add(line, depth)
        kernel.add(f"more = j < {vector}_size", depth)
        kernel.along.clear()
        made = written(stage)
        for ref in dict.fromkeys([*(ref for ref, _ in stage.reads()), *made]):
            if kernel.program.vector_of(ref) is not None:
                kernel.add(self._address(ref, vector), depth)
        return depth

    def _address(self, ref: Ref, vector: str) -> str:
        numel, name = self.kernel.program.type_of(ref).numel, self.kernel.names[ref]
        at = self.kernel.along[ref] = f"{name}_at_of{self.number}"
        if ref.kind == "input":
            own = self._vector(ref.index)
            slot = f"tl.load(tables + {own}_slots + {own}_first + j, mask=more, other=0)"
        else:
            slot = f"tl.where(more, {vector}_first + j, 0)"
        return f"{at} = {slot}.to(tl.int64)" + f" * {numel}" * (numel != 1)

    def _origin(self, stage: Map | Reduce | RaggedReduce) -> str:
        return "" if isinstance(stage, Map) else self.kernel.origin(stage.source)

    def _next(self, block: int, depth: int) -> None:
        self.kernel.add(f"begin += {block}", depth)


def _positions(columns: int) -> int:
    return max(1, min(POSITIONS, TILE_ELEMENTS // columns))
