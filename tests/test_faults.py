"""Faults: kernels that raise, threads that end, forks, signals, the interpreter's end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.errors import RequestTimeout
from cellc.ops import RowType
from cellc.plan import Tables
from cellc.state import Arenas
from cellc.workers import Workers


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


@pytest.fixture
def model() -> nn.Module:
    return Tagger().eval()


def eager(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def requests(count: int = 12) -> list[Tensor]:
    return [torch.randn(1 + n % 7, 4) for n in range(count)]


def check(compiled: cellc.Compiled, model: nn.Module) -> None:
    for x, got in zip(given := requests(), compiled.map(given), strict=True):
        torch.testing.assert_close(got, eager(model, x))
    engine = compiled._engine
    assert engine._arenas.live == engine.flight.live_bytes == engine.flight.futures == 0
    assert engine._scheduler.num_requests == engine.num_running == engine.num_waiting == 0


# -- kernels that raise


class Raises:
    """A kernel that raises at some of its launches, after it has written half of what it makes."""

    def __init__(self, kernel: Any, when: Callable[[], bool]) -> None:
        self.kernel, self.when = kernel, when
        self.source = kernel.source

    def __call__(self, launch: Any, arenas: Any) -> Any:
        if self.when():
            for slots in launch.outputs:
                for arena in arenas.values():
                    if len(slots) and int(slots.max()) < len(arena) and arena.is_floating_point():
                        arena[int(slots[0])] = float("nan")
                        break
            raise RuntimeError("injected")
        return self.kernel(launch, arenas)


def test_a_kernel_that_raises_fails_the_requests_of_its_launch(model: nn.Module) -> None:
    with cellc.compile(model, backend="eager", max_batch=4) as compiled:
        compiled.map(requests())
        engine, generator = compiled._engine, random.Random(0)
        lost: set[int] = set()
        end = engine.launcher.end

        def noting(running: Any) -> Any:
            failed = end(running)
            lost.update(id(engine.flight.live[number]) for number in failed)
            return failed

        engine.launcher.end = noting  # type: ignore[method-assign]
        kernels = compiled._compiler.kernels
        for number, kernel in list(kernels.items()):
            kernels[number] = Raises(kernel, lambda: generator.random() < 0.1)
        failures = 0
        for _ in range(20):
            lost.clear()
            tickets = [compiled._ticket((x,), {}) for x in requests(24)]
            given = [t.tensors[0] for t in tickets]
            compiled._run(tickets)
            for ticket, x in zip(tickets, given, strict=True):
                assert (ticket.error is not None) == (id(ticket) in lost)
                if ticket.error is None:
                    torch.testing.assert_close(ticket.result, eager(model, x))
                else:
                    assert "injected" in str(ticket.error)
            failures += len(lost)
        assert 0 < failures < 20 * 24
        for number, kernel in list(kernels.items()):
            kernels[number] = kernel.kernel  # type: ignore[attr-defined]
        check(compiled, model)


# -- the background thread


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_the_background_thread_fails_its_requests(
    model: nn.Module, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(requests())
        engine = compiled._engine
        complete = engine._turns._complete

        def ends(*args: Any) -> Any:
            if threading.current_thread() is engine._background:
                monkeypatch.undo()
                raise kind("out of the blue")
            return complete(*args)

        monkeypatch.setattr(engine._turns, "_complete", ends)
        with engine._loop.holding():
            futures = [compiled.submit(x) for x in requests()]
        errors = [future.exception(30) for future in futures]
        assert all(isinstance(error, cellc.WorkerError) for error in errors)
        assert isinstance(errors[0].__cause__, kind) and "out of the blue" in str(errors[0])
        assert len(set(map(id, errors))) == len(errors)
        x = torch.randn(3, 4)
        torch.testing.assert_close(compiled.submit(x).result(30), eager(model, x))
        assert compiled.stats()["recoveries"] > 0
        check(compiled, model)


def test_a_callback_that_exits(model: nn.Module) -> None:
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(requests())
        with compiled._engine._loop.holding():
            futures = [compiled.submit(x) for x in requests()]
            futures[0].add_done_callback(lambda _: sys.exit(3))
        for future in futures:
            with contextlib.suppress(cellc.WorkerError):
                future.result(30)
        x = torch.randn(3, 4)
        torch.testing.assert_close(compiled.submit(x).result(30), eager(model, x))
        check(compiled, model)


def exits(future: Any) -> None:
    if threading.current_thread() is not threading.main_thread():
        sys.exit(3)


def standstill(compiled: cellc.Compiled) -> contextlib.ExitStack:
    """While it is entered, no worker gets further."""
    stack, workers = contextlib.ExitStack(), compiled._serving
    for engine in workers._engines if isinstance(workers, Workers) else [workers]:
        stack.enter_context(engine._loop.holding())
    return stack


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("options", "wants", "error"),
    [
        ({}, {}, None),
        ({"timeout": 0.4}, {}, RequestTimeout),
        ({"policy": "deadline"}, {"deadline": 1e-6}, cellc.DeadlineError),
        ({"max_calls": 9}, {}, cellc.CallsError),
    ],
)
def test_callbacks_that_all_exit(
    model: nn.Module, options: dict[str, Any], wants: dict[str, Any], error: Any, workers: int
) -> None:
    """However their requests end: nobody waits for ever."""
    given = options | {"workers": workers}
    with cellc.compile(model, backend="eager", options=given) as compiled:
        compiled(torch.randn(2, 4))
        wanted = compiled.with_options(**wants) if wants else compiled
        with standstill(compiled):
            futures = [wanted.submit(torch.randn(20, 4)) for _ in range(12)]
            for future in futures:
                future.add_done_callback(exits)
            time.sleep(options.get("timeout", 0.0) + 0.1)
        errors = [future.exception(30) for future in futures]
        assert all(type(e) is error if error else e is None for e in errors), errors
        x = torch.randn(2, 4)
        torch.testing.assert_close(compiled.submit(x).result(30), eager(model, x))
        assert compiled.stats()["requests"] == 14 and compiled.stats()["running"] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_nobody_begins_after_its_timeout(model: nn.Module, workers: int) -> None:
    """Though the loop looked for those that are late just before."""
    given = {"workers": workers, "timeout": 0.3}
    with cellc.compile(model, backend="eager", options=given) as compiled:
        compiled(torch.randn(2, 4))
        engines = compiled._serving
        for engine in engines._engines if isinstance(engines, Workers) else [engines]:
            engine._turns._looked = time.perf_counter() + 100  # seconds: it does not look again
        with standstill(compiled):
            late = [compiled.submit(torch.randn(2, 4)) for _ in range(4)]
            time.sleep(0.4)
        assert all(type(future.exception(30)) is RequestTimeout for future in late)
        assert compiled.submit(torch.randn(2, 4)).exception(30) is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_policy_that_exits(workers: int) -> None:
    class Exits:
        def pick(self, ready: Any, turn: Any) -> Any:
            sys.exit(3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.GRU(4, 6), nn.GRU(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)[0] + self.other(x)[0]  # type: ignore[no-any-return]

    options = {"policy": Exits(), "workers": workers}
    with cellc.compile(Both().eval(), backend="eager", options=options) as compiled:
        for _ in range(2):
            assert isinstance(compiled.submit(torch.randn(3, 4)).exception(30), cellc.WorkerError)


@pytest.mark.parametrize("workers", [1, 2])
def test_callbacks_may_submit_what_is_new_and_may_not_wait(workers: int) -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merge = nn.Linear(8, 4)

        def forward(self, tree: Any) -> Tensor:
            if isinstance(tree, Tensor):
                return tree.tanh()
            return self.merge(torch.cat([self(part) for part in tree]))  # type: ignore[no-any-return]

    model, x = Tree().eval(), torch.randn(4)
    options = {"workers": workers, "max_calls": 20}
    with cellc.compile(model, backend="eager", options=options) as compiled:
        compiled((x, x))
        found: list[Any] = []
        told = threading.Event()

        def callback(_: Any) -> None:
            for ask in (lambda: compiled.submit((x, (x, x))), lambda: compiled((x, x))):
                try:
                    found.append(ask())
                except Exception as error:
                    found.append(error)
            told.set()

        with standstill(compiled):
            compiled.submit((x, x)).add_done_callback(callback)
        assert told.wait(30)
        future, error = found
        with torch.no_grad():
            torch.testing.assert_close(future.result(30), model((x, (x, x))))
        assert isinstance(error, cellc.UnsupportedError) and "in a callback" in str(error)


def test_an_exception_set_from_outside(model: nn.Module) -> None:
    """Whatever the thread is at."""
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(requests())
        generator = random.Random(0)
        for _ in range(20):
            futures = [(x, compiled.submit(x)) for x in requests(40)]
            time.sleep(generator.random() * 0.01)
            thread = compiled._engine._background
            assert thread is not None and thread.ident is not None
            identity = ctypes.c_ulong(thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(SystemExit))
            compiled.submit(torch.randn(2, 4))  # somebody starts the thread again, if it is gone
            for x, future in futures:
                with contextlib.suppress(cellc.WorkerError):
                    torch.testing.assert_close(future.result(30), eager(model, x))
        x = torch.randn(3, 4)
        for _ in range(3):  # one may still meet the last exception
            with contextlib.suppress(cellc.WorkerError):
                torch.testing.assert_close(compiled.submit(x).result(30), eager(model, x))
        check(compiled, model)


def test_failing_fails(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What should tell requests of an error raises itself."""
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(requests())
        engine = compiled._engine
        monkeypatch.setattr(engine._turns, "_complete", lambda *_: 1 // 0)
        monkeypatch.setattr(engine.flight, "fail", lambda *_: [][1])
        for run in (
            lambda: compiled.map(requests()),
            lambda: compiled.submit(torch.randn(2, 4)).result(30),
        ):
            with pytest.raises(cellc.WorkerError) as caught:
                run()
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        monkeypatch.undo()
        check(compiled, model)


@pytest.mark.parametrize("reads", [False, True])
def test_what_torch_refuses_fails_alone(reads: bool) -> None:
    """With the line of the operation; also where the launch was recorded."""

    def forward(x: Tensor, at: Tensor) -> Tensor:
        if reads and x[0] > 0:
            x = x + 1
        return torch.tanh(x).gather(0, at[None])

    given = [(torch.randn(4), torch.tensor(n % 6)) for n in range(24)]
    with cellc.compile(forward) as compiled:
        for found in (
            compiled.map(given, return_exceptions=True),
            *[[outcome(compiled, *x) for x in given] for _ in range(2)],
        ):
            for (x, at), got in zip(given, found, strict=True):
                if at < 4:
                    torch.testing.assert_close(got, forward(x, at))
                else:
                    assert isinstance(got, cellc.ForwardError), got
                    assert got.origin == f"test_faults.py:{forward.__code__.co_firstlineno + 3}"


def outcome(compiled: cellc.Compiled, *args: Tensor) -> Any:
    try:
        return compiled(*args)
    except cellc.CellcError as error:
        return error


# -- cancelling


def test_cancelling_everywhere(model: nn.Module) -> None:
    """Futures and asyncio tasks, before, while and after their requests run."""

    async def tasks(compiled: cellc.Compiled, generator: random.Random) -> None:
        given = requests(30)
        made = [asyncio.create_task(compiled.submit_async(x)) for x in given]
        await asyncio.sleep(generator.random() * 0.005)
        for task in made[::2]:
            task.cancel()
        results = await asyncio.gather(*made, return_exceptions=True)
        for k, (x, got) in enumerate(zip(given, results, strict=True)):
            if not isinstance(got, asyncio.CancelledError):
                torch.testing.assert_close(got, eager(model, x))
            else:
                assert k % 2 == 0

    with cellc.compile(model, backend="eager") as compiled:
        compiled.map(requests())
        generator = random.Random(0)
        for _ in range(10):
            asyncio.run(tasks(compiled, generator))
            futures = [(x, compiled.submit(x)) for x in requests(30)]
            time.sleep(generator.random() * 0.005)
            cancelled = [future.cancel() for _, future in futures[::3]]
            for x, future in futures:
                if not future.cancelled():
                    torch.testing.assert_close(future.result(30), eager(model, x))
            del cancelled
        compiled.submit(torch.randn(2, 4)).result(30)
        check(compiled, model)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
        count = torch.zeros((), dtype=torch.int64)
        while count < many:
            x, count = self.cell(x, x), count + 1
        return x, count


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cancelled_task_ends_a_request_that_runs(workers: int) -> None:
    model, few, many = Counts().eval(), torch.tensor(3), torch.tensor(10**9)
    options = {"workers": workers}

    async def cancelled(asked: Any) -> None:
        task = asyncio.create_task(asked)
        while not compiled.stats()["running"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while compiled.stats()["running"]:
            await asyncio.sleep(0.001)

    async def both() -> None:
        x = torch.randn(4)
        await cancelled(compiled.submit_async(x, many))
        with compiled.session({"x": x}) as session:
            await session.step_async(few)
            before = session.state["x"]
            await cancelled(session.step_async(many))
            torch.testing.assert_close(session.state["x"], before)
            got, _ = await session.step_async(few)
            with torch.no_grad():
                torch.testing.assert_close(got, model(before, few)[0])

    with cellc.compile(model, backend="eager", carry={"x": "0"}, options=options) as compiled:
        for _ in range(3):
            compiled(torch.randn(4), few)
        asyncio.run(asyncio.wait_for(both(), 60))
        assert compiled.stats()["cancelled"] == 2 and compiled.stats()["live_bytes"] == 0


# -- other processes


def in_fork(work: Callable[[], None]) -> int:
    """Exit code of a forked child that works; -1 where it does not end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    for _ in range(3000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
@pytest.mark.parametrize(("held", "workers"), [(False, 1), (True, 1), (True, 2)])
def test_a_forked_child(model: nn.Module, held: bool, workers: int) -> None:
    """`held`: the parent's thread is in a turn of the loop when it forks."""
    compiled = cellc.compile(model, backend="eager", options={"workers": workers})
    stream = cellc.compile(lambda x: (yield x), backend="eager")
    pieces = stream.stream(torch.randn(3))
    listener = cellc.compile(
        lambda x, state: (x + state, state + 1),
        carry={"state": "1"},
        backend="eager",
        options={"workers": workers},
    )
    opened = [listener.session({"state": torch.zeros(3)}) for _ in range(2)]
    for _ in range(2):  # the second time as a step like those before
        listener.step_all([(session, torch.randn(3)) for session in opened])
    compiled.map(requests())
    future = compiled.submit(torch.randn(3, 4))
    future.result(30)

    def refused() -> None:
        x = torch.randn(3, 4)
        for use in (
            lambda: compiled(x),
            lambda: compiled.map([x]),
            lambda: compiled.submit(x),
            lambda: next(pieces),
            lambda: opened[0].step(torch.randn(3)),
            lambda: listener.step_all([(session, torch.randn(3)) for session in opened]),
            compiled.refresh,
            compiled.profile().__enter__,
        ):
            with pytest.raises(
                cellc.UnsupportedError, match=r"forked.*cellc\.compile in the child"
            ):
                use()
        pieces.close()
        compiled.stats()
        compiled.close()

    def again() -> None:
        with cellc.compile(model, backend="eager") as own:
            x = torch.randn(3, 4)
            torch.testing.assert_close(own(x), eager(model, x))
            torch.testing.assert_close(own.submit(x).result(30), eager(model, x))

    locks = contextlib.ExitStack()
    if held:
        locks.enter_context(compiled._engine._loop.holding())
        locks.enter_context(stream._engine._loop.holding())
        locks.enter_context(listener._engine._loop.holding())
        for serving in (compiled._serving, listener._serving):
            if isinstance(serving, Workers):
                locks.enter_context(serving._pool.lock)
    with locks:
        assert in_fork(refused) == 0
        assert in_fork(again) == 0
    check(compiled, model)
    assert len(list(pieces)) == 1
    for one in (compiled, stream, listener):
        one.close()


def _child(model: nn.Module, x: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)
    with cellc.compile(model, backend="eager") as compiled:
        answers.put(compiled.submit(x).result(30).tolist())


def test_a_spawned_child(model: nn.Module) -> None:
    with cellc.compile(model, backend="eager") as compiled:
        x = torch.randn(3, 4)
        compiled.submit(x).result(30)
        with pytest.raises(cellc.UnsupportedError, match="pickling"):
            pickle.dumps(compiled)
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=_child, args=(model, x, answers))
        child.start()
        torch.testing.assert_close(torch.tensor(answers.get(timeout=100)), eager(model, x))
        child.join(100)
        assert child.exitcode == 0
        check(compiled, model)


SHUTDOWN = """
    import sys, threading, time, torch, cellc
    from torch import nn
    torch.set_num_threads(1)
    model = nn.LSTM(64, 256)
    workers = {"workers": 2} if sys.argv[2] == "workers" else None
    compiled = cellc.compile(model.eval(), backend=sys.argv[1], options=workers)
    compiled(torch.randn(3, 64))
    futures = [compiled.submit(torch.randn(400, 64)) for _ in range(300)]
    if sys.argv[2] == "stream":
        def counting(x):
            for _ in range(200):
                x = x + 1
                yield x
        other = cellc.compile(counting, backend=sys.argv[1])
        print(next(iter(other.stream(torch.zeros(3)))))
    while not any(f.running() for f in futures):
        time.sleep(0.001)
    assert not all(f.done() for f in futures)
    if sys.argv[2] == "raise":
        raise ValueError("on purpose")
    print("leaving", time.time(), flush=True)
"""


@pytest.mark.parametrize("how", ["return", "stream", "raise", "workers"])
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_the_interpreter_ends_with_requests_in_flight(backend: str, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHUTDOWN), backend, how],
        capture_output=True,
        text=True,
        timeout=200,
    )
    if "no C++ compiler" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == (1 if how == "raise" else 0), done.stderr
    if how == "raise":
        assert done.stderr.rstrip().endswith("ValueError: on purpose"), done.stderr
    else:
        assert done.stderr == ""
        assert (
            time.time() - float(done.stdout.split()[-1]) < 60
        )  # a second, where nothing else runs


# -- signals


# Python ignores what is raised in a destructor, and says so
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_signals_at_any_time(model: nn.Module) -> None:
    """Ctrl-C in `map`, in calls and in streams leaves a model that gives right results."""

    def counting(x: Tensor) -> Any:
        for _ in range(8):
            x = x + 1
            yield x

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    generator = random.Random(0)
    interrupted = 0
    try:
        for turn in range(60):
            if turn % 20 == 0:  # arenas are new
                compiled = cellc.compile(model, backend="eager")
                streams = cellc.compile(counting, backend="eager")
                compiled.map(requests())
            given = requests(40)
            others = [compiled.submit(x) for x in given[:5]]
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + generator.random() * 0.02)
                compiled.map(given)
                compiled(given[0])
                list(streams.stream(torch.zeros(3)))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for x, future in zip(given, others, strict=False):
                torch.testing.assert_close(future.result(30), eager(model, x))
            check(compiled, model)
            want = [torch.full((3,), float(k)) for k in range(1, 9)]
            torch.testing.assert_close(list(streams.stream(torch.zeros(3))), want)
            if turn % 20 == 19:
                compiled.close()
                streams.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5


@pytest.mark.parametrize("step", ["Regions", "empty", "_view"])
def test_an_arena_whose_opening_is_interrupted(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RowType((3,), "f32"), RowType((2,), "i64")
    tables = Tables()
    tables.type(first)
    tables.constant(first, ("full", 2.0))
    arenas = Arenas(tables, {}, torch.device("cpu"))
    plan: Any = None  # what it holds is not looked at
    for type in (None, second):
        if type is not None:
            tables.type(type)
            tables.constant(type, ("full", 7))
        owner: Any = {"Regions": sys.modules["cellc.state"], "empty": torch, "_view": arenas}[step]
        function = getattr(owner, step)

        def interrupted(*args: Any, function: Any = function, **kwargs: Any) -> Any:
            function(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(owner, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                arenas.prepare(plan)
        arenas.clear()
        assert arenas.prepare(plan)
    assert arenas[first][0].tolist() == [2.0] * 3 and arenas[second][0].tolist() == [7] * 2
    assert len(arenas._types) == len(arenas._regions) == len(arenas._views) == 2
