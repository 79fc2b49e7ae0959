"""State: the arenas that hold every live row, and the constant rows at their start.

Duty: one tensor `[capacity, *shape]` a row type on the model's device, its free regions, and copies
in and out. Used by the engine, which decides who gets a region and who waits for memory.
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
SMALL_OUTPUT = 1 << 14
MAX_SIZES = 4096


class Arenas(Mapping[RowType, torch.Tensor]):
    """Arenas by row type. Row types are numbered by `tables`."""

    def __init__(
        self, tables: Tables, params: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self._tables, self._params, self._device = tables, params, device
        self._bytes: dict[int, tuple[Plan, int]] = {}
        self._tensors: dict[RowType, torch.Tensor] = {}
        self._views: list[npt.NDArray[Any] | None] = []
        self._types: list[RowType] = []
        self._regions: list[Regions] = []
        self._written: dict[tuple[RowType, Hashable], int] = {}
        self.generation = 0  # moves when an arena grows: addresses taken before are stale

    def __getitem__(self, type: RowType) -> torch.Tensor:
        return self._tensors[type]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    # -- types and constants --

    def prepare(self, plan: Plan) -> bool:
        """Make arenas and constants for a plan; False while live rows lie where new constants must
        go.
        """
        for type in list(self._tables.types)[len(self._types) :]:
            self._open(type)
        if len(self._tables.constants) == len(self._written):
            return True
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
        new = torch.empty(
            (capacity, *type.shape), dtype=TORCH_DTYPES[type.dtype], device=self._device
        )
        old = self._tensors.get(type)
        if old is not None:
            new[: len(old)] = old
        self._tensors[type] = new
        self.generation += 1
        plain = self._device.type == "cpu" and type.dtype != "bf16"
        self._views[number] = new.numpy() if plain else None

    def _constant(self, type: RowType, key: Any) -> torch.Tensor | bool | int | float:
        if key[0] == "full":
            value: bool | int | float = key[-1]
            return value
        if key[0] == "rows":
            return torch.tensor(
                key[-1], dtype=TORCH_DTYPES[type.dtype], device=self._device
            ).reshape(type.shape)
        _, name, row_dims, index = key
        weight = self._params[name]
        order = [i for i, r in enumerate(row_dims) if not r] + [
            i for i, r in enumerate(row_dims) if r
        ]
        return weight.permute(order).reshape(-1, *type.shape)[index]

    def refresh(self) -> None:
        """The weights changed: write constant rows again."""
        for (type, key), slot in self._written.items():
            self._tensors[type][slot] = self._constant(type, key)

    # -- regions --

    def bytes_of(self, plan: Plan) -> int:
        """Bytes of one request's regions."""
        known = self._bytes.get(id(plan))
        if known is None or known[0] is not plan:
            sizes = zip(plan.num_slots, self._types, strict=False)
            known = plan, sum(size_class(size) * type.nbytes for size, type in sizes)
            self._bytes[id(plan)] = known
            if len(self._bytes) > MAX_SIZES:
                self._bytes.pop(next(iter(self._bytes)))
        return known[1]

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
        """Free the regions of requests of one plan: `bases` [m, row types]."""
        for number, size in enumerate(plan.num_slots):
            if size:
                self._regions[number].free(bases[:, number].tolist(), size)

    # -- copies --

    def write(
        self, rows: DataRows, bases: npt.NDArray[np.int64], tensors: Sequence[torch.Tensor]
    ) -> npt.NDArray[np.intp]:
        """Copy one tensor of each of m requests into their regions.

        Returns the positions (among the m) of requests that hold an index outside [0, bound).
        """
        type = self._types[rows.type]
        stacked = torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
        stacked = stacked.detach()
        if any(rows.row_dims) and not all(rows.row_dims):
            order = [i + 1 for i, r in enumerate(rows.row_dims) if not r]
            order += [i + 1 for i, r in enumerate(rows.row_dims) if r]
            stacked = stacked.permute(0, *order)
        flat = stacked.reshape(len(tensors) * rows.count, *type.shape)
        starts = bases[:, rows.type] + rows.start
        view = self._views[rows.type]
        if view is None or stacked.device.type != "cpu":
            slots = torch.from_numpy((starts[:, None] + np.arange(rows.count)).reshape(-1))
            self._tensors[type].index_copy_(0, slots.to(self._device), flat.to(self._device))
        elif len(tensors) == 1:
            view[int(starts[0]) : int(starts[0]) + rows.count] = flat.numpy()
        else:
            view[(starts[:, None] + np.arange(rows.count)).reshape(-1)] = flat.numpy()
        return self._outside(rows, flat, len(tensors))

    def _outside(self, rows: DataRows, flat: torch.Tensor, count: int) -> npt.NDArray[np.intp]:
        if rows.bound is None or flat.numel() == 0:
            return np.zeros(0, np.intp)
        values = flat.cpu().numpy().reshape(-1)
        if values.view(f"u{values.dtype.itemsize}").max() < rows.bound:
            return np.zeros(0, np.intp)
        wrong = ((values < 0) | (values >= rows.bound)).reshape(count, -1)
        return np.flatnonzero(wrong.any(1))

    def read(self, wanted: Sequence[tuple[OutputRows, int]]) -> list[torch.Tensor]:
        """Returned tensors, each (its rows, the base of its region), with dimensions in the model's
        order.

        Small ones of one row type are gathered together; a tensor of over SMALL_OUTPUT bytes has
        its own memory.
        """
        out: list[torch.Tensor | None] = [None] * len(wanted)
        small: dict[int, list[int]] = {}
        for i, (rows, base) in enumerate(wanted):
            if len(wanted) > 1 and len(rows.slots) * self._types[rows.type].nbytes <= SMALL_OUTPUT:
                small.setdefault(rows.type, []).append(i)
            elif rows.contiguous:
                start = base + int(rows.slots[0])
                flat = self[self._types[rows.type]][start : start + len(rows.slots)]
                out[i] = _arrange(flat.clone(), rows)
            else:
                (flat,) = self._gather(rows.type, [(rows, base)])
                out[i] = _arrange(flat, rows)
        for number, members in small.items():
            gathered = self._gather(number, [wanted[i] for i in members])
            for i, flat in zip(members, gathered, strict=True):
                out[i] = _arrange(flat, wanted[i][0])
        return out  # type: ignore[return-value]

    def _gather(
        self, number: int, wanted: Sequence[tuple[OutputRows, int]]
    ) -> Sequence[torch.Tensor]:
        sizes = [len(rows.slots) for rows, _ in wanted]
        if len(wanted) == 1:
            slots = wanted[0][0].slots + wanted[0][0].owned * np.int64(wanted[0][1])
        else:
            owned = np.concatenate([rows.owned for rows, _ in wanted])
            bases = np.repeat(np.array([base for _, base in wanted]), sizes)
            slots = np.concatenate([rows.slots for rows, _ in wanted]) + owned * bases
        index = torch.from_numpy(slots).to(self._device)
        gathered = self._tensors[self._types[number]].index_select(0, index)
        return torch.split(gathered, sizes)


def _arrange(flat: torch.Tensor, rows: OutputRows) -> torch.Tensor:
    """[positions flattened, *row] in the order of the tensor's dimensions."""
    shaped = flat.view((*rows.positions, *flat.shape[1:]))
    if rows.order is None:
        return shaped
    return shaped.permute(rows.order).contiguous()
