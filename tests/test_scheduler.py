"""The scheduler on random requests: a simulated engine runs its launches on named values.

Every read is checked against the call graph, so that a call that runs too early, twice, on another
request's rows or on rows given out again shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import (
    Memory,
    S,
    X,
    _dims,
    call_graphs,
    chain_graph,
    fake_cell,
    needed_calls,
    random_graph,
    starts_of,
)

from cellc.arithmetic import Advanced, Numpy
from cellc.calls import CallGraph, CallGroup
from cellc.cells import Cell
from cellc.kernels.native import find_arithmetic
from cellc.plan import Plan, Tables, record_length
from cellc.planner import make_plan
from cellc.regions import Regions
from cellc.rows import DataSource, RowOutput
from cellc.scheduler import Batch, Scheduler
from cellc.urgency import Wish

POLICIES = ("cellular", "fifo")
checked = settings(deadline=None, derandomize=True, max_examples=40)
policies = st.sampled_from(POLICIES)


class Both:
    """By numpy and, where there is a compiler, in C++: all that is made and changed is equal."""

    def __init__(self) -> None:
        self.one, self.other = Numpy(), find_arithmetic()

    def place(self, table: Any, *given: Any) -> None:
        copied = table.copy()
        self.other.place(copied, *given)
        self.one.place(table, *given)
        assert np.array_equal(table, copied)

    def advance(self, table: Any, left: Any, *given: Any) -> Advanced:
        other_table, other_left = table.copy(), left.copy()
        looked = [a.look(table, *given) for a in (self.one, self.other)]
        assert np.array_equal(table, other_table)
        made = self.other.advance(other_table, other_left, *given)
        want = self.one.advance(table, left, *given)
        assert np.array_equal(table, other_table) and np.array_equal(left, other_left)
        for a, b in zip(made, want, strict=True):
            assert np.array_equal(a, b)
            assert isinstance(b, (list, int)) or a.dtype == b.dtype
        for found in looked:
            for a, b in zip(found, want, strict=False):
                assert np.array_equal(a, b) and a.dtype == b.dtype
        return want

    def look(self, *given: Any) -> Any:
        return self.one.look(*given)

    def unlike(self, *given: Any) -> Any:
        return self.one.unlike(*given)


class Engine:
    """Admits, launches and delivers as the engine does, but with names for rows."""

    def __init__(self, graphs: list[CallGraph], max_batch: int, policy: Any) -> None:
        self.graphs, self.tables = graphs, Tables()
        self.plans = [make_plan(g, self.tables) for g in graphs]
        # Plans made before a row type was known have no column for it.
        self.plans = [make_plan(g, self.tables) for g in graphs]
        self.scheduler = Scheduler(max_batch=max_batch, policy=policy, arithmetic=Both())
        for plan in self.plans:
            for cell, depth in zip(plan.cells, plan.priority, strict=True):
                priority = self.scheduler.priority
                priority[cell] = max(priority.get(cell, 0), depth)
        self.cells = {self.tables.cell(g.cell): g.cell for graph in graphs for g in graph.groups}
        self.scheduler.record_lengths = {n: record_length(c) for n, c in self.cells.items()}
        self.memory = Memory(self.tables)
        counts = self.tables.constant_counts
        self.regions = [
            Regions(4, lambda _: None, counts.get(t, 0)) for t in range(len(self.tables.types))
        ]
        self.live: dict[int, tuple[int, Any]] = {}  # request: graph, bases
        self.needed = [needed_calls(g) for g in graphs]
        self.ran: dict[int, set[int]] = {}
        self.delivered: list[int] = []
        self.numbers = iter(range(1 << 20))
        self.free_numbers: list[int] = []

    def add(self, k: int, count: int, wishes: Sequence[Wish] = ()) -> list[int]:
        """Admit `count` requests of graph k; numbers are used again."""
        plan = self.plans[k]
        requests = [
            self.free_numbers.pop() if self.free_numbers else next(self.numbers)
            for _ in range(count)
        ]
        columns = [
            r.allocate([s] * count) for r, s in zip(self.regions, plan.num_slots, strict=True)
        ]
        bases = np.array(columns, np.int64).reshape(len(columns), count).T
        for request, base in zip(requests, bases, strict=True):
            self.live[request], self.ran[request] = (k, base), set()
            self.memory.put_data(request, self.graphs[k], plan, base)
        self.scheduler.add([plan] * len(requests), requests, bases, wishes)
        return requests

    def leave(self, request: int) -> None:
        """Give back a request's regions: what lies there is nobody's."""
        k, bases = self.live.pop(request)
        for t, (region, size) in enumerate(zip(self.regions, self.plans[k].num_slots, strict=True)):
            region.free([int(bases[t])], [size])
            for slot in range(int(bases[t]), int(bases[t]) + size):
                self.memory.rows.pop((t, slot), None)
        self.free_numbers.append(request)

    def cancel(self, request: int) -> None:
        self.scheduler.cancel([request])
        self.leave(request)

    def launch(self, max_steps: int | None = None) -> Batch | None:
        promised = self.scheduler.peek()
        batch = self.scheduler.next(max_steps)
        if batch is None:
            assert promised is None
            return None
        sizes = np.diff(batch.steps)
        assert batch.steps[0] == 0 and batch.steps[-1] == len(batch.calls)
        assert promised == (batch.cell, sizes[0])
        assert (sizes > 0).all() and (np.diff(sizes) <= 0).all()
        assert sizes[0] <= self.scheduler.max_batch
        assert max_steps is None or len(sizes) <= max_steps
        assert batch.table.shape == (record_length(self.cells[batch.cell]), len(batch.calls))
        steps = [batch.calls[a:b] for a, b in zip(batch.steps, batch.steps[1:], strict=False)]
        for before, after in zip(steps, steps[1:], strict=False):
            assert (after == before[: len(after)] + 1).all()
        requests = self.scheduler.requests_of(batch.calls).tolist()
        for a, b in zip(batch.steps.tolist(), batch.steps[1:].tolist(), strict=False):
            self.step(batch, range(a, b), requests)
        for request in batch.finished:
            k, bases = self.live[request]
            assert len(self.ran[request]) == self.plans[k].num_calls
            self.memory.check_outputs(request, self.graphs[k], self.plans[k], bases)
            self.delivered.append(request)
        unfinished = set(requests) - set(batch.finished)
        assert all(len(self.ran[r]) < self.plans[self.live[r][0]].num_calls for r in unfinished)
        self.scheduler.release(batch.finished)
        for request in batch.finished:
            self.leave(request)
        return batch

    def step(self, batch: Batch, columns: range, requests: list[int]) -> None:
        """One step: everything is read, then everything is written."""
        cell, work = self.cells[batch.cell], []
        for i in columns:
            request = requests[i]
            k, _ = self.live[request]
            first = self.scheduler._requests[request][1]
            call = int(batch.calls[i]) - first
            assert call not in self.ran[request] and self.needed[k][call] <= self.ran[request]
            group = next(n for n, g in enumerate(self.graphs[k].groups) if g.cell.key == cell.key)
            j = call - int(starts_of(self.graphs[k])[group])
            work.append((request, self.graphs[k], cell, j, batch.table[:, i]))
        for request, graph, cell, j, record in work:
            self.memory.read(request, graph, cell, j, record, self.scheduler.entries)
        self.check_apart(cell, [record for *_, record in work])
        for i, (request, graph, cell, j, record) in zip(columns, work, strict=True):
            self.memory.write(request, graph, cell, j, record)
            self.ran[request].add(int(batch.calls[i]) - self.scheduler._requests[request][1])

    def check_apart(self, cell: Cell, records: list[Any]) -> None:
        """Rows of a step run side by side: what one writes, none reads and no other writes."""
        read, written = set(), []
        for record in records:
            k = 0
            for spec in cell.inputs:
                if spec.ragged:
                    slots = self.scheduler.entries[record[k] : record[k] + record[k + 1]].tolist()
                else:
                    slots = [int(record[k])]
                read |= {(self.tables.type(spec.type), slot) for slot in slots}
                k += 2 if spec.ragged else 1
            kinds = map(self.tables.type, cell.output_types)
            written += zip(kinds, record[k:].tolist(), strict=True)
        assert len(set(written)) == len(written) and read.isdisjoint(written)

    def drain(self, max_steps: int | None = None) -> None:
        left = sum(self.plans[k].num_calls for k, _ in self.live.values())
        while (batch := self.launch(max_steps)) is not None:
            left -= len(batch.calls)
            assert left >= 0
        assert not self.live and not self.scheduler.num_requests and not self.scheduler.num_ready
        assert all(region.live == 0 for region in self.regions)
        assert self.scheduler._table._regions.live == 0
        assert self.scheduler.peek() is None


@given(st.lists(call_graphs, min_size=1, max_size=3), policies, st.integers(1, 9), st.randoms())
@checked
def test_random_requests(
    graphs: list[CallGraph], policy: str, max_batch: int, rng: random.Random
) -> None:
    """Requests come while others run, some are cancelled, launches are of any number of steps."""
    engine = Engine(graphs, max_batch, policy)
    added, cancelled = 0, 0
    for _ in range(40):
        event = rng.random()
        if event < 0.3:
            added += len(engine.add(rng.randrange(len(graphs)), rng.randint(1, 4)))
        elif event < 0.4 and engine.live:
            engine.cancel(rng.choice(sorted(engine.live)))
            cancelled += 1
        else:
            engine.launch(rng.choice([None, 1, 2, 3]))
    engine.drain(rng.choice([None, 1, 4]))
    assert len(engine.delivered) == added - cancelled


@given(call_graphs, policies, st.integers(1, 70), st.integers(1, 20))
@checked
def test_requests_of_one_plan(graph: CallGraph, policy: str, max_batch: int, count: int) -> None:
    engine = Engine([graph], max_batch, policy)
    requests = engine.add(0, count)
    engine.drain()
    assert sorted(engine.delivered) == sorted(requests)


@given(st.integers(0, 1 << 30), policies)
@checked
def test_everything_is_cancelled(seed: int, policy: str) -> None:
    rng = random.Random(seed)
    engine = Engine([random_graph(rng)], 4, policy)
    engine.add(0, 5)
    for _ in range(rng.randint(0, 6)):
        engine.launch()
    for request in list(engine.live):
        engine.cancel(request)
        engine.scheduler.cancel([request])  # again: nothing happens
    engine.drain()


@pytest.mark.parametrize("policy", POLICIES)
def test_arrays_grow_with_requests(policy: str) -> None:
    """More calls at once than the first arrays hold, while launches go on."""
    engine = Engine([chain_graph(200), chain_graph(7, keep=True)], 16, policy)
    for _ in range(12):
        engine.add(0, 6)
        engine.add(1, 6)
        engine.launch(3)
    assert len(engine.scheduler.entries) > 8192 * 8
    engine.drain()


def test_chains_of_unequal_lengths_go_in_one_launch() -> None:
    engine = Engine([chain_graph(n) for n in (3, 7, 5)], 512, "cellular")
    for k in range(3):
        engine.add(k, 2)
    batch = engine.launch()
    assert batch is not None
    assert np.diff(batch.steps).tolist() == [6, 6, 6, 4, 4, 2, 2]
    assert sorted(batch.finished) == [0, 1, 2, 3, 4, 5]
    engine.drain()


def test_a_launch_of_some_steps_leaves_the_rest_ready() -> None:
    engine = Engine([chain_graph(5)], 512, "cellular")
    engine.add(0, 3)
    sizes = []
    while (batch := engine.launch(2)) is not None:
        sizes.append(np.diff(batch.steps).tolist())
    assert sizes == [[3, 3], [3, 3], [3]]
    engine.drain()


def test_a_batch_is_cut_at_its_largest() -> None:
    engine = Engine([chain_graph(2)], 4, "cellular")
    engine.add(0, 10)
    sizes = []
    while (batch := engine.launch()) is not None:
        sizes.append(int(batch.steps[1]))
    assert sizes == [4, 4, 2]


A, B = fake_cell("a", [(X, False)], [S]), fake_cell("b", [(S, False)], [S])


def two_layers(n: int, both: bool = True) -> CallGraph:
    """n calls of A, each followed by one of B (or A alone)."""
    data = [DataSource(0, "x", 0, n, X, _dims(1, X))]
    first, second = n + np.arange(n), 2 * n + np.arange(n)
    groups = [CallGroup(A, [np.arange(n)], [first])]
    groups += [CallGroup(B, [first], [second])] if both else []
    refs = second if both else first
    outputs = [RowOutput(refs, S, (n, *S.shape), _dims(1, S))]
    return CallGraph(groups, data, {}, outputs, 3 * n)


def started(policy: str, max_batch: int) -> tuple[Engine, int, int]:
    """An engine where calls of B are ready, and older ones of A: (engine, A's number, B's)."""
    engine = Engine([two_layers(3), two_layers(3, both=False)], max_batch, policy)
    a, b = (engine.tables.cell(cell) for cell in (A, B))
    engine.add(0, 1)
    first = engine.launch()
    assert first is not None and first.cell == a
    engine.add(1, 2)
    return engine, a, b


def test_deepest_cell_first() -> None:
    engine, _, b = started("cellular", 512)
    batch = engine.launch()
    assert batch is not None and batch.cell == b
    engine.drain()


def test_a_full_batch_goes_before_a_deeper_cell() -> None:
    engine, a, b = started("cellular", 6)
    picked = [batch.cell for batch in iter(engine.launch, None)]
    assert picked == [a, b]


def test_what_a_full_batch_left_goes_before_a_deeper_cell() -> None:
    engine = Engine([two_layers(3), two_layers(3, both=False)], 4, "cellular")
    a, b = (engine.tables.cell(cell) for cell in (A, B))
    engine.add(0, 1)
    engine.add(1, 1)
    picked = [(batch.cell, len(batch.calls)) for batch in iter(engine.launch, None)]
    assert picked == [(a, 4), (a, 2), (b, 3)]
    engine.drain()


def test_few_calls_of_a_deep_cell_wait_for_more() -> None:
    picked = {}
    for patience in (0, 1, 64):
        engine = Engine([two_layers(1), two_layers(8)], 512, "cellular")
        engine.scheduler.turn.patience = patience
        a, b = (engine.tables.cell(cell) for cell in (A, B))
        engine.add(0, 1)
        engine.launch()
        engine.add(1, 1)  # eight calls of A, beside one of B
        picked[patience] = [(x.cell, len(x.calls)) for x in iter(engine.launch, None)]
        engine.drain()
    assert picked[0] == picked[1] == [(b, 1), (a, 8), (b, 8)]
    assert picked[64] == [(a, 8), (b, 9)]


def test_first_come_first_served() -> None:
    engine, a, b = started("fifo", 6)
    picked = [batch.cell for batch in iter(engine.launch, None)]
    assert picked == [b, a]


@given(st.lists(call_graphs, min_size=1, max_size=3), st.integers(1, 4))
@checked
def test_nobody_waits_for_ever(graphs: list[CallGraph], max_batch: int) -> None:
    """With `fifo` a request ends however many come after it (other policies: `test_policies`)."""
    engine = Engine(graphs, max_batch, "fifo")
    (request,) = engine.add(0, 1)
    for _ in range(2000):
        if request in engine.delivered:
            break
        if len(engine.live) < 30:
            engine.add(len(graphs) - 1, 2)
        engine.launch()
    assert request in engine.delivered
    engine.drain()


def test_plans_are_not_written_to() -> None:
    graph = random_graph(random.Random(3))
    plan: Plan = make_plan(graph, Tables())
    before = [a.copy() for a in (plan.calls, plan.records, plan.successors, *plan.block)]
    engine = Engine([graph], 4, "cellular")
    engine.plans = [plan]
    engine.add(0, 3)
    engine.drain()
    after = (plan.calls, plan.records, plan.successors, *plan.block)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_calls_of_a_launch_that_runs_beside_have_not_run_yet() -> None:
    engine = Engine([chain_graph(3), chain_graph(2)], 512, "cellular")
    one, other = *engine.add(0, 1), *engine.add(1, 1)
    scheduler = engine.scheduler
    batch = scheduler.next(1)
    assert batch is not None and scheduler.ran(one, np.array([0]))
    scheduler.note_begun(batch)
    scheduler.note_running(batch)
    assert scheduler.runs(one) and scheduler.runs(other)
    assert not scheduler.ran(one, np.array([0])) and not scheduler.ran(one, np.array([1]))
    scheduler.note_ran(batch)
    assert scheduler.ran(one, np.array([0])) and scheduler.runs(one)
    scheduler.note_read(batch)
    assert not scheduler.runs(one)


def test_what_follows_is_known_while_a_launch_runs() -> None:
    """It is what comes then, and nothing changes by asking; not where other calls are ready."""
    engine = Engine([chain_graph(3), chain_graph(3)], 512, "cellular")
    engine.add(0, 4)
    scheduler = engine.scheduler
    done = scheduler.next(1)
    assert done is not None
    held = scheduler._pick()
    assert held is not None
    calls, cell = held.pop(512, 0), held.cell
    running = replace(done, held=calls, held_cell=cell)
    for max_steps in (None, 1, 2):
        before = scheduler._table.data.copy()
        seen = scheduler.look(running, max_steps)
        assert seen is not None and not seen.finished
        assert np.array_equal(before, scheduler._table.data)
        assert len(seen.steps) - 1 == (max_steps or 2)
    engine.add(1, 1)
    assert scheduler.look(running) is None  # others are ready
    assert scheduler.next() is not None
    scheduler.max_batch = 3
    assert scheduler.look(running) is None  # they would not all be in it
    scheduler.max_batch = 512
    seen = scheduler.look(running)
    scheduler.note_ran(running)
    following = scheduler.next()
    assert seen is not None and following is not None
    for name in ("cell", "calls", "steps", "table"):
        assert np.array_equal(getattr(seen, name), getattr(following, name))
    assert len(following.finished) == 4
