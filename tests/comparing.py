"""Results compared with those of eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
