"""Compiled models: what `cellc.compile` returns.

Duty: the public face: calls become tickets (`cellc.intake`), and the engine runs them. The main
path is three files: this one, `cellc.compiler` (how a request never seen becomes a plan) and
`cellc.turns` (how plans run).
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from cellc.batches import Batches
from cellc.carry import Carry, Late
from cellc.compiler import Compiler
from cellc.errors import MODEL_CLOSED, CellcError, UnsupportedError
from cellc.figures import figures_of
from cellc.intake import Intake
from cellc.launch import Backend
from cellc.legs import Leg
from cellc.modules import named_tensors, without_collecting
from cellc.options import Options
from cellc.owning import owned
from cellc.passes import PassOptions
from cellc.profiling import Profile
from cellc.request import as_call
from cellc.runs import Runs
from cellc.sessions import Session, Steps, pair_of
from cellc.stages import Stage
from cellc.streams import Stream, pieces_of
from cellc.ticket import Ticket
from cellc.urgency import NO_WISH
from cellc.views import Cells, CellView
from cellc.waiting import Future
from cellc.wants import NOTHING_WANTED, Wants, check_seconds, make_wants
from cellc.workers import Workers, make_engines

if TYPE_CHECKING:
    import networkx


EXPIRY = 1.0  # seconds between looks for sessions that expired

F = TypeVar("F", bound=Callable[..., Any])


def _without_autocast(method: F) -> F:
    """Cells compute in the dtypes that were traced, whatever the caller's context says."""

    @functools.wraps(method)
    def call(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        kind = self._device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class Compiled(Runs):
    """A model whose cells are batched across requests; made by `cellc.compile`, safe in threads."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        backends: Sequence[Backend],
        devices: Sequence[torch.device],
        options: Options,
        *,
        batch_dim: int | None,
        max_batch: int | None,
        max_queue: int | None,
        dtype: torch.dtype | None,
        source: Any,
        carry: Mapping[str, str] | None = None,
    ) -> None:
        device = devices[0]
        self._compiler = Compiler(model, backends[0], device, PassOptions(options.fold_bytes))
        engines = make_engines(self._compiler, backends, devices, options, max_batch, max_queue)
        self._engine = engines[0]  # the only one, if there is one worker
        serving = self._engine if len(engines) == 1 else Workers(engines, max_queue)
        super().__init__(serving, max_queue, options.timeout)
        self._intake = Intake(self._compiler, dtype, self._run)
        self._batches = None if batch_dim is None else Batches(self._compiler, batch_dim)
        self._device, self._source = device, source
        self._carry = Carry(carry, self._compiler.arguments.names) if carry is not None else None
        self._sessions: dict[Session, None] = {}  # open ones
        self._policy = options.policy
        self._whole: Compiled | None = None  # what it is a copy of, which has the backend's end
        self._looked = 0.0  # when those that expired were last closed
        self._finalizer = weakref.finalize(self, _close_backends, list(backends))

    # -- requests --

    def with_options(self, *, deadline: float | None = None, priority: int = 0) -> Compiled:
        """The same compiled model, whose requests are wanted otherwise: what it is called, mapped,
        submitted, streamed and stepped with goes to the model, these do not.

        deadline: seconds from the call on. A request that cannot end by then fails at once, with
        DeadlineError. priority: higher ones go first (an integer, 0 where none is given). Both need
        `options={"policy": "deadline"}`, or a policy of your own that says `deadlines = True`.

        >>> import torch, cellc
        >>> model = torch.nn.GRU(4, 8)
        >>> compiled = cellc.compile(model, backend="eager", options={"policy": "deadline"})
        >>> future = compiled.with_options(deadline=60.0).submit(torch.randn(5, 1, 4))
        >>> future.result()[0].shape
        torch.Size([5, 1, 8])
        >>> compiled.close()
        """
        other = object.__new__(Compiled)
        other.__dict__.update(self.__dict__)
        other._wants, other._whole = make_wants(deadline, priority, self._policy), self
        return other

    @_without_autocast
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One request; equals `model(*args, **kwargs)` in eval mode.

        With `batch_dim`, a call is as many requests as its tensors have there, results stacked
        again. Raises CellcError, or what the request itself raises.
        """
        if self._batches is not None:
            return self._batched(self._batches, args, kwargs)
        return self._one(args, kwargs)

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ticket = self._ticket(args, kwargs)
        if _generates(ticket):
            return Stream(self._serving, ticket)
        self._run([ticket])
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    @_without_autocast
    def map(self, requests: Iterable[Any], *, return_exceptions: bool = False) -> list[Any]:
        """Many requests at once, in order. A tuple is positional arguments, a dict keywords,
        anything else one argument.

        Raises the first error, after all requests have ended; with `return_exceptions`, a request's
        error stands in place of its result. Results share memory, in pieces of 1 MiB at most: clone
        what you keep of a few for long.
        """
        requests = list(requests)
        if self._batches is not None:
            calls = [as_call(r) for r in requests]
            return self._map_batches(self._batches, calls, return_exceptions)
        with without_collecting():  # of what is made here, nothing is garbage
            # nor is anything left of calls and tickets when it ends
            return self._results(self._begun(requests), return_exceptions)

    @_without_autocast
    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """One request without waiting: a `concurrent.futures.Future`. Tensors are copied now. The
        result of a generator is the list of its pieces.
        """
        return self._send(self._ticket(args, kwargs))

    async def submit_async(self, *args: Any, **kwargs: Any) -> Any:
        """One request in asyncio. Cancelling the task cancels the request, though it runs."""
        return await self._answer(self._sent(args, kwargs))

    @_without_autocast
    def _sent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        ticket = self._ticket(args, kwargs)
        self._send(ticket)
        return ticket

    @_without_autocast
    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        """One request of a forward that is a generator: an iterator over what it yields, each piece
        as soon as its cells have run. `close()` cancels the request and frees its rows.
        """
        return Stream(self._serving, self._generating(args, kwargs))

    def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """The same in asyncio: `async for piece in compiled.astream(x)`."""
        return pieces_of(self._serving, owned(self._generating(args, kwargs)))

    def _generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        ticket = self._ticket(args, kwargs)
        if not _generates(ticket):
            raise UnsupportedError(
                what="streaming of a forward that returns",
                remedy="make it a generator (yield each piece), or call the compiled model",
            )
        return ticket

    # -- sessions --

    def session(
        self, initial: Mapping[str, Any] | None = None, *, lifetime: float | None = None
    ) -> Session:
        """Open a session: state that is carried from step to step (see `cellc.compile(carry=)`).

        initial: values of carried arguments for the first step, by name; those that are missing
        take the forward's defaults. lifetime: seconds without a step after which it expires.
        """
        self._check_open()
        if self._carry is None or self._batches is not None:
            raise UnsupportedError(
                what="a session of a model compiled without carry, or with batch_dim",
                remedy="cellc.compile(model, carry={'state': '1'}) says that the argument `state` "
                "of a step is output 1 of the step before",
            )
        if initial is not None and not isinstance(initial, Mapping):
            raise UnsupportedError(
                what=f"a session that begins with a {type(initial).__name__}",
                remedy="give carried arguments by name, as {'state': tensor}",
            )
        self._carry.check_begin(initial or {}, self._compiler.arguments.required)
        check_seconds(lifetime=lifetime)
        now = time.monotonic()
        if now - self._looked > EXPIRY:
            self._looked = now
            for old in list(self._sessions):
                old.expire()
        session = Session(
            _Model(self), self._carry, initial, lifetime, lambda s: self._sessions.pop(s, None)
        )
        self._sessions[session] = None
        return session

    @_without_autocast
    def step_all(
        self, steps: Iterable[tuple[Steps, Any]], *, return_exceptions: bool = False
    ) -> list[Any]:
        """One step of each of many sessions at once, in order: (session, arguments), these as in
        `map`. Raises the first error after all have ended, as `map` does.
        """
        with without_collecting():
            tickets: list[Ticket] = []
            try:
                for step in steps:
                    try:
                        tickets.append(self._step(*pair_of(step)))
                    except Exception as error:
                        tickets.append(Ticket.failed(error))
                return self._results(tickets, return_exceptions)
            finally:
                for ticket in tickets:
                    ticket.abandon()  # those that never ran
                del tickets  # before the collector looks at what is left

    def _step(self, session: Steps, given: Any) -> Ticket:
        """A session's next step, wanted as its session says, else as this compiled model does."""
        if session.of is not self._serving:
            raise UnsupportedError(
                what="a step of another compiled model's session", remedy="call its own step_all"
            )
        ticket = session.begin(*as_call(given))
        if ticket.wish is NO_WISH and self._wants is not NOTHING_WANTED:
            ticket.wish = self._wants.from_now()
        return ticket

    def warmup(self, *args: Any, **kwargs: Any) -> Compiled:
        """Trace, plan and make kernels for an example request ahead of the first; runs it once."""
        result = self(*args, **kwargs)
        if isinstance(result, Stream):
            for _ in result:
                pass
        return self

    # -- what it is made of --

    @property
    def cells(self) -> Mapping[str, CellView]:
        """The cells found so far, by name."""
        return Cells(self._compiler)

    @property
    def graph(self) -> networkx.MultiDiGraph:
        """The networkx dataflow graph of the last traced request."""
        graph = self._compiler.traced_graph()
        if graph is None:
            raise CellcError("nothing was traced yet; call the compiled model or warmup() first")
        return graph.nx

    @property
    def stages(self) -> list[Stage]:
        """Every stage of the last traced request, printable."""
        return list(self._compiler.stages)

    def stats(self) -> dict[str, Any]:
        """Counters since compile: launches, rows, mean_batch (rows a step), requests (done,
        failed, cancelled, refused past `max_queue`; of those with deadlines the ones that were
        `shed`, and the ones that ended `late`), plans, what is queued and kept now, and, of the
        last requests, ms until they ran and until they were answered; `workers`: some of it by
        worker.
        """
        return figures_of(self._serving, self._compiler)

    def profile(self, path: str | os.PathLike[str] | None = None) -> Profile:
        """`with compiled.profile("trace.json") as p:` notes launches, what the host does, queue
        lengths and requests, and writes a trace for https://ui.perfetto.dev.
        """
        return Profile(self._serving.all_counters, str(self._device), path, self._check_open)

    def refresh(self) -> None:
        """The model's weights changed: use the new ones from the next request on. Cells and plans
        are kept.
        """
        self._check_open()
        if self._source is not self._compiler.model:
            with torch.no_grad():
                for name, tensor in named_tensors(self._source).items():
                    named_tensors(self._compiler.model)[name].copy_(tensor)
        self._serving.refresh()

    # -- end --

    def close(self) -> None:
        """Finish what is queued, free everything, leave no thread behind. Calling it again does
        nothing.
        """
        if not self._serving.closed:
            self._serving.close()
            for session in list(self._sessions):
                session.end(MODEL_CLOSED)
            self._compiler.kernels.clear()
            self._finalizer()

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            what="pickling a compiled model, as for another process",
            remedy="send the model, and call cellc.compile there",
        )

    def __enter__(self) -> Compiled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _generates(ticket: Ticket) -> bool:
    return isinstance(ticket.entry, Leg) and ticket.entry.generates


class _Model:
    """A compiled model as its sessions see it."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled, self.serving = compiled, compiled._serving

    def ticket(self, args: Any, kwargs: Any) -> Ticket:
        return self._compiled._ticket(args, kwargs)

    def again(self, tensors: Late) -> Ticket | None:
        compiled = self._compiled
        compiled._check_open()
        ticket = compiled._intake.again(tensors)
        if ticket is not None and compiled._wants is not NOTHING_WANTED:
            ticket.wish = compiled._wants.from_now()
        return ticket

    @property
    def dropped_plans(self) -> int:
        return self._compiled._compiler.plans.dropped

    def run(self, tickets: Sequence[Ticket]) -> None:
        self._compiled._run(tickets)

    def send(self, ticket: Ticket) -> Future[Any]:
        return self._compiled._send(ticket)

    async def answer(self, ticket: Ticket) -> Any:
        return await self._compiled._answer(ticket)

    def wants(self, deadline: float | None, priority: int) -> Wants:
        return make_wants(deadline, priority, self._compiled._policy)


def _close_backends(backends: Sequence[Backend]) -> None:
    for backend in backends:
        close = getattr(backend, "close", None)
        if close is not None:
            close()
