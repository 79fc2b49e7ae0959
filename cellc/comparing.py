"""Comparing: are two results of a model the same, up to rounding?

Duty: walk two results, and say by how much their tensors differ. Used by `cellc.checking`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellc.skeleton import VALUES, children

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-2, 2e-2),
}
"""Relative and absolute; whole numbers and booleans must be equal."""


@dataclass(frozen=True)
class Tolerance:
    """What is asked for, in place of a dtype's own. `norm`: floats are compared as whole tensors,
    the norm of the difference to that of what is wanted.
    """

    rtol: float | None = None
    atol: float | None = None
    norm: float | None = None

    def of(self, dtype: torch.dtype) -> tuple[float, float]:
        rtol, atol = TOLERANCES.get(dtype, (0.0, 0.0))
        return rtol if self.rtol is None else self.rtol, atol if self.atol is None else self.atol


@dataclass(frozen=True)
class Comparison:
    """`difference`: the largest between two numbers; nan where results differ in kind, which
    `problem` says.
    """

    equal: bool
    difference: float
    problem: str = ""

    def __and__(self, other: Comparison) -> Comparison:
        """The worse of two."""
        worse = max(self, other, key=lambda c: (not c.equal, _order(c.difference)))
        return Comparison(
            self.equal and other.equal, worse.difference, self.problem or other.problem
        )


SAME = Comparison(True, 0.0)


def _order(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def compare(got: Any, want: Any, tolerance: Tolerance) -> Comparison:
    """Two results: tensors and plain values, in containers and objects of any depth."""
    found, stack = SAME, [(got, want)]
    while stack:
        a, b = stack.pop()
        inside, wanted = _children(a), _children(b)
        if inside is None or wanted is None:
            found &= _leaf(a, b, tolerance)
        elif inside[0] != wanted[0]:
            found &= _unlike(f"a {_kind(a)} in place of a {_kind(b)}, or of another size")
        else:
            stack += reversed(list(zip(inside[1], wanted[1], strict=True)))
    return found


def _children(x: Any) -> tuple[Hashable, list[Any]] | None:
    parts = None if isinstance(x, VALUES) else children(x)
    return None if parts is None else parts[:2]


def _kind(x: Any) -> str:
    return type(x).__name__


def _unlike(problem: str) -> Comparison:
    return Comparison(False, math.nan, problem)


def _leaf(got: Any, want: Any, tolerance: Tolerance) -> Comparison:
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        return compare_tensors(got, want, tolerance)
    if isinstance(got, float) and isinstance(want, float):
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (got, want))
        rtol, atol = tolerance.of(torch.float32)  # out of a tensor
        return compare_tensors(a, b, Tolerance(rtol, atol, tolerance.norm))
    if type(got) is not type(want):
        return _unlike(f"a {_kind(got)} in place of a {_kind(want)}")
    if got is want or got == want:
        return SAME
    return _unlike(f"{got!r} in place of {want!r}"[:200])


def compare_tensors(
    got: Tensor, want: Tensor, tolerance: Tolerance, scaled: bool = False
) -> Comparison:
    """`scaled`: atol is of the largest value, where that is above 1."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return _unlike(f"{_form(got)} in place of {_form(want)}")
    if got.numel() == 0:
        return SAME
    a, b = got.detach().cpu(), want.detach().cpu()
    rtol, atol = tolerance.of(want.dtype)
    if not want.dtype.is_floating_point and not want.dtype.is_complex:
        rtol = atol = 0.0
        a, b = a.to(torch.int64), b.to(torch.int64)
    elif not want.dtype.is_complex:
        a, b = a.to(torch.float64), b.to(torch.float64)
    if tolerance.norm is not None and want.dtype.is_floating_point:
        return _by_norm(a, b, tolerance.norm, atol)
    if scaled:
        finite = b[b.isfinite()].abs()
        atol *= max(1.0, float(finite.max())) if finite.numel() else 1.0
    equal = torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    return Comparison(equal, _largest(a, b))


def _by_norm(a: Tensor, b: Tensor, share: float, atol: float) -> Comparison:
    """`difference` is a share of the norm."""
    finite = a.isfinite() & b.isfinite()
    same = torch.allclose(a[~finite], b[~finite], rtol=0.0, atol=0.0, equal_nan=True)
    off, norm = float((a - b)[finite].norm()), float(b[finite].norm())
    equal = same and off <= share * norm + atol
    return Comparison(equal, off / norm if norm else off)


def _largest(a: Tensor, b: Tensor) -> float:
    same = (a == b) | ((a != a) & (b != b))  # infinities and nans of one place
    differences = (a - b).abs()[~same]
    return float(differences.max()) if differences.numel() else 0.0


def _form(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def described(result: Any) -> list[str]:
    """The forms of a result's parts: `float32[3, 5]`."""
    found, stack = list[str](), [result]
    while stack:
        x = stack.pop()
        inside = _children(x)
        if inside is None:
            found.append(_form(x) if isinstance(x, Tensor) else _kind(x))
        else:
            stack += reversed(inside[1])
    return found
