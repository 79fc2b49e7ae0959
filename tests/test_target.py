from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from cellc.errors import UsageError
from cellc.target import load

MODEL = """
import torch
from torch import nn

model = nn.GRU(3, 4)
number = 7
requests = [torch.randn(2, 1, 3)]

class Sum(nn.Module):
    def forward(self, x):
        return x.sum()

def build():
    return nn.Linear(3, 4)

def double(x):
    return 2 * x

def none():
    return None

def broken():
    raise ValueError("no weights here")

def more():
    return iter([torch.randn(5, 1, 3), (torch.randn(1, 1, 3),)])

def nothing():
    return []
"""
EXAMPLES = """
def example_inputs():
    return [torch.randn(n, 1, 3) for n in (1, 2, 3)]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny_model.py"
    path.write_text(MODEL + EXAMPLES)
    return path


def test_module_with_example_inputs(file: Path) -> None:
    target = load(f"{file}:model")
    assert isinstance(target.model, nn.GRU)
    assert [len(x) for x in target.requests] == [1, 2, 3]


def test_function_returning_a_module_is_called(file: Path) -> None:
    assert isinstance(load("tiny_model.py:build").model, nn.Linear)
    assert type(load("tiny_model.py:Sum").model).__name__ == "Sum"


def test_function_of_tensors_is_the_model(file: Path) -> None:
    model = load("tiny_model.py:double").model
    assert model(3) == 6


def test_package_and_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = file.parent / "tiny_package"
    package.mkdir()
    (package / "__init__.py").touch()
    file.rename(package / "models.py")
    target = load("tiny_package.models:model")
    assert isinstance(target.model, nn.GRU)
    for name in ("tiny_package", "tiny_package.models"):
        monkeypatch.delitem(sys.modules, name)


def test_a_file_sees_its_neighbours(file: Path) -> None:
    neighbour = file.parent / "tiny_neighbour.py"
    neighbour.write_text("from tiny_model import model, example_inputs")
    assert isinstance(load(f"{neighbour}:model").model, nn.GRU)


def test_one_file_is_loaded_once(file: Path) -> None:
    target = load("tiny_model.py:model", f"{file}:requests")
    assert target.model is load("./tiny_model.py:model").model


@pytest.mark.parametrize(("name", "count"), [("requests", 1), ("more", 2)])
def test_input(file: Path, name: str, count: int) -> None:
    assert len(load("tiny_model.py:model", f"tiny_model.py:{name}").requests) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny_model.py", "no target; write path/to/file.py:name"),
        (":model", "no target"),
        ("tiny_modl.py:model", "there is no file tiny_modl.py; did you mean tiny_model.py"),
        ("nowhere/model.py:model", "there is no file nowhere/model.py"),
        ("tiny_nowhere.module:model", "there is no module tiny_nowhere"),
        ("tiny_model.py:modle", "has no 'modle'; did you mean model"),
        ("tiny_model.py:xyzzy", "there are model, build, double"),
        ("tiny_model.py:number", "is a int; a target is an nn.Module or a function"),
        ("tiny_model.py:none", r"none\(\) returned a NoneType"),
        ("tiny_model.py:broken", r"broken\(\) raised ValueError: no weights here \(tiny_model.py:"),
    ],
)
def test_wrong_targets(file: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny_model.py:number", "gives a int, not a list of requests"),
        ("tiny_model.py:nothing", "gives no requests"),
        ("tiny_model.py:broken", "raised ValueError"),
        ("tiny_model.py:request", "did you mean requests"),
    ],
)
def test_wrong_inputs(file: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("tiny_model.py:model", text)


def test_no_example_inputs(file: Path) -> None:
    file.write_text(MODEL)
    with pytest.raises(UsageError, match=r"has no example_inputs\(\); add one .* or pass --input"):
        load("tiny_model.py:model")


def test_a_file_that_raises(file: Path) -> None:
    file.write_text("import torch\n\nimport tiny_missing\n")
    with pytest.raises(UsageError, match=r"cannot be loaded: ModuleNotFoundError.*model.py:3"):
        load("tiny_model.py:model")
