"""Families: derived call graphs are the real ones, and nothing is derived that is not known.

The real ones are built here from sizes alone, and compared without value numbers (`told`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from graphs import told
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import STEP, S, X, _dims, chain_graph, fake_cell

from cellc import calls
from cellc.calls import CallGraph, CallGroup
from cellc.family import Family
from cellc.ops import RowType
from cellc.plan import Tables
from cellc.planner import make_plan
from cellc.rows import DataSource, RaggedRefs, RowOutput

checked = settings(deadline=None, derandomize=True, max_examples=60)
COUNTER = RowType((), "f32")
Sizes = tuple[int, ...]

PROJECT = fake_cell("project", [(X, False)], [X])
PAIR = fake_cell("pair", [(X, False), (X, False)], [X])
POOL = fake_cell("pool", [(X, True)], [X])
COUNT = fake_cell("count", [(X, False), (COUNTER, False)], [X])


class Build:
    """A call graph, value by value."""

    def __init__(self, *lengths: Sequence[int]) -> None:
        self.num_values, self.shapes = 0, [(*shape, *X.shape) for shape in lengths]
        self.groups: list[CallGroup] = []
        self.constants: dict[object, int] = {}
        self.inputs = [self.fresh(int(np.prod(shape))) for shape in lengths]
        self.data = [
            DataSource(leaf, f"x{leaf}", int(v[0]), len(v), X, _dims(len(shape), X))
            for leaf, (v, shape) in enumerate(zip(self.inputs, lengths, strict=True))
        ]

    def fresh(self, count: int) -> Any:
        self.num_values += count
        return np.arange(self.num_values - count, self.num_values)

    def constant(self, type: RowType, value: float) -> int:
        key = ("full", type.shape, type.dtype, value)
        if key not in self.constants:
            self.constants[key] = int(self.fresh(1)[0])
        return self.constants[key]

    def call(self, cell: Any, *inputs: Any) -> Any:
        first = inputs[0]
        count = len(first.offsets) - 1 if isinstance(first, RaggedRefs) else len(first)
        made = self.fresh(count)
        self.groups.append(CallGroup(cell, list(inputs), [made]))
        return made

    def chain(self, rows: Any, lanes: int = 1) -> Any:
        """A recurrence over rows [n * lanes], lane by lane in the group; states in row order."""
        n, made = len(rows) // lanes, self.fresh(len(rows))
        order = np.arange(len(rows)).reshape(n, lanes).T.reshape(-1)
        start = np.full(lanes, self.constant(S, 0.0))
        before = np.concatenate([start, made[: len(rows) - lanes]])
        inputs = [calls.take(rows, order), calls.take(before, order)]
        self.groups.append(CallGroup(STEP, inputs, [made[order]]))
        return made

    def returning(self, *outputs: tuple[Any, RowType]) -> tuple[CallGraph, list[Sizes]]:
        rows = [
            RowOutput(refs, type, (*refs.shape, *type.shape), _dims(refs.ndim, type))
            for refs, type in outputs
        ]
        graph = CallGraph(self.groups, self.data, self.constants, rows, self.num_values)
        return graph, self.shapes


Made = tuple[CallGraph, list[Sizes]]


def chain(n: int) -> Made:
    b = Build((n,))
    states = b.chain(b.call(PROJECT, b.inputs[0]))
    return b.returning((states, S), (states[-1:], S))


def reversed_chain(n: int) -> Made:
    b = Build((n,))
    return b.returning((b.chain(b.inputs[0][::-1])[::-1], S))


def two_directions(n: int) -> Made:
    """Both directions are calls of one cell, one after the other."""
    b = Build((n,))
    there, back = b.chain(b.inputs[0]), b.chain(b.inputs[0][::-1])[::-1]
    b.groups = calls.merge(b.groups)
    return b.returning((there, S), (back, S))


def shifted(n: int) -> Made:
    """Neighbours meet; the first position meets a constant."""
    b = Build((n,))
    x = b.inputs[0]
    return b.returning((b.call(PAIR, x, np.append(b.constant(X, 1.0), x[:-1])), X))


def every_other(n: int) -> Made:
    b = Build((n,))
    return b.returning((b.call(PROJECT, b.inputs[0][::2]), X))


def pooled(n: int) -> Made:
    b = Build((n,))
    rows = b.call(PROJECT, b.inputs[0])
    return b.returning((b.call(POOL, RaggedRefs(np.array([0, n]), rows)), X))


def counted(n: int) -> Made:
    """A loop counter, and the length itself, as constants."""
    b = Build((n,))
    counters = np.array([b.constant(COUNTER, float(t)) for t in range(n)])
    rows = b.call(COUNT, b.inputs[0], counters)
    lengths = np.full(n, b.constant(COUNTER, float(n)))
    return b.returning((b.call(COUNT, rows, lengths), X))


def truncated(n: int) -> Made:
    b = Build((n,))
    return b.returning((b.call(PROJECT, b.inputs[0][:6]), X))


def all_pairs(n: int) -> Made:
    b = Build((n,))
    i, j = (v.reshape(-1) for v in np.meshgrid(b.inputs[0], b.inputs[0], indexing="ij"))
    return b.returning((b.call(PAIR, i, j).reshape(n, n), X))


def encoder_decoder(n: int, m: int) -> Made:
    b = Build((n,), (m,))
    encoded = b.chain(b.inputs[0])
    out = b.call(PAIR, b.inputs[1], np.repeat(b.inputs[0][-1:], m))
    return b.returning((encoded[-1:], S), (b.chain(out), S))


def lanes(n: int, size: int) -> Made:
    b = Build((n, size))
    return b.returning((b.chain(b.inputs[0], size).reshape(n, size), S))


def every_pair(n: int, m: int) -> Made:
    b = Build((n,), (m,))
    i, j = (v.reshape(-1) for v in np.meshgrid(*b.inputs, indexing="ij"))
    return b.returning((b.call(PAIR, i, j).reshape(n, m), X))


def pairs_beside(n: int, m: int) -> Made:
    """Pairs within the first input; the second only goes through."""
    b = Build((n,), (m,))
    i, j = (v.reshape(-1) for v in np.meshgrid(b.inputs[0], b.inputs[0], indexing="ij"))
    rows = b.call(PROJECT, b.inputs[1])
    return b.returning((b.call(PAIR, i, j).reshape(n, n), X), (rows, X))


def matrix(n: int, same: int, m: int) -> Made:
    """A square of rows, pooled, beside a sequence."""
    b = Build((n, same), (m,))
    rows = b.call(PROJECT, b.inputs[0])
    total = b.call(POOL, RaggedRefs(np.array([0, n * same]), rows))
    return b.returning((total, X), (b.chain(b.inputs[1]), S))


def several(n: int, m: int, k: int) -> Made:
    b = Build((n,), (m,), (k,))
    return b.returning(*((b.chain(x), S) for x in b.inputs))


AFFINE = [chain, reversed_chain, two_directions, shifted, pooled, counted]
OTHER = [every_other, truncated, all_pairs]
TWO = [encoder_decoder, lanes, every_pair, pairs_beside]


def traced(make: Callable[..., Made], samples: Sequence[Sizes]) -> Family:
    family = Family()
    for sizes in samples:
        family.learn(sizes, make(*sizes)[0])
    return family


def derived(family: Family, make: Callable[..., Made], sizes: Sizes) -> CallGraph | None:
    """What the family says of some sizes; if anything, then the truth."""
    graph, shapes = make(*sizes)
    got = family.predict(sizes, shapes)
    if got is not None:
        assert told(got) == told(graph), sizes
        tables = Tables()
        plan, other = make_plan(graph, tables), make_plan(got, tables)
        assert (plan.calls == other.calls).all()
        assert plan.num_slots == other.num_slots
    return got


lengths = st.lists(st.integers(1, 14), min_size=1, max_size=7, unique=True)


@pytest.mark.parametrize("make", [*AFFINE, *OTHER], ids=lambda f: f.__name__)
@given(samples=lengths)
@checked
def test_only_the_truth_and_only_between(make: Callable[..., Made], samples: list[int]) -> None:
    family = traced(make, [(n,) for n in samples])
    for n in range(1, 17):
        if derived(family, make, (n,)) is not None:
            assert min(samples) <= n <= max(samples)


@pytest.mark.parametrize("make", AFFINE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("samples", [(4, 9, 15), (15, 4, 9, 5), (30, 5, 8, 6)])
def test_three_sizes_are_enough(make: Callable[..., Made], samples: Sizes) -> None:
    family = traced(make, [(n,) for n in samples])
    for n in range(min(samples) + 1, max(samples)):
        assert derived(family, make, (n,)) is not None


@pytest.mark.parametrize("make", AFFINE, ids=lambda f: f.__name__)
def test_two_sizes_are_not(make: Callable[..., Made]) -> None:
    family = traced(make, [(4,), (9,)])
    assert all(derived(family, make, (n,)) is None for n in range(1, 12))


def test_what_is_not_affine_is_never_derived() -> None:
    family = traced(all_pairs, [(n,) for n in (2, 4, 6, 9, 10)])
    assert all(derived(family, all_pairs, (n,)) is None for n in (3, 5, 7, 8))


sides = st.integers(1, 5)
points = st.lists(st.tuples(sides, sides), min_size=1, max_size=14, unique=True)


@pytest.mark.parametrize("make", TWO, ids=lambda f: f.__name__)
@given(samples=points)
@checked
def test_two_sizes_at_once(make: Callable[..., Made], samples: list[Sizes]) -> None:
    family, known = traced(make, samples), np.array(samples)
    for sizes in product(range(1, 7), repeat=2):
        if derived(family, make, sizes) is not None:
            assert (known.min(0) <= sizes).all() and (sizes <= known.max(0)).all()


@given(st.lists(st.tuples(sides, sides, sides), min_size=1, max_size=12, unique=True))
@checked
def test_three_sizes_at_once(samples: list[Sizes]) -> None:
    family = traced(several, samples)
    for sizes in [*product((1, 3, 5), repeat=3), (2, 4, 2), (6, 1, 1)]:
        derived(family, several, sizes)


def test_two_sizes_are_derived_from_a_grid() -> None:
    family = traced(encoder_decoder, list(product((2, 5, 9), (2, 3, 6))))
    assert derived(family, encoder_decoder, (7, 4)) is not None
    for outside in [(7, 7), (10, 4), (1, 4), (7, 1)]:
        assert derived(family, encoder_decoder, outside) is None


def test_lanes_are_derived_along_time_alone() -> None:
    family = traced(lanes, list(product((2, 5, 9), (3,))))
    assert derived(family, lanes, (7, 3)) is not None
    assert derived(family, lanes, (7, 2)) is None


@pytest.mark.parametrize("others", [(1, 2), (1, 2, 3), (2, 5, 7, 8)])
@pytest.mark.parametrize("sides", [(2, 4), (2, 6), (3, 9)])
def test_a_square_seen_at_two_sizes(sides: Sizes, others: Sizes) -> None:
    """A line through two squares says nothing of those between them."""
    samples = [(n, n, m) for n in sides for m in others]
    family = traced(matrix, [*samples, (sides[0], sides[0], others[-1] + 1)])
    for n in range(sides[0] + 1, sides[1]):
        for m in others:
            derived(family, matrix, (n, n, m))


def test_a_square_seen_beside_itself() -> None:
    """The other size happened to be the square of this one."""
    family = traced(matrix, [(n, n, n * n) for n in (1, 2, 3, 4, 5)])
    for n, m in [(2, 5), (3, 10), (4, 15), (3, 8)]:
        derived(family, matrix, (n, n, m))


@given(st.lists(st.integers(3, 12), min_size=3, max_size=6, unique=True), st.integers(0, 3))
@checked
def test_sizes_that_moved_together_must_do_so(samples: list[int], more: int) -> None:
    """Traced with m = n + more only: any other m is not known."""
    make = encoder_decoder
    family = traced(make, [(n, n + more) for n in samples])
    for n in range(min(samples), max(samples) + 1):
        assert derived(family, make, (n, n + more)) is not None
        for m in range(1, 16):
            if m != n + more:
                assert derived(family, make, (n, m)) is None


@pytest.mark.parametrize("special", [3, 5, 8])
def test_another_structure_in_between(special: int) -> None:
    """A size inside the range behaves otherwise: nothing on either side of it is derived then."""

    def make(n: int) -> Made:
        return shifted(n) if n == special else chain(n)

    family = traced(make, [(n,) for n in (2, 4, 6, 9, 10)])
    family.learn((special,), make(special)[0])
    assert all(family.predict((n,), make(n)[1]) is None for n in range(2, 11))


def test_tracing_a_size_twice_teaches_nothing() -> None:
    family = traced(chain, [(4,), (9,), (4,), (9,), (9,)])
    assert derived(family, chain, (6,)) is None


def test_numbers_of_values_do_not_matter() -> None:
    graph = chain_graph(5, keep=True)
    moved = CallGraph(
        [CallGroup(g.cell, [c + 7 for c in g.inputs], [o + 7 for o in g.outputs])
         for g in graph.groups],
        [DataSource(d.leaf, d.name, d.base + 7, d.count, d.type, d.row_dims) for d in graph.data],
        {key: value + 7 for key, value in graph.constants.items()},
        [RowOutput(o.refs + 7, o.type, o.shape, o.row_dims) for o in graph.outputs],
        graph.num_values + 7,
    )  # fmt: skip
    assert told(graph) == told(moved)
    assert told(graph) != told(chain_graph(6, keep=True))
    assert told(graph) != told(chain_graph(5))
