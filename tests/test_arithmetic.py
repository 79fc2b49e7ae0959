"""The scheduler's arithmetic in C++ gives what numpy gives (launches: `test_scheduler`)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellc.arithmetic import Numpy
from cellc.kernels.native import Native, find_arithmetic

pytestmark = pytest.mark.skipif(
    not isinstance(find_arithmetic(), Native), reason="needs a C++ compiler"
)
checked = settings(max_examples=200, deadline=None)


@given(st.integers(1, 12), st.data())
@checked
def test_depths(total: int, data: st.DataObject) -> None:
    """Edges from anywhere to anywhere, twice too: some wait in circles."""
    call = st.integers(0, total - 1)
    forward = data.draw(st.booleans())
    edges = data.draw(st.lists(st.tuples(call, call), max_size=20))
    if forward:
        edges = [(min(e), max(e)) for e in edges if e[0] != e[1]]
    sources, targets = (np.array([e[k] for e in edges], np.int64) for k in (0, 1))
    group_of = np.array(data.draw(st.lists(st.integers(0, 2), min_size=total, max_size=total)))
    want, seen = Numpy().depths(sources, targets, group_of, 3)
    got, count = find_arithmetic().depths(sources, targets, group_of, 3)
    np.testing.assert_array_equal(got, want)
    assert count == seen and (seen == total or not forward)


@given(st.integers(0, 6), st.integers(0, 3), st.data())
@checked
def test_trees(nodes: int, width: int, data: st.DataObject) -> None:
    """Most of these are no trees; those that are hang each node on a later one."""
    children = np.full((nodes, width), -1)
    for i in range(nodes - 1 if width else 0):
        parent = data.draw(st.integers(i + 1, nodes - 1))
        children[parent, data.draw(st.integers(0, width - 1))] = i
    if nodes and width and data.draw(st.booleans()):
        at = data.draw(st.tuples(st.integers(0, nodes - 1), st.integers(0, width - 1)))
        children[at] = data.draw(st.integers(-2, nodes))
    for given_ in (children, np.asfortranarray(children)):
        want, got = Numpy().tree(given_), find_arithmetic().tree(given_)
        assert (want is None) == (got is None)
        if want is not None and got is not None:
            for a, b in zip(want, got, strict=True):
                np.testing.assert_array_equal(a, b)
                assert np.asarray(a).dtype == np.asarray(b).dtype
