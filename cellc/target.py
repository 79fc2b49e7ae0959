"""Targets: the model and the example requests that a command line names.

Duty: load `path/to/file.py:name` or `package.module:name`. Comes in: that text; goes out: an
nn.Module or a function of tensors, and a list of requests, to the commands. A mistake is a
UsageError that says what was found instead.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from cellc.errors import UsageError

Model: TypeAlias = "nn.Module | Callable[..., Any]"


@dataclass(frozen=True)
class Target:
    """What a command works on."""

    text: str
    model: Model
    requests: list[Any]


def load(text: str, inputs: str | None = None) -> Target:
    """The model that `text` names and its requests; `inputs` is `--input`. Raises UsageError."""
    module, name = _module_and_name(text)
    model = _as_model(_attribute(module, name, text), text)
    if inputs is not None:
        found = _attribute(*_module_and_name(inputs), inputs)
        return Target(text, model, _as_requests(found, inputs))
    if not hasattr(module, "example_inputs"):
        where = text.rpartition(":")[0]
        raise UsageError(
            f"{where} has no example_inputs(); add one that returns a list of requests, or pass "
            "--input file.py:name"
        )
    where = f"{text.rpartition(':')[0]}:example_inputs"
    return Target(text, model, _as_requests(module.example_inputs, where))


def load_object(text: str) -> Any:
    """Whatever `file.py:name` or `package.module:name` names. Raises UsageError."""
    return _attribute(*_module_and_name(text), text)


# -- modules and names -----------------------------------------------------------------------------


def _module_and_name(text: str) -> tuple[ModuleType, str]:
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(
            f"{text!r} is no target; write path/to/file.py:name or package.module:name"
        )
    if where.endswith(".py") or os.sep in where:
        return _load_file(where), name
    return _load_module(where), name


def _load_file(where: str) -> ModuleType:
    path = Path(where).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {where}{_near_files(path)}")
    path = path.resolve()
    unique = f"cellc_target_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if unique in sys.modules:  # the same file named twice, as TARGET and as --input
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{where} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    _search(str(path.parent))
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[unique]
        raise UsageError(f"{where} cannot be loaded: {_reason(error)}") from error
    return module


def _load_module(where: str) -> ModuleType:
    _search(os.getcwd())  # as python -m does
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            hint = f"; for a file write {where}.py" if Path(f"{where}.py").is_file() else ""
            raise UsageError(f"there is no module {error.name}{hint}") from error
        raise UsageError(f"{where} cannot be loaded: {_reason(error)}") from error
    except Exception as error:
        raise UsageError(f"{where} cannot be loaded: {_reason(error)}") from error


def _search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _near_files(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _attribute(module: ModuleType, name: str, text: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            where = text.rpartition(":")[0]
            raise UsageError(f"{where} has no {name!r}; {_near_names(module, name)}")
        value = getattr(value, part)
    return value


def _near_names(module: ModuleType, name: str) -> str:
    """Names that look alike, or else everything there that could be a model."""
    names = [n for n in vars(module) if not n.startswith("_")]
    near = difflib.get_close_matches(name, names, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    own = [n for n in names if _could_be_model(module, getattr(module, n))]
    return f"there are {', '.join(own)}" if own else "it defines no model"


def _could_be_model(module: ModuleType, value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, FunctionType) and value.__module__ == module.__name__


# -- values ----------------------------------------------------------------------------------------


def _as_model(value: Any, text: str) -> Model:
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        kind = type(value).__name__
        raise UsageError(f"{text} is a {kind}; a target is an nn.Module or a function")
    if not isinstance(value, type) and not _takes_nothing(value):
        function: Callable[..., Any] = value
        return function  # of tensors: the model itself
    made = _called(value, text)
    if isinstance(made, nn.Module) or (callable(made) and not isinstance(made, type)):
        model: Model = made
        return model
    raise UsageError(f"{text}() returned a {type(made).__name__}, not an nn.Module or a function")


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether it can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _as_requests(value: Any, text: str) -> list[Any]:
    if callable(value):
        value = _called(value, text)
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, dict, torch.Tensor)):
        raise UsageError(f"{text} gives a {type(value).__name__}, not a list of requests")
    requests = list(value)
    if not requests:
        raise UsageError(f"{text} gives no requests; one at least is needed")
    return requests


def _called(function: Callable[[], Any], text: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise UsageError(f"{text}() raised {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The exception with the line of the user's code that it came from."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith("<frozen")]
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
