"""Requests keep tensors of their own, whatever the caller does to those given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellc.owning import copied

LONG = torch.arange(1 << 16, dtype=torch.float32).reshape(4, -1)


@pytest.mark.parametrize(
    "tensor",
    [
        LONG,
        LONG.t(),
        LONG[:, ::2],
        LONG[:, :8],
        LONG.to(torch.bfloat16),
        LONG.to(torch.int64),
        torch.complex(LONG, -LONG).conj(),
        torch.complex(LONG, -LONG).conj().imag,
        LONG.clone().requires_grad_(),
        torch.nn.Parameter(LONG.clone()),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}-{t.stride()}",
)
def test_copies_are_as_clones(tensor: Tensor) -> None:
    want, got = tensor.detach().clone(), copied(tensor)
    assert torch.equal(got, want) and got.stride() == want.stride()
    assert got.dtype == want.dtype and not got.requires_grad
    before = want.clone()
    with torch.no_grad():
        tensor.add_(1)
    assert torch.equal(got, before)
    tensor.data.sub_(1)
