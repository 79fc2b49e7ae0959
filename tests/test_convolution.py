"""Convolutions as windows and products: which are generated, and that all equal PyTorch's."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.kernels import cpp_build
from cellc.kernels.triton_backend import interpreting
from cellc.survey import survey

compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")
interpreted = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
BACKENDS = [
    "eager",
    pytest.param("cpp", marks=compiler),
    pytest.param("triton", marks=interpreted),
]
GENERATED: dict[str, tuple[Callable[[], nn.Module], Sequence[tuple[int, ...]]]] = {
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), [(1, 3, 5, 5), (2, 3, 5, 5), (3, 5, 5)]),
    "2d-strides": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (0, 1), bias=False), [(1, 3, 7, 6)]),
    "2d-dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=2), [(2, 3, 7, 8)]),
    "2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), [(1, 4, 5, 5)]),
    "2d-each-channel": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), [(1, 4, 5, 5)]),
    "2d-two-a-channel": (lambda: nn.Conv2d(4, 8, 3, groups=4), [(1, 4, 5, 5)]),
    "2d-1x1": (lambda: nn.Conv2d(4, 8, 1), [(1, 4, 5, 5)]),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), [(1, 2, 3, 4, 3)]),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), [(1, 4, 9), (4, 5), (2, 4, 7), (4, 1)]),
    "1d-strides": (lambda: nn.Conv1d(4, 6, 4, stride=2, dilation=2), [(1, 4, 9), (4, 12)]),
    "1d-each-channel": (lambda: nn.Conv1d(4, 4, 3, padding=2, groups=4), [(1, 4, 9), (4, 5)]),
    "1d-long-windows": (lambda: nn.Conv1d(1, 6, 40, stride=20), [(1, 1, 100)]),
}
LEFT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), (1, 2, 4, 4)),
    "large": (lambda: nn.Conv2d(16, 8, 5), (1, 16, 20, 20)),
    "many-groups": (lambda: nn.Conv2d(18, 36, 1, groups=9), (1, 18, 3, 3)),
}


class After(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def left_to_torch(compiled: Any) -> set[str]:
    names = {op for view in compiled.cells.values() for op in view.ops}
    return {name for name in names if name.startswith("aten:")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GENERATED)
def test_generated(name: str, backend: Any) -> None:
    torch.manual_seed(0)
    make, shapes = GENERATED[name]
    model = After(make()).eval()
    xs = [torch.randn(shape) for shape in shapes]
    with cellc.compile(model, backend=backend) as compiled:
        for x, got in zip(xs, compiled.map([(x,) for x in xs]), strict=True):
            torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-5)
        assert not left_to_torch(compiled)


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LEFT[name]
    model, x = After(make()).eval(), torch.randn(shape)
    with cellc.compile(model, backend="eager") as compiled:
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)
        assert left_to_torch(compiled) == {"aten:convolution.default"}


def test_a_filter_that_is_data() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return nn.functional.conv1d(x, w, padding=1)

    x, w = torch.randn(1, 3, 6), torch.randn(2, 3, 3)
    with cellc.compile(forward, backend="eager") as compiled:
        torch.testing.assert_close(compiled(x, w), forward(x, w))


class Speech(nn.Module):
    """Convolutions over time, of frames [T, 8], before a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 12, 5, stride=2, padding=2)
        self.second = nn.Conv1d(12, 12, 3, padding=1)
        self.rnn = nn.GRU(12, 16)

    def forward(self, frames: Tensor) -> Tensor:
        x = torch.relu(self.first(frames.T))
        return self.rnn(torch.relu(self.second(x)).T)[0]


def test_over_time_all_lengths_share_cells() -> None:
    model = Speech().eval()
    xs = [torch.randn(n, 8) for n in (5, 9, 14, 30, 31)]
    with cellc.compile(model, backend="eager") as compiled:
        for x, got in zip(xs, compiled.map(xs), strict=True):
            torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-5)
        computing = [v for v in compiled.cells.values() if v.flops_per_row]
        assert len(computing) == 3, list(compiled.cells)  # two convolutions and the recurrence
        assert compiled.stats()["mean_batch"] > 2


def test_arithmetic_that_runs_through_torch_is_not_covered() -> None:
    """A transposed convolution is nearly all of the arithmetic, and its cell is not generated."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(4, 2, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.up(x), self.head(x[0, :, 0, 0])

    with cellc.compile(Model().eval()) as compiled:
        found = survey(compiled, [(torch.randn(1, 4, 6, 6),)])
    (up,) = [c for c in found.cells if c.kernels == ["eager"] and c.parameters]
    assert up.flops_per_row == 2 * 4 * 36 * 2 * 9
    assert found.coverage < 0.01
