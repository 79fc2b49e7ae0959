"""Regions: pieces never overlap, nothing leaks, everything starts over when nothing is live."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellc.regions import Flat, Regions, size_class

checked = settings(deadline=None, derandomize=True, max_examples=60)
SIZES = st.integers(0, 40)
# Steps: (take `count` pieces of `size`, one by one or together), or (give back the first `count` of
# the k-th live batch, likewise).
STEPS = st.lists(
    st.tuples(st.booleans(), SIZES, st.integers(1, 5)) | st.tuples(st.just(None), SIZES, SIZES),
    max_size=40,
)


@given(st.integers(0, 5000))
@checked
def test_size_classes(size: int) -> None:
    room = size_class(size)
    assert size <= room <= max(size, size * 1.25)
    assert size_class(room) == room
    assert size_class(size + 1) >= room


@given(STEPS, st.integers(0, 9))
@checked
def test_pieces_never_overlap(steps: list[tuple[bool | None, int, int]], reserved: int) -> None:
    grown: list[int] = []
    regions = Regions(16, grown.append, reserved)
    live: list[tuple[int, list[int]]] = []  # size, starts
    for fresh, size, count in steps:
        if fresh is not None:
            if fresh and size:
                starts = [regions.take(size_class(size)) for _ in range(count)]
            else:
                starts = regions.allocate([size] * count)
            live.append((size, starts))
        elif live:
            size_of, starts = live[size % len(live)]
            given_back = [starts.pop() for _ in range(min(count, len(starts)))]
            if count % 2 and size_of:
                for start in given_back:
                    regions.give(start, size_class(size_of))
            else:
                regions.free(given_back, [size_of] * len(given_back))
        taken = sorted((s, s + size_class(n)) for n, starts in live if n for s in starts)
        assert regions.live == len(taken)
        assert all(a[1] <= b[0] for a, b in zip(taken, taken[1:], strict=False))
        assert all(reserved <= a and b <= regions.capacity for a, b in taken)
    assert grown == sorted(set(grown)) and [*grown, regions.capacity][-1] == regions.capacity
    for size, starts in live:
        regions.free(starts, [size] * len(starts))
    assert regions.live == 0
    assert regions.allocate([3]) == [reserved]


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 30))
@checked
def test_a_steady_state_needs_no_more_room(sizes: list[int], kept: int) -> None:
    """The same pieces taken and given back over and over: the array stays as large as it was."""
    regions = Regions(8, lambda _: None)
    regions.allocate([kept])
    capacities = []
    for _ in range(4):
        starts = [(regions.allocate([size]), size) for size in sizes]
        for start, size in starts:
            regions.free(start, [size])
        capacities.append(regions.capacity)
    assert len(set(capacities)) == 1


def test_reserving() -> None:
    grown: list[int] = []
    regions = Regions(8, grown.append, reserved=2)
    start = regions.allocate([3])
    assert start == [2]
    assert regions.reserve(2) and not regions.reserve(5)
    regions.free(start, [3])
    assert regions.reserve(20) and regions.capacity >= 20 and grown == [regions.capacity]
    assert regions.allocate([1]) == [20]


def test_nothing_is_given_for_nothing() -> None:
    regions = Regions(4, pytest.fail)
    assert regions.allocate([0] * 3) == [0, 0, 0]
    regions.free([0, 0, 0], [0, 0, 0])
    assert regions.live == 0


def test_flat_arrays_keep_their_rows() -> None:
    flat = Flat(np.zeros((4, 2), np.int32))
    pieces = []
    for k in range(1, 9):
        for start in flat.allocate_rooms([size_class(k)] * 2):
            flat.data[start : start + k] = k
            pieces.append((start, k))
    assert flat.data.dtype == np.int32 and flat.data.shape[1] == 2
    for start, k in pieces:
        assert (flat.data[start : start + k] == k).all()
    for start, k in pieces:
        flat.free_rooms([start], [size_class(k)])
    assert flat.allocate_rooms([5]) == [0]


def test_without_memory_nothing_is_given_out() -> None:
    grown: list[int] = []

    def grow(capacity: int) -> None:
        if capacity > 16:
            raise MemoryError
        grown.append(capacity)

    regions = Regions(8, grow)
    kept, other = regions.allocate([3, 2])
    regions.free([other], [2])
    for _ in range(3):
        with pytest.raises(MemoryError):
            regions.allocate([2, 40])
        assert regions.live == 1 and regions.capacity == 8
    assert regions.allocate([2, 3]) == [other, 5]
    assert kept == 0 and grown == []
