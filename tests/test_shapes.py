"""What operations on placeholders give: the shapes, dtypes and errors that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellc.frontends.placeholder import Placeholder, form_of, row_major
from cellc.frontends.shapes import Results, _ruled

aten = torch.ops.aten
F32, F16, I64, BOOL = torch.float32, torch.float16, torch.int64, torch.bool
DTYPES = st.sampled_from([F32, F16, torch.float64, I64, torch.int32, BOOL])
BINARY = [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default]
COMPARING = [aten.gt.Tensor, aten.eq.Tensor]
UNARY = [aten.tanh.default, aten.relu.default, aten.exp.default, aten.neg.default]


def check(func: Any, *args: Any) -> None:
    """Rules and meta tensors say what the operation on real tensors says; so do errors."""
    try:
        real = func(*args)
    except (RuntimeError, IndexError):
        with pytest.raises((RuntimeError, IndexError)):
            Results().of(func, args, {})
        return
    want = list(real) if isinstance(real, (tuple, list)) else [real]
    got = Results().of(func, args, {}).forms
    assert [(f.shape, f.dtype) for f in got] == [(tuple(t.shape), t.dtype) for t in want]
    assert [f.stride for f in got] == [t.stride() for t in want]


def tensor(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(tuple(shape), dtype=dtype)


SHAPES = st.lists(st.integers(1, 3), max_size=3)


@given(st.sampled_from(BINARY + COMPARING), SHAPES, SHAPES, DTYPES, DTYPES)
@settings(max_examples=300, deadline=None)
def test_pairs(func: Any, a: Any, b: Any, first: torch.dtype, second: torch.dtype) -> None:
    check(func, tensor(a, first), tensor(b, second))


@given(st.sampled_from(UNARY), SHAPES, DTYPES)
@settings(max_examples=100, deadline=None)
def test_single(func: Any, shape: Any, dtype: torch.dtype) -> None:
    check(func, tensor(shape, dtype))


@given(SHAPES, DTYPES, st.sampled_from([2, 2.5, True]))
@settings(max_examples=100, deadline=None)
def test_numbers(shape: Any, dtype: torch.dtype, number: Any) -> None:
    check(aten.mul.Tensor, tensor(shape, dtype), number)


@given(SHAPES, SHAPES, st.sampled_from([aten.mm.default, aten.bmm.default, aten.mv.default]))
@settings(max_examples=300, deadline=None)
def test_products(a: Any, b: Any, func: Any) -> None:
    check(func, tensor(a, F32), tensor(b, F32))


@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(-4, 3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_joins(shapes: Any, dim: int, stacked: bool) -> None:
    func = aten.stack.default if stacked else aten.cat.default
    check(func, [tensor(s, F32) for s in shapes], dim)


@given(SHAPES, st.lists(st.integers(-3, 2), max_size=2, unique_by=lambda d: d % 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_means(shape: Any, dims: Any, keep: bool) -> None:
    check(aten.mean.dim, tensor(shape, F32), dims, keep)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.embedding.default, (torch.ones(5, 2), torch.zeros(3, dtype=I64))),
        (aten.embedding.default, (torch.ones(5, 2), torch.zeros(2, 3, dtype=torch.int32))),
        (aten.embedding.default, (torch.ones(5, 2), torch.ones(3))),
        (aten.mm.default, (torch.ones(2, 3), torch.ones(4, 3).t())),
        (aten.mm.default, (torch.ones(2, 3), torch.ones(3, 4, dtype=torch.float64))),
        (aten.add.Tensor, (torch.ones(2, 3).t(), torch.ones(3, 2))),
        (aten.add.Tensor, (torch.ones(2, 8)[:, :4], torch.ones(4))),
        (aten.cat.default, ([torch.ones(2), torch.ones(2, dtype=I64)],)),
        (aten.mean.dim, (torch.ones(2, dtype=I64), [0])),
        (aten.topk.default, (torch.ones(4, 5), 2)),
        (aten.sort.default, (torch.ones(4),)),
        (aten.argmax.default, (torch.ones(2, 3).t(), 1)),
        (aten.argmax.default, (torch.ones(2, 3), 2)),
        (aten._softmax.default, (torch.ones(1, 3).expand(2, 3), 1, False)),
        (aten.gather.default, (torch.ones(2, 3), 1, torch.zeros(2, 1, dtype=I64))),
        (aten.sum.dim_IntList, (torch.ones(0, 3), [0])),
        (aten.max.dim, (torch.ones(2, 3), 0, True)),
        (aten.index.Tensor, (torch.ones(5, 3), [None, torch.zeros(4, dtype=I64)])),
        (aten.native_layer_norm.default, (torch.ones(2, 3), [3], None, None, 1e-5)),
        (aten.addmm.default, (torch.ones(4), torch.ones(2, 3), torch.ones(3, 4))),
        (aten.addmm.default, (torch.ones(4), torch.ones(2, 3), torch.ones(2, 4))),
        (aten.dot.default, (torch.ones(3), torch.ones(4))),
    ],
)
def test_cases(func: Any, args: Any) -> None:
    check(func, *args)


def test_common_operations_have_rules() -> None:
    """Where they do not, the first trace of a process imports torch._dynamo."""
    x, w = tensor((2, 3), F32), tensor((4, 3), F32)
    for func, args in [
        (aten.mm.default, (x, w.t())),
        (aten.add.Tensor, (x, 1)),
        (aten.sigmoid.default, (x,)),
        (aten.cat.default, ([x, x], 1)),
        (aten.stack.default, ([x, x],)),
        (aten.embedding.default, (w, tensor((2,), I64))),
    ]:
        assert _ruled(func, args, {}) is not None, func


def test_views_are_known() -> None:
    x = Placeholder(row_major((4, 6), F32))
    results = Results()
    assert results.of(aten.view.default, (x, [24]), {}).views == (True,)
    assert results.of(aten.split.Tensor, (x, 2), {}).views == (True, True)
    assert results.of(aten.clone.default, (x,), {}).views == (False,)


@pytest.mark.parametrize("change", [lambda x: x.squeeze_(0), lambda x: x.t_()])
def test_placeholders_change_shape_in_place(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    real = change(torch.ones(1, 3))
    held = Placeholder(row_major((1, 3), F32))
    name = "squeeze_" if real.dim() == 1 else "t_"
    func, args = (aten.squeeze_.dim, (0,)) if name == "squeeze_" else (aten.t_.default, ())
    held.change(func, args, form_of(real))
    assert (held.shape, held.stride()) == (real.shape, real.stride())


def test_placeholders_outlive_no_trace() -> None:
    with pytest.raises(RuntimeError, match="after the trace"):
        Placeholder(row_major((2,), F32)) + 1
