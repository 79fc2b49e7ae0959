"""Plans of random call graphs: every place is right, whatever order its calls may run in.

`call_graphs` draws call graphs and `Memory` runs their plans without kernels: a place holds the
name of the value last written to it, so that a read of any other value shows. Both serve the
scheduler's tests too.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.errors import VerifyError
from cellc.ops import RowType
from cellc.plan import (
    CELL,
    CHAIN,
    EDGES,
    MISSING,
    NUM_COLUMNS,
    NUM_SUCCESSORS,
    RECORD,
    REQUEST,
    SUCCESSOR,
    Plan,
    Tables,
    ragged_range,
    record_length,
)
from cellc.planner import make_plan
from cellc.rows import DataSource, RaggedRefs, RowOutput

checked = settings(deadline=None, derandomize=True, max_examples=80)
TYPES = (RowType((3,), "f32"), RowType((2, 2), "f32"), RowType((), "i64"))


def fake_cell(
    name: str, inputs: Sequence[tuple[RowType, bool]], outputs: Sequence[RowType]
) -> Cell:
    """A cell of one operation that no backend knows."""
    specs = tuple(CellInput(f"x{i}", type, ragged) for i, (type, ragged) in enumerate(inputs))
    op = CellOp(f"fake:{name}", tuple(Operand("input", i) for i in range(len(specs))), (),
                tuple(outputs))  # fmt: skip
    return Cell(name, specs, (), (op,), tuple(Operand("op", 0, p) for p in range(len(outputs))))


def column(lists: Sequence[Sequence[int]], ragged: bool) -> Any:
    """What each call reads, as a group's column."""
    flat = np.array([v for values in lists for v in values], np.int64)
    if not ragged:
        return flat
    return RaggedRefs(np.cumsum([0, *map(len, lists)]), flat)


def random_graph(rng: random.Random) -> CallGraph:
    """A few cells with calls in any order: chains, fans, ragged inputs, dead ends."""
    num_values = 0
    values: list[tuple[int, RowType]] = []  # so far

    def fresh(type: RowType) -> int:
        nonlocal num_values
        values.append((num_values, type))
        num_values += 1
        return num_values - 1

    data = []
    for leaf, type in enumerate(rng.sample(TYPES, rng.randint(1, 3))):
        count = rng.randint(1, 5)
        data.append(DataSource(leaf, f"x{leaf}", num_values, count, type, _dims(1, type)))
        for _ in range(count):
            fresh(type)
    constants: dict[object, int] = {}
    for number in range(rng.randint(0, 3)):
        type = rng.choice(TYPES)
        constants["full", type.shape, type.dtype, number] = fresh(type)
    have = sorted({t for _, t in values})
    cells = []
    for k in range(rng.randint(1, 4)):
        reads = [(rng.choice(have), rng.random() < 0.2) for _ in range(rng.randint(1, 3))]
        makes = [rng.choice(have) for _ in range(rng.randint(1, 2))]
        cells.append(fake_cell(f"c{k}", reads, makes))
    calls: list[list[tuple[list[list[int]], list[int]]]] = [[] for _ in cells]
    chaining = rng.random()
    for _ in range(rng.randint(len(cells), 24)):
        k = rng.randrange(len(cells))
        last = calls[k][-1][1] if calls[k] else []
        reads_of: list[list[int]] = []
        for spec in cells[k].inputs:
            fits = [v for v, t in values if t == spec.type]
            mine = [v for v in last if dict(values)[v] == spec.type]
            count = rng.randint(0, 4) if spec.ragged else 1
            reads_of.append(
                [rng.choice(mine if mine and rng.random() < chaining else fits[-6:] + fits[:2])
                 for _ in range(count)]
            )  # fmt: skip
        calls[k].append((reads_of, [fresh(t) for t in cells[k].output_types]))
    groups = []
    for cell, members in zip(cells, calls, strict=True):
        if rng.random() < 0.25:
            rng.shuffle(members)
        if members:
            inputs = [
                column([m[0][i] for m in members], spec.ragged)
                for i, spec in enumerate(cell.inputs)
            ]
            makes_of = [np.array([m[1][o] for m in members]) for o in range(len(cell.outputs))]
            groups.append(CallGroup(cell, inputs, makes_of))
    rng.shuffle(groups)
    outputs = []
    for _ in range(rng.randint(1, 3)):
        type = rng.choice(have)
        fits = [v for v, t in values if t == type]
        shape = (rng.randint(1, 3), 2) if rng.random() < 0.3 else (rng.randint(1, 4),)
        refs = np.array([rng.choice(fits) for _ in range(int(np.prod(shape)))]).reshape(shape)
        outputs.append(RowOutput(refs, type, (*shape, *type.shape), _dims(len(shape), type)))
    return CallGraph(groups, data, constants, outputs, num_values)


def _dims(positions: int, type: RowType) -> tuple[bool, ...]:
    return (False,) * positions + (True,) * len(type.shape)


call_graphs = st.integers(0, 1 << 30).map(lambda seed: random_graph(random.Random(seed)))


class Memory:
    """Arenas that hold names of values: (owner, value id), or ("constant", key)."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.rows: dict[tuple[int, int], Hashable] = {}
        for (type, key), slot in tables.constants.items():
            self.rows[tables.type(type), slot] = ("constant", key)

    def put_data(self, owner: Hashable, graph: CallGraph, plan: Plan, bases: Any) -> None:
        kept = {source.leaf: source for source in graph.data}
        for data in plan.data:
            for i in range(data.count):
                name = (owner, kept[data.leaf].base + i)
                self.rows[data.type, int(bases[data.type]) + data.start + i] = name

    def name(self, owner: Hashable, graph: CallGraph, value: int) -> Hashable:
        for key, constant in graph.constants.items():
            if constant == value:
                return ("constant", key)
        return (owner, value)

    def read(self, owner: Hashable, graph: CallGraph, cell: Cell, j: int, record: Any,
             entries: Any) -> None:  # fmt: skip
        """Call j of a cell reads what the graph says."""
        group = next(g for g in graph.groups if g.cell.key == cell.key)
        k = 0
        for spec, reads in zip(cell.inputs, group.inputs, strict=True):
            type = self.tables.type(spec.type)
            if isinstance(reads, RaggedRefs):
                start, length = int(record[k]), int(record[k + 1])
                slots = entries[start : start + length].tolist()
                wanted = reads.refs[reads.offsets[j] : reads.offsets[j + 1]].tolist()
                k += 2
            else:
                slots, wanted = [int(record[k])], [int(reads[j])]
                k += 1
            found = [self.rows.get((type, slot)) for slot in slots]
            assert found == [self.name(owner, graph, v) for v in wanted], (cell.name, j)

    def write(self, owner: Hashable, graph: CallGraph, cell: Cell, j: int, record: Any) -> None:
        group = next(g for g in graph.groups if g.cell.key == cell.key)
        slots = record[len(record) - len(group.outputs) :]
        for type, made, slot in zip(cell.output_types, group.outputs, slots, strict=True):
            self.rows[self.tables.type(type), int(slot)] = (owner, int(made[j]))

    def check_outputs(self, owner: Hashable, graph: CallGraph, plan: Plan, bases: Any) -> None:
        """Every returned row is in its place, in order."""
        for rows, output in zip(plan.outputs, graph.outputs, strict=True):
            slots = rows.slots + rows.owned * bases[rows.type]
            found = [self.rows.get((rows.type, int(slot))) for slot in slots]
            wanted = [self.name(owner, graph, int(v)) for v in output.refs.reshape(-1)]
            assert found == wanted
            assert rows.positions == output.refs.shape
            if rows.contiguous:
                assert (np.diff(slots) == 1).all() and rows.owned.all()


def starts_of(graph: CallGraph) -> Any:
    return np.cumsum([0, *(g.num_calls for g in graph.groups)])


def needed_calls(graph: CallGraph) -> list[set[int]]:
    """For every call: the calls that make what it reads."""
    starts = starts_of(graph)
    maker = {
        int(v): int(start) + j
        for start, group in zip(starts, graph.groups, strict=False)
        for made in group.outputs
        for j, v in enumerate(made)
    }
    out: list[set[int]] = []
    for group in graph.groups:
        for j in range(group.num_calls):
            reads: set[int] = set()
            for values in group.inputs:
                if isinstance(values, RaggedRefs):
                    reads |= set(values.refs[values.offsets[j] : values.offsets[j + 1]].tolist())
                else:
                    reads.add(int(values[j]))
            out.append({maker[v] for v in reads if v in maker})
    return out


def based(plan: Plan, bases: Any) -> Any:
    """Records with the bases of a request's regions added."""
    return plan.records + np.array([*bases, 0, 0])[plan.record_base]


@given(call_graphs, st.integers(0, 1 << 30))
@checked
def test_any_order_reads_what_it_must(graph: CallGraph, seed: int) -> None:
    """Calls as their counters allow, in random order: right values, each call once."""
    rng, tables = random.Random(seed), Tables()
    make_plan(random_graph(random.Random(seed)), tables)  # another plan of the same model before
    plan = make_plan(graph, tables)
    # Where constants end, the region begins; some room between.
    bases = np.array([20 + 7 * t for t in range(len(tables.types))])
    memory = Memory(tables)
    memory.put_data("a", graph, plan, bases)
    records, missing = based(plan, bases), plan.calls[:, MISSING].copy()
    needed, starts = needed_calls(graph), starts_of(graph)
    cells = {tables.cell(g.cell): g for g in graph.groups}
    first = {tables.cell(g.cell): int(s) for s, g in zip(starts, graph.groups, strict=False)}
    ready, done = plan.ready.tolist(), set()
    while ready:
        call = ready.pop(rng.randrange(len(ready)))
        row = plan.calls[call]
        group = cells[row[CELL]]
        assert call not in done and needed[call] <= done
        record = records[row[RECORD] : row[RECORD] + record_length(group.cell)]
        j = call - first[row[CELL]]
        memory.read("a", graph, group.cell, j, record, records)
        memory.write("a", graph, group.cell, j, record)
        done.add(call)
        woken = plan.successors[row[SUCCESSOR] : row[SUCCESSOR] + row[NUM_SUCCESSORS]].tolist()
        if row[CHAIN] > 1:
            woken += [call + 1] * int(plan.calls[call + 1, EDGES])
        for other in woken:
            missing[other] -= 1
            ready += [other] if missing[other] == 0 else []
    assert len(done) == plan.num_calls == starts[-1]
    memory.check_outputs("a", graph, plan, bases)
    for type, slot in memory.rows:
        inside = bases[type] <= slot < bases[type] + plan.num_slots[type]
        assert inside or slot < tables.constant_counts.get(type, 0)


@given(call_graphs)
@checked
def test_chains_and_depths(graph: CallGraph) -> None:
    tables = Tables()
    plan = make_plan(graph, tables)
    needed, starts = needed_calls(graph), starts_of(graph)
    depth: list[int] = [-1] * plan.num_calls
    for _ in range(plan.num_calls):
        for call, before in enumerate(needed):
            depth[call] = 1 + max((depth[b] for b in before), default=-1)
    for call in range(plan.num_calls):
        length, edges = int(plan.calls[call, CHAIN]), int(plan.calls[call, EDGES])
        assert (edges > 0) == (call - 1 in needed[call] and call not in starts)
        if length > 1:
            assert plan.calls[call + 1, CHAIN] == length - 1 and plan.calls[call + 1, EDGES] > 0
        elif call + 1 < plan.num_calls:
            assert plan.calls[call + 1, EDGES] == 0
    for k, group in enumerate(graph.groups):
        assert plan.cells[k] == tables.cell(group.cell)
        assert plan.priority[k] == max(depth[starts[k] : starts[k + 1]])
    assert set(plan.ready.tolist()) == {c for c, before in enumerate(needed) if not before}
    assert f"{plan.num_calls} calls" in str(plan)


@given(call_graphs, st.integers(0, 50), st.integers(0, 50), st.integers(0, 9))
@checked
def test_block_is_the_plan_moved(graph: CallGraph, first: int, base: int, request: int) -> None:
    tables = Tables()
    plan = make_plan(graph, tables)
    types = len(plan.num_slots)
    block, columns = plan.block
    assert len(block) == plan.num_rows * NUM_COLUMNS
    bases = base + 3 * np.arange(types)
    moved = block + np.array([0, first * NUM_COLUMNS, first, request, *bases])[columns]
    table = np.zeros((first + plan.num_rows, NUM_COLUMNS), np.int64)
    table.reshape(-1)[first * NUM_COLUMNS :] = moved
    entries, rows = table.reshape(-1), table[first : first + plan.num_calls]
    for column_ in (CELL, MISSING, CHAIN, EDGES, NUM_SUCCESSORS):
        assert (rows[:, column_] == plan.calls[:, column_]).all()
    assert (rows[:, REQUEST] == request).all()
    records = based(plan, bases)
    for call, row in enumerate(rows):
        cell = next(g.cell for g in graph.groups if tables.cell(g.cell) == row[CELL])
        at, length = plan.calls[call, RECORD], record_length(cell)
        got = entries[row[RECORD] : row[RECORD] + length]
        want, k = records[at : at + length], 0
        for spec in cell.inputs:
            if spec.ragged:
                vector = entries[got[k] : got[k] + got[k + 1]]
                assert vector.tolist() == records[want[k] : want[k] + want[k + 1]].tolist()
                assert got[k + 1] == want[k + 1]
                k += 2
            else:
                assert got[k] == want[k]
                k += 1
        assert got[k:].tolist() == want[k:].tolist()
        woken = entries[row[SUCCESSOR] : row[SUCCESSOR] + row[NUM_SUCCESSORS]] - first
        at = plan.calls[call, SUCCESSOR]
        assert woken.tolist() == plan.successors[at : at + row[NUM_SUCCESSORS]].tolist()


X, S = TYPES[0], TYPES[1]
STEP = fake_cell("step", [(X, False), (S, False)], [S])


def chain_graph(n: int, keep: bool = False) -> CallGraph:
    """x[n] through a chain of n steps from a constant; returns the last state, or all of them."""
    data = [DataSource(0, "x", 0, n, X, _dims(1, X))]
    start, made = n, n + 1 + np.arange(n)
    before = np.concatenate([[start], made[:-1]])
    group = CallGroup(STEP, [np.arange(n), before], [made])
    refs = made if keep else made[-1:]
    outputs = [RowOutput(refs, S, (len(refs), *S.shape), _dims(1, S))]
    return CallGraph([group], data, {("full", (2, 2), "f32", 0.0): start}, outputs, 2 * n + 1)


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_a_chain_takes_two_places(n: int) -> None:
    tables = Tables()
    plan = make_plan(chain_graph(n), tables)
    assert plan.num_slots[tables.type(S)] <= 3
    assert plan.num_slots[tables.type(X)] == n
    assert plan.calls[:, CHAIN].tolist() == list(range(n, 0, -1))
    assert len(plan.successors) == 0 and plan.ready.tolist() == [0]


def test_a_chain_that_is_returned_is_contiguous() -> None:
    tables = Tables()
    (output,) = make_plan(chain_graph(9, keep=True), tables).outputs
    assert output.contiguous and output.positions == (9,) and output.order is None


def test_constants_are_shared_by_plans() -> None:
    tables = Tables()
    for n in (1, 4, 9):
        make_plan(chain_graph(n), tables)
    assert list(tables.constants.values()) == [0]
    assert tables.constant_counts == {tables.type(S): 1}


def test_data_that_nobody_reads_takes_no_room() -> None:
    graph = chain_graph(3)
    graph.data.append(DataSource(1, "unused", graph.num_values, 6, X, _dims(1, X)))
    graph.num_values += 6
    plan = make_plan(graph, Tables())
    assert [d.name for d in plan.data] == ["x"]


def test_rows_apart_are_permuted() -> None:
    """A tensor whose second dimension is its positions."""
    graph = chain_graph(3, keep=True)
    type = RowType((4,), "f32")
    cell = fake_cell("flat", [(S, False)], [type])
    made = graph.num_values + np.arange(3)
    graph.groups.append(CallGroup(cell, [graph.groups[0].outputs[0]], [made]))
    graph.outputs.append(RowOutput(made, type, (4, 3), (True, False)))
    graph.num_values += 3
    plan = make_plan(graph, Tables())
    assert [o.order for o in plan.outputs] == [None, (1, 0)]


def test_indices_know_their_table() -> None:
    word, row = RowType((), "i64"), RowType((3,), "f32")

    def look_up(size: int) -> Cell:
        table = Param(f"table{size}", RowType((size, 3), "f32"))
        op = CellOp("embedding", (Operand("param", 0), Operand("input", 0)), (), (row,))
        return Cell("emb", (CellInput("i", word),), (table,), (op,), (Operand("op", 0),))

    data = [DataSource(0, "words", 0, 4, word, (False,)), DataSource(1, "x", 4, 1, row, (True,))]

    def limits(*looked_up: tuple[int, int]) -> tuple[int | None, int | None]:
        groups, at = [], 5
        for size, count in looked_up:
            groups.append(CallGroup(look_up(size), [np.arange(count)], [at + np.arange(count)]))
            at += count
        outputs = [RowOutput(np.arange(4, at), row, (at - 4, 3), (False, True))]
        words, x = make_plan(CallGraph(groups, data, {}, outputs, at), Tables()).data
        assert (words.name, x.name, x.bound, x.ahead) == ("words", "x", None, None)
        return words.bound, words.ahead

    assert limits((10, 4), (7, 4)) == (7, None)
    assert limits((7, 2)) == (None, 7)  # the others may be anything
    assert limits((10, 4), (7, 2)) == (None, None)


def test_calls_that_wait_for_each_other() -> None:
    first, second = fake_cell("a", [(X, False)], [X]), fake_cell("b", [(X, False)], [X])
    groups = [
        CallGroup(first, [np.array([1])], [np.array([0])]),
        CallGroup(second, [np.array([0])], [np.array([1])]),
    ]
    with pytest.raises(VerifyError, match="wait for each other"):
        make_plan(CallGraph(groups, [], {}, [], 2), Tables())


def test_no_calls_at_all() -> None:
    """A forward that returns its input."""
    data = [DataSource(0, "x", 0, 4, X, _dims(1, X))]
    outputs = [RowOutput(np.arange(4)[::-1], X, (4, 3), _dims(1, X))]
    plan = make_plan(CallGraph([], data, {}, outputs, 4), Tables())
    assert plan.num_calls == 0 and plan.outputs[0].slots.tolist() == [3, 2, 1, 0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
@checked
def test_ragged_ranges(parts: list[tuple[int, int]]) -> None:
    starts, counts = (np.array([p[i] for p in parts], np.int64) for i in (0, 1))
    wanted = [i for start, count in parts for i in range(start, start + count)]
    assert ragged_range(starts, counts).tolist() == wanted
