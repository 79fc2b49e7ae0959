"""Prints a tile program as a module of Triton kernels.

Duty: text, and nothing that runs. Comes in: a `TileProgram`; goes out: `Printed`, the module's
source and, for each kernel, its arguments, grid and tile sizes, from which `triton_backend`
launches it and `triton_targets` compiles it. A product that one map alone reads, at constant
offsets, is computed in that map's kernel: all gates of a block of hidden units in one program.

Tile sizes never depend on the number of rows, so that a row's result does not depend on its
neighbours: every reduction runs in one order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import groupby

from cellc.kernels.tile_ir import (
    Map,
    MatMul,
    Product,
    RaggedReduce,
    Reduce,
    Ref,
    Stage,
    TileProgram,
    read,
)
from cellc.kernels.triton_body import HELPERS, RESERVED, Kernel, identifier
from cellc.kernels.triton_map import print_map, print_product
from cellc.kernels.triton_reduce import print_matmul, print_ragged, print_reduce
from cellc.kernels.triton_tiles import PrintedKernel
from cellc.kernels.triton_vectors import is_along, is_plain, print_vectors

MAX_OFFSETS = 8  # of one product in one map
SCALARS = ("start", "num_rows", "num_total")


@dataclass(frozen=True)
class Printed:
    """A module and the launches that run it, in order."""

    source: str
    kernels: tuple[PrintedKernel, ...]


def print_program(program: TileProgram, precision: str = "ieee") -> Printed:
    """The Triton module of a program; `precision` is tl.dot's for f32 products."""
    printer = Printer(program, precision)
    printer.run()
    return Printed(printer.module(), tuple(printer.kernels))


class Printer:
    def __init__(self, program: TileProgram, precision: str) -> None:
        self.program, self.precision = program, precision
        self.names = _ref_names(program)
        self.kernels: list[PrintedKernel] = []
        self.texts: list[str] = []

    def run(self) -> None:
        stages = self.program.stages
        homes = {i: self._home(p) for i, p in enumerate(stages) if isinstance(p, Product)}
        for along, group in groupby(enumerate(stages), lambda item: is_along(item[1])):
            if along:
                self._along([stage for _, stage in group])
                continue
            for i, stage in group:
                inside = [p for k, p in enumerate(stages) if homes.get(k) == i]
                self._stage(stage, [p for p in inside if isinstance(p, Product)], homes.get(i))

    def _along(self, stages: list[Stage]) -> None:
        """Stages along vectors in one kernel; those that reduce nothing but inputs by themselves,
        which takes more columns at once.
        """
        if not is_plain(stages):
            kernel = self.new_kernel()
            self._close(kernel, "vectors", print_vectors(kernel, stages))
            return
        for stage in stages:
            assert isinstance(stage, RaggedReduce)
            kernel = self.new_kernel()
            self._close(kernel, f"ragged_{stage.op}", print_ragged(kernel, stage))

    def _stage(self, stage: Stage, products: list[Product], home: int | None) -> None:
        kernel = self.new_kernel()
        if isinstance(stage, Product):
            if home is None:
                self._close(kernel, "product", print_product(kernel, stage, self.precision))
        elif isinstance(stage, Map):
            printed = print_map(kernel, stage, products, self.precision)
            self._close(kernel, "fused" if products else "map", printed)
        elif isinstance(stage, MatMul):
            self._close(kernel, "matmul", print_matmul(kernel, stage, self.precision))
        else:
            assert isinstance(stage, Reduce)
            self._close(kernel, stage.op, print_reduce(kernel, stage))

    def _home(self, product: Product) -> int | None:
        """The map that a product is computed in, if any."""
        stages = self.program.stages
        readers = [j for j, s in enumerate(stages) if product.out in read(s)]
        if product.out.kind != "buffer" or len(readers) != 1 or product.num_rows != 1:
            return None
        reader = stages[readers[0]]
        if not isinstance(reader, Map) or not reader.space or reader.over is not None:
            return None
        offsets = reader.column_offsets(product.out)
        return readers[0] if offsets and len(offsets) <= MAX_OFFSETS else None

    def new_kernel(self) -> Kernel:
        kinds = ("ptr", "at", "first", "size")
        refs = {f"{n}_{kind}" for n in self.names.values() for kind in kinds}
        return Kernel(self.program, self.names, taken=set(RESERVED | HELPERS | refs))

    def _close(self, kernel: Kernel, kind: str, printed: PrintedKernel) -> None:
        """Add the kernel's text, with the arguments that its lines turned out to use."""
        name = f"{identifier(self.program.cell.name) or 'cell'}_{len(self.kernels)}_{kind}"
        pointers = ["tables", *(f"{self.names[r]}_ptr" for r in kernel.refs)]
        pointers += ["bad_ptr"] * kernel.reports
        scalars = list(SCALARS)
        for ref in printed.ragged:
            scalars += [f"{self.names[ref]}_offsets", f"{self.names[ref]}_slots"]
        constants = [f"{c}: tl.constexpr" for c in printed.constants]
        plain = ", ".join(f'"{s}"' for s in scalars)
        head = [f"@triton.jit(do_not_specialize=[{plain}])", f"def {name}("]
        head += [f"    {', '.join(part)}," for part in (pointers, scalars, constants) if part]
        self.texts.append("\n".join([*head, "):", *kernel.lines]) + "\n")
        args = tuple(pointers + scalars)
        self.kernels.append(
            replace(printed, name=name, args=args, refs=tuple(kernel.refs), reports=kernel.reports)
        )

    def module(self) -> str:
        """The whole text; its docstring is the tile program."""
        text = "\n\n".join(self.texts)
        used = ", ".join(sorted(HELPERS & set(re.findall(r"(?<![.\w])(\w+)\(", text))))
        used += ", mul" * bool(re.search(r"tl\.reduce\(\w+, \d, mul\)", text))
        tile = str(self.program).replace("\\", "\\\\").replace('"""', "'''")
        head = f'"""Triton kernels of one cell, generated by cellc from\n\n{tile}"""\n\n'
        head += "import triton\nimport triton.language as tl\n"
        if used:
            head += f"\nfrom cellc.kernels.triton_math import {used.removeprefix(', ')}\n"
        return f"{head}\n\n{text}"


def _ref_names(program: TileProgram) -> dict[Ref, str]:
    """A distinct identifier for every input, parameter, buffer and output."""
    cell, names = program.cell, dict[Ref, str]()
    kinds = [("input", i) for i in range(len(cell.inputs))]
    kinds += [("param", i) for i in range(len(cell.params))]
    kinds += [("buffer", i) for i in range(len(program.buffers))]
    kinds += [("output", i) for i in range(len(cell.outputs))]
    for kind, i in kinds:
        ref = Ref(kind, i)  # type: ignore[arg-type]
        base = name = identifier(program.name_of(ref)) or kind
        count = 1
        while name in names.values():
            count += 1
            name = f"{base}_{count}"
        names[ref] = name
    return names
