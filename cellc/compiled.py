"""Compiled models: what `cellc.compile` returns.

Duty: the public face: bind and check a request, plan it, hand it to the engine. The main path is
three files: this one, `cellc.compiler` (how a request never seen becomes a plan) and `cellc.engine`
(how plans run).
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from cellc.compiler import Compiler
from cellc.copier import Copier
from cellc.engine import Engine
from cellc.errors import (
    CellcError,
    ClosedError,
    GeneratorForward,
    Overloaded,
    RequestError,
    UnsupportedError,
    ValueReadError,
    distinct,
)
from cellc.forests import Wanted
from cellc.frontends.drawing import Draws
from cellc.launch import Backend
from cellc.legs import Entry, Leg
from cellc.modules import named_tensors, without_collecting
from cellc.options import Options
from cellc.passes import PassOptions
from cellc.request import Request, Structure, as_call
from cellc.sessions import Carry, Session
from cellc.stages import Stage
from cellc.streams import Stream, pieces_of
from cellc.ticket import Ticket
from cellc.views import Cells, CellView

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


class Compiled:
    """A model whose cells are batched across requests; made by `cellc.compile`, safe in threads."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        backend: Backend,
        device: torch.device,
        options: Options,
        *,
        batch_dim: int | None,
        max_batch: int | None,
        max_queue: int | None,
        dtype: torch.dtype | None,
        source: Any,
        carry: Mapping[str, str] | None = None,
    ) -> None:
        self._compiler = Compiler(model, backend, device, PassOptions(options.fold_bytes))
        self._engine = Engine(
            self._compiler,
            max_batch=max_batch,
            max_queue=max_queue,
            policy=options.policy,
            memory_limit=options.memory_limit,
            max_steps=options.max_steps,
            timeout=options.timeout,
        )
        self._batch_dim, self._max_queue = batch_dim, max_queue
        self._batch_outputs: dict[Any, list[int | None]] = {}
        self._dtype, self._device, self._source = dtype, device, source
        self._carry = Carry(carry, self._compiler.arguments.names) if carry is not None else None
        self._sessions: dict[Session, None] = {}  # open ones
        self._looked = 0.0  # when those that expired were last closed
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _close_backend, backend)

    # -- requests --

    @_without_autocast
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One request; equals `model(*args, **kwargs)` in eval mode.

        With `batch_dim`, a call is as many requests as its tensors have there, results stacked
        again. Raises CellcError, or what the request itself raises.
        """
        if self._batch_dim is not None:
            return self._batched(args, kwargs)
        return self._one(args, kwargs)

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ticket = self._ticket(args, kwargs)
        if _generates(ticket):
            return Stream(self._engine, ticket)
        self._run([ticket])
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    @_without_autocast
    def map(self, requests: Iterable[Any], *, return_exceptions: bool = False) -> list[Any]:
        """Many requests at once, in order. A tuple is positional arguments, a dict keywords,
        anything else one argument.

        Raises the first error, after all requests have ended; with `return_exceptions`, a request's
        error stands in place of its result.
        """
        calls = [as_call(r) for r in requests]
        if self._batch_dim is not None:
            return self._map_batches(calls, return_exceptions)
        with without_collecting():  # of what is made here, nothing is garbage
            return self._results(self._tickets(calls), return_exceptions)

    def _map_batches(
        self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], return_exceptions: bool
    ) -> list[Any]:
        results: list[Any] = []
        first: Exception | None = None
        for i, (args, kwargs) in enumerate(calls):
            try:
                results.append(self._batched(args, kwargs))
            except Exception as error:
                first = first or _noted(error, i, len(calls))
                results.append(error)
        if first is not None and not return_exceptions:
            raise first
        return results

    def _run(self, tickets: Sequence[Ticket]) -> None:
        """Queue requests, and block until they are done."""
        try:
            self._engine.enqueue(tickets)
            self._engine.run(tickets)
        except (ClosedError, Overloaded):  # none is queued
            raise
        except BaseException:
            self._engine.cancel(tickets)
            raise

    @_without_autocast
    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """One request without waiting: a `concurrent.futures.Future`. Tensors are copied now. The
        result of a generator is the list of its pieces.
        """
        return self._send(self._ticket(args, kwargs))

    def _send(self, ticket: Ticket) -> Future[Any]:
        ticket.future = Future()
        self._engine.enqueue([self._owned(ticket)])
        self._engine.start()
        return ticket.future

    def _owned(self, ticket: Ticket) -> Ticket:
        ticket.tensors = [t.detach().clone() for t in ticket.tensors]
        if ticket.call is not None:
            ticket.call = Copier(lambda leaf, _: leaf.detach().clone()).call(*ticket.call)
        return ticket

    async def submit_async(self, *args: Any, **kwargs: Any) -> Any:
        """One request in asyncio."""
        return await asyncio.wrap_future(self.submit(*args, **kwargs))

    @_without_autocast
    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        """One request of a forward that is a generator: an iterator over what it yields, each piece
        as soon as its cells have run. `close()` cancels the request and frees its rows.
        """
        return Stream(self._engine, self._generating(args, kwargs))

    def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """The same in asyncio: `async for piece in compiled.astream(x)`."""
        return pieces_of(self._engine, self._owned(self._generating(args, kwargs)))

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
        if self._carry is None or self._batch_dim is not None:
            raise UnsupportedError(
                what="a session of a model compiled without carry, or with batch_dim",
                remedy="cellc.compile(model, carry={'state': '1'}) says that the argument `state` "
                "of a step is output 1 of the step before",
            )
        now = time.monotonic()
        if now - self._looked > EXPIRY:
            self._looked = now
            for old in list(self._sessions):
                old.expire()
        session = Session(
            _Steps(self), self._carry, initial, lifetime, lambda s: self._sessions.pop(s, None)
        )
        self._sessions[session] = None
        return session

    @_without_autocast
    def step_all(
        self, steps: Iterable[tuple[Session, Any]], *, return_exceptions: bool = False
    ) -> list[Any]:
        """One step of each of many sessions at once, in order: (session, arguments), these as in
        `map`. Raises the first error after all have ended, as `map` does.
        """
        with without_collecting():
            tickets: list[Ticket] = []
            try:
                for session, given in steps:
                    try:
                        tickets.append(session.begin(*as_call(given)))
                    except Exception as error:
                        tickets.append(Ticket.failed(error))
                return self._results(tickets, return_exceptions)
            finally:
                for ticket in tickets:
                    ticket.abandon()  # those that never ran
                del tickets  # before the collector looks at what is left

    def _results(self, tickets: Sequence[Ticket], return_exceptions: bool) -> list[Any]:
        """Run tickets; their results in order."""
        queued = [t for t in tickets if not t.done]
        portion = self._max_queue or max(len(queued), 1)
        for start in range(0, len(queued), portion):
            part = queued[start : start + portion]
            self._run(part)
        failed = [t for t in tickets if t.error is not None]
        for ticket, error in zip(failed, distinct([t.error for t in failed]), strict=True):  # type: ignore[misc]
            ticket.error = error
        for i, ticket in enumerate(tickets):
            if ticket.error is not None and not return_exceptions:
                raise _noted(ticket.error, i, len(tickets))
        return [t.result if t.error is None else t.error for t in tickets]

    def warmup(self, *args: Any, **kwargs: Any) -> Compiled:
        """Trace, plan and make kernels for an example request ahead of the first; runs it once."""
        result = self(*args, **kwargs)
        if isinstance(result, Stream):
            for _ in result:
                pass
        return self

    def _ticket(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        self._check_open()
        compiler = self._compiler
        if not kwargs and self._dtype is None:
            known = compiler.known(args)
            if known is not None:
                return Ticket(known, list(args))
        bound = self._bind(args, kwargs)
        request = compiler.arguments.flatten(*bound)
        entry = compiler.cached(request.key)
        if entry is None:
            (found,) = self._planned([bound])
            if isinstance(found, Exception):
                raise found
            return found
        return _new_ticket(entry, request, bound)

    def _bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._compiler.arguments.bind(args, kwargs)
        return call if self._dtype is None else self._cast(call)

    def _tickets(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Ticket]:
        """Tickets in order, those of requests that cannot be planned already failed. Of sizes never
        seen, the extremes are planned first: those between need no tracing.
        """
        self._check_open()
        bound: list[Any] = []
        for call in calls:
            try:
                bound.append(self._bind(*call))
            except CellcError as error:
                bound.append(error)
        return [
            Ticket.failed(one) if isinstance(one, Exception) else one
            for one in self._planned(bound)
        ]

    def _planned(self, bound: Sequence[Any]) -> list[Ticket | Exception]:
        """Tickets of bound calls (or of errors, which are passed on)."""
        compiler = self._compiler
        while True:
            flat = [self._flattened(call) for call in bound]
            firsts: dict[Any, Request] = {}  # one a key: keys take long to hash
            leaders: list[Request | Exception] = []
            new: list[Wanted] = []
            for request, call in zip(flat, bound, strict=True):
                if isinstance(request, Exception):
                    leaders.append(request)
                    continue
                leaders.append(firsts.setdefault(request.key, request))
                if leaders[-1] is request:
                    request.entry = compiler.cached(request.key)
                    if request.entry is None:
                        new.append(Wanted(request, *call))
            any(compiler.unfolds(one.request) for one in new)  # one may decide for all
            chosen = [one for one in new if compiler.unfolds(one.request)]
            if not chosen or (compiler.unfold(chosen) and self._agrees(chosen)):
                tickets = self._traced(bound, flat, leaders)
                if tickets is not None:
                    return tickets

    def _flattened(self, call: Any) -> Request | Exception:
        if isinstance(call, Exception):
            return call
        try:
            return self._compiler.arguments.flatten(*call)
        except CellcError as error:
            return error

    def _traced(
        self,
        bound: Sequence[Any],
        flat: Sequence[Request | Exception],
        leaders: Sequence[Any],
    ) -> list[Ticket | Exception] | None:
        """Tickets, requests without an entry planned one by one. Of sizes never seen, the extremes
        are planned first: those between need no tracing. None where the forward turned out to read
        values: it is unfolded.
        """
        compiler = self._compiler
        out: list[Ticket | Exception | None] = [None] * len(flat)
        left: list[tuple[int, Structure, Any, Request]] = []
        for i, (request, call) in enumerate(zip(flat, bound, strict=True)):
            if isinstance(request, Exception):
                out[i] = request
            elif (entry := leaders[i].entry) is not None:
                out[i] = _new_ticket(entry, request, call)
            else:  # traced: Python numbers become part of it
                exact = compiler.arguments.flatten(*call, exact=True)
                left.append((i, exact.structure, call, exact))
        families: dict[Any, dict[tuple[int, ...], tuple[Structure, Any]]] = {}
        for _, structure, call, _ in left:
            families.setdefault(structure.family, {})[structure.sizes] = (structure, call)
        made: dict[Any, Entry | Exception] = {}
        keys = {structure.key: flat[i].key for i, structure, _, _ in left}  # type: ignore[union-attr]
        for members in families.values():
            for sizes in _extremes_first(list(members)):
                structure, call = members[sizes]
                made[structure.key] = self._entry(structure, call)
                reads = isinstance(made[structure.key], (ValueReadError, GeneratorForward))
                if reads and compiler.steer(keys[structure.key]):
                    return None
                if reads:
                    made[structure.key] = compiler.explained(
                        made[structure.key], keys[structure.key]
                    )
        for members in families.values():  # a later trace may have changed what earlier plans hold
            for structure, call in members.values():
                if not isinstance(made[structure.key], Exception):
                    made[structure.key] = self._entry(structure, call)
        for i, structure, _, exact in left:
            entry_or_error = made[structure.key]
            if not isinstance(entry_or_error, Exception):
                compiler.traced_instead(flat[i])  # type: ignore[arg-type]
            out[i] = (
                entry_or_error
                if isinstance(entry_or_error, Exception)
                else Ticket(entry_or_error, exact.tensors)
            )
        return out  # type: ignore[return-value]

    def _entry(self, structure: Structure, bound: Any) -> Entry | Exception:
        try:
            return self._compiler.entry(structure, *bound)
        except CellcError as error:
            return error

    def _agrees(self, requests: Sequence[Wanted]) -> bool:
        """Do the first unfolded requests give what the model gives? If not, requests are traced."""
        compiler = self._compiler
        for request, args, kwargs, *_ in requests:
            if compiler.unfolder.to_check <= 0:
                break
            if (entry := request.entry) is None:
                continue
            ticket = self._owned(_new_ticket(entry, request, (args, kwargs), trial=True))
            self._run([ticket])
            if ticket.error is not None:
                continue  # the request's own fault
            compiler.unfolder.to_check -= 1
            try:
                alike = _alike(ticket.result, compiler.own_result(args, kwargs))
            except Exception:
                continue  # the model refuses what can be planned: nothing to compare with
            if not alike and compiler.read_plainly():
                return False
            if not alike:
                compiler.distrust("a request run on stubs gave another result than the model")
                return False
        return True

    def _cast(self, call: Any) -> Any:
        def cast(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                return leaf.to(self._dtype)
            return leaf

        return pytree.tree_map(cast, call)

    # -- batches --

    def _batched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dim = self._batch_dim
        assert dim is not None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.dim() > dim]
        sizes = {t.shape[dim] for t in tensors}
        if len(sizes) != 1:
            raise RequestError(
                argument=", ".join(self._compiler.arguments.names),
                got=f"sizes {sorted(sizes)} in dimension {dim}",
                expected="one batch size in all tensors (batch_dim)",
            )
        (size,) = sizes
        if size == 0:
            raise RequestError(argument="batch", got="size 0", expected="at least one request")

        def piece(i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cut = [
                t.narrow(dim, i, 1) if isinstance(t, torch.Tensor) and t.dim() > dim else t
                for t in leaves
            ]
            call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(cut, spec)
            return call

        tickets = self._tickets([piece(i) for i in range(size)])
        queued = [t for t in tickets if not t.done]
        self._run(queued)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return self._stack([t.result for t in tickets], leaves, spec)

    def _stack(self, results: list[Any], leaves: list[Any], spec: Any) -> Any:
        flat = [pytree.tree_flatten(r) for r in results]
        dims = self._output_dims(leaves, spec, len(flat[0][0]))
        out = []
        for k, dim in enumerate(dims):
            pieces = [f[0][k] for f in flat]
            if dim is not None and isinstance(pieces[0], torch.Tensor):
                out.append(torch.cat(pieces, dim))
            else:
                out.append(pieces[0])
        return pytree.tree_unflatten(out, flat[0][1])

    def _output_dims(self, leaves: list[Any], spec: Any, count: int) -> list[int | None]:
        """Which dimension of each result is the batch: the one that doubles when the batch does."""
        dim = self._batch_dim
        assert dim is not None
        key = (
            str(spec),
            tuple((t.dim(), t.dtype) if isinstance(t, torch.Tensor) else None for t in leaves),
        )
        if key not in self._batch_outputs:
            shapes = [self._shapes(leaves, spec, dim, size) for size in (2, 3)]
            found: list[int | None] = []
            for two, three in zip(*shapes, strict=True):
                grown = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
                found.append(grown[0] if grown else None)
            self._batch_outputs[key] = found
        return self._batch_outputs[key]

    def _shapes(self, leaves: list[Any], spec: Any, dim: int, size: int) -> list[tuple[int, ...]]:
        """Result shapes for a batch of `size`, from a trace on shapes alone."""
        wide = [
            t.narrow(dim, 0, 1).expand(*t.shape[:dim], size, *t.shape[dim + 1 :]).contiguous()
            if isinstance(t, torch.Tensor) and t.dim() > dim
            else t
            for t in leaves
        ]
        args, kwargs = pytree.tree_unflatten(wide, spec)
        args, kwargs = self._compiler.arguments.bind(args, kwargs)
        return self._compiler.output_shapes(args, kwargs)

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
        """Counters since compile: launches, rows, mean_batch (rows a step), plans, queue, latency
        in ms.
        """
        counters = self._engine.counters
        latencies = np.array(counters.latencies) * 1e3
        p50, p90, p99 = np.quantile(latencies, (0.5, 0.9, 0.99)) if len(latencies) else (0, 0, 0)
        plans = self._compiler.counts
        return {
            "launches": counters.launches,
            "rows": counters.rows,
            "steps": counters.steps,
            "mean_batch": counters.rows / max(counters.steps, 1),
            "kernel_seconds": counters.seconds,
            "requests": counters.requests,
            "failed": counters.failed,
            "waiting": self._engine.num_waiting,
            "running": self._engine.num_running,
            **plans,
            "arena_bytes": self._engine.arena_bytes,
            "latency_ms": {"p50": float(p50), "p90": float(p90), "p99": float(p99)},
        }

    def refresh(self) -> None:
        """The model's weights changed: use the new ones from the next request on. Cells and plans
        are kept.
        """
        self._check_open()
        if self._source is not self._compiler.model:
            with torch.no_grad():
                for name, tensor in named_tensors(self._source).items():
                    named_tensors(self._compiler.model)[name].copy_(tensor)
        self._engine.refresh()

    # -- end --

    def _check_open(self) -> None:
        if self._engine.closed:
            raise ClosedError(what="this compiled model")
        if os.getpid() != self._pid:
            raise UnsupportedError(
                what="a compiled model in a forked process",
                remedy="call cellc.compile in the child process",
            )

    def close(self) -> None:
        """Finish what is queued, free everything, leave no thread behind. Calling it again does
        nothing.
        """
        if not self._engine.closed:
            self._engine.close()
            for session in list(self._sessions):
                session.close()
            self._compiler.kernels.clear()
            self._finalizer()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _alike(got: Any, want: Any) -> bool:
    """Equal but for rounding."""
    a, a_spec = pytree.tree_flatten(got)
    b, b_spec = pytree.tree_flatten(want)
    if a_spec != b_spec:
        return False
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, torch.Tensor):
            floats = isinstance(x, float) and isinstance(y, float)
            both_nan = floats and x != x and y != y
            close = both_nan or (floats and math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-3))
            if type(x) is not type(y) or not (x == y or close):
                return False
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        y = y.to(x.device)
        exact = not y.dtype.is_floating_point
        if not (torch.equal(x, y) if exact else torch.allclose(x, y, 1e-2, 1e-3, equal_nan=True)):
            return False
    return True


def _noted(error: BaseException, number: int, count: int) -> Any:
    """The error, saying which request of `map` it is about (Python 3.11 and later print that)."""
    if hasattr(error, "add_note") and count > 1:
        error.add_note(f"in request {number} of the {count} given at once")
    return error


def _new_ticket(entry: Entry, request: Request, call: Any, *, trial: bool = False) -> Ticket:
    """A ticket; one on `trial` leaves the request's generators as they are."""
    ticket = Ticket(entry, request.tensors, trial=trial)
    if request.nested and isinstance(entry, Leg):
        ticket.call = call
    if request.generators:
        given = [g.clone_state() for g in request.generators] if trial else request.generators
        ticket.draws = Draws(given)
    return ticket


def _generates(ticket: Ticket) -> bool:
    return isinstance(ticket.entry, Leg) and ticket.entry.generates


class _Steps:
    """A compiled model as its sessions see it."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def ticket(self, args: Any, kwargs: Any) -> Ticket:
        return self._compiled._ticket(args, kwargs)

    def run(self, tickets: Sequence[Ticket]) -> None:
        self._compiled._run(tickets)

    def send(self, ticket: Ticket) -> Future[Any]:
        return self._compiled._send(ticket)


def _close_backend(backend: Backend) -> None:
    close = getattr(backend, "close", None)
    if close is not None:
        close()


def _extremes_first(sizes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Order in which sizes are planned: largest, smallest, middle, next to smallest, the rest."""
    if len(sizes) <= 4:
        return sizes
    order = sorted(sizes, key=lambda s: (sum(s), s))
    picks = [order[-1], order[0], order[len(order) // 2], order[1]]
    return list(dict.fromkeys([*picks, *order]))
