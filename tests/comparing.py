"""Results compared with those of eager PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellc.plan import Plan


def alike(got: Any, want: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Python values of the same types, equal; tensors and floats close."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        alike(list(got.items()), list(want.items()), rtol=rtol, atol=atol)
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            alike(a, b, rtol=rtol, atol=atol)
    elif isinstance(want, (Tensor, float)):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
    else:
        assert got == want


def assert_same_plan(a: Plan, b: Plan) -> None:
    for name in ("calls", "records", "record_base", "successors", "ready"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    for one, other in zip(a.block, b.block, strict=True):
        np.testing.assert_array_equal(one, other)
    assert a.num_slots == b.num_slots and set(a.cells) == set(b.cells)
    for x, y in zip(a.outputs, b.outputs, strict=True):
        np.testing.assert_array_equal(x.slots, y.slots)
    assert a.data == b.data
    for plan in (a, b):  # what was noted of all at once is what each finds out by itself
        alone = replace(plan, nbytes=0)
        assert list(plan.addresses) == list(alone.addresses)
        np.testing.assert_array_equal(plan.rooms, alone.rooms)
        arrays = plan.calls, plan.records, plan.successors
        assert plan.nbytes >= sum(array.nbytes for array in arrays)
