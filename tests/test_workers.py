"""Several workers: the same results, wherever a request runs; who takes what."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc
from cellc.compiled import Compiled
from cellc.errors import ClosedError, Overloaded, RequestTimeout, UnsupportedError
from cellc.kernels.eager import EagerBackend
from cellc.launch import Crew, Launch
from cellc.ops import RowType
from cellc.options import Options
from cellc.replica import Replica
from cellc.ticket import Counters, together
from cellc.workers import Workers

TWO = ["cpu", "cpu"]
H = 8


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, H), nn.LSTM(H, H)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rnn(self.embedding(tokens))[0]


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.merge = nn.Embedding(20, H), nn.Linear(2 * H, H)

    def forward(self, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return self.embedding(torch.tensor(tree))
        return self.merge(torch.cat([self(tree[0]), self(tree[1])])).tanh()


class Speaks(nn.Module):
    """Yields states until one is large."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, H)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        h = torch.zeros(H)
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            if h.abs().max() > 0.5:
                return
            yield h


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return h * 2, h


class Gate:
    """Kernels of a model, that wait in the turns of some workers until these are let go."""

    def __init__(self, compiled: Compiled) -> None:
        assert isinstance(compiled._serving, Workers)
        self._engines = compiled._serving._engines
        self.open = [threading.Event() for _ in self._engines]
        self.held = [threading.Event() for _ in self._engines]
        kernels = compiled._compiler.kernels
        for number, kernel in list(kernels.items()):
            kernels[number] = self._gated(kernel)
        self.let_go()

    def let_go(self) -> None:
        for event in self.open:
            event.set()

    def hold(self, *workers: int) -> None:
        for worker in workers:
            self.open[worker].clear()
            self.held[worker].clear()

    def _gated(self, kernel: Any) -> Any:
        def run(launch: Launch, arenas: dict[RowType, Tensor]) -> Sequence[int]:
            worker = next(i for i, e in enumerate(self._engines) if e._arenas is arenas)
            self.held[worker].set()
            while not self.open[worker].wait(0.01):
                pass
            return kernel(launch, arenas)  # type: ignore[no-any-return]

        return run


def trees(count: int) -> list[Any]:
    def tree(depth: int) -> Any:
        if depth == 0 or torch.rand(()) < 0.3:
            return int(torch.randint(20, ()))
        return tree(depth - 1), tree(depth - 1)

    return [(tree(5),) for _ in range(count)]


def sentences(count: int) -> list[Tensor]:
    return [torch.randint(20, (int(n),)) for n in torch.randint(1, 12, (count,))]


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def both_worked(compiled: Compiled) -> bool:
    return all(w["requests"] > 0 for w in compiled.stats()["workers"])


def nothing_left(compiled: Compiled) -> bool:
    assert isinstance(compiled._serving, Workers)
    engines = compiled._serving._engines
    stats = compiled.stats()
    return stats["running"] == stats["waiting"] == 0 and all(
        e._arenas.idle() and e._scheduler.num_requests == 0 and e.load == 0 for e in engines
    )


@pytest.fixture
def reads() -> Iterator[tuple[Reads, Compiled]]:
    model = Reads().eval()
    with cellc.compile(model, backend="eager", device=TWO) as compiled:
        yield model, compiled


def workers_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("cellc-worker")]


# -- results --


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_map_gives_what_the_model_gives(backend: Any) -> None:
    model, requests = Reads().eval(), sentences(60)
    with cellc.compile(model, backend=backend, device=TWO) as compiled:
        for _ in range(3):
            for got, x in zip(compiled.map(requests), requests, strict=True):
                close(got, model(x))
        assert both_worked(compiled) and nothing_left(compiled)


def test_trees_over_two_workers() -> None:
    model, requests = Tree().eval(), trees(40)
    with cellc.compile(model, device=TWO) as compiled:
        for _ in range(2):
            for got, (tree,) in zip(compiled.map(requests), requests, strict=True):
                close(got, model(tree))
        assert both_worked(compiled)


def test_futures_and_asyncio(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    requests = sentences(50)
    futures = [compiled.submit(x) for x in requests]
    for future, x in zip(futures, requests, strict=True):
        close(future.result(timeout=60), model(x))

    async def everything() -> list[Tensor]:
        return await asyncio.gather(*(compiled.submit_async(x) for x in requests))

    for got, x in zip(asyncio.run(everything()), requests, strict=True):
        close(got, model(x))
    assert both_worked(compiled) and nothing_left(compiled)


def test_calls_from_many_threads(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    requests = sentences(64)
    found: dict[int, Tensor] = {}

    def some(start: int) -> None:
        for i in range(start, len(requests), 8):
            found[i] = compiled(requests[i])

    threads = [threading.Thread(target=some, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(requests):
        close(found[i], model(x))
    assert nothing_left(compiled)


def test_a_lone_call_needs_no_thread(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    for x in sentences(5):
        close(compiled(x), model(x))
    assert not workers_alive()


def test_batches_of_requests() -> None:
    model = nn.GRU(3, H, batch_first=True).eval()
    x = torch.randn(6, 5, 3)
    with cellc.compile(model, backend="eager", batch_dim=0, options={"workers": 2}) as compiled:
        for _ in range(2):
            close(compiled(x), model(x))
        assert both_worked(compiled)


def test_streams_over_two_workers() -> None:
    model = Speaks().eval()
    requests = [torch.randn(n, 3) for n in (2, 9, 5, 7)]
    with cellc.compile(model, backend="eager", device=TWO) as compiled:
        assert [len(p) for p in compiled.map(requests)] == [len(list(model(x))) for x in requests]
        streams = [compiled.stream(x) for x in requests]
        for stream, x in zip(streams, requests, strict=True):
            for got, want in zip(stream, model(x), strict=True):
                close(got, want)

        async def pieces(x: Tensor) -> list[Tensor]:
            return [piece async for piece in compiled.astream(x)]

        for x in requests:
            for got, want in zip(asyncio.run(pieces(x)), model(x), strict=True):
                close(got, want)
        assert nothing_left(compiled)


def test_a_closed_stream_leaves_its_worker() -> None:
    with cellc.compile(Speaks().eval(), backend="eager", device=TWO) as compiled:
        x = torch.randn(9, 3) * 0.1
        for _ in range(4):  # until nothing new is learned
            compiled.map([x, x])
        gate = Gate(compiled)
        gate.hold(0, 1)
        streams = [compiled.stream(x) for _ in range(4)]
        compiled._serving.start()
        assert gate.held[0].wait(60) and gate.held[1].wait(60)
        for stream in streams:
            stream.close()
            assert list(stream) == []
        gate.let_go()
        compiled.refresh()  # waits for turns
        assert nothing_left(compiled)


# -- sessions --


def test_sessions_stay_where_their_rows_are() -> None:
    model = Steps().eval()
    first = {"h": torch.zeros(H)}
    with cellc.compile(model, backend="eager", carry={"h": "1"}, device=TWO) as compiled:
        opened = [compiled.session(first) for _ in range(6)]
        states, seen = [torch.zeros(H) for _ in opened], []
        for round in range(5):
            xs = torch.randn(6, 3)
            if round % 2:
                results = compiled.step_all(zip(opened, [(x,) for x in xs], strict=True))
            else:
                futures = [s.submit(x) for s, x in zip(opened, xs, strict=True)]
                results = [f.result(timeout=60) for f in futures]
            for i, (y, _) in enumerate(results):
                want, states[i] = model(xs[i], states[i])
                close(y, want)
            places = [s._worker for s in opened]
            seen.append(tuple(places))
        assert len(set(seen)) == 1 and set(seen[0]) == {0, 1}
        assert nothing_left(compiled)


# -- who takes what --


def test_an_idle_worker_takes_whole_requests_that_wait(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    requests = [torch.randint(20, (6,)) for _ in range(10)]
    compiled.map(requests)
    gate = Gate(compiled)
    gate.hold(0, 1)
    stuck = [compiled.submit(x) for x in requests[:2]]  # one each
    assert gate.held[0].wait(60) and gate.held[1].wait(60)
    futures = [compiled.submit(x) for x in requests[2:]]  # wait for both
    assert compiled.stats()["waiting"] == len(futures)
    before = compiled.stats()["workers"]
    gate.open[1].set()
    for future, x in zip(futures, requests[2:], strict=True):
        close(future.result(timeout=60), model(x))  # though worker 0 is still held
    assert not stuck[0].done()
    after = compiled.stats()["workers"]
    assert after[1]["taken"] > before[1]["taken"] and after[0]["taken"] == before[0]["taken"]
    gate.let_go()
    close(stuck[0].result(timeout=60), model(requests[0]))


def test_steps_of_sessions_are_not_taken() -> None:
    model = Steps().eval()
    with cellc.compile(model, backend="eager", carry={"h": "1"}, device=TWO) as compiled:
        opened = [compiled.session({"h": torch.zeros(H)}) for _ in range(4)]
        x = torch.randn(3)
        compiled.step_all([(s, (x,)) for s in opened])
        places = [s._worker for s in opened]
        gate = Gate(compiled)
        there = [s for s, place in zip(opened, places, strict=True) if place == places[0]]
        other = 1 - places[0]
        gate.hold(places[0])
        first = there[0].submit(x)
        assert gate.held[places[0]].wait(60)
        rest = [s.submit(x) for s in there[1:]]
        away = [s.submit(x) for s in opened if s not in there]
        for future in away:
            future.result(timeout=60)
        assert not first.done() and not any(f.done() for f in rest)
        assert compiled.stats()["workers"][other]["taken"] == 0
        gate.let_go()
        for future in [first, *rest]:
            future.result(timeout=60)
        assert [s._worker for s in opened] == places


def test_requests_go_where_the_least_is_to_be_done(reads: tuple[Reads, Compiled]) -> None:
    _, compiled = reads
    long, short = torch.randint(20, (40,)), torch.randint(20, (2,))
    compiled.map([long, short])
    gate = Gate(compiled)
    gate.hold(0, 1)
    futures = [compiled.submit(x) for x in (short, short)]
    assert gate.held[0].wait(60) and gate.held[1].wait(60)
    futures += [compiled.submit(long), *(compiled.submit(short) for _ in range(6))]
    waiting = [w["waiting"] for w in compiled.stats()["workers"]]
    assert sorted(waiting) == [1, 6]  # six short ones are less than a long one
    gate.let_go()
    for future in futures:
        future.result(timeout=60)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["map", "submit", "call"]), st.integers(1, 12)), max_size=12
    ),
    st.integers(2, 4),
)
def test_each_request_runs_once_on_one_worker(ways: list[tuple[str, int]], workers: int) -> None:
    """As many cell calls run as with one worker, and as many requests end."""
    model = _model()
    groups = [sentences(count) for _, count in ways]
    with cellc.compile(model, backend="eager", device=["cpu"] * workers) as compiled:
        compiled.map([x for g in groups for x in g])  # plans, before they are counted
        plans = [compiled._ticket((x,), {}).entry.plan.num_calls for g in groups for x in g]
        before = compiled.stats()
        futures: list[Any] = []
        for (way, _), group in zip(ways, groups, strict=True):
            if way == "map":
                for got, x in zip(compiled.map(group), group, strict=True):
                    close(got, model(x))
            elif way == "submit":
                futures += [(compiled.submit(x), x) for x in group]
            else:
                for x in group:
                    close(compiled(x), model(x))
        for future, x in futures:
            close(future.result(timeout=60), model(x))
        after = compiled.stats()
        assert after["rows"] - before["rows"] == sum(plans)
        assert after["requests"] - before["requests"] == len(plans)
        assert sum(w["rows"] for w in after["workers"]) == after["rows"]
        assert nothing_left(compiled)
    assert not workers_alive()


_kept: list[Reads] = []


def _model() -> Reads:
    if not _kept:
        _kept.append(Reads().eval())
    return _kept[0]


# -- limits, cancelling, ends --


def test_the_queue_is_bounded_over_all_workers() -> None:
    with cellc.compile(Reads().eval(), backend="eager", device=TWO, max_queue=3) as compiled:
        x = torch.randint(20, (4,))
        compiled.map([x] * 8)
        gate = Gate(compiled)
        gate.hold(0, 1)
        futures = [compiled.submit(x), compiled.submit(x)]
        assert gate.held[0].wait(60) and gate.held[1].wait(60)
        futures += [compiled.submit(x) for _ in range(3)]
        with pytest.raises(Overloaded):
            compiled.submit(x)
        assert futures[-1].cancel()
        futures[-1] = compiled.submit(x)  # in its place
        gate.let_go()
        for future in futures:
            future.result(timeout=60)


def test_cancelled_futures_do_not_run(reads: tuple[Reads, Compiled]) -> None:
    _, compiled = reads
    x = torch.randint(20, (4,))
    compiled.map([x] * 4)
    gate = Gate(compiled)
    gate.hold(0, 1)
    futures = [compiled.submit(x) for _ in range(2)]
    assert gate.held[0].wait(60) and gate.held[1].wait(60)
    waiting = [compiled.submit(x) for _ in range(4)]
    before = compiled.stats()["requests"]
    assert all(f.cancel() for f in waiting)
    gate.let_go()
    for future in futures:
        future.result(timeout=60)
    close(compiled(x), compiled._compiler.model(x))  # type: ignore[operator]
    compiled.refresh()
    assert compiled.stats()["requests"] == before + 3 and nothing_left(compiled)


def test_timeouts_end_requests_of_every_worker() -> None:
    options = {"timeout": 0.05}
    with cellc.compile(Reads().eval(), backend="eager", device=TWO, options=options) as compiled:
        x = torch.randint(20, (4,))
        with contextlib.suppress(RequestTimeout):  # the first is traced meanwhile
            compiled.map([x] * 4)
        gate = Gate(compiled)
        gate.hold(0, 1)
        futures = [compiled.submit(x) for _ in range(2)]
        assert gate.held[0].wait(60) and gate.held[1].wait(60)
        late = [compiled.submit(x) for _ in range(4)]
        threading.Event().wait(0.1)
        gate.let_go()
        for future in futures:
            future.exception(timeout=60)
        errors = [f.exception(timeout=60) for f in late]
        assert {type(e) for e in errors} >= {
            RequestTimeout
        }  # those that are looked at too late end


def test_an_error_is_that_request_alone(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    requests = [*sentences(10), torch.tensor([1, 99]), *sentences(10)]
    results = compiled.map(requests, return_exceptions=True)
    assert isinstance(results[10], cellc.CellcError)
    for i, (got, x) in enumerate(zip(results, requests, strict=True)):
        if i != 10:
            close(got, model(x))


def test_ctrl_c_in_map_leaves_nothing_behind(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    requests = sentences(40)
    compiled.map(requests)
    gate = Gate(compiled)
    gate.hold(0, 1)

    def interrupt() -> None:
        gate.held[0].wait(60)
        gate.held[1].wait(60)
        signal.raise_signal(signal.SIGINT)
        gate.let_go()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        compiled.map(requests)
        thread.join()
    thread.join()
    compiled.refresh()  # waits for turns
    assert nothing_left(compiled)
    for got, x in zip(compiled.map(requests), requests, strict=True):
        close(got, model(x))


def test_refresh_waits_for_all_and_changes_all() -> None:
    model = Reads().eval()
    requests = sentences(30)
    with cellc.compile(model, backend="eager", device=TWO) as compiled:
        compiled.map(requests)
        old = [model(x) for x in requests]
        futures = [compiled.submit(x) for x in requests]
        with torch.no_grad():
            copies = {k: v.clone() for k, v in model.state_dict().items()}
        for future, want in zip(futures, old, strict=True):
            close(future.result(timeout=60), want)
        model.load_state_dict({k: v * 1.5 for k, v in copies.items()})
        compiled.refresh()
        for got, x in zip(compiled.map(requests), requests, strict=True):
            close(got, model(x))
        assert both_worked(compiled)


def test_close_ends_what_waits_and_all_threads(reads: tuple[Reads, Compiled]) -> None:
    model, compiled = reads
    requests = sentences(30)
    futures = [compiled.submit(x) for x in requests]
    assert workers_alive()
    compiled.close()
    assert not workers_alive()
    for future, x in zip(futures, requests, strict=True):
        close(future.result(timeout=0), model(x))
    with pytest.raises(ClosedError):
        compiled(requests[0])
    compiled.close()


def test_threads_end_when_nobody_holds_the_model() -> None:
    compiled = cellc.compile(Reads().eval(), backend="eager", device=TWO)
    compiled.submit(torch.tensor([1, 2])).result(timeout=60)
    threads = [t for t in threading.enumerate() if t.name.startswith("cellc-worker")]
    assert threads
    del compiled
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_waiting_in_a_callback_is_refused(reads: tuple[Reads, Compiled]) -> None:
    _, compiled = reads
    x = torch.tensor([1, 2])
    found: list[Any] = []

    def ask(_: Any) -> None:
        try:
            compiled(x)
        except UnsupportedError as error:
            found.append(error)

    compiled(x)
    gate = Gate(compiled)
    gate.hold(0)
    future = compiled.submit(x)
    future.add_done_callback(ask)
    gate.let_go()
    future.result(timeout=60)
    compiled.close()
    assert len(found) == 1


# -- what is asked for --


@pytest.mark.parametrize(
    ("device", "options"),
    [([], {}), (["cpu", "cuda:0"], {}), (TWO, {"workers": 3}), (None, {"workers": 0})],
)
def test_wrong_devices(device: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        cellc.compile(Reads(), backend="eager", device=device, options=options)


def test_cpu_workers_share_the_threads() -> None:
    model = Reads().eval()
    with cellc.compile(model, backend="eager", options={"workers": 2}) as compiled:
        figures = compiled.stats()["workers"]
        assert [w["device"] for w in figures] == TWO
        assert [w["threads"] for w in figures] == [max(1, torch.get_num_threads() // 2)] * 2
    with cellc.compile(model, backend="eager", device=["cpu"]) as compiled:
        assert len(compiled.stats()["workers"]) == 1


# -- devices of their own --


def test_a_replica_has_weights_and_kernels_of_its_own() -> None:
    """As on several GPUs: one backend a worker."""
    model = Reads().eval()
    cpu = torch.device("cpu")
    compiled = Compiled(
        model, [EagerBackend(), EagerBackend()], [cpu, cpu], Options(), batch_dim=None,
        max_batch=None, max_queue=None, dtype=None, source=model,
    )  # fmt: skip
    requests = sentences(40)
    with compiled:
        assert isinstance(compiled._serving, Workers)
        own, other = (e.compiler for e in compiled._serving._engines)
        assert own is compiled._compiler and isinstance(other, Replica)
        for scale in (1.0, 1.5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(scale)
            compiled.refresh()
            for got, x in zip(compiled.map(requests), requests, strict=True):
                close(got, model(x))
        assert both_worked(compiled)
        assert other._kernels and not set(map(id, other._kernels.values())) & set(
            map(id, own.kernels.values())  # type: ignore[attr-defined]
        )


def test_requests_go_to_the_device_of_their_data() -> None:
    """On devices that are not here: requests are placed, and do not run."""
    model = Reads().eval()
    with cellc.compile(model, backend="eager", device=TWO) as compiled:
        compiled.map(sentences(4))
        assert isinstance(compiled._serving, Workers)
        pool = compiled._serving._pool
        pool._devices = [torch.device("cpu"), torch.device("meta")]
        ticket = compiled._ticket((torch.tensor([1, 2]),), {})
        for device, place in (("meta", 1), ("cpu", 0), ("meta", 1)):
            ticket.tensors, ticket.stays = [torch.zeros(2, device=device)], False
            with pool.lock:
                pool.place([ticket])
                assert ticket.worker == place and ticket.stays
                assert pool.workers[place].take_back(lambda t: t is ticket) == [ticket]
                assert not any(w.load for w in pool.workers)


def test_teams_of_threads_run_side_by_side() -> None:
    """Launches of two workers, each on two threads, at the same time."""
    cpp = pytest.importorskip("cellc.kernels.cpp")
    build = pytest.importorskip("cellc.kernels.cpp_build")
    if build.find_compiler() is None or cpp.num_cores() < 2:
        pytest.skip("needs a C++ compiler and two cores")
    model = nn.LSTM(64, 192).eval()
    requests = [torch.randn(12, 64) for _ in range(96)]
    with cellc.compile(model, backend="cpp", device=TWO) as compiled:
        assert isinstance(compiled._serving, Workers)
        for engine in compiled._serving._engines:
            engine.launcher._crew = Crew(engine.launcher._crew.team, 2)
        for _ in range(4):
            for (got, _), x in zip(compiled.map(requests), requests, strict=True):
                close(got, model(x)[0])
        assert both_worked(compiled)
        assert cpp.num_workers() == 2  # one beside each worker's own


def test_counters_add_up() -> None:
    a, b = Counters(launches=2, seconds=0.5), Counters(launches=3, seconds=0.25)
    a.latencies.append(1.0)
    b.latencies.extend([2.0, 3.0])
    both = together([a, b])
    assert (both.launches, both.seconds, list(both.latencies)) == (5, 0.75, [1.0, 2.0, 3.0])


def test_what_is_learned_is_learned_once() -> None:
    """Threads of several workers that meet new structures at the same time."""
    model = Tree().eval()
    parts: list[Callable[[], Any]] = []
    with cellc.compile(model, device=["cpu"] * 3) as compiled:
        found: dict[int, list[Any]] = {}
        given = {i: trees(15) for i in range(4)}
        for i, requests in given.items():
            parts.append(lambda i=i, r=requests: found.update({i: compiled.map(r)}))
        threads = [threading.Thread(target=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, requests in given.items():
            for got, (tree,) in zip(found[i], requests, strict=True):
                close(got, model(tree))


def test_alike_workers_know_what_either_measured() -> None:
    """Else one that has not run yet would judge deadlines by guesses."""
    model = nn.GRU(4, 8).eval()
    requests = [(torch.randn(n, 1, 4),) for n in range(1, 9)]
    with torch.no_grad(), cellc.compile(model, backend="eager", options={"workers": 2}) as compiled:
        compiled(*requests[0])
        assert isinstance(compiled._serving, Workers)
        first, second = (engine.launcher for engine in compiled._serving._engines)
        assert first._seconds
        compiled.map(requests)
        for cell, bits in list(first._seconds):
            rows = 1 << (bits - 1)
            assert first.step_seconds(cell, rows) == second.step_seconds(cell, rows)
