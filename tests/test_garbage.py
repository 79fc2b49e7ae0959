"""Python's garbage collector is off while a structure is traced, and then as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cellc
from cellc.garbage import put_off


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


def test_it_is_off_meanwhile_and_on_again_after_errors() -> None:
    assert put_off(gc.isenabled) is False and gc.isenabled()
    assert put_off(lambda: put_off(gc.isenabled)) is False and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        put_off(lambda: 1 // 0)
    assert gc.isenabled()


def test_who_had_it_off_finds_it_off() -> None:
    gc.disable()
    assert put_off(gc.isenabled) is False and not gc.isenabled()


def test_a_first_request_is_traced_without_it_and_a_second_runs_with_it() -> None:
    seen: list[bool] = []

    class Seen(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.isenabled())
            return x + 1

    with cellc.compile(Seen().eval(), backend="eager") as compiled:
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
        assert seen and not any(seen) and gc.isenabled()
        compiled(torch.ones(3))
        assert gc.isenabled()
