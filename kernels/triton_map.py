"""Triton text of maps, with the products that are computed in the same kernel.

Duty: one program is a tile of rows and a tile of columns: it runs a loop over the depth of each
product, one accumulator for each part of the product that the map reads (the four gates of a
block of hidden units), then the map's values, then stores. Comes in: a `Map` and its `Product`s;
goes out: lines in a `Kernel`. Products that the map only adds up share accumulators.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cellc.kernels.tile_ir import Index, Instr, Map, Product, Ref, Target, read, written
from cellc.kernels.triton_body import (
    COL_COORDINATES,
    BodyPrinter,
    Kernel,
    Tile,
    coordinates,
    pointer_at,
)
from cellc.kernels.triton_tiles import (
    Grid,
    PrintedKernel,
    Space,
    pointwise_tile,
    product_tile,
)


@dataclass(frozen=True)
class Accumulator:
    """The sum of some products at constant offsets: the value at position `value` of the body."""

    name: str
    value: int
    parts: tuple[tuple[Product, int], ...]  # product, first column


def print_product(kernel: Kernel, product: Product, precision: str) -> PrintedKernel:
    """A product of its own: a map that stores it, over rows of calls and rows of x at once."""
    mult, size = product.num_rows, product.num_columns
    space = (mult, size) if mult > 1 else (size,)
    flat = Index(0, (size, 1) if mult > 1 else (1,))
    body = (Instr("load", product.dtype, ref=product.out, index=flat, source=product.source),)
    stage = Map(space, body, (Target(product.out, flat, 0),))
    return print_map(kernel, stage, [product], precision, mult)


def print_map(
    kernel: Kernel, stage: Map, products: Sequence[Product], precision: str, mult: int = 1
) -> PrintedKernel:
    """A map over rows (`mult` of them a call) and columns, with its products."""
    size, accs = math.prod(stage.space) // mult, accumulators(stage, products)
    constants = _constants(stage, accs, products, size)
    inner = stage.space[1:] if mult > 1 else stage.space
    cols = ("unit",) if len(inner) == 1 else COL_COORDINATES[: len(inner)]
    tile = Tile(("m",) * (mult > 1), cols, "cols" if size % constants["BN"] else "")
    for acc in accs:
        kernel.add(f"{acc.name} = tl.zeros((BM, BN), tl.float32)")
    for product in products:
        _loop(kernel, product, accs, tile, constants["BK"], precision)
    given = {a.value: with_bias(kernel, a, tile) for a in accs}
    body = BodyPrinter(kernel, stage.body, tile, 1, given)
    values = body.run([t.value for t in stage.targets])
    for target, value in zip(stage.targets, values, strict=True):
        store(kernel, target, value, tile)
    kernel.lines[:0] = _head(kernel, stage, mult, tile, size, inner)
    grid = Grid(mult, constants["BM"], -(-size // constants["BN"]))
    warps = 8 if len(accs) * constants["BM"] * constants["BN"] > 8192 else 4
    space = _space(accs, products, size, constants) if products else None
    return PrintedKernel("", grid, constants, warps, space=space)


def _space(
    accs: Sequence[Accumulator],
    products: Sequence[Product],
    size: int,
    constants: Mapping[str, int],
) -> Space:
    depths = tuple(p.depth for p in products)
    return Space(
        size,
        depths,
        len(accs),
        item_bytes(products),
        masks_columns=size % constants["BN"] != 0,
        masks_depth=all(d % constants["BK"] != 0 for d in depths),
    )


def accumulators(stage: Map, products: Sequence[Product]) -> list[Accumulator]:
    """One for each load of a product; loads that are only added to each other share one."""
    by_ref = {p.out: p for p in products}
    uses = Counter(a for instr in stage.body for a in instr.args)
    uses.update(t.value for t in stage.targets)
    groups: dict[int, tuple[tuple[Product, int], ...]] = {}
    for i, instr in enumerate(stage.body):
        if instr.op == "load" and instr.ref in by_ref:
            assert instr.index is not None
            groups[i] = ((by_ref[instr.ref], instr.index.const),)
        elif instr.op == "add" and all(a in groups and uses[a] == 1 for a in instr.args):
            left, right = (groups[a] for a in instr.args)
            if {p.out for p, _ in left}.isdisjoint(p.out for p, _ in right):
                for a in instr.args:
                    del groups[a]
                groups[i] = left + right
    return [Accumulator(f"acc_{n}", i, parts) for n, (i, parts) in enumerate(groups.items())]


def _constants(
    stage: Map, accs: Sequence[Accumulator], products: Sequence[Product], size: int
) -> dict[str, int]:
    if not products:
        rows = {r for r in (*read(stage), *written(stage)) if r.kind != "param"}
        return {**pointwise_tile(size, len(rows)), "BK": 1}
    deepest = max(p.depth for p in products)
    return product_tile(size, len(accs), deepest, item_bytes(products))


def item_bytes(products: Sequence[Product]) -> int:
    return 4 if any(p.dtype == "f32" for p in products) else 2


def _loop(
    kernel: Kernel,
    product: Product,
    accs: Sequence[Accumulator],
    tile: Tile,
    block: int,
    precision: str,
) -> None:
    """Over the depth of one product: a tile of x, and a tile of weights for each accumulator."""
    depth, weight, mult = product.depth, Ref("param", product.weight), len(tile.along_rows)
    index = Index(product.x.offset, (product.x.strides[0],) * mult + (1,))
    x, _ = pointer_at(kernel, product.x.ref, index, Tile(tile.along_rows, ("ks",)))
    odd = depth % block != 0
    masks = [f"(ks < {depth})[:, None]"] * odd + [tile.mask] * bool(tile.mask)
    mask = ", mask=inside, other=0" if odd else f", mask={tile.mask}, other=0" if masks else ""
    inner = f", mask=(ks < {depth})[None, :], other=0" if odd else ""
    kernel.add(f"for k0 in range(0, {depth}, BK):", 1, kernel.origin(product.source))
    kernel.add("ks = k0 + tl.arange(0, BK)", 2)
    kernel.add(f"a = tl.load({x}{inner}){_cast(kernel, product, product.x.ref)}", 2)
    columns = f"ks[:, None] * {product.num_columns} + unit[None, :]"
    kernel.add(f"w = {kernel.pointer(weight)} + {columns}", 2)
    if odd:
        kernel.add(f"inside = {' & '.join(masks)}", 2)
    precise = precision if product.dtype == "f32" else "ieee"
    for acc in accs:
        for offset in [o for p, o in acc.parts if p is product]:
            at = f"w + {offset}" if offset else "w"
            kernel.add(f"b = tl.load({at}{mask}){_cast(kernel, product, weight)}", 2)
            kernel.add(f'{acc.name} = dot(a, b, {acc.name}, "{precise}")', 2)


def _cast(kernel: Kernel, product: Product, ref: Ref) -> str:
    return kernel.cast(ref, product.dtype)


def with_bias(kernel: Kernel, acc: Accumulator, tile: Tile) -> str:
    """The name of the accumulated value, the biases of its products added."""
    terms = []
    for product, offset in acc.parts:
        if product.bias is not None:
            pointer = kernel.pointer(Ref("param", product.bias))
            column = f"(unit + {offset})" if offset else "unit"
            mask = f", mask={tile.mask}, other=0" if tile.mask else ""
            terms.append(f"tl.load({pointer} + {column}[None, :]{mask}).to(tl.float32)")
    for term in terms:
        kernel.add(f"{acc.name} += {term}")
    return acc.name


def store(kernel: Kernel, target: Target, value: str, tile: Tile) -> None:
    pointer, across = pointer_at(kernel, target.ref, target.index, tile)
    if not across:  # one column: lanes beside it are masked off
        pointer += " + 0 * unit[None, :]"
    mask = "live[:, None]" + f" & {tile.mask}" * bool(tile.mask)
    kernel.add(f"tl.store({pointer}, {value}, mask={mask})")


def _head(
    kernel: Kernel, stage: Map, mult: int, tile: Tile, size: int, inner: tuple[int, ...]
) -> list[str]:
    """Lines that say which rows and columns this program has."""
    lines = kernel.row_lines(mult, "m" * (mult > 1))
    lines.append("    unit = tl.program_id(1) * BN + tl.arange(0, BN)")
    if tile.mask:
        lines.append(f"    cols = (unit < {size})[None, :]")
    lines += [f"    {line}" for line in coordinates(tile.along_cols, inner, "unit")]
    return lines + kernel.addresses()
