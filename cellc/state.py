"""State: the arenas that hold every live row, and the constant rows at their start.

Duty: one tensor `[capacity, *shape]` a row type on the model's device, its free regions, and copies
out (in: `cellc.writing`). Used by the engine, which decides who gets a region and who waits for
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.arithmetic import NUMBER_KINDS
from cellc.dtypes import TORCH_DTYPES
from cellc.layout import Held, arranged, as_block, parted
from cellc.ops import RowType
from cellc.plan import OutputRows, Plan, Tables, table_bytes
from cellc.regions import FEW, Regions, size_class

FIRST_CAPACITY = 256
FIRST_CONSTANTS = 16
SMALL_OUTPUT = 1 << 14  # bytes of a returned tensor
ONE_BY_ONE = 4  # returned tensors of a request that are copied so


class Arenas(Mapping[RowType, torch.Tensor]):
    """Arenas by row type. Row types are numbered by `tables`."""

    def __init__(
        self, tables: Tables, params: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self._tables, self._params, self._device = tables, params, device
        self._tensors: dict[RowType, torch.Tensor] = {}
        self._views: list[npt.NDArray[Any] | None] = []
        self.places = np.zeros((0, 2), np.int64)  # see `Arithmetic.unlike`
        self.in_numpy = False  # all of them; elsewhere a copy costs more than what it copies
        self._types: list[RowType] = []
        self._regions: list[Regions] = []
        self._written: dict[tuple[RowType, Hashable], int] = {}
        self.generation = 0  # moves when an arena grows: addresses taken before are stale
        self.settle: Callable[[], None] = lambda: None  # called before: nothing runs meanwhile

    def __getitem__(self, type: RowType) -> torch.Tensor:
        return self._tensors[type]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def arena(self, number: int) -> tuple[RowType, torch.Tensor, npt.NDArray[Any] | None]:
        """A row type by number, its arena, and that as numpy has it, where numpy can."""
        type = self._types[number]
        return type, self._tensors[type], self._views[number]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    # -- types and constants --

    def prepare(self, plan: Plan) -> bool:
        """Make arenas and constants for a plan; False while live rows lie where new constants must
        go.
        """
        tables = self._tables  # others add to them meanwhile: types, then counts, then constants
        if not self._lacks() and len(tables.types) == len(self._types):
            return True
        constants = list(tables.constants.items()) if self._lacks() else []
        counts = list(tables.constant_counts.items())
        for type in list(tables.types)[len(self._types) :]:
            self._open(type)
        if not constants:
            return True
        for number, needed in counts:
            regions = self._regions[number]
            if needed > regions.reserved:
                if regions.live:
                    return False
                self.generation += 1  # pieces begin elsewhere from now on
                regions.reserve(size_class(2 * needed))
        for (type, key), slot in constants:
            if (type, key) not in self._written:
                self._tensors[type][slot] = self._constant(type, key)
                self._written[type, key] = slot
        return True

    def _lacks(self) -> bool:
        """Are there constants that no arena holds yet?"""
        return len(self._tables.constants) != len(self._written)

    def _open(self, type: RowType) -> None:
        """The type itself comes last: before that, an interruption leaves what the next call
        writes over.
        """
        number = len(self._types)
        capacity = max(FIRST_CAPACITY, FIRST_CONSTANTS)
        regions = Regions(capacity, lambda c: self._grow(number, c), reserved=FIRST_CONSTANTS)
        self._regions[number:], self._views[number:] = [regions], [None]
        self._grow_type(type, number, capacity)
        self._types.append(type)

    def _grow(self, number: int, capacity: int) -> None:
        self._grow_type(self._types[number], number, capacity)

    def _grow_type(self, type: RowType, number: int, capacity: int) -> None:
        new = torch.empty(
            (capacity, *type.shape), dtype=TORCH_DTYPES[type.dtype], device=self._device
        )
        old = self._tensors.get(type)
        if old is not None:
            self.settle()
            new[: len(old)] = old
        self.generation += 1
        self._tensors[type] = new
        self._view(type, number)

    def _view(self, type: RowType, number: int) -> None:
        plain = self._device.type == "cpu" and type.dtype != "bf16"
        tensor = self._tensors[type]
        self._views[number] = tensor.numpy() if plain else None
        self.in_numpy = all([view is not None for view in self._views])
        if len(self.places) <= number:
            self.places = np.concatenate([self.places, np.zeros((number + 8, 2), np.int64)])
        kind = NUMBER_KINDS.get(type.dtype, 0) if plain and not type.shape else 0
        self.places[number] = tensor.data_ptr(), kind

    def _constant(self, type: RowType, key: Any) -> torch.Tensor | bool | int | float:
        return constant_row(self._params, self._device, type, key)

    def refresh(self) -> None:
        """The weights changed: write constant rows again."""
        for (type, key), slot in self._written.items():
            self._tensors[type][slot] = self._constant(type, key)

    # -- regions --

    def bytes_of(self, plan: Plan) -> int:
        """Bytes of one request's regions, and of its block in the scheduler's table."""
        if plan.nbytes == 0:
            sizes = zip(plan.num_slots, list(self._tables.types), strict=False)
            rows = sum(size_class(size) * type.nbytes for size, type in sizes)
            block = len(plan.calls), len(plan.records), len(plan.successors)
            plan.nbytes = rows + table_bytes(*block)
        return plan.nbytes

    @property
    def live(self) -> int:
        """Pieces that are given out."""
        return sum(r.live for r in self._regions)

    def idle(self) -> bool:
        return all(r.live == 0 for r in self._regions)

    def allocate(self, plans: Sequence[Plan]) -> npt.NDArray[np.int64]:
        """First slots of the regions of requests, one a plan: [m, row types]."""
        if len(plans) <= FEW:
            return self._allocate_few(plans)
        rooms = _rooms(plans, len(self._regions))
        wanted = (rooms != 0).any(0)
        bases = np.zeros((len(plans), len(self._regions)), np.int64)
        for number, regions in enumerate(self._regions):
            if wanted[number]:
                try:
                    bases[:, number] = regions.allocate_rooms(rooms[:, number].tolist())
                except BaseException:  # there is no memory
                    self._free_rooms(bases[:, :number], rooms)
                    raise
        return bases

    def _allocate_few(self, plans: Sequence[Plan]) -> npt.NDArray[np.int64]:
        regions = self._regions
        bases = [[0] * len(regions) for _ in plans]
        given: list[tuple[Regions, int, int]] = []
        try:
            for base, plan in zip(bases, plans, strict=True):
                for type, room in plan.pieces:
                    start = base[type] = regions[type].take(room)
                    given.append((regions[type], start, room))
        except BaseException:  # there is no memory
            for those, start, room in given:
                those.give(start, room)
            raise
        return np.array(bases, np.int64)

    def free_few(self, plans: Sequence[Plan], bases: Sequence[Sequence[int]]) -> None:
        """`free` of few requests, whose bases are lists."""
        regions = self._regions
        for plan, base in zip(plans, bases, strict=True):
            for type, room in plan.pieces:
                regions[type].give(base[type], room)

    def free(self, plans: Sequence[Plan], bases: npt.NDArray[np.int64]) -> None:
        """Free the regions of requests; `bases` as `allocate` gave them, or more row types."""
        self._free_rooms(bases, _rooms(plans, bases.shape[1]))

    def _free_rooms(self, bases: npt.NDArray[np.int64], rooms: npt.NDArray[np.int64]) -> None:
        wanted = (rooms != 0).any(0)
        for number, regions in enumerate(self._regions[: bases.shape[1]]):
            if wanted[number]:
                regions.free_rooms(bases[:, number].tolist(), rooms[:, number].tolist())

    def clear(self) -> None:
        """Free all regions."""
        for number, type in enumerate(self._types):
            self._regions[number].clear()
            self._view(type, number)

    # -- copies --

    def scalars(self, number: int, slots: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of a type without dimensions."""
        view = self._views[number]
        if view is not None:
            return view[slots]
        index = torch.from_numpy(slots).to(self._device)
        rows = self._tensors[self._types[number]].index_select(0, index)
        return rows.cpu().numpy()

    def move(
        self, number: int, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]
    ) -> None:
        """Copy rows of a type from some slots to others."""
        view = self._views[number]
        if view is not None:
            view[targets] = view[sources]
            return
        tensor = self._tensors[self._types[number]]
        index = torch.from_numpy(np.stack([sources, targets])).to(self._device)
        tensor.index_copy_(0, index[1], tensor.index_select(0, index[0]))

    def read(self, wanted: Sequence[tuple[OutputRows, int]]) -> list[torch.Tensor]:
        """Returned tensors of a request, each (its rows, the base of its region), with dimensions
        in the model's order.

        Of more than ONE_BY_ONE, small ones that are alike are gathered together; any other tensor
        has its own memory. Of many requests: `cellc.gathering`.
        """
        out: list[torch.Tensor | None] = [None] * len(wanted)
        small: dict[Any, list[int]] = {}
        for i, (rows, base) in enumerate(wanted):
            if len(wanted) > ONE_BY_ONE and self._bytes(rows) <= SMALL_OUTPUT:
                small.setdefault(rows.kind, []).append(i)
            elif rows.contiguous:
                view, start = self._views[rows.type], base + rows.first
                part = slice(start, start + len(rows.slots))
                tensor = self._tensors[self._types[rows.type]]
                flat = tensor[part].clone() if view is None else view[part].copy()
                out[i] = arranged(flat, rows)
            else:
                index = self.index(rows.slots + rows.owned * np.int64(base))
                out[i] = arranged(self.take(rows.type, index), rows)
        for members in small.values():
            for i, made in zip(members, self._gather([wanted[i] for i in members]), strict=True):
                out[i] = made
        return out  # type: ignore[return-value]

    def block(self, rows: OutputRows, bases: npt.NDArray[np.int64]) -> torch.Tensor:
        """`read_alike` as one tensor, [requests, ..]."""
        slots = (rows.slots + rows.owned * bases[:, None]).reshape(-1)
        return as_block(self.take(rows.type, self.index(slots)), rows, len(bases))

    def num_alike(self, outputs: Sequence[OutputRows], nbytes: int) -> int:
        """Of how many requests these outputs take so many bytes each."""
        return max(1, min(nbytes // max(1, self._bytes(rows)) for rows in outputs))

    def _bytes(self, rows: OutputRows) -> int:
        return len(rows.slots) * self._types[rows.type].nbytes

    def _gather(self, wanted: Sequence[tuple[OutputRows, int]]) -> Sequence[torch.Tensor]:
        """Tensors of one kind, in one copy."""
        first, sizes = wanted[0][0], [len(rows.slots) for rows, _ in wanted]
        slots = np.concatenate([rows.slots + rows.owned * np.int64(base) for rows, base in wanted])
        return parted(self.take(first.type, self.index(slots)), first, sizes)

    def index(self, slots: npt.NDArray[np.int64]) -> Any:
        """What `take` is given, whole or parts of it: slots, on the device in one copy."""
        if self._device.type == "cpu":
            return slots
        return torch.from_numpy(slots).to(self._device, non_blocking=True)

    def take(self, number: int, index: Any) -> Held:
        """A copy of rows of a type."""
        view = self._views[number]
        if view is not None:
            return view.take(index, 0)  # type: ignore[no-any-return]
        if self._device.type == "cpu":
            index = torch.from_numpy(index)
        return self._tensors[self._types[number]].index_select(0, index)

    def row_bytes(self, number: int) -> int:
        """Of a row of a type."""
        return self._types[number].nbytes


def constant_row(
    params: Mapping[str, torch.Tensor], device: torch.device, type: RowType, key: Any
) -> torch.Tensor | bool | int | float:
    """What a constant row holds: a number in every place, numbers, or a row of a weight."""
    if key[0] == "full":
        value: bool | int | float = key[-1]
        return value
    if key[0] == "rows":
        numbers = torch.tensor(key[-1], dtype=TORCH_DTYPES[type.dtype], device=device)
        return numbers.reshape(type.shape)
    _, name, row_dims, index = key
    weight = params[name]
    order = [i for i, r in enumerate(row_dims) if not r] + [i for i, r in enumerate(row_dims) if r]
    count = math.prod(n for n, r in zip(weight.shape, row_dims, strict=True) if not r)
    return weight.permute(order).reshape(count, *type.shape)[index]


def _rooms(plans: Sequence[Plan], types: int) -> npt.NDArray[np.int64]:
    """How many slots of each row type every request needs, as size classes; later types are unknown
    to older plans.
    """
    rooms = [plan.rooms for plan in plans]
    joined = np.concatenate(rooms)
    if len(joined) < types * len(rooms):
        joined = np.concatenate([np.pad(given, (0, types - len(given))) for given in rooms])
    return joined.reshape(len(rooms), types)
