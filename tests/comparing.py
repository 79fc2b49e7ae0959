"""Results compared with those of eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def alike(got: Any, want: Any, atol: float = 1e-6) -> None:
    """Python values of the same types, equal; tensors and floats close."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        alike(list(got.items()), list(want.items()), atol)
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            alike(a, b, atol)
    elif isinstance(want, (Tensor, float)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=atol, equal_nan=True)
    else:
        assert got == want
