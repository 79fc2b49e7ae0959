"""The arithmetic of planning and scheduling in C++ gives what numpy gives (launches:
`test_scheduler`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellc.answers import Events, read_events
from cellc.arithmetic import NUMBER_KINDS, Numpy
from cellc.calls import CallGraph, CallGroup, Forest, join
from cellc.errors import VerifyError
from cellc.kernels.native import Native, find_arithmetic
from cellc.plan import UNEXPECTED, YIELDED, Tables
from cellc.planner import make_plans
from cellc.rows import RaggedRefs
from tests.test_plan import random_graph

pytestmark = pytest.mark.skipif(
    not isinstance(find_arithmetic(), Native), reason="needs a C++ compiler"
)
checked = settings(max_examples=200, deadline=None)


def side_by_side(graphs: Sequence[CallGraph]) -> Forest:
    """A request each; equal cells share a group."""
    constants: dict[object, int] = {}
    groups: dict[str, CallGroup] = {}
    owners: dict[str, list[np.ndarray]] = {}
    data, outputs = [], []
    at = sum(len(g.constants) for g in graphs)
    for owner, graph in enumerate(graphs):
        values = at + np.arange(graph.num_values)
        at += graph.num_values
        for key, value in graph.constants.items():
            values[value] = constants.setdefault(key, len(constants))
        for group in graph.groups:
            inputs = [
                RaggedRefs(c.offsets, values[c.refs]) if isinstance(c, RaggedRefs) else values[c]
                for c in group.inputs
            ]
            made = CallGroup(group.cell, inputs, [values[o] for o in group.outputs])
            key = group.cell.key
            if (known := groups.get(key)) is not None:
                made.inputs = [join(a, b) for a, b in zip(known.inputs, made.inputs, strict=True)]
                pairs = zip(known.outputs, made.outputs, strict=True)
                made.outputs = [np.concatenate(pair) for pair in pairs]
            groups[key] = made
            owners.setdefault(key, []).append(np.full(group.num_calls, owner))
        one = Forest.of(graph)
        owned = np.array([owner])
        data += [replace(c, bases=values[c.bases], owners=owned) for c in one.data]
        outputs += [replace(c, refs=values[c.refs], owners=owned) for c in one.outputs]
    whole = CallGraph([*groups.values()], [], constants, [], at)
    return Forest(whole, len(graphs), [np.concatenate(o) for o in owners.values()], data, outputs)


def told(forest: Forest, arithmetic: Numpy | Native) -> list[object]:
    """All that plans say, as lists."""
    said: list[object] = []
    for plan in make_plans(forest, Tables(), arithmetic):
        arrays = [plan.calls, plan.records, plan.record_base, plan.successors, plan.ready]
        said += [(a.dtype.name, a.tolist()) for a in (*arrays, plan.rooms, *plan.block)]
        for rows in plan.outputs:
            said.append((rows.slots.tolist(), rows.owned.tolist(), rows.kind, rows.contiguous))
        said.append((plan.num_slots, plan.data, plan.cells, plan.priority, plan.nbytes))
    return said


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 3)), min_size=1, max_size=4))
@checked
def test_plans(seeds: list[tuple[int, int]]) -> None:
    """Of random requests, some of them several times, side by side."""
    drawn = [random_graph(random.Random(seed)) for seed, _ in seeds]
    forest = side_by_side(
        drawn + [g for g, (_, n) in zip(drawn, seeds, strict=True) for _ in range(n)]
    )
    assert told(forest, find_arithmetic()) == told(forest, Numpy())


@given(st.integers(0, 1 << 30), st.data())
@checked
def test_calls_in_circles(seed: int, data: st.DataObject) -> None:
    """Where calls wait for each other, both say for how many."""
    graph = random_graph(random.Random(seed))
    group = graph.groups[data.draw(st.integers(0, len(graph.groups) - 1))]
    type = group.cell.output_types[0]
    at = next((i for i, x in enumerate(group.cell.inputs) if x.type == type), None)
    if at is None or not len(group.input_values(at)):
        return
    group.input_values(at)[0] = group.outputs[0][-1]
    errors = []
    for arithmetic in (find_arithmetic(), Numpy()):
        try:
            make_plans(Forest.of(graph), Tables(), arithmetic)
        except VerifyError as error:
            errors.append(str(error))
        else:
            errors.append("")
    assert errors[0] == errors[1]


@given(st.data())
@checked
def test_answers_that_are_as_expected_are_left_out(data: st.DataObject) -> None:
    """Of calls with any number of events, of all types: those left have one that is not an expected
    answer, or of rows that are no plain numbers; and read as numpy reads them, the same is found.
    """
    draw = random.Random(data.draw(st.integers(0, 1 << 30)))
    dtypes = [np.bool_, np.int32, np.int64, np.float32, np.float64, np.float16]
    wide = (np.int32, np.int64, np.float32, np.float64)  # hold what stands for no answer, too
    rows = [
        np.array([draw.choice([0, 1, 7, -3, *[UNEXPECTED] * (t in wide)]) for _ in range(6)], t)
        for t in dtypes
    ]
    kinds = [*NUMBER_KINDS.values(), 0]
    places = np.array([(r.ctypes.data, k) for r, k in zip(rows, kinds, strict=True)], np.int64)
    entries, begin, plain, other = [0], [], [], set()
    for owner in range(draw.randrange(40)):
        begin.append(len(entries))
        events = []
        for number in range(draw.choice([1, 1, 1, 2, 5])):
            type, slot = draw.choice([*range(len(rows)), YIELDED]), draw.randrange(6)
            known = type != YIELDED and draw.random() < 0.9
            expected = int(rows[type][slot]) if known else draw.choice([0, 1, 8, UNEXPECTED])
            events.append((type, slot, expected, number))
            held = rows[type][slot].item()
            if type != YIELDED and (held != expected or expected == UNEXPECTED):
                other.add(owner)
        entries += [len(events), *np.array(events).reshape(-1).tolist()]
        numbers = [
            kinds[type] and rows[type][slot].item() == want and want != UNEXPECTED
            for type, slot, want, _ in events
        ]
        plain.append(all(k != YIELDED and n for (k, *_), n in zip(events, numbers, strict=True)))
    table, at = np.array(entries, np.int32), np.array(begin, np.int32)
    found = find_arithmetic().unlike(table, at, places)
    assert found.tolist() == [i for i, expected in enumerate(plain) if not expected]
    if not begin:
        return
    owners = np.arange(len(at), dtype=np.int32)

    def values_of(type: int, slots: np.ndarray) -> np.ndarray:
        return rows[type][slots]

    want = read_events(at, owners, table, values_of)
    got = read_events(at[found], owners[found], table, values_of) if len(found) else Events({}, [])
    assert want.unexpected.keys() == other
    assert got.unexpected == want.unexpected and sorted(got.yielded) == sorted(want.yielded)


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
