"""Tile sizes and grids of the generated Triton kernels.

Duty: the numbers, all fixed when a kernel is printed: none depends on how many rows a launch has.
Comes in: the stages of a `TileProgram`; goes out: `PrintedKernel`, without its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from cellc.kernels.tile_ir import Ref

MIN_DOT = 16  # the least size of each side of tl.dot
TILE_ELEMENTS = 1024  # of a map without products, and of a reduction
RAGGED_ELEMENTS = 512  # of a reduction over vectors, which keeps their lengths and slots as well
THREADS = 128  # of a program with four warps
ADDRESS_REGISTERS = 56  # of a thread: with 64, ptxas (of triton 3.6) spills a few maps


@dataclass(frozen=True)
class Grid:
    """Programs of a launch of n rows: ceil(n * mult / rows), y, z."""

    mult: int
    rows: int
    y: int = 1
    z: int = 1

    def __call__(self, num_rows: int) -> tuple[int, int, int]:
        return -(-num_rows * self.mult // self.rows), self.y, self.z


@dataclass(frozen=True)
class Tiles:
    """A choice for a kernel with products: a tile's rows, columns and depth, warps, and how many
    tiles of the depth are loaded ahead.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Space:
    """What the tiles of a kernel with products may be: its columns, the depth of each product, its
    accumulators, bytes of an element; where the text has masks, sizes need not divide.
    """

    columns: int
    depths: tuple[int, ...]
    accumulators: int
    item_bytes: int
    masks_columns: bool
    masks_depth: bool

    def choices(self, shared_bytes: int) -> Iterator[Tiles]:
        """All choices that fit a program's shared memory and registers."""
        for BM, BN, BK, warps, stages in product(
            (16, 32, 64, 128), (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)
        ):
            tile = self.accumulators * BM * BN  # f32 values kept by 32 * warps threads
            loaded = (BM + self.accumulators * BN) * BK * self.item_bytes
            if not 16 * 32 * warps <= tile <= 64 * 32 * warps or 4 * BN < BM or 4 * BM < BN:
                continue
            if BK * self.item_bytes < 64 and BK < max(self.depths):  # half a line of memory
                continue
            if stages * loaded > shared_bytes or BN > padded(self.columns, MIN_DOT):
                continue
            if self.columns % BN and not self.masks_columns:
                continue
            if any(d % BK for d in self.depths) and not self.masks_depth:
                continue
            if BK > padded(max(self.depths), MIN_DOT) or (stages > 2 and BK == max(self.depths)):
                continue
            yield Tiles(BM, BN, BK, warps, stages)


@dataclass(frozen=True)
class PrintedKernel:
    """How to launch one kernel: `tables`, pointers of `refs`, `bad_ptr` if it reports, scalars."""

    name: str
    grid: Grid
    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3
    space: Space | None = None  # of kernels with products
    args: tuple[str, ...] = ()
    refs: tuple[Ref, ...] = ()
    ragged: tuple[Ref, ...] = ()
    reports: bool = False

    @property
    def tiles(self) -> Tiles:
        """Those in use."""
        sizes = self.constants
        return Tiles(sizes["BM"], sizes["BN"], sizes["BK"], self.num_warps, self.num_stages)

    def tiled(self, tiles: Tiles) -> PrintedKernel:
        """The same text with other tiles."""
        assert self.space is not None
        grid = replace(self.grid, rows=tiles.BM, y=-(-self.space.columns // tiles.BN))
        sizes = {"BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK}
        return replace(
            self, grid=grid, constants=sizes, num_warps=tiles.num_warps, num_stages=tiles.num_stages
        )


def compile_options(kernel: PrintedKernel) -> dict[str, int]:
    return {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}


def padded(size: int, least: int = 1, most: int = 1 << 30) -> int:
    """The next power of two, within bounds that are powers of two."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def pointwise_tile(size: int, num_refs: int = 1) -> dict[str, int]:
    """The more rows in memory a map touches, the fewer lanes a thread has: each lane may hold an
    address of two registers for each of them.
    """
    elements = TILE_ELEMENTS
    while elements > THREADS and 2 * num_refs * (elements // THREADS) > ADDRESS_REGISTERS:
        elements //= 2
    columns = padded(size, most=TILE_ELEMENTS // 4)
    return {"BM": max(1, elements // columns), "BN": columns}


def product_tile(size: int, num_accumulators: int, depth: int, item_bytes: int) -> dict[str, int]:
    """Rows fixed at the tensor cores' 64 (f32: 32), columns by how many accumulators must fit."""
    rows = 64 if item_bytes == 2 else 32
    columns = padded(8192 // (rows * padded(num_accumulators)), MIN_DOT, 128)
    deep = padded(depth, MIN_DOT, 64 if item_bytes == 2 else 16)
    return {"BM": rows, "BN": padded(size, MIN_DOT, columns), "BK": deep}
