"""Every example compiles, and gives what eager PyTorch gives."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import cellc
from cellc.request import as_call

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path: Path) -> None:
    try:
        names: dict[str, Any] = runpy.run_path(str(path))
        model, requests = names["model"], names["example_inputs"]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    with cellc.compile(model) as compiled, torch.no_grad():
        for request, got in zip(requests, compiled.map(requests), strict=True):
            args, kwargs = as_call(request)
            want = model(*args, **kwargs)
            for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("tree_lstm", ["--functions", "40"], "known shapes"),
        ("nested_sequences", [], "equal to eager"),
        ("policy", [], "equal to eager"),
    ],
)
def test_example_as_a_script(name: str, arguments: list[str], said: str) -> None:
    path = next(p for p in EXAMPLES if p.stem == name)
    done = subprocess.run(
        [sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
