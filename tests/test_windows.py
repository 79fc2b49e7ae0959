"""Windows over a request's signal: one cell for all places and lengths, equal to PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc

WIDTH, HOP = 12, 5


class Base(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.cell = nn.Linear(width, 8), nn.GRUCell(8, 6)
        self.out = nn.Linear(6, 3)

    def run(self, windows: Any) -> Tensor:
        h = torch.zeros(6)
        for window in windows:
            h = self.cell(torch.tanh(self.inner(window)), h)
        return self.out(h)


class Slices(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x[i * HOP : i * HOP + WIDTH] for i in range((len(x) - WIDTH) // HOP + 1))


class Unfolded(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.unfold(0, WIDTH, HOP))


class UnfoldedWhole(Base):
    """All windows at once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(torch.relu(x.unfold(0, WIDTH, HOP)).unbind(0))


class Centred(Base):
    """The signal is read otherwise, too."""

    def forward(self, x: Tensor) -> Tensor:
        middle = x.mean()
        return self.run(x[i : i + WIDTH] - middle for i in range(2, len(x) - WIDTH + 1, HOP))


class Frames(Base):
    """Four frames of three numbers each."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x[i : i + 4].reshape(-1) for i in range(len(x) - 3))


class FramesUnfolded(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(w.reshape(-1) for w in x.unfold(0, 4, 2))


FLAT: list[Callable[[], Base]] = [Slices, Unfolded, UnfoldedWhole, Centred]
FRAMES: list[Callable[[], Base]] = [Frames, FramesUnfolded]
LENGTHS = (12, 14, 40, 41, 67)


def requests(make: Callable[[], Base]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3) if make in FRAMES else torch.randn(n) for n in LENGTHS]


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("make", [*FLAT, *FRAMES])
def test_equal_and_one_cell(make: Callable[[], Base], backend: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    xs = requests(make)
    with cellc.compile(model, backend=backend) as compiled:
        for _ in range(2):  # the second time their plans are known
            for x, got in zip(xs, compiled.map([*xs]), strict=True):
                torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-5)
        for x in xs:
            torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)
        readers = [v for v in compiled.cells.values() if "inner.weight" in " ".join(v.parameters)]
        assert len(readers) == 1, [v.inputs for v in compiled.cells.values()]


def test_strided_and_reversed_signals() -> None:
    torch.manual_seed(0)
    model = Slices().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for x in (torch.randn(60)[::2], torch.randn(30).flip(0), torch.randn(30, 2)[:, 1]):
            torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_pieces_that_are_no_windows() -> None:
    """Of several lengths, taken apart again, or all but the ends: as they were."""

    def halves(x: Tensor) -> Tensor:
        return x[: len(x) // 2].sum() - x[len(x) // 2 + 1 :].sum()

    def differences(x: Tensor) -> Tensor:
        return (x[1:] - x[:-1]).abs().sum()

    def taken_apart(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for i in range(len(x) - 2):
            for value in x[i : i + 3]:
                total = torch.tanh(total + value)
        return total

    for forward in (halves, differences, taken_apart):
        with cellc.compile(forward, backend="eager") as compiled:
            for n in (4, 7, 9):
                x = torch.randn(n)
                torch.testing.assert_close(compiled(x), forward(x), rtol=1e-4, atol=1e-5)


def test_a_session_that_carries_the_signal() -> None:
    """Steps whose carried states lie in blocks of many."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
            made = torch.tanh(self.inner(old[:4]) + new)
            return made.sum(), torch.cat([old[4:], made])

    model = Step().eval()
    with cellc.compile(model, carry={"old": "1"}, backend="eager") as compiled:
        states = [torch.randn(8) for _ in range(12)]
        sessions = [compiled.session({"old": state}) for state in states]
        for _ in range(4):
            news = [torch.randn(4) for _ in sessions]
            got = compiled.step_all([(s, (n,)) for s, n in zip(sessions, news, strict=True)])
            for i, (new, y) in enumerate(zip(news, got, strict=True)):
                want, states[i] = model(new, states[i])
                torch.testing.assert_close(y[0], want.detach(), rtol=1e-4, atol=1e-5)
        multiplying = [v for v in compiled.cells.values() if v.parameters]
        assert [v.inputs for v in multiplying] == [("x0: f32[4]", "x1: f32[4]", "x2: f32[4]")]
