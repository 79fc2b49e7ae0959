"""Tile sizes and grids of the generated Triton kernels.

Duty: the numbers, all fixed when a kernel is printed: none depends on how many rows a launch has.
Comes in: the stages of a `TileProgram`; goes out: `PrintedKernel`, without its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cellc.kernels.tile_ir import Ref

MIN_DOT = 16  # the least size of each side of tl.dot
TILE_ELEMENTS = 1024  # of a map without products, and of a reduction


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
class PrintedKernel:
    """How to launch one kernel: `tables`, pointers of `refs`, `bad_ptr` if it reports, scalars."""

    name: str
    grid: Grid
    constants: Mapping[str, int]
    num_warps: int = 4
    args: tuple[str, ...] = ()
    refs: tuple[Ref, ...] = ()
    ragged: tuple[Ref, ...] = ()
    reports: bool = False


def padded(size: int, least: int = 1, most: int = 1 << 30) -> int:
    """The next power of two, within bounds that are powers of two."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def pointwise_tile(size: int) -> dict[str, int]:
    columns = padded(size, most=TILE_ELEMENTS // 4)
    return {"BM": max(1, TILE_ELEMENTS // columns), "BN": columns}


def product_tile(size: int, num_accumulators: int, depth: int, item_bytes: int) -> dict[str, int]:
    """Rows fixed at the tensor cores' 64 (f32: 32), columns by how many accumulators must fit."""
    rows = 64 if item_bytes == 2 else 32
    columns = padded(8192 // (rows * padded(num_accumulators)), MIN_DOT, 128)
    deep = padded(depth, MIN_DOT, 64 if item_bytes == 2 else 16)
    return {"BM": rows, "BN": padded(size, MIN_DOT, columns), "BK": deep}
