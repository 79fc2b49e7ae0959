"""Regions: contiguous pieces of a growing array, given out and taken back.

Duty: the allocator behind arenas and the scheduler's flat arrays. Sizes are rounded up to classes
(at most a quarter is wasted), freed pieces wait in their class; when nothing is live, everything
starts over. Pure Python and numpy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
FEW = 16  # pieces that are given out and taken back one by one: arrays take longer


@cache
def size_class(size: int) -> int:
    """Smallest of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, .. that holds `size`.

    >>> [size_class(n) for n in (0, 1, 5, 9, 13, 33)]
    [0, 1, 5, 10, 14, 40]
    """
    if size <= 4:
        return size
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


def size_classes(sizes: I64) -> I64:
    """`size_class` of each."""
    values, which = np.unique(sizes, return_inverse=True)
    classes = np.array([size_class(n) for n in values.tolist()], np.int64)
    return classes[which].reshape(sizes.shape)


class Regions:
    """Gives out `[start, start + size)` pieces of `capacity` places; `grow(capacity)` is told when
    more are needed.

    The first `reserved` places are never given out (constants live there).
    """

    def __init__(self, capacity: int, grow: Callable[[int], None], reserved: int = 0) -> None:
        self.capacity, self.reserved = capacity, reserved
        self._grow = grow
        self._next = reserved
        self._free: dict[int, list[int]] = defaultdict(list)
        self.live = 0  # pieces

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """Starts of pieces of `sizes` places, one after the other; 0 where no place is wanted."""
        return self.allocate_rooms([size_class(n) for n in sizes])

    def allocate_rooms(self, rooms: Sequence[int]) -> list[int]:
        """The same, of sizes that are size classes. Without memory nothing is given out."""
        if len(rooms) > FEW and not self._free:
            return self._side_by_side(rooms)
        starts: list[int] = []
        try:
            for room in rooms:
                starts.append(self.take(room) if room else 0)
        except BaseException:
            self.free_rooms(starts, rooms[: len(starts)])
            raise
        return starts

    def _side_by_side(self, rooms: Sequence[int]) -> list[int]:
        wanted = np.array(rooms, np.int64)
        ends = np.cumsum(wanted) + self._next
        self._reach(int(ends[-1]))
        self._next = int(ends[-1])
        self.live += int(np.count_nonzero(wanted))
        return np.where(wanted > 0, ends - wanted, 0).tolist()  # type: ignore[no-any-return]

    def take(self, room: int) -> int:
        """Start of one piece, whose size is a size class and not 0."""
        free = self._free.get(room)
        if free:
            start = free.pop()
        else:
            start, end = self._next, self._next + room
            self._reach(end)
            self._next = end
        self.live += 1
        return start

    def _reach(self, end: int) -> None:
        """See that there are so many places."""
        if end > self.capacity:
            capacity = max(2 * self.capacity, end)
            self._grow(capacity)
            self.capacity = capacity

    def free(self, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """Take back pieces of `sizes` places."""
        self.free_rooms(starts, [size_class(n) for n in sizes])

    def free_rooms(self, starts: Sequence[int], rooms: Sequence[int]) -> None:
        """The same, of sizes that are size classes."""
        if len(rooms) - rooms.count(0) == self.live:
            self.clear()
            return
        for start, room in zip(starts, rooms, strict=True):
            if room:
                self.give(start, room)

    def give(self, start: int, room: int) -> None:
        """Take one piece back."""
        self.live -= 1
        if self.live == 0:
            self.clear()
        else:
            self._free[room].append(start)

    def clear(self) -> None:
        """Take all pieces back."""
        self.live, self._next = 0, self.reserved
        self._free.clear()

    def reserve(self, count: int) -> bool:
        """Keep the first `count` places from now on; False while pieces that lie there are live."""
        if count <= self.reserved:
            return True
        if self.live:
            return False
        self._reach(count)
        self.reserved = self._next = count
        return True


class Flat:
    """A numpy array that grows, with pieces."""

    def __init__(self, data: npt.NDArray[Any]) -> None:
        self.data = data
        self._regions = Regions(len(data), self._resize)

    def _resize(self, capacity: int) -> None:
        data = np.zeros((capacity, *self.data.shape[1:]), self.data.dtype)
        data[: len(self.data)] = self.data
        self.data = data

    def allocate_rooms(self, rooms: Sequence[int]) -> list[int]:
        return self._regions.allocate_rooms(rooms)

    def free_rooms(self, starts: Sequence[int], rooms: Sequence[int]) -> None:
        self._regions.free_rooms(starts, rooms)

    def clear(self) -> None:
        self._regions.clear()
