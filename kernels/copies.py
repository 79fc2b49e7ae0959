"""Kernels of cells that copy rows.

Duty: cells whose outputs are their inputs, perhaps in another shape, as numpy copies of memory.
torch would wake its threads for them, which then spin for milliseconds beside those of generated
kernels. Used by `cellc.cell_store`, on CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch

from cellc.cells import Cell, Operand
from cellc.kernels.eager import source
from cellc.launch import Launch
from cellc.ops import RowType

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy has no bf16


class CopyKernel:
    """One cell of which `copied_inputs` says which input each output is."""

    backend = "eager"

    def __init__(self, cell: Cell, inputs: Sequence[int]) -> None:
        self.cell, self.source = cell, source(cell)
        self._sources = [(i, cell.inputs[i].type) for i in inputs]

    def __call__(self, launch: Launch, arenas: Mapping[RowType, torch.Tensor]) -> Sequence[int]:
        indices = [launch.inputs[i] for i, _ in self._sources]
        sources = [_memory(arenas[type]) for _, type in self._sources]
        targets = [_memory(arenas[type]) for type in self.cell.output_types]
        steps = launch.steps.tolist()
        for start, stop in zip(steps[:-1], steps[1:], strict=True):
            rows = [
                memory[index[start:stop]]  # type: ignore[index]  # none is ragged
                for memory, index in zip(sources, indices, strict=True)
            ]
            for memory, slots, values in zip(targets, launch.outputs, rows, strict=True):
                memory[slots[start:stop]] = values
        return ()


def copied_inputs(cell: Cell) -> list[int] | None:
    """Which input each output of a cell is, whatever its shape; None where one is computed."""
    found = [_copied(cell, operand) for operand in cell.outputs]
    inputs = [i for i in found if i is not None]
    if len(inputs) < len(found) or any(cell.inputs[i].ragged for i in inputs):
        return None
    return inputs


def _copied(cell: Cell, operand: Operand) -> int | None:
    while operand.kind == "op" and cell.ops[operand.index].op == "reshape":
        operand = cell.ops[operand.index].operands[0]
    return operand.index if operand.kind == "input" else None


def _memory(arena: torch.Tensor) -> npt.NDArray[Any]:
    """[slots, numbers of a row], as integers that hold the same bits."""
    if arena.is_complex():
        arena = torch.view_as_real(arena)
    return arena.view(WORDS[arena.element_size()]).reshape(len(arena), -1).numpy()
