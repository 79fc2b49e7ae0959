"""Launches whose numbers lie on the device: what graphs replay, and persistent kernels loop over.

Duty: the layout of a launch in one array of integers, and kernels that read from it which rows a
step has, so that their arguments never change. Comes in: a printed module; goes out: the same with
one kernel more for each, named `.._step`; a launch cut into `Packed` parts. Used by
`triton_graphs`.

The array: [rows in all, steps, for each ragged input where its offsets and slots begin, first row
of each step, .. padded], then index tables as `triton_backend` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cellc.cells import Cell
from cellc.kernels.tile_ir import Ref, TileProgram
from cellc.kernels.triton_printer import Printed
from cellc.kernels.triton_tiles import PrintedKernel
from cellc.launch import Index, Launch, Ragged

MAX_STEPS = 64  # of a part; longer launches are several
ALIGNED = 4  # integers: Triton is told that pointers are multiples of 16 bytes


@dataclass(frozen=True)
class Head:
    """Where things are before the tables."""

    num_ragged: int

    @classmethod
    def of(cls, cell: Cell) -> Head:
        return cls(sum(i.ragged for i in cell.inputs))

    @property
    def steps(self) -> int:
        return 2 + 2 * self.num_ragged

    @property
    def size(self) -> int:
        return -(-(self.steps + MAX_STEPS + 1) // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Packed:
    """Some steps of a launch."""

    ints: Index
    num_rows: int
    num_steps: int
    most_rows: int  # of a step
    apart: bool  # what rows read of each other's, they read at their own position


def pack(head: Head, launch: Launch, apart: bool = False) -> Iterator[Packed]:
    """A launch in parts of MAX_STEPS steps at most; steps without rows are left out."""
    sizes = launch.steps[1:] - launch.steps[:-1]
    if 0 < len(sizes) <= MAX_STEPS and sizes.all():
        ints = _ints(head, launch, 0, launch.num_rows, launch.steps)
        yield Packed(ints, launch.num_rows, len(sizes), int(sizes.max()), apart)
        return
    filled = np.flatnonzero(sizes)
    for first in range(0, len(filled), MAX_STEPS):
        part = filled[first : first + MAX_STEPS]
        start, stop = int(launch.steps[part[0]]), int(launch.steps[part[-1] + 1])
        steps = np.append(launch.steps[part], stop) - start
        ints = _ints(head, launch, start, stop, steps)
        yield Packed(ints, stop - start, len(part), int(sizes[part].max()), apart)


def _ints(head: Head, launch: Launch, start: int, stop: int, steps: Index) -> Index:
    count = stop - start
    if not head.num_ragged:
        tables = [*launch.inputs, *launch.outputs]
        flat = np.empty(head.size + count * len(tables), np.int32)
        _begin(head, count, steps, flat)
        for table, part in zip(tables, flat[head.size :].reshape(len(tables), count), strict=True):
            part[:] = table[start:stop]
        return flat
    parts: list[Index] = []
    ragged: list[Index] = []
    for table in launch.inputs:
        if isinstance(table, Ragged):
            offsets = table.offsets[start : stop + 1]
            ragged += [offsets - offsets[0], table.slots[offsets[0] : offsets[-1]]]
            parts.append(np.zeros(count, np.int32))
        else:
            parts.append(table[start:stop])
    parts += [table[start:stop] for table in launch.outputs]
    sizes = [count * len(parts), *map(len, ragged)]
    begin = np.empty(head.size, np.int32)
    _begin(head, count, steps, begin)
    begin[2 : head.steps] = np.cumsum(sizes)[:-1]
    return np.concatenate([begin, *parts, *ragged]).astype(np.int32, copy=False)


def _begin(head: Head, count: int, steps: Index, flat: Index) -> None:
    """What comes before the tables, but for where ragged parts begin."""
    flat[0], flat[1] = count, len(steps) - 1
    flat[head.steps : head.size] = count  # steps beyond the last have no rows
    flat[head.steps : head.steps + len(steps)] = steps


# -- text ------------------------------------------------------------------------------------------


def print_stepped(program: TileProgram, printed: Printed) -> Printed:
    """The module with kernels that are told a step's number, and whose grids may be too large."""
    head, texts, kernels = Head.of(program.cell), [printed.source], []
    for kernel in printed.kernels:
        stepped = _stepped(kernel)
        texts.append(_text(program, kernel, stepped, head))
        kernels.append(stepped)
    return Printed("\n\n".join(texts), tuple(kernels))


def _stepped(kernel: PrintedKernel) -> PrintedKernel:
    args = (*pointers(kernel), "head", "step")
    sizes = {**kernel.constants, "ROWS": kernel.grid.rows, "MULT": kernel.grid.mult}
    return replace(kernel, name=f"{kernel.name}_step", args=args, constants=sizes, space=None)


def pointers(kernel: PrintedKernel) -> tuple[str, ...]:
    """Names of the arguments that are addresses."""
    return kernel.args[: 1 + len(kernel.refs) + kernel.reports]


def ragged_lines(cell: Cell, names: Sequence[tuple[Ref, str, str]]) -> list[str]:
    """Lines that load where the parts of ragged inputs begin: (input, names of the two)."""
    order = [i for i, spec in enumerate(cell.inputs) if spec.ragged]
    lines = []
    for ref, offsets, slots in names:
        at = 2 + 2 * order.index(ref.index)
        lines += [f"{offsets} = tl.load(head + {at})", f"{slots} = tl.load(head + {at + 1})"]
    return lines


def step_lines(head: Head) -> list[str]:
    """Lines that load the rows of `step`."""
    at = head.steps
    return [
        f"start = tl.load(head + {at} + step)",
        f"num_rows = tl.load(head + {at + 1} + step) - start",
    ]


def _text(program: TileProgram, kernel: PrintedKernel, stepped: PrintedKernel, head: Head) -> str:
    """Programs beyond the rows that there are touch nothing: a product of data has no masks."""
    scalars = kernel.args[len(pointers(kernel)) :]
    pairs = zip(kernel.ragged, scalars[3::2], scalars[4::2], strict=True)
    lines = [*step_lines(head), "num_total = tl.load(head)"]
    lines += ragged_lines(program.cell, list(pairs))
    lines.append("if tl.program_id(0) * ROWS < num_rows * MULT:")
    passed = [*kernel.args, *(f"{c}={c}" for c in kernel.constants)]
    lines += [f"    {kernel.name}(", f"        {', '.join(passed)}", "    )"]
    constants = ", ".join(f"{c}: tl.constexpr" for c in stepped.constants)
    begin = ['@triton.jit(do_not_specialize=["step"])', f"def {stepped.name}("]
    begin += [f"    {', '.join(stepped.args)},", f"    {constants},", "):"]
    return "\n".join([*begin, *(f"    {line}" for line in lines)]) + "\n"
