"""Policies, on random requests under a fake clock, and deadlines as users ask for them.

The simulated engine of `test_scheduler` checks every read and write; here it also knows, by itself,
which calls are ready since when, and how long requests still take.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import call_graphs, chain_graph
from test_scheduler import Engine, two_layers
from torch import Tensor, nn

import cellc
from cellc.arithmetic import Arithmetic, Numpy
from cellc.calls import CallGraph
from cellc.errors import DeadlineError, PolicyError, UnsupportedError
from cellc.kernels.native import find_arithmetic
from cellc.plan import CELL
from cellc.policies import MAX_AGE, POLICIES, Turn
from cellc.queues import Queue
from cellc.scheduler import Batch, Scheduler
from cellc.urgency import MARGIN, Urgency, Waiting, Wish

EXAMPLES = 420  # for each of five policies: more than 2,000 in all
NOBODY = (np.zeros(0), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


class Youngest:
    """The cell whose oldest call is the youngest, of those the shallowest: as unfair as can be."""

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        return min(ready, key=lambda queue: (queue.age, queue.depth, queue.cell))


class Anyhow:
    """Any cell, with deadlines."""

    deadlines = True

    def __init__(self) -> None:
        self._draw = random.Random(0)

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        return self._draw.choice(list(ready))


ARITHMETICS = (Numpy(), find_arithmetic())
WAYS: list[Any] = [*POLICIES, Youngest, Anyhow]


def policy_of(way: Any) -> Any:
    return way if isinstance(way, str) else way()


class Timed(Engine):
    """Steps take whole seconds, whatever their rows. Knows of each call since when it is ready."""

    def __init__(
        self,
        graphs: list[CallGraph],
        max_batch: int,
        policy: Any,
        max_age: int,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        super().__init__(graphs, max_batch, policy)
        before = self.scheduler
        self.scheduler = Scheduler(
            max_batch=max_batch,
            policy=policy,
            arithmetic=arithmetic,
            max_age=max_age,
            seconds=lambda cell, num_rows: self.cost(cell),
        )
        self.scheduler.record_lengths = before.record_lengths
        self.scheduler.priority = before.priority
        self.now, self.turns, self.launches = 0, 0, 0
        self.due: dict[int, float] = {}
        self.ready: dict[tuple[int, int], int] = {}  # (request, call): the turn it became so
        self.limit: dict[tuple[int, int], int] = {}  # launches by which an old call has run
        self.num_shed = 0
        self.ways = [self._ways(k) for k in range(len(graphs))]

    @staticmethod
    def cost(cell: int) -> int:
        return 1 + cell % 3

    def _ways(self, k: int) -> list[int]:
        """Seconds from each call to its request's end, from what calls need."""
        after: dict[int, list[int]] = {}
        for call, needed in enumerate(self.needed[k]):
            for other in needed:
                after.setdefault(other, []).append(call)
        cells = self.plans[k].calls[:, CELL].tolist()
        known: dict[int, int] = {}

        def way(call: int) -> int:
            if call not in known:
                rest = max((way(other) for other in after.get(call, ())), default=0)
                known[call] = self.cost(cells[call]) + rest
            return known[call]

        return [way(call) for call in range(len(cells))]

    def enter(self, k: int, wishes: list[Wish]) -> list[int]:
        requests = super().add(k, len(wishes), wishes)
        self.turns += 1
        for request, wish in zip(requests, wishes, strict=True):
            self.due[request] = wish.due
            self._now_ready(request)
        return requests

    def _now_ready(self, request: int) -> None:
        k, _ = self.live[request]
        for call, needed in enumerate(self.needed[k]):
            if call not in self.ran[request] and needed <= self.ran[request]:
                self.ready.setdefault((request, call), self.turns)

    def leave(self, request: int) -> None:
        super().leave(request)
        for known in (self.ready, self.limit):
            for key in [key for key in known if key[0] == request]:
                del known[key]

    def cell_of(self, request: int, call: int) -> int:
        return int(self.plans[self.live[request][0]].calls[call, CELL])

    def note_old(self) -> None:
        """A call that has waited for `max_age` turns goes before all that came after it."""
        for key, since in self.ready.items():
            if key in self.limit or self.turns - since < self.scheduler.max_age:
                continue
            counts: dict[int, int] = {}
            for other, turn in self.ready.items():
                if turn <= since:
                    cell = self.cell_of(*other)
                    counts[cell] = counts.get(cell, 0) + 1
            most = self.scheduler.max_batch
            self.limit[key] = self.launches + sum(-(-n // most) for n in counts.values())

    def turn(self, max_steps: int | None) -> Batch | None:
        if self.scheduler.urgency is not None:
            self.check_shed(self.scheduler.urgency)
        self.note_old()
        self.touched: set[int] = set()
        batch = super().launch(max_steps)
        if batch is None:
            assert not self.ready
            return None
        self.turns, self.launches = self.turns + 1, self.launches + 1
        self.now += self.cost(batch.cell) * (len(batch.steps) - 1)
        for request, call in list(self.ready):
            if call in self.ran[request]:
                del self.ready[request, call]
                self.limit.pop((request, call), None)
        for request in self.touched:
            if request in self.live:
                self._now_ready(request)
        assert all(self.launches < limit for limit in self.limit.values()), "one waits too long"
        return batch

    def step(self, batch: Batch, columns: range, requests: list[int]) -> None:
        super().step(batch, columns, requests)
        self.touched.update(requests)

    def check_shed(self, urgency: Urgency) -> None:
        """Those, and only those, that cannot end in time if they run at once are shed."""
        urgency.now = float(self.now)
        late = set(self.scheduler.late())
        left = {r: due - self.now for r, due in self.due.items() if r in self.live}
        assert late == {r for r, call in self.ready if left[r] < self.ways[self.live[r][0]][call]}
        for request in late:
            self.cancel(request)
        self.num_shed += len(late)

    def finish(self, max_steps: int | None) -> None:
        while self.turn(max_steps) is not None:
            pass
        assert not self.live and not self.limit
        self.drain()


@pytest.mark.parametrize("way", WAYS, ids=str)
@given(
    st.lists(call_graphs, min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, derandomize=True, max_examples=EXAMPLES)
def test_random_requests(
    way: Any, graphs: list[CallGraph], max_batch: int, max_age: int, rng: random.Random
) -> None:
    """Requests come, with wishes or none, and are cancelled; under every policy every call runs
    once, after what it needs and before its rows are freed, and none waits for ever.
    """
    engine = Timed(graphs, max_batch, policy_of(way), max_age, rng.choice(ARITHMETICS))
    added, cancelled = 0, 0
    for _ in range(16):
        event = rng.random()
        if event < 0.35:
            k = rng.randrange(len(graphs))
            longest = max(engine.ways[k], default=0)
            wishes = [wish(rng, engine.now, longest) for _ in range(rng.randint(1, 4))]
            added += len(engine.enter(k, wishes))
        elif event < 0.4 and engine.live:
            engine.cancel(rng.choice(sorted(engine.live)))
            cancelled += 1
        else:
            engine.turn(rng.choice([None, 1, 2, 3]))
    engine.finish(rng.choice([None, 1, 4]))
    assert len(engine.delivered) == added - cancelled - engine.num_shed


def wish(rng: random.Random, now: int, longest: int) -> Wish:
    due = math.inf if rng.random() < 0.4 else now + rng.randint(0, 4 * longest + 4) + 0.5
    return Wish(due, rng.choice([0, 0, 0, 1, -2]))


# -- the bound on waiting --------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nobody_waits_for_ever(way: Any) -> None:
    """A call of one cell beside a flood of calls of another, which fill every batch."""
    engine = Timed([two_layers(1), two_layers(4, both=False)], 4, policy_of(way), 20)
    (request,) = engine.enter(0, [Wish()])
    engine.turn(1)
    for _ in range(40):
        engine.enter(1, [Wish(engine.now + 50.5, 5)] * 2)
        engine.turn(1)
    assert request in engine.delivered


def test_without_the_bound_some_would() -> None:
    """What the bound is for: full batches go first, and there is always one."""
    engine = Timed([two_layers(1), two_layers(4, both=False)], 4, "cellular", 1 << 30)
    (request,) = engine.enter(0, [Wish()])
    engine.turn(1)
    for _ in range(300):
        engine.enter(1, [Wish()] * 2)
        engine.turn(1)
    assert request not in engine.delivered and MAX_AGE < 300


def test_what_was_promised_may_be_cancelled_or_outdone() -> None:
    engine = Timed([two_layers(1), chain_graph(3)], 4, "fifo", MAX_AGE)
    (request,) = engine.enter(0, [Wish()])
    assert engine.scheduler.peek() is not None
    engine.cancel(request)
    assert engine.scheduler.peek() is None and engine.scheduler.next() is None
    engine.enter(0, [Wish()] * 3)
    assert engine.scheduler.peek() == (0, 3)
    engine.enter(0, [Wish()] * 2)
    assert engine.scheduler.peek() == (0, 4)
    engine.finish(None)


# -- deadlines: order ------------------------------------------------------------------------------


def test_the_most_urgent_calls_of_a_cell_go_first() -> None:
    engine = Timed([chain_graph(2)], 2, "deadline", MAX_AGE)
    late, soon, never, first = engine.enter(0, [Wish(90.5), Wish(50.5), Wish(), Wish(99.5, 1)])
    for _ in range(2):
        engine.turn(1)
    assert engine.delivered == [soon, first]
    engine.finish(None)
    assert engine.delivered[2:] == [late, never]


def test_short_requests_can_wait_longer() -> None:
    """Of two that are due at once, the longer has to begin first."""
    engine = Timed([chain_graph(2), chain_graph(9)], 1, "deadline", MAX_AGE)
    (short,), (long,) = engine.enter(0, [Wish(60.5)]), engine.enter(1, [Wish(60.5)])
    batch = engine.turn(1)
    assert batch is not None
    assert engine.scheduler.requests_of(batch.calls).tolist() == [long] and short in engine.live


def test_a_cell_in_a_hurry_goes_first() -> None:
    for due, full in ((1000.5, True), (3.5, False)):  # with time to spare: the full batch
        engine = Timed([two_layers(1), two_layers(4, both=False)], 4, "deadline", MAX_AGE)
        engine.enter(0, [Wish(due)])
        engine.turn(1)
        engine.enter(1, [Wish()])
        engine.scheduler.urgency.now = 1.5  # type: ignore[union-attr]
        batch = engine.scheduler.next(1)
        assert batch is not None and (len(batch.calls) == 4) is full


# -- deadlines: who is shed ------------------------------------------------------------------------


def steps_of(count: int, due: Sequence[float]) -> tuple[Urgency, Any]:
    """Chains of `count` calls, ready; a step of n rows takes n seconds."""
    urgency = Urgency(lambda cell, rows: float(rows))
    plan = Engine([chain_graph(count)], 1, "fifo").plans[0]
    firsts = [plan.num_calls * i for i in range(len(due))]
    urgency.place([plan] * len(due), firsts, [Wish(at) for at in due])
    urgency.ran(int(plan.calls[0, CELL]), 1)
    return urgency, (int(plan.calls[0, CELL]), np.array(firsts, np.int64))


def test_as_few_are_shed_as_need_be() -> None:
    """A chain of ten steps takes ten seconds alone, and ten more for each beside it, which count
    MARGIN times: four end within `enough` seconds, five do not.
    """
    enough = 10 + 3 * 10 * MARGIN
    urgency, (cell, calls) = steps_of(10, [enough] * 4 + [enough - 1] * 6)
    assert sorted(urgency.late([(cell, calls)]).tolist()) == calls[4:].tolist()
    every = 10 + 9 * 10 * MARGIN
    urgency, (cell, calls) = steps_of(10, [every] * 10)
    assert not len(urgency.late([(cell, calls)]))
    urgency, (cell, calls) = steps_of(10, [every - 1, *[math.inf] * 9])
    assert urgency.late([(cell, calls)]).tolist() == [0]


def test_triage() -> None:
    urgency = Urgency(lambda cell, rows: 1.0)
    urgency.now = 10.0
    waiting = Waiting(
        due=np.array([math.inf, 14.0, 30.0, 20.0, 12.5, math.inf, 25.0]),
        priority=np.array([0, 0, 0, 0, 0, 0, -1]),
        needs=np.array([3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
        arrived=np.arange(7.0),
    )
    following, late = urgency.triage(waiting, 1.0, 7)
    assert late.tolist() == [4] and following.tolist() == [0, 1, 2, 3, 5, 6]
    following, late = urgency.triage(waiting, 1.4, 3)  # the oldest; then who has time to spare
    assert late.tolist() == [1, 4] and following.tolist() == [0, 2, 3]
    following, _ = urgency.triage(waiting, 1.0, 5)  # no deadline after any, priority before all
    assert following.tolist() == [0, 2, 3, 1, 5]
    following, late = urgency.triage(Waiting(*NOBODY), 1.0, 3)
    assert not len(following) and not len(late)


# -- as users have them ----------------------------------------------------------------------------


class Summed(nn.Module):
    """Arguments named as options are."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 8)

    def forward(self, x: Tensor, deadline: Tensor, priority: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return states[-1] + deadline + priority


class Two(nn.Module):
    """Two cells that are ready at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.GRUCell(4, 8), nn.LSTMCell(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, state = torch.zeros(8), (torch.zeros(8), torch.zeros(8))
        for row in x:
            h, state = self.one(row, h), self.other(row, state)
        return h + state[0]


class Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros(4)
        for row in x:
            h = self.cell(row, h)
            yield h


class Listens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return h * 2, h


def compiled_of(model: nn.Module, policy: Any = "deadline", **given: Any) -> cellc.Compiled:
    return cellc.compile(model.eval(), backend="eager", options={"policy": policy}, **given)


@torch.no_grad()
def test_options_are_no_arguments() -> None:
    model = Summed()
    request = (torch.randn(5, 4), torch.randn(8), torch.randn(8))
    with compiled_of(model) as compiled:
        soon = compiled.with_options(deadline=60.0, priority=3)
        named = dict(zip(("x", "deadline", "priority"), request, strict=True))
        want = model(*request)
        for got in (
            soon(*request),
            soon(**named),
            soon.submit(**named).result(),
            asyncio.run(soon.submit_async(*request)),
            *soon.map([request, named]),
        ):
            torch.testing.assert_close(got, want)
        stats = compiled.stats()
        assert stats["shed"] == stats["late"] == stats["failed"] == 0


@torch.no_grad()
def test_who_cannot_make_it_is_shed_and_others_are_served() -> None:
    model = nn.GRU(4, 8)
    x = torch.randn(6, 1, 4)
    with compiled_of(model) as compiled:
        want = compiled(x)[0]
        hopeless = compiled.with_options(deadline=1e-7)
        results = hopeless.map([x, x], return_exceptions=True)
        assert all(isinstance(r, DeadlineError) and isinstance(r, TimeoutError) for r in results)
        with pytest.raises(DeadlineError, match="deadline"):
            hopeless(x)
        assert isinstance(hopeless.submit(x).exception(), DeadlineError)
        torch.testing.assert_close(compiled.submit(x).result()[0], want)
        stats = compiled.stats()
        assert stats["shed"] == stats["failed"] == 4 and stats["requests"] == 6
        assert stats["running"] == stats["waiting"] == 0 and compiled._engine._arenas.idle()


@torch.no_grad()
def test_requests_in_flight_are_shed() -> None:
    """Their rows are freed at once; those beside them go on."""
    model = nn.GRU(4, 8)
    x = torch.randn(40, 1, 4)
    with compiled_of(model) as compiled:
        compiled(x)
        engine = compiled._engine
        tickets = [compiled.with_options(deadline=60.0)._ticket((x,), {}) for _ in range(4)]
        engine.enqueue(tickets)
        engine.launcher.ahead, limit = None, engine._scheduler.next  # type: ignore[assignment]
        engine._scheduler.next = lambda steps=None, hold=False: limit(1, hold=hold)  # type: ignore[method-assign]
        engine.step()
        assert compiled.stats()["running"] == 4
        for ticket in tickets[1:3]:
            engine._scheduler.urgency._due[:] = np.where(  # their time is up
                engine._scheduler._table.data[: len(engine._scheduler.urgency._due), 7]
                == ticket.number,
                0.0,
                engine._scheduler.urgency._due,
            )
        engine.run(tickets)
        assert [isinstance(t.error, DeadlineError) for t in tickets] == [False, True, True, False]
        torch.testing.assert_close(tickets[0].result, model(x))
        assert engine._arenas.idle() and compiled.stats()["shed"] == 2


@torch.no_grad()
def test_streams_and_sessions_have_options() -> None:
    x = torch.randn(3, 4)
    with compiled_of(Yields()) as compiled:
        assert len(list(compiled.with_options(deadline=60.0).stream(x))) == 3
        with pytest.raises(DeadlineError):
            list(compiled.with_options(deadline=1e-7).stream(x))
    with compiled_of(Listens(), carry={"h": "1"}) as compiled:
        with compiled.session({"h": torch.zeros(4)}) as session:
            y, h = session.with_options(deadline=60.0).step(x[0])
            with pytest.raises(DeadlineError):
                session.with_options(deadline=1e-7).step(x[1])
            hurried = session.with_options(deadline=60.0, priority=1)
            ((y, h),) = compiled.step_all([(hurried, (x[1],))])
            cell = compiled._compiler.model.cell
            torch.testing.assert_close(h, cell(x[1], cell(x[0], torch.zeros(4))))
        with compiled.with_options(deadline=1e-7).session({"h": torch.zeros(4)}) as session:
            with pytest.raises(DeadlineError):
                session.submit(x[0]).result()


@torch.no_grad()
def test_a_policy_of_ones_own() -> None:
    model, requests = Two(), [(torch.randn(n, 4),) for n in (3, 7, 5, 1)]
    with compiled_of(model, Youngest()) as compiled:
        for x, got in zip(requests, compiled.map(requests), strict=True):
            torch.testing.assert_close(got, model(*x))
        with pytest.raises(UnsupportedError, match="deadlines = True"):
            compiled.with_options(deadline=1.0)


class Wrong:
    def pick(self, ready: Any, turn: Any) -> Any:
        return ready[0].cell


@torch.no_grad()
def test_a_policy_that_is_wrong() -> None:
    """Its requests fail with what it did; the engine goes on."""
    with compiled_of(Two(), Wrong()) as compiled:
        with pytest.raises(PolicyError, match="pick.. of policy Wrong"):
            compiled.map([(torch.randn(5, 4),), (torch.randn(2, 4),)])
        assert compiled.stats()["running"] == 0 and compiled._engine._arenas.idle()


@pytest.mark.parametrize(
    "options",
    [{"policy": "soonest"}, {"policy": Youngest}, {"policy": 3}, {"max_age": 0}],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        cellc.compile(nn.GRU(4, 8), backend="eager", options=options)


@pytest.mark.parametrize(
    "wrong",
    [{"deadline": 0}, {"deadline": "1"}, {"deadline": True}, {"deadline": math.nan},
     {"priority": 0.5}, {"priority": 10**9}],
)  # fmt: skip
def test_wrong_wants(wrong: dict[str, Any]) -> None:
    with compiled_of(nn.GRU(4, 8)) as compiled, pytest.raises(UnsupportedError):
        compiled.with_options(**wrong)
    with compiled_of(nn.GRU(4, 8), "cellular") as compiled:
        with pytest.raises(UnsupportedError, match="policy"):
            compiled.with_options(deadline=1.0)
