"""The zoo: models of the literature as their users write them, compared with eager PyTorch.

Each module of `tests/zoo` names its paper, and has `make()`, a model that knows nothing of cellc,
and `requests()`, of different structures, in the forms of `Compiled.map`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import cellc
from cellc.request import as_call

NAMES = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "zoo")]))


def check(name: str, backend: Any, most: int | None = None) -> None:
    zoo = importlib.import_module(f"zoo.{name}")
    torch.manual_seed(0)
    model = zoo.make().eval()
    requests = zoo.requests()[:most]
    with cellc.compile(model, backend=backend) as compiled:
        results = compiled.map(requests)
    for request, got in zip(requests, results, strict=True):
        args, kwargs = as_call(request)
        with torch.no_grad():
            want = model(*args, **kwargs)
        got_leaves, got_tree = pytree.tree_flatten(got)
        want_leaves, want_tree = pytree.tree_flatten(want)
        assert got_tree == want_tree
        for a, b in zip(got_leaves, want_leaves, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_equals_eager(name: str) -> None:
    check(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_eager_on_cpp(name: str) -> None:
    check(name, "cpp")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_eager_interpreted(name: str) -> None:
    check(name, "triton", most=3)
