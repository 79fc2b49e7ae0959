"""Sessions: streaming state between calls.

Duty: give the carried arguments of a step what the step before returned at their paths. A step is
a request like any other, batched with whatever else is ready; the state stays where the results
are made. Used through `Compiled.session`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from cellc.copier import Copier
from cellc.errors import RequestError, SessionBusy, SessionClosed, UnsupportedError
from cellc.ticket import Ticket
from cellc.wants import Wants

_MISSING: Any = object()


class Model(Protocol):
    """What a session needs of its compiled model."""

    def ticket(self, args: Any, kwargs: Any) -> Ticket: ...

    def run(self, tickets: Sequence[Ticket]) -> None: ...

    def send(self, ticket: Ticket) -> Future[Any]: ...

    async def answer(self, ticket: Ticket) -> Any: ...

    def wants(self, deadline: float | None, priority: int) -> Wants: ...

    @property
    def serving(self) -> object: ...


class Carry:
    """Which arguments are what a result holds, checked against a forward's arguments."""

    def __init__(self, paths: Mapping[str, str], names: Sequence[str]) -> None:
        self.paths = {
            name: [(step, int(step) if step.isdecimal() else None) for step in str(path).split(".")]
            for name, path in paths.items()
        }
        strange = [name for name in paths if name not in names]
        if strange:
            raise UnsupportedError(
                what=f"carry of {', '.join(strange)}",
                remedy=f"name arguments of the forward: {', '.join(names)}",
            )
        self.free = [name for name in names if name not in paths]  # given at each step
        self._carried = [name if name in paths else None for name in names]  # by argument
        self._items = [(n, p[0][1]) for n, p in self.paths.items() if len(p) == 1]

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A step's arguments."""
        if not kwargs and len(args) == len(self.free) and len(state) == len(self.paths):
            following = iter(args)
            return tuple([next(following) if n is None else state[n] for n in self._carried]), {}
        if len(args) > len(self.free) or not self.paths.keys().isdisjoint(kwargs):
            given = ", ".join([*map(str, range(len(args))), *kwargs])
            raise RequestError(
                argument=", ".join(self.paths),
                got=f"arguments {given}",
                expected=f"a step of ({', '.join(self.free)}); the session carries the rest",
            )
        return (), {**dict(zip(self.free, args, strict=False)), **kwargs, **state}

    def of(self, result: Any) -> dict[str, Any]:
        """The next step's state; tensors of its own, whatever the caller does to the result."""
        if type(result) is tuple and len(self._items) == len(self.paths):
            try:
                return {name: _owned(result[place]) for name, place in self._items}  # type: ignore[index]
            except (TypeError, IndexError):
                pass  # said below
        return {name: _owned(_at(result, path, name)) for name, path in self.paths.items()}


def _owned(state: Any) -> Any:
    if type(state) is torch.Tensor:
        return state.clone()
    if type(state) is tuple and all(type(x) is torch.Tensor for x in state):
        return tuple([x.clone() for x in state])
    return pytree.tree_map(_own, state)


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with tensors of its own, objects that hold tensors included."""
    return Copier(lambda leaf, _: _own(leaf)).call((), state)[1]


def _at(result: Any, path: Sequence[tuple[str, int | None]], name: str) -> Any:
    found = result
    for step, place in path:
        if place is not None and type(found) is tuple and place < len(found):
            found = found[place]
        else:
            found = _inside(found, step, place, name, path)
    return found


def _inside(
    found: Any, step: str, place: int | None, name: str, path: Sequence[tuple[str, int | None]]
) -> Any:
    following: Any = _MISSING
    there: Any = type(found).__name__
    if isinstance(found, Mapping):
        there = list(found)
        following = found[step] if step in found else found.get(place, _MISSING)
    elif isinstance(found, (tuple, list)) and place is not None:
        there = f"{len(found)} items"
        following = found[place] if place < len(found) else _MISSING
    elif not isinstance(found, torch.Tensor):
        following = getattr(found, step, _MISSING)
    if following is _MISSING:
        whole = ".".join(step for step, _ in path)
        raise UnsupportedError(
            what=f"carry={{{name!r}: {whole!r}}}: the result has no {step!r}",
            remedy=f"give the path of {name} in what the forward returns; there is: {there}",
        )
    return following


class Steps:
    """Ways to ask for a step, of a session or of one whose steps have options."""

    _model: Model

    @property
    def of(self) -> object:
        """What runs its steps."""
        return self._model.serving

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        """The request of the next step."""
        raise NotImplementedError

    def _release(self, ticket: Ticket) -> None:
        """A step does not run any more."""
        raise NotImplementedError

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step: what the forward returns. Raises SessionBusy while another step runs,
        SessionClosed after `close` or expiry.
        """
        ticket = self.begin(args, kwargs)
        try:
            self._model.run([ticket])
        finally:
            ticket.abandon()  # if it never ran
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """One step without waiting; the next may begin once its future is done. Cancelling the
        future before the step runs leaves the state as it was.
        """
        future = self._sent(args, kwargs).future
        assert future is not None
        return future

    def _sent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        ticket = self.begin(args, kwargs)
        try:
            future = self._model.send(ticket)
        except BaseException:
            ticket.abandon()
            raise
        future.add_done_callback(lambda done: self._release(ticket) if done.cancelled() else None)
        return ticket

    async def step_async(self, *args: Any, **kwargs: Any) -> Any:
        """One step in asyncio. Cancelling the task cancels the step, and leaves the state as it was
        before.
        """
        return await self._model.answer(self._sent(args, kwargs))


class Session(Steps):
    """State of one stream, made by `Compiled.session`. Steps follow each other; many sessions step
    at the same time. Safe in threads; also a context manager.
    """

    def __init__(
        self,
        model: Model,
        carry: Carry,
        initial: Mapping[str, Any] | None,
        lifetime: float | None,
        ended: Callable[[Session], None],
    ) -> None:
        strange = [name for name in initial or {} if name not in carry.paths]
        if strange:
            raise RequestError(
                argument=", ".join(strange),
                got="an initial value",
                expected=f"values of what is carried: {', '.join(carry.paths)}",
            )
        self._model, self._carry, self._lifetime, self._ended = model, carry, lifetime, ended
        self._initial = _copied(initial or {})
        self._state = self._initial
        self._lock = threading.RLock()
        self._running: Ticket | None = None  # the step that runs
        self._worker = -1  # where the state is
        self._beginning = False
        self._closed: str | None = None
        self.used = time.monotonic()

    def with_options(self, *, deadline: float | None = None, priority: int = 0) -> Steps:
        """The same session, whose steps have a deadline and a priority: see
        `Compiled.with_options`.
        """
        return _Wanted(self, self._model.wants(deadline, priority))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        """The request of the next step."""
        with self._lock:
            if self._closed is not None or self._lifetime is not None:
                self.check()
            if self._beginning or self._running is not None:
                raise SessionBusy()
            self._beginning, state = True, self._state
        try:
            ticket = self._model.ticket(*self._carry.call(args, kwargs, state))
            ticket.before_end = self._end
            ticket.worker, ticket.stays = self._worker, self._worker >= 0
            self._running = ticket
        finally:
            self._beginning = False
        return ticket

    @property
    def _busy(self) -> bool:
        return self._beginning or self._running is not None

    def _end(self, ticket: Ticket) -> None:
        """A step is through: take its state. After an error the state is as before."""
        with self._lock:
            if self._running is not ticket:
                return  # it was cancelled
            if ticket.error is None and not ticket.dropped and self._closed is None:
                try:
                    self._state, self._worker = self._carry.of(ticket.result), ticket.worker
                except Exception as error:
                    ticket.error = error
            self._released()

    def _release(self, ticket: Ticket) -> None:
        """A step does not run any more."""
        with self._lock:
            if self._running is ticket:
                self._released()

    def _released(self) -> None:
        self._running = None
        if self._lifetime is not None:
            self.used = time.monotonic()

    def check(self) -> None:
        """Raises SessionClosed where it cannot be used any more."""
        self.expire()
        if self._closed is not None:
            raise SessionClosed(why=self._closed)

    def expire(self) -> None:
        """Close it if it was idle for longer than its lifetime."""
        with self._lock:
            late = self._lifetime is not None and time.monotonic() - self.used > self._lifetime
            if late and not self._busy:
                self._close("it was idle for longer than its lifetime")

    def reset(self) -> None:
        """Begin anew, with the initial state."""
        with self._lock:
            self.check()
            if self._busy:
                raise SessionBusy()
            self._state = self._initial

    @property
    def state(self) -> dict[str, Any]:
        """What is carried into the next step, by argument: copies."""
        self.check()
        return _copied(self._state)

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def close(self) -> None:
        """Free the state. Calling it again does nothing."""
        self._close("close() was called")

    def _close(self, why: str) -> None:
        with self._lock:
            if self._closed is not None:
                return
            self._closed = why
            self._state = self._initial = {}
        self._ended(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class _Wanted(Steps):
    """A session whose steps are wanted otherwise."""

    def __init__(self, session: Session, wants: Wants) -> None:
        self._session, self._model, self._wants = session, session._model, wants

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        wish = self._wants.from_now()
        ticket = self._session.begin(args, kwargs)
        ticket.wish = wish
        return ticket

    def _release(self, ticket: Ticket) -> None:
        self._session._release(ticket)
