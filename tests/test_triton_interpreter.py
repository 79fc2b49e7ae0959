"""Triton's interpreter converts to bf16 as torch does, and every device."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cellc.kernels.triton_backend import TritonBackend, interpreting
from cellc.kernels.triton_interpreter import to_bf16

N = 1 << 14


@triton.jit
def cast(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x.to(tl.bfloat16))
    tl.store(z_ptr + at, x)  # cast by the store


def numbers() -> torch.Tensor:
    """Any bit patterns, numbers half way between two bf16, and the ends of the range."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, N, np.uint32)
    bits[: N // 4] = bits[: N // 4] & 0xFFFF0000 | 0x8000
    bits[:8] = (0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x007FFFFF, 0x7FFFFFFF)
    return torch.from_numpy(bits.view(np.float32))


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Bit for bit, but for which nan it is."""
    nan = want.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        got[~nan].view(torch.int16), want[~nan].view(torch.int16)
    )


def test_to_the_nearest_ties_to_even() -> None:
    x = numbers()
    got = torch.from_numpy(to_bf16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert same(got, x.to(torch.bfloat16))


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
def test_interpreted_kernels_round_as_torch_does() -> None:
    TritonBackend("cpu")
    x = numbers()
    y, z = torch.zeros(2, N, dtype=torch.bfloat16)
    cast[(1,)](x, y, z, N)
    assert same(y, x.to(torch.bfloat16)) and same(z, y)


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_in_interpreted_kernels(dtype: torch.dtype) -> None:
    TritonBackend("cpu")
    x = torch.arange(-N // 2, N // 2).to(dtype)
    y, z = torch.zeros(2, N, dtype=torch.bfloat16)
    cast[(1,)](x, y, z, N)
    assert same(y, x.to(torch.bfloat16)) and same(z, y)
