"""Which functions may take another path at another size, and which frames are looked at."""

from __future__ import annotations

import cProfile
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from cellc.frontends.branching import CodesSeen, _may_branch

# Functions are compiled from text: what is tested is their bytecode, and none of them runs.
STRAIGHT = {
    "loop over a range": "for t in range(len(x)): y = x[t]",
    "loop over rows": "for row in x: y = row",
    "loop over pairs": "for t, (a, b) in enumerate(zip(x, y)): z = a + b",
    "backwards": "for t in reversed(range(x.shape[0])): y = x[t]",
    "comprehension": "return [row for row in x]",
    "shapes": "b, t, h = x.shape\n return x.view(b * t, h)",
    "arithmetic": "return x[: len(x) - 1] + n * 2 / 3",
    "attribute": "if self.flag: y = x",
    "attribute negated": "if not self.flag: y = x",
    "attribute, conditional expression": "return x if self.batch_first else y",
    "two attributes": "if self.a and self.b: y = x",
    "look-up in a tensor": "for t in range(n): y = self.cells[t](x[t - 1], x[len(x) - 1 - t])",
    "is None": "if x is None: y = 1",
    "is not None": "if x is not None: y = 1",
    "None or a value": "y = x if y is None else y",
    "is": "if x is y: y = 1",
    "isinstance": "if isinstance(x, tuple): x = x[0]",
    "not isinstance": "if not isinstance(x, tuple): x = x[0]",
    "hasattr": "if hasattr(self, 'head'): x = self.head(x)",
    "try": "try: y = x[0]\n except IndexError: y = 0",
    "with": "with torch.no_grad(): y = x",
    "comparison with a word": "if flag == 'sum': y = x",
    "word among others": "if flag in ('sum', 'mean'): y = x",
    "number of dimensions": "if x.dim() == 2: y = x",
    "number of dimensions, as an attribute": "if x.ndim == 2: y = x",
}
BRANCHING = {
    "comparison": "if len(x) > 3: y = x",
    "comparison of a name": "if n == 3: y = x",
    "comparison kept": "long = n > 3\n return y[long]",
    "comparison in a loop": "for t in range(len(x)):\n  if t > 0: y = x[t]",
    "chained comparison": "if 2 < n < 5: y = x",
    "while": "while n > 1: n = n - 1",
    "remainder": "if len(x) % 2: y = x",
    "remainder kept": "y = x[n % 3]",
    "remainder in place": "n %= 2",
    "half": "y = x[: len(x) // 2]",
    "half in place": "n //= 2",
    "bit": "if n & 1: y = x",
    "shift": "y = x[: n >> 1]",
    "truth of a call": "if helper(len(x)): y = x",
    "truth of a length": "if len(x): y = x",
    "truth of a sum": "if n - 1: y = x",
    "conditional expression": "return x if len(x) else y",
    "and": "return len(x) and y",
    "comprehension": "return [row for row in x if helper(row)]",
    "lambda": "return (lambda m: m > 3)(n)",
    "nested function": "def inner(m):\n  return m // 2\n return inner(n)",
    "match": "match n:\n  case 3: y = x",
    "assertion": "assert len(x) > 1",
    "check of a type, then of a value": "if isinstance(x, tuple) and n > 3: y = x",
    "check of a type, then a truth": "ok = hasattr(x, 'a')\n if helper(n): y = x",
    "membership": "if len(x) in (2, 4): y = x",
    "membership kept": "few = n in (2, 4)\n return y[few]",
    "rounded": "y = x[: int(n / 2) * 2]",
    "divmod": "y = x[: divmod(n, 2)[0]]",
    "truth of a computed name": "k = len(x) - 5\n y = x if k else y",
    "truth of an argument": "if n: y = x",
    "look-up in a table": "y = x * [1.0, 2.0, 1.0][len(x)]",
    "look-up in a global": "y = x * TABLE[len(x)]",
    "look-up in an attribute": "y = self.modules[n - 1](x)",
    "look-up in a dict": "try: y = x + {3: 1.0}[len(x)]\n except KeyError: y = x",
    "bisect": "y = x * bisect(self.edges, len(x))",
    "gcd": "y = x * gcd(len(x), 6)",
    "count": "y = x * [1, 2].count(n)",
}


def function(body: str) -> FunctionType:
    space: dict[str, Any] = {"torch": torch}
    exec(compile(f"def f(self, x, y, n, flag):\n {body}\n", "user.py", "exec"), space)
    made = space["f"]
    assert isinstance(made, FunctionType)
    return made


def codes(made: FunctionType) -> list[Any]:
    """The function's code and that of the functions in it, as running it would show."""
    found = [made.__code__]
    for code in found:
        found += [c for c in code.co_consts if hasattr(c, "co_code")]
    return found


@pytest.mark.parametrize("name", STRAIGHT)
def test_one_path(name: str) -> None:
    assert not any(map(_may_branch, codes(function(STRAIGHT[name]))))


@pytest.mark.parametrize("name", BRANCHING)
def test_more_than_one_path(name: str) -> None:
    assert any(map(_may_branch, codes(function(BRANCHING[name]))))


def longer(n: int) -> bool:
    return n > 3


def outer(n: int) -> int:
    return [1, 2][longer(n)]


def straight(n: int) -> int:
    return n + 1


@pytest.mark.parametrize(("call", "branches"), [(outer, True), (straight, False)])
def test_functions_that_ran(call: Callable[[int], int], branches: bool) -> None:
    seen = CodesSeen(())
    with seen.watching():
        call(2)
    assert {c.co_name for c in seen._seen} >= {call.__name__}
    user = CodesSeen((os.path.dirname(pytest.__file__),))
    user._seen = {c for c in seen._seen if c.co_filename == __file__}
    assert user.may_branch() == branches


def test_imports_while_tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lazily imported module and its finder run is none of the forward's code."""
    (tmp_path / "lazy_module.py").write_text("def f(n): return n > 1\nassert f(2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            assert name != "" and name > ""

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    seen = CodesSeen(())
    with seen.watching():
        import lazy_module

        straight(1)
    names = {c.co_name for c in seen._seen}
    assert "straight" in names and not names & {"f", "find_spec", "<module>"}
    with seen.watching():
        lazy_module.f(1)
    assert "f" in {c.co_name for c in seen._seen}


def test_tracing_while_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may run its model at its top level."""
    (tmp_path / "running_module.py").write_text(
        "from cellc.frontends.branching import CodesSeen\n"
        "def f(n): return n > 1\n"
        "seen = CodesSeen(())\n"
        "with seen.watching(): f(2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import running_module

    assert {c.co_name for c in running_module.seen._seen} >= {"f"}


def test_trusted_folders() -> None:
    seen = CodesSeen((os.path.dirname(__file__),))
    seen._seen = {outer.__code__, longer.__code__}
    assert not seen.may_branch()
    seen._seen.add(function("return n // 2").__code__)
    assert seen.may_branch()


def test_the_profiler_before_goes_on() -> None:
    calls: list[str] = []

    def profiler(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        with CodesSeen(()).watching():
            straight(1)
        assert sys.getprofile() is profiler
        calls.clear()
        longer(1)
    finally:
        sys.setprofile(before)
    assert calls[0] == "longer"


def test_a_profiler_in_c_goes_on() -> None:
    profile = cProfile.Profile()
    with profile:
        with CodesSeen(()).watching():
            straight(1)
        longer(1)
    assert any(code == longer.__code__ for code, *_ in profile.getstats())


def test_the_profiler_is_off_after_an_error() -> None:
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError), CodesSeen(()).watching():
        _ = 1 / 0
    assert sys.getprofile() is before
