"""Families: call graphs whose arrays are affine in the request's sizes.

Duty: after a few sizes of one structure were traced, make the call graph of another size with numpy
alone. Comes in: traced `CallGraph`s with their sizes; goes out: a `CallGraph` for new sizes, to
`cellc.plan`. No torch here.

Every column of a call graph is written as arithmetic runs (`cellc.call_form`). A family is a set of
traces with the same runs, whose starts, steps and lengths are affine functions of the sizes: solved
from the traces, exact on all of them, with at least one more trace than unknowns. Prediction is
used *between* sizes that were traced; a size beyond them is traced and checked first, since a model
may truncate or branch at some length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cellc.call_builder import build
from cellc.call_form import CallForm, Floats, describe
from cellc.calls import CallGraph
from cellc.cells import Cell


@dataclass
class _Sample:
    sizes: tuple[int, ...]
    numbers: Floats  # start, step, length of every run; then output shapes


@dataclass
class _Member:
    """All samples of one form, and the affine map once it is known."""

    cells: list[Cell]
    samples: list[_Sample] = field(default_factory=list)
    coefficients: Floats | None = None  # [1 + varying sizes, numbers]
    varying: tuple[int, ...] = ()

    def fit(self) -> None:
        sizes = np.array([s.sizes for s in self.samples], float)
        self.varying = _independent(sizes)
        self.coefficients = None
        if any(len(set(sizes[:, i])) < 3 for i in self.varying):
            return  # two values of a size cannot tell a line from a square
        basis = self._basis(sizes)
        if len(basis) < basis.shape[1] + 1 or np.linalg.matrix_rank(basis) < basis.shape[1]:
            return
        numbers = _filled(np.stack([s.numbers for s in self.samples]))
        if numbers is None:
            return
        solution, *_ = np.linalg.lstsq(basis, numbers, rcond=None)
        if np.abs(basis @ solution - numbers).max(initial=0) < 1e-6:
            self.coefficients = np.asarray(solution, np.float64)

    def _basis(self, sizes: Floats) -> Floats:
        """1, the varying sizes, and their products: what a count may be a sum of."""
        kept = [sizes[:, i] for i in self.varying]
        products = [a * b for k, a in enumerate(kept) for b in kept[:k]]
        return np.stack([np.ones(len(sizes)), *kept, *products], 1)

    def covers(self, sizes: Sequence[int]) -> bool:
        """Do `sizes` lie between those of the samples, and agree where those do not vary?"""
        if self.coefficients is None:
            return False
        known = np.array([s.sizes for s in self.samples])
        wanted = np.array(sizes)
        return bool(((known.min(0) <= wanted) & (wanted <= known.max(0))).all()) and self._tied(
            sizes
        )

    def _tied(self, sizes: Sequence[int]) -> bool:
        """Sizes that always moved together must do so now."""
        known = np.array([s.sizes for s in self.samples], float)
        columns = list(self.varying)
        basis = np.concatenate([np.ones((len(known), 1)), known[:, columns]], 1)
        solution, *_ = np.linalg.lstsq(basis, known, rcond=None)
        wanted = np.array([1.0, *(sizes[i] for i in columns)])
        return bool(np.abs(wanted @ solution - np.array(sizes)).max(initial=0) < 1e-6)

    def predict(self, sizes: Sequence[int]) -> npt.NDArray[np.int64] | None:
        assert self.coefficients is not None
        numbers = (self._basis(np.array([sizes], float)) @ self.coefficients)[0]
        whole: npt.NDArray[np.int64] = np.rint(numbers).astype(np.int64)
        return whole if np.abs(whole - numbers).max(initial=0) < 1e-4 else None


def _filled(numbers: Floats) -> Floats | None:
    """Steps of runs of one element are unknown (nan): they are what the other samples say, if those
    agree.
    """
    unknown = np.isnan(numbers)
    if not unknown.any():
        return numbers
    low = np.min(np.where(unknown, np.inf, numbers), 0)
    high = np.max(np.where(unknown, -np.inf, numbers), 0)
    known = np.where(np.isinf(low), 0, low)
    if (low < high)[unknown.any(0)].any():
        return None
    return np.where(unknown, known, numbers)


def _independent(sizes: Floats) -> tuple[int, ...]:
    """Sizes that vary, but for those that are affine in the others (two inputs of one length)."""
    kept: list[int] = []
    columns = np.ones((len(sizes), 1))
    for i in np.flatnonzero((sizes != sizes[0]).any(0)).tolist():
        wider = np.concatenate([columns, sizes[:, i : i + 1]], 1)
        if np.linalg.matrix_rank(wider) > columns.shape[1]:
            columns, kept = wider, [*kept, i]
    return tuple(kept)


class Family:
    """All sizes of one structure seen so far."""

    def __init__(self) -> None:
        self._members: dict[CallForm, _Member] = {}

    def __len__(self) -> int:
        """Requests that were traced."""
        return sum(len(member.samples) for member in self._members.values())

    def learn(self, sizes: Sequence[int], graph: CallGraph) -> None:
        """Add a traced request."""
        described = describe(graph)
        if described is None:
            return
        form, numbers = described
        member = self._members.setdefault(form, _Member([g.cell for g in graph.groups]))
        if all(s.sizes != tuple(sizes) for s in member.samples):
            member.samples.append(_Sample(tuple(sizes), numbers))
            member.fit()

    def predict(self, sizes: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> CallGraph | None:
        """The call graph of a size between the traced ones, or None. `shapes` are the tensor
        leaves' shapes.
        """
        for form, member in self._members.items():
            if member.covers(sizes) and self._alone(member, sizes):
                numbers = member.predict(sizes)
                if numbers is not None:
                    return build(form, member.cells, numbers, shapes)
        return None

    def _alone(self, member: _Member, sizes: Sequence[int]) -> bool:
        """No trace of another form lies inside this member's range: the structure changes in
        between.
        """
        known = np.array([s.sizes for s in member.samples])
        low, high = known.min(0), known.max(0)
        for other in self._members.values():
            if other is not member:
                for sample in other.samples:
                    inside = (low < np.array(sample.sizes)) & (np.array(sample.sizes) < high)
                    if inside[list(member.varying)].any():
                        return False
        return True
