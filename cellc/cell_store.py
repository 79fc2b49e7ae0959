"""The cell store: the cells of one model, their names, numbers and kernels.

Duty: give cells their names and numbers, and make the kernel of each, once. Filled by
`cellc.compiler` as requests show cells; read by `cellc.engine`, which launches by number.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from cellc import log
from cellc.calls import CallGraph
from cellc.cells import Cell
from cellc.errors import UnsupportedError
from cellc.kernels.copies import CopyKernel, copied_inputs
from cellc.kernels.eager import EagerBackend
from cellc.kernels.tiered import SIZES, TieredKernel, form_of
from cellc.launch import Backend, Kernel
from cellc.naming import suggest_name
from cellc.params import Params
from cellc.plan import Plan, Tables, record_length

MAX_KERNELS = 1 << 10  # kept, each with its weights packed; others are made again when needed


class CellStore:
    """All cells of a model."""

    def __init__(self, backend: Backend, params: Params, lock: threading.RLock) -> None:
        self.backend, self.params = backend, params
        self.tables = Tables()
        self.cells: dict[str, Cell] = {}  # by key
        self.by_number: dict[int, Cell] = {}
        self.kernels: dict[int, Kernel] = {}  # by cell number
        self.priority: dict[int, int] = {}
        self.record_lengths: dict[int, int] = {}
        self._lock = lock
        self._used: set[int] = set()  # numbers of kernels, since any was dropped
        self._unfolded: set[str] = set()  # keys of cells that unfolding made
        self._sizes: Counter[Hashable] = Counter()  # kernels of each form

    # -- names and numbers --

    def name(self, calls: CallGraph) -> None:
        """Name a call graph's cells; those that were named before keep their names."""
        for group in calls.groups:
            key = group.cell.key
            if key not in self.cells:
                taken = {c.name for c in self.cells.values()}
                name = base = suggest_name(group.cell, list(self.params.base))
                count = 1
                while name in taken:
                    count += 1
                    name = f"{base}_{count}"
                self.cells[key] = group.cell.named(name)
            elif group.cell.recurrent and not self.cells[key].recurrent:
                self.cells[key] = replace(self.cells[key], recurrent=True)
            group.cell = self.cells[key]

    def number(self, graph: CallGraph) -> None:
        """Note the numbers that a planned graph's cells have."""
        for group in graph.groups:
            number = self.tables.cell(group.cell)
            self.by_number[number] = self.cells.get(group.cell.key, group.cell)
            self.record_lengths[number] = record_length(group.cell)

    def keep_unfolded(self, live: set[str]) -> None:
        """Forget cells that unfolding made and would not make now."""
        for key in self._unfolded - live:
            self.cells.pop(key, None)
        self._unfolded = live

    def note_priority(self, plan: Plan) -> None:
        """A cell is as deep as in the plan where it is deepest."""
        for cell, depth in zip(plan.cells, plan.priority, strict=True):
            self.priority[cell] = max(self.priority.get(cell, 0), depth)

    # -- kernels --

    def kernel(self, number: int) -> Kernel:
        """The kernel of a cell, made on first use."""
        self._used.add(number)
        kernel = self.kernels.get(number)
        if kernel is None:
            with self._lock:
                kernel = self.kernels.get(number)
                if kernel is None:
                    kernel = self._make_kernel(self.by_number[number])
                    self.kernels[number] = kernel
                    self._trim()
        return kernel

    def _trim(self) -> None:
        """Drop kernels that were not used lately where there are too many, or else the oldest."""
        if len(self.kernels) <= MAX_KERNELS:
            return
        spare = [n for n in list(self.kernels) if n not in self._used]
        for number in spare:
            self.kernels.pop(number, None)
        for number in list(self.kernels)[: max(0, len(self.kernels) - MAX_KERNELS)]:
            self.kernels.pop(number, None)
        self._used.clear()

    def make_kernels(self, plan: Plan) -> None:
        """Make all kernels of a plan at once: compilers run side by side."""
        missing = [n for n in dict.fromkeys(plan.cells) if n not in self.kernels]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
                made = pool.map(lambda n: self._make_kernel(self.by_number[n]), missing)
                self.kernels.update(zip(missing, made, strict=True))
            self._used.update(missing)
            self._trim()

    def made(self, number: int, backend: Backend, params: Mapping[str, torch.Tensor]) -> Kernel:
        """Another kernel of a cell, for another device."""
        return self._make_kernel(self.by_number[number], backend, params)

    def _make_kernel(
        self,
        cell: Cell,
        backend: Backend | None = None,
        params: Mapping[str, torch.Tensor] | None = None,
    ) -> Kernel:
        """From the backend, or from the eager one for a cell that it cannot generate."""
        backend, params = backend or self.backend, params or self.params
        try:
            moves = cell.flops_per_row == 0 and not cell.params and len(cell.ops) < 4
            copied = copied_inputs(cell) if moves and self.backend.name == "cpp" else None
            kernel: Kernel
            if copied is not None:
                kernel = CopyKernel(cell, copied)
            elif moves:
                kernel = EagerBackend().kernel(cell, params)
            elif self._one_of_many(cell):
                first = EagerBackend().kernel(cell, params)
                kernel = TieredKernel(first, lambda: backend.kernel(cell, params))
            else:
                kernel = backend.kernel(cell, params)
        except UnsupportedError as error:
            log.info("kernel", f"{cell.name}: {error}; it runs on the eager backend")
            kernel = EagerBackend().kernel(cell, params)
        if log.enabled("kernel"):
            log.info("kernel", kernel.source)
        log.dump(f"kernel_{cell.name}", kernel.source)
        return kernel

    def _one_of_many(self, cell: Cell) -> bool:
        """Is it the same computation as others, in another size? On other backends than `cpp` all
        have kernels: there, results are equal bit by bit whenever a request comes.
        """
        if self.backend.name != "cpp":
            return False
        form = form_of(cell)
        self._sizes[form] += 1
        return self._sizes[form] > SIZES
