"""Triton text of reductions, ragged reductions and products of data with data.

Duty: one function a kind of stage. Comes in: the stage; goes out: lines in a `Kernel`, and its grid
and tiles. A reduction's tile is rows (calls and kept coordinates) by a chunk of what is reduced; it
accumulates chunks lane by lane, then combines the lanes: always in the same order.
"""

from __future__ import annotations

import math

from cellc import ops
from cellc.kernels.tile_ir import MatMul, RaggedReduce, Reduce, View
from cellc.kernels.triton_body import (
    COL_COORDINATES,
    ROW_COORDINATES,
    BodyPrinter,
    Kernel,
    Tile,
    affine,
    coordinates,
    register_type,
)
from cellc.kernels.triton_tiles import (
    MIN_DOT,
    RAGGED_ELEMENTS,
    TILE_ELEMENTS,
    Grid,
    PrintedKernel,
    padded,
)

INT_BITS = {"i8": 7, "i16": 15, "i32": 31, "i64": 63}


def print_reduce(kernel: Kernel, stage: Reduce) -> PrintedKernel:
    kept, reduced = stage.space[: stage.num_kept], stage.space[stage.num_kept :]
    mult, size = math.prod(kept), math.prod(reduced)
    block = padded(size, most=TILE_ELEMENTS)
    rows = max(1, TILE_ELEMENTS // block)
    outer = ("q",) if len(kept) == 1 else ROW_COORDINATES[: len(kept)]
    inner = ("s",) if len(reduced) == 1 else COL_COORDINATES[: len(reduced)]
    mask = "cols" if size % block else ""
    tile = Tile(outer, inner, mask)
    reducer = Reducer(stage.op, stage.body[stage.value].dtype, stage.dtype, size, mask)
    for line in reducer.start():
        kernel.add(line)
    looped = size > block
    if looped:
        kernel.add(f"for k0 in range(0, {size}, BN):")
    depth = 2 if looped else 1
    kernel.add("s = k0 + tl.arange(0, BN)" if looped else "s = tl.arange(0, BN)", depth)
    if mask:
        kernel.add(f"cols = (s < {size})[None, :]", depth)
    for line in coordinates(inner, reduced, "s"):
        kernel.add(line, depth)
    (value,) = BodyPrinter(kernel, stage.body, tile, depth, {}).run([stage.value])
    for line in reducer.step(value):
        kernel.add(line, depth)
    for line in reducer.finish():
        kernel.add(line)
    out, at = kernel.pointer(stage.out), kernel.address(stage.out)
    where = f"{out} + {at}" + " + q" * bool(kept)
    kernel.add(f"tl.store({where}, value, mask=live)", 1, kernel.origin(stage.source))
    head = kernel.row_lines(mult, "q" * bool(kept))
    head += [f"    {line}" for line in coordinates(outer, kept, "q")]
    kernel.lines[:0] = head + kernel.addresses()
    return PrintedKernel("", Grid(mult, rows), {"BM": rows, "BN": block})


class Reducer:
    """The lines of one reduction over [BM, BN] lanes; leaves `value`, [BM] (along axis 0: [BN])."""

    def __init__(
        self,
        op: str,
        source: str,
        dtype: str,
        size: int | str,
        mask: str,
        shape: str = "(BM, BN)",
        axis: int = 1,
    ) -> None:
        self.op, self.size, self.mask, self.shape, self.axis = op, size, mask, shape, axis
        self.dtype, self.source = register_type(dtype), register_type(source)
        self.real = source in ops.FLOAT_DTYPES
        self.worst = worst(source, op in ("amax", "argmax"))
        self.count = f"{size}.0" if isinstance(size, int) else f"{size}.to(tl.float32)"

    def start(self) -> list[str]:
        if self.op in ("sum", "mean"):
            return [f"acc = tl.zeros({self.shape}, {self.dtype})"]
        if self.op == "prod":
            return [f"acc = tl.full({self.shape}, 1, {self.dtype})"]
        if self.op in ("any", "all"):
            return [f"acc = tl.zeros({self.shape}, tl.int32)"]
        best = f"tl.full({self.shape}, {self.worst}, {self.source})"
        if self.op in ("amax", "amin"):
            return [f"acc = {best}"]
        return [f"best = {best}", f"best_at = tl.full({self.shape}, {self.size}, tl.int32)"]

    def step(self, value: str) -> list[str]:
        if self.op in ("sum", "mean"):
            return [f"acc += {self._masked(value, '0', self.dtype)}"]
        if self.op == "prod":
            return [f"acc *= {self._masked(value, '1', self.dtype)}"]
        if self.op in ("any", "all"):
            hit = f"({value} != 0)" if self.op == "any" else f"({value} == 0)"
            hit = f"({hit} & {self.mask})" if self.mask else hit
            return [f"acc |= {hit}.to(tl.int32)"]
        if self.op in ("amax", "amin"):
            masked, name = self._masked(value, self.worst, self.source), self.op[1:] + "imum"
            return [f"acc = {name if self.real else 'tl.' + name}(acc, {masked})"]
        sign = ">" if self.op == "argmax" else "<"
        better = f"({value} {sign} best) | (best_at == {self.size})"
        if self.real:
            better += f" | (({value} != {value}) & (best == best))"
        better = f"({better}) & {self.mask}" if self.mask else better
        return [
            f"first = {better}",
            f"best = tl.where(first, {value}, best)",
            "best_at = tl.where(first, s[None, :], best_at)",
        ]

    def _masked(self, value: str, other: str, kind: str) -> str:
        value = f"{value}.to({kind})"
        return f"tl.where({self.mask}, {value}, {other})" if self.mask else value

    def finish(self) -> list[str]:
        if self.op == "sum":
            return [f"value = tl.sum(acc, {self.axis})"]
        if self.op == "mean":
            return [f"value = tl.sum(acc, {self.axis}) / {self.count}"]
        if self.op == "prod":
            return [f"value = tl.reduce(acc, {self.axis}, mul)"]
        if self.op in ("any", "all"):
            return [f"value = tl.max(acc, {self.axis}) {'>' if self.op == 'any' else '=='} 0"]
        which = "max" if self.op.endswith("max") else "min"
        if self.op in ("amax", "amin"):
            if not self.real:
                return [f"value = tl.{which}(acc, {self.axis})"]
            return [
                f"value = tl.{which}(tl.where(acc != acc, {self.worst}, acc), {self.axis})",
                f"first = tl.max((acc != acc).to(tl.int32), {self.axis}) > 0",
                'value = tl.where(first, float("nan"), value)',
            ]
        return self._first(which)

    def _first(self, which: str) -> list[str]:
        """The least position among the best; any nan is better than all numbers."""
        if not self.real:
            hit = [f"first = best == tl.{which}(best, 1)[:, None]"]
        else:
            hit = [
                "first = best != best",
                f"value = tl.{which}(tl.where(first, {self.worst}, best), 1)[:, None]",
                "none = tl.max(first.to(tl.int32), 1)[:, None] == 0",
                "first = first | (none & (best == value))",
            ]
        return [*hit, f"value = tl.min(tl.where(first, best_at, {self.size}), 1).to(tl.int64)"]


def worst(dtype: str, largest: bool) -> str:
    """What every value of a type beats."""
    if dtype in ops.FLOAT_DTYPES:
        return 'float("-inf")' if largest else 'float("inf")'
    if dtype in ("bool", "u8"):
        return "0" if largest else {"bool": "1", "u8": "255"}[dtype]
    bits = INT_BITS[dtype]
    return f"({-(1 << bits)})" if largest else str((1 << bits) - 1)


def print_ragged(kernel: Kernel, stage: RaggedReduce) -> PrintedKernel:
    """Rows by columns; a loop over the longest vector among the rows, each in its own order."""
    ref, real = stage.body[0].ref, stage.dtype in ops.FLOAT_DTYPES
    assert ref is not None
    columns = padded(stage.size, most=TILE_ELEMENTS // 4)
    mask = "cols" if stage.size % columns else ""
    name, pointer = kernel.names[ref], kernel.pointer(ref)
    best = stage.op in ("amax", "amin")
    acc = "tl.int32" if stage.op in ("any", "all") else register_type(stage.dtype)
    start = worst(stage.dtype, stage.op == "amax") if best else str(int(stage.op == "prod"))
    kernel.add(f"first = tl.load(tables + {name}_offsets + start + row)")
    kernel.add(f"lengths = tl.load(tables + {name}_offsets + start + row + 1) - first")
    kernel.add("lengths = tl.where(live, lengths, 0)")
    kernel.add(f"acc = tl.full((BM, BN), {start}, {acc})")
    kernel.add("j, longest = 0, tl.max(lengths)")
    kernel.add("while j < longest:", 1, kernel.origin(stage.source))  # 3.6 interprets no range here
    kernel.add("more = j < lengths", 2)
    slot = f"tl.load(tables + {name}_slots + first + j, mask=more, other=0)"
    kernel.add(f"slot = {slot}.to(tl.int64) * {stage.size}", 2)
    both = "more[:, None]" + f" & {mask}" * bool(mask)
    load = f"tl.load({pointer} + slot[:, None] + unit[None, :], mask={both}, other=0)"
    kernel.add(f"value = {load}" + f".to({register_type(stage.dtype)})" * (stage.op != "any"), 2)
    kernel.add(f"acc = tl.where({both}, {_combined(stage.op, real)}, acc)", 2)
    kernel.add("j += 1", 2)
    if stage.op == "mean":
        kernel.add("acc = acc / lengths.to(tl.float32)[:, None]")
    elif stage.op in ("any", "all"):
        kernel.add(f"acc = acc {'>' if stage.op == 'any' else '=='} 0")
    elif best:
        kernel.add("report(bad_ptr + start + row, ((lengths == 0) & live)[:, None])")
        kernel.reports = True
    out, at = kernel.pointer(stage.out), kernel.address(stage.out)
    keep = "live[:, None]" + f" & {mask}" * bool(mask)
    kernel.add(f"tl.store({out} + {at}[:, None] + unit[None, :], acc, mask={keep})")
    head = kernel.row_lines()
    head.append("    unit = tl.program_id(1) * BN + tl.arange(0, BN)")
    head += [f"    cols = (unit < {stage.size})[None, :]"] if mask else []
    kernel.lines[:0] = head + kernel.addresses()
    rows = max(1, RAGGED_ELEMENTS // columns)
    grid = Grid(1, rows, -(-stage.size // columns))
    return PrintedKernel("", grid, {"BM": rows, "BN": columns}, ragged=(ref,))


def _combined(op: str, real: bool) -> str:
    if op in ("sum", "mean"):
        return "acc + value"
    if op == "prod":
        return "acc * value"
    if op in ("any", "all"):
        return f"acc | (value {'!=' if op == 'any' else '=='} 0).to(tl.int32)"
    return f"{'' if real else 'tl.'}{op[1:]}imum(acc, value)"


def print_matmul(kernel: Kernel, stage: MatMul, precision: str) -> PrintedKernel:
    """One program is a tile of the product of one call and one batch coordinate."""
    *batch, size_m, size_n = stage.shape
    depth = stage.a.shape[-1]
    least = 128 // (4 if stage.dtype == "f32" else 2)
    blocks = {"BM": padded(size_m, MIN_DOT, 32), "BN": padded(size_n, MIN_DOT, 64)}
    blocks["BK"] = padded(depth, MIN_DOT, least)
    names = ROW_COORDINATES[: len(batch)]
    inside_m, inside_n = f"(m < {size_m})[:, None]", f"(n < {size_n})[None, :]"
    kernel.add("m = tl.program_id(1) * BM + tl.arange(0, BM)")
    kernel.add("n = tl.program_id(2) * BN + tl.arange(0, BN)")
    kernel.add("acc = tl.zeros((BM, BN), tl.float32)")
    kernel.add(f"for k0 in range(0, {depth}, BK):", 1, kernel.origin(stage.source))
    kernel.add("ks = k0 + tl.arange(0, BK)", 2)
    a = _element(kernel, stage.a, names, "m[:, None]", "ks[None, :]")
    b = _element(kernel, stage.b, names, "ks[:, None]", "n[None, :]")
    odd = depth % blocks["BK"] != 0
    mask_a = inside_m + f" & (ks < {depth})[None, :]" * odd
    mask_b = inside_n + f" & (ks < {depth})[:, None]" * odd
    for name, view, at, mask in (("a", stage.a, a, mask_a), ("b", stage.b, b, mask_b)):
        kind = kernel.cast(view.ref, stage.dtype)
        kernel.add(f"{name} = tl.load({at}, mask={mask}, other=0){kind}", 2)
    precise = precision if stage.dtype == "f32" else "ieee"
    kernel.add(f'acc = dot(a, b, acc, "{precise}")', 2)
    out, at = kernel.pointer(stage.out), kernel.address(stage.out)
    flat = [math.prod(stage.shape[d + 1 :]) for d in range(len(batch))]
    base = f"{out} + {at}" + (f" + {affine(0, flat, names)}" if batch else "")
    inside = f"{inside_m} & {inside_n}"
    kernel.add(f"tl.store({base} + m[:, None] * {size_n} + n[None, :], acc, mask={inside})")
    mult = math.prod(batch)
    head = [f"    row = tl.program_id(0) // {mult}" if mult > 1 else "    row = tl.program_id(0)"]
    head += [f"    q = tl.program_id(0) % {mult}"] if batch else []
    lines = [f"{names[0]} = q"] if len(batch) == 1 else coordinates(names, batch, "q")
    kernel.lines[:0] = head + [f"    {line}" for line in lines] + kernel.addresses()
    grid = Grid(mult, 1, -(-size_m // blocks["BM"]), -(-size_n // blocks["BN"]))
    return PrintedKernel("", grid, blocks)


def _element(kernel: Kernel, view: View, batch: tuple[str, ...], row: str, column: str) -> str:
    """The address of an element of a view: batch coordinates, then row and column."""
    base = [kernel.pointer(view.ref), kernel.address(view.ref)]
    *outer, stride_row, stride_column = view.strides
    shift = affine(view.offset, outer, batch)
    parts = [p for p in base if p] + [shift] * (shift != "0")
    return " + ".join([*parts, f"{row} * {stride_row}", f"{column} * {stride_column}"])
