"""Views: cells as users see them, by name.

Duty: `compiled.cells`. Reads what `cellc.compiler` has found so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cellc.cells import Cell
from cellc.compiler import Compiler
from cellc.launch import Kernel


@dataclass(frozen=True)
class CellView:
    """A cell as users see it."""

    name: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[str, ...]
    recurrent: bool
    flops_per_row: int
    bytes_per_row: int
    kernels: Mapping[str, Kernel]
    cell: Cell


class Cells(Mapping[str, CellView]):
    """Cells by name, made as they are looked at."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def __getitem__(self, name: str) -> CellView:
        return self.of(self._numbers()[name])

    def _numbers(self) -> dict[str, int]:
        """By name: cells that were forgotten may have had names of others, which count."""
        compiler = self._compiler
        known = list(compiler.by_number.items())
        known.sort(key=lambda item: item[1].key in compiler.cells)
        return {cell.name: number for number, cell in known}

    def of(self, number: int) -> CellView:
        """The cell of a number."""
        compiler = self._compiler
        cell = compiler.cells.get(compiler.by_number[number].key, compiler.by_number[number])
        kernels = {}
        if number in compiler.kernels:
            kernels[getattr(compiler.kernels[number], "backend", compiler.backend.name)] = (
                compiler.kernels[number]
            )
        return CellView(
            cell.name,
            tuple(p.name for p in cell.params),
            tuple(f"{i.name}: {'ragged ' if i.ragged else ''}{i.type}" for i in cell.inputs),
            tuple(map(str, cell.output_types)),
            tuple(op.op for op in cell.ops),
            cell.recurrent,
            cell.flops_per_row,
            cell.bytes_per_row,
            kernels,
            cell,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers())

    def __len__(self) -> int:
        return len(self._numbers())
