"""Tensors of any layout, copied into arenas: what is there afterwards is what was given."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cellc.arithmetic import Numpy
from cellc.dtypes import TORCH_DTYPES
from cellc.kernels.native import find_arithmetic
from cellc.layout import are_rows, arranged, as_block, as_rows, parted
from cellc.ops import RowType
from cellc.plan import DataRows, OutputRows, Tables
from cellc.rows import Windows
from cellc.state import Arenas
from cellc.writing import FEW, SMALL_DATA, Writer

checked = settings(max_examples=150, deadline=None)
ROW_DIMS = ((False,), (True,), (False, True), (True, False), (False, True, True), (True, True))
ROW_DIMS += ((True, False, True), (False, False), (False, False, True))


WAYS = ("plain", "strided", "transposed", "gradient", "parameter")


def opened(type: RowType, capacity: int) -> Arenas:
    tables = Tables()
    tables.type(type)
    arenas = Arenas(tables, {}, torch.device("cpu"))
    plan: Any = None  # what it holds is not looked at
    assert arenas.prepare(plan)
    arenas._grow(0, max(capacity, len(arenas[type])))
    arenas[type].zero_()
    return arenas


def values(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    drawn = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 9, shape)
    return torch.from_numpy(drawn).to(TORCH_DTYPES[dtype])


def disguised(x: Tensor, way: str) -> Tensor:
    """The same values, held otherwise."""
    if way == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if way == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "gradient" and x.dtype.is_floating_point:
        return x.clone().requires_grad_()
    if way == "parameter":
        return torch.nn.Parameter(x.clone(), requires_grad=False)
    return x


@given(data=st.data())
@checked
def test_what_is_written(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["f32", "f64", "f16", "bf16", "i64", "i32", "u8", "bool"]))
    row_dims = data.draw(st.sampled_from(ROW_DIMS))
    wide = data.draw(st.sampled_from([1, 3, 700]))
    shape = tuple(wide if i == 0 else 2 for i in range(sum(row_dims)))
    arithmetic = data.draw(st.sampled_from([Numpy(), find_arithmetic()]))
    number = data.draw(st.sampled_from([1, 2, FEW, FEW + 1, 40]))
    free = row_dims.count(False)
    sizes = data.draw(
        st.lists(st.tuples(*[st.integers(0, 5)] * free), min_size=number, max_size=number)
    )
    if data.draw(st.booleans()):
        sizes = [(1,) * free] * number
    ways = data.draw(st.lists(st.sampled_from(WAYS), min_size=1, max_size=3))
    dims = range(len(row_dims))
    order = sorted(dims, key=lambda i: (row_dims[i], i))  # positions first
    tensors, flat = [], []
    for k, given_ in enumerate(sizes):
        left, right = iter(given_), iter(shape)
        full = tuple(next(right) if row else next(left) for row in row_dims)
        x = values(dtype, full, k)
        flat.append(x.permute(order).reshape(-1, *shape) if x.numel() else x.new_zeros((0, *shape)))
        tensors.append(disguised(x, ways[k % len(ways)]))
    counts = np.array([int(np.prod(s)) for s in sizes], np.int64)
    type = RowType(shape, dtype)
    starts = np.cumsum(counts + 1) - counts
    arenas = opened(type, int(starts[-1] + counts[-1]))
    arena = arenas[type]
    want = torch.zeros_like(arena)
    for start, part in zip(starts.tolist(), flat, strict=True):
        want[start : start + len(part)] = part
    same = len(set(counts.tolist())) == 1
    rows = DataRows(0, "x", 0, int(counts[0]) if same else 2, 0, row_dims, None)
    assert Writer(arenas, arithmetic).write(rows, starts, counts, tensors) == []
    torch.testing.assert_close(arena, want, rtol=0, atol=0)
    arenas = opened(type, int(starts[-1] + counts[-1]))
    one_by_one = Writer(arenas, arithmetic)
    for k, x in enumerate(tensors):
        rows, written = replace(rows, count=int(counts[k])), False
        with contextlib.suppress(TypeError, RuntimeError):  # numpy has no such numbers
            written = one_by_one.write_one(rows, int(starts[k]), x)
        if not written:
            x = x.resolve_conj().resolve_neg()
            assert not one_by_one.write(rows, starts[k : k + 1], counts[k : k + 1], [x])
    torch.testing.assert_close(arenas[type], want, rtol=0, atol=0)


@pytest.mark.parametrize("number", [2, FEW + 4])
@pytest.mark.parametrize("length", [1, 3, SMALL_DATA])
def test_indices_outside(number: int, length: int) -> None:
    arenas = opened(RowType((), "i64"), number * (length + 1))
    tensors = [torch.full((length,), k % 5) for k in range(number)]
    tensors[1][-1], tensors[-1][0] = 5, -1
    counts = np.full(number, length)
    rows = DataRows(0, "x", 0, length, 0, (False,), 5)
    starts = np.arange(number) * (length + 1)
    wrong = Writer(arenas, Numpy()).write(rows, starts, counts, tensors)
    assert wrong == sorted({1, number - 1})


@pytest.mark.parametrize(
    ("row_dims", "shape", "windows", "are"),
    [
        ((False,), (), None, True),
        ((False, True), (3,), None, True),
        ((False, True, True), (3, 2), None, True),
        ((True,), (3,), None, False),
        ((True, False), (3,), None, False),
        ((False, False), (), None, False),
        ((), (), None, False),
        ((False,), (2,), Windows(0, 2, 1), False),
    ],
)
def test_tensors_that_are_rows(row_dims: Any, shape: Any, windows: Any, are: bool) -> None:
    assert are_rows(row_dims, shape, windows) == are
    if are:
        x = torch.randn(4, *shape)
        assert as_rows(x, row_dims, shape) is x


@pytest.mark.parametrize(
    ("positions", "order", "row"),
    [
        ((5,), None, (3,)),
        ((2, 3), None, ()),
        ((), None, (4,)),
        ((), None, ()),
        ((0,), None, (4,)),
        ((2, 3), (1, 0, 2), (4,)),
        ((6,), (1, 0), (2,)),
        ((), (1, 0), (2, 3)),
        ((), None, (0,)),
        ((), None, (3, 0)),
        ((2, 2), None, (0,)),
        ((2,), (1, 0), (0,)),
        ((2, 0), None, (3,)),
    ],
)
def test_arrays_as_tensors(positions: Any, order: Any, row: Any) -> None:
    """As torch arranges them, and of several requests parts them."""
    count = int(np.prod(positions))
    slots = np.arange(count, dtype=np.int32)
    rows = OutputRows(slots, np.ones_like(slots), 0, positions, order, True)
    flat = torch.randn(count, *row)
    got, want = arranged(flat.numpy().copy(), rows), arranged(flat.clone(), rows)
    assert got.shape == want.shape and (not got.numel() or got.stride() == want.stride())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    flat = torch.randn(3 * count, *row)
    block = as_block(flat.numpy().copy(), rows, 3)
    torch.testing.assert_close(block, as_block(flat.clone(), rows, 3), rtol=0, atol=0)
    parts = parted(flat.numpy().copy(), rows, [count] * 3)
    for part, other in zip(parts, parted(flat.clone(), rows, [count] * 3), strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=0)


@pytest.mark.parametrize("number", [1, FEW + 4])
def test_memory_that_is_not_the_values(number: int) -> None:
    """Whoever resolves such tensors may write them then."""
    arenas, length = opened(RowType((), "f64"), number * SMALL_DATA), SMALL_DATA
    counts, starts = np.full(number, length), np.arange(number) * length
    rows = DataRows(0, "x", 0, length, 0, (False,), None)
    tensors = [torch._neg_view(torch.ones(length, dtype=torch.float64)) for _ in range(number)]
    with pytest.raises(RuntimeError, match="negative"):
        Writer(arenas, find_arithmetic()).write(rows, starts, counts, tensors)


def test_memory_is_copied() -> None:
    for arithmetic in (Numpy(), find_arithmetic()):
        source, target = np.arange(50.0), np.zeros(50)
        pieces = [(target[3:].ctypes.data, source.ctypes.data, 80), (target.ctypes.data, 0, 0)]
        pieces.append((target[20:].ctypes.data, source[10:].ctypes.data, 8))
        arithmetic.copy(np.array(pieces, np.int64))
        want = np.zeros(50)
        want[3:13], want[20] = source[:10], source[10]
        np.testing.assert_array_equal(target, want)
