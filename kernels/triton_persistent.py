"""Persistent kernels: all steps of a launch in one kernel that keeps the weights on chip.

Duty: of a recurrent cell whose module is one kernel of products of its inputs (an LSTM, a GRU),
print a kernel in which a program owns a tile of rows, and all columns: it loads the weights once,
then loops over the steps. Comes in: a tile program and its module; goes out: `Persistent`, or None
where there is no such kernel. Products add up in the order of the module's own kernel.

A program reads what it wrote itself a step before, so a row may read only what rows at its own
position wrote in the launch: `cellc.kernels.triton_chains` looks at that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cellc.kernels.tile_ir import Index, Map, Product, Ref, TileProgram
from cellc.kernels.triton_body import (
    COL_COORDINATES,
    BodyPrinter,
    Kernel,
    Tile,
    coordinates,
    identifier,
    pointer_at,
)
from cellc.kernels.triton_devices import DEVICES
from cellc.kernels.triton_map import Accumulator, accumulators, item_bytes, store, with_bias
from cellc.kernels.triton_printer import Printed, Printer
from cellc.kernels.triton_steps import Head, step_lines
from cellc.kernels.triton_tiles import MIN_DOT, Grid, PrintedKernel, padded

ROWS = (16, 32, 64)  # of a program
WARPS = (4, 8)
MOST = max(d.shared_limit for d in DEVICES.values())  # bytes: no GPU keeps more on chip
REGISTERS = 64  # of a thread, for accumulators: with 128, ptxas (of triton 3.7) spills


@dataclass(frozen=True)
class Persistent:
    """A module of one kernel, and what it needs on chip."""

    printed: Printed
    weight_bytes: int
    row_bytes: int  # that pass through shared memory, for each row of a program
    row_lanes: int  # of accumulators, for each row

    @property
    def kernel(self) -> PrintedKernel:
        """With the fewest rows a program."""
        return self.printed.kernels[0]

    def tiled(self, rows: int, num_warps: int) -> PrintedKernel:
        """The kernel with other numbers of rows a program, and of warps."""
        sizes = {**self.kernel.constants, "BM": rows}
        return replace(self.kernel, grid=Grid(1, rows), constants=sizes, num_warps=num_warps)

    def fits(self, shared_bytes: int, rows: int = ROWS[0]) -> bool:
        """Do the weights stay in a program's shared memory?"""
        return self.weight_bytes + rows * self.row_bytes <= shared_bytes

    def choices(self, shared_bytes: int) -> Iterator[PrintedKernel]:
        """All that fit shared memory and registers."""
        for rows in ROWS:
            for warps in WARPS:
                if rows * self.row_lanes <= REGISTERS * 32 * warps and self.fits(
                    shared_bytes, rows
                ):
                    yield self.tiled(rows, warps)


def print_persistent(
    program: TileProgram, printed: Printed, precision: str = "ieee"
) -> Persistent | None:
    """`printed`: the module of `print_program`; `precision` is tl.dot's for f32 products."""
    if not program.cell.recurrent or len(printed.kernels) != 1:
        return None
    *rest, stage = program.stages
    products = [p for p in rest if isinstance(p, Product) and _reads_input(program, p)]
    if not isinstance(stage, Map) or not products or len(products) < len(rest):
        return None
    size = math.prod(stage.space)
    accs, columns = accumulators(stage, products), padded(size, MIN_DOT)
    mask = "cols" if size % columns else ""
    names = ("unit",) if len(stage.space) == 1 else COL_COORDINATES[: len(stage.space)]
    block = printed.kernels[0].constants["BK"]
    shape = _Shape(stage, products, accs, columns, block, Tile((), names, mask))
    return _Persistent(program, precision).made(shape) if shape.weight_bytes <= MOST else None


def _reads_input(program: TileProgram, product: Product) -> bool:
    ref = product.x.ref
    return ref.kind == "input" and not program.cell.inputs[ref.index].ragged


@dataclass(frozen=True)
class _Shape:
    """What is computed in a step: a map and its products, all columns at once, the depth of each
    product in blocks.
    """

    stage: Map
    products: Sequence[Product]
    accumulators: Sequence[Accumulator]
    columns: int
    block: int
    tile: Tile

    @property
    def weight_bytes(self) -> int:
        parts = [p for acc in self.accumulators for p, _ in acc.parts]
        depth = sum(-(-p.depth // self.block) * self.block for p in parts)
        return depth * self.columns * item_bytes(self.products)

    @property
    def row_bytes(self) -> int:
        deepest = max(p.depth for p in self.products)
        return self.columns * 4 + deepest * item_bytes(self.products)

    def weights(self, number: int, k0: int) -> Iterator[tuple[Accumulator, int, str]]:
        """Of a block of a product's depth: an accumulator, the first column, the tile's name."""
        for acc in self.accumulators:
            for product, offset in acc.parts:
                if product is self.products[number]:
                    yield acc, offset, f"{acc.name}_w{number}_{offset}_{k0}"


class _Persistent(Printer):
    def made(self, shape: _Shape) -> Persistent:
        kernel = self.new_kernel()
        kernel.taken |= {"head", "step", "num_steps"}
        before = _weights(kernel, shape)
        _step(kernel, shape, self.precision)
        self._text(kernel, before, {"BM": ROWS[0], "BN": shape.columns, "BK": shape.block})
        module = Printed(self.module(), tuple(self.kernels))
        lanes = len(shape.accumulators) * shape.columns
        return Persistent(module, shape.weight_bytes, shape.row_bytes, lanes)

    def _text(self, kernel: Kernel, before: Sequence[str], sizes: Mapping[str, int]) -> None:
        """Close the kernel: `before` the loop, and its lines inside."""
        name = f"{identifier(self.program.cell.name) or 'cell'}_persistent"
        args = ["tables", *(f"{self.names[r]}_ptr" for r in kernel.refs)]
        args += ["bad_ptr"] * kernel.reports + ["head"]
        constants = ", ".join(f"{c}: tl.constexpr" for c in sizes)
        lines = ["@triton.jit", f"def {name}(", f"    {', '.join(args)},", f"    {constants},"]
        lines += ["):", *(f"    {line}" for line in before)]
        lines += ["    num_total = tl.load(head)", "    num_steps = tl.load(head + 1)"]
        lines += ["    for step in range(0, num_steps):"]
        lines += [f"    {line}" for line in kernel.lines]
        self.texts.append("\n".join(lines) + "\n")
        made = PrintedKernel(
            name, Grid(1, ROWS[0]), sizes, args=tuple(args), refs=tuple(kernel.refs),
            reports=kernel.reports, num_warps=8 if sizes["BN"] > 64 else 4,
            num_stages=1,  # a load may not be moved before the store of an earlier step
        )  # fmt: skip
        self.kernels.append(made)


def _weights(kernel: Kernel, shape: _Shape) -> list[str]:
    """Lines that load all weights, block by block of the depth."""
    mask, lines = shape.tile.mask, ["unit = tl.arange(0, BN)"]
    lines += [f"cols = (unit < {math.prod(shape.stage.space)})[None, :]"] * bool(mask)
    for n, product in enumerate(shape.products):
        weight = Ref("param", product.weight)
        cast = kernel.cast(weight, product.dtype)
        for k0 in range(0, product.depth, shape.block):
            odd = k0 + shape.block > product.depth
            masks = [f"(ks < {product.depth})[:, None]"] * odd + [mask] * bool(mask)
            masked = f", mask={' & '.join(masks)}, other=0" if masks else ""
            lines.append(f"ks = {k0} + tl.arange(0, BK)")
            at = f"ks[:, None] * {product.num_columns} + unit[None, :]"
            lines.append(f"w = {kernel.pointer(weight)} + {at}")
            for _, offset, name in shape.weights(n, k0):
                kernel.taken.add(name)
                lines.append(f"{name} = tl.load(w + {offset}{masked}){cast}")
    return lines


def _step(kernel: Kernel, shape: _Shape, precision: str) -> None:
    """The lines of one step, as if they stood in a kernel of their own."""
    for acc in shape.accumulators:
        kernel.add(f"{acc.name} = tl.zeros((BM, BN), tl.float32)")
    for n, product in enumerate(shape.products):
        x, _ = pointer_at(kernel, product.x.ref, Index(product.x.offset, (1,)), Tile((), ("ks",)))
        cast = kernel.cast(product.x.ref, product.dtype)
        precise = precision if product.dtype == "f32" else "ieee"
        for k0 in range(0, product.depth, shape.block):
            odd = k0 + shape.block > product.depth
            mask = f", mask=(ks < {product.depth})[None, :], other=0" if odd else ""
            kernel.add(f"ks = {k0} + tl.arange(0, BK)", 1, kernel.origin(product.source))
            kernel.add(f"a = tl.load({x}{mask}){cast}")
            for acc, _, name in shape.weights(n, k0):
                kernel.add(f'{acc.name} = dot(a, {name}, {acc.name}, "{precise}")')
    stage, tile = shape.stage, shape.tile
    given = {a.value: with_bias(kernel, a, tile) for a in shape.accumulators}
    values = BodyPrinter(kernel, stage.body, tile, 1, given).run([t.value for t in stage.targets])
    for target, value in zip(stage.targets, values, strict=True):
        store(kernel, target, value, tile)
    kernel.add("tl.debug_barrier()")  # what this program stored it loads in the next step
    head = [*step_lines(Head.of(kernel.program.cell)), *(s.strip() for s in kernel.row_lines())]
    inner = coordinates(tile.along_cols, stage.space, "unit")
    kernel.lines[:0] = [f"    {line}" for line in [*head, *inner]] + kernel.addresses()
