"""State: the arenas that hold every live row, and the constant rows at their start.

Duty: one tensor `[capacity, *shape]` a row type on the model's device, its free regions, and copies in and out. Used by the
engine, which decides who gets a region. Growth stops at `limit` bytes over all arenas: requests wait instead.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.dtypes import TORCH_DTYPES
from cellc.ops import RowType
from cellc.plan import DataRows, OutputRows, Plan, Tables
from cellc.regions import Regions, size_class

FIRST_CAPACITY = 256
FIRST_CONSTANTS = 16


class Arenas(Mapping[RowType, torch.Tensor]):
    """Arenas by row type. Row types are numbered by `tables`."""

    def __init__(
        self, tables: Tables, params: Mapping[str, torch.Tensor], device: torch.device, limit: int
    ) -> None:
        self._tables, self._params, self._device = tables, params, device
        self._limit = limit
        self._tensors: dict[RowType, torch.Tensor] = {}
        self._views: list[npt.NDArray[Any] | None] = []
        self._types: list[RowType] = []
        self._regions: list[Regions] = []
        self._written: dict[tuple[RowType, Hashable], int] = {}

    def __getitem__(self, type: RowType) -> torch.Tensor:
        return self._tensors[type]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    # -- types and constants --------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> bool:
        """Make arenas and constants for a plan; False while live rows lie where new constants must go."""
        for type in list(self._tables.types)[len(self._types) :]:
            self._open(type)
        for number, needed in self._tables.constant_counts.items():
            regions = self._regions[number]
            if needed > regions.reserved and not regions.reserve(size_class(2 * needed)):
                return False
        for (type, key), slot in self._tables.constants.items():
            if (type, key) not in self._written:
                self._tensors[type][slot] = self._constant(type, key)
                self._written[type, key] = slot
        return True

    def _open(self, type: RowType) -> None:
        number = len(self._types)
        capacity = max(FIRST_CAPACITY, FIRST_CONSTANTS)
        self._types.append(type)
        self._regions.append(
            Regions(capacity, lambda c: self._grow(number, c), reserved=FIRST_CONSTANTS)
        )
        self._views.append(None)
        self._grow(number, capacity)

    def _grow(self, number: int, capacity: int) -> None:
        type = self._types[number]
        new = torch.empty((capacity, *type.shape), dtype=TORCH_DTYPES[type.dtype], device=self._device)
        old = self._tensors.get(type)
        if old is not None:
            new[: len(old)] = old
        self._tensors[type] = new
        plain = self._device.type == "cpu" and type.dtype != "bf16"
        self._views[number] = new.numpy() if plain else None

    def _constant(self, type: RowType, key: Any) -> torch.Tensor | bool | int | float:
        if key[0] == "full":
            value: bool | int | float = key[-1]
            return value
        if key[0] == "rows":
            return torch.tensor(key[-1], dtype=TORCH_DTYPES[type.dtype], device=self._device).reshape(type.shape)
        _, name, row_dims, index = key
        weight = self._params[name]
        order = [i for i, r in enumerate(row_dims) if not r] + [i for i, r in enumerate(row_dims) if r]
        return weight.permute(order).reshape(-1, *type.shape)[index]

    def refresh(self) -> None:
        """The weights changed: write constant rows again."""
        for (type, key), slot in self._written.items():
            self._tensors[type][slot] = self._constant(type, key)

    # -- regions --------------------------------------------------------------------------------------------

    def fits(self, plan: Plan) -> bool:
        """Can a request of this plan get its regions without growing past the limit?"""
        if self.nbytes <= self._limit // 2:
            return True
        for number, size in enumerate(plan.num_slots):
            if size:
                row = max(self._types[number].nbytes, 1)
                spare = max(self._limit - self.nbytes, 0) // (2 * row)
                if not self._regions[number].fits(size, self._regions[number].capacity + spare):
                    return False
        return True

    def idle(self) -> bool:
        return all(r.live == 0 for r in self._regions)

    def allocate(self, plan: Plan, count: int) -> npt.NDArray[np.int64]:
        """First slots of the regions of `count` requests: [count, row types]."""
        bases = np.zeros((count, len(plan.num_slots)), np.int64)
        for number, size in enumerate(plan.num_slots):
            if size:
                bases[:, number] = self._regions[number].allocate(size, count)
        return bases

    def free(self, plan: Plan, bases: npt.NDArray[np.int64]) -> None:
        for number, size in enumerate(plan.num_slots):
            if size:
                self._regions[number].free(int(bases[number]), size)

    # -- copies ---------------------------------------------------------------------------------------------

    def write(self, rows: DataRows, base: int, tensor: torch.Tensor) -> None:
        """Copy a request's tensor into its region."""
        start = base + rows.start
        type = self._types[rows.type]
        if any(rows.row_dims) and not all(rows.row_dims):
            order = [i for i, r in enumerate(rows.row_dims) if not r]
            order += [i for i, r in enumerate(rows.row_dims) if r]
            if order != list(range(len(order))):
                tensor = tensor.permute(order)
        view = self._views[rows.type]
        if view is not None and not tensor.requires_grad:
            view[start : start + rows.count] = tensor.numpy().reshape(rows.count, *type.shape)
        else:
            flat = tensor.detach().reshape(rows.count, *type.shape)
            self._tensors[type][start : start + rows.count] = flat

    def invalid(self, rows: DataRows, base: int) -> int | None:
        """First position of a written index outside [0, bound), or None."""
        if rows.bound is None or rows.count == 0:
            return None
        start = base + rows.start
        view = self._views[rows.type]
        if view is None:
            written = self._tensors[self._types[rows.type]][start : start + rows.count].cpu().numpy()
        else:
            written = view[start : start + rows.count]
        flat = written.reshape(-1)
        unsigned = flat.view(f"u{flat.dtype.itemsize}")
        if unsigned.max() < rows.bound:
            return None
        return int(np.flatnonzero((flat < 0) | (flat >= rows.bound))[0])

    def read(self, rows: OutputRows, base: int) -> torch.Tensor:
        """A returned tensor, as a new tensor with its dimensions in the model's order."""
        arena = self._tensors[self._types[rows.type]]
        if rows.contiguous:
            start = base + int(rows.slots[0])
            flat = arena[start : start + len(rows.slots)].clone()
        else:
            index = torch.from_numpy(rows.slots.astype(np.int64) + rows.owned * base)
            flat = arena.index_select(0, index.to(self._device))
        return _arrange(flat, rows)


def _arrange(flat: torch.Tensor, rows: OutputRows) -> torch.Tensor:
    """[positions flattened, *row] in the order of the tensor's dimensions."""
    shaped = flat.reshape(*rows.positions, *flat.shape[1:])
    if not any(rows.row_dims) or all(rows.row_dims):
        return shaped
    num_positions = len(rows.positions)
    position, row = iter(range(num_positions)), iter(range(num_positions, shaped.dim()))
    order = [next(row) if r else next(position) for r in rows.row_dims]
    if order == sorted(order):
        return shaped
    return shaped.permute(order).contiguous()


def types_of(tables: Tables) -> Sequence[RowType]:
    return list(tables.types)
