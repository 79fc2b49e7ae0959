"""Sessions: streaming state between calls.

Duty: give the carried arguments of a step what the step before returned at their paths. A step is
a request like any other, batched with whatever else is ready; the state stays where the results
are made. Used through `Compiled.session`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from cellc.carry import Blocks, Carry, Held, Kept, Late, copied, form_key
from cellc.errors import RequestError, SessionBusy, SessionClosed, UnsupportedError
from cellc.ticket import Ticket
from cellc.waiting import Future
from cellc.wants import Wants


class Model(Protocol):
    """What a session needs of its compiled model."""

    def ticket(self, args: Any, kwargs: Any) -> Ticket: ...

    def again(self, tensors: Late) -> Ticket | None: ...

    @property
    def dropped_plans(self) -> int: ...

    def run(self, tickets: Sequence[Ticket]) -> None: ...

    def send(self, ticket: Ticket) -> Future[Any]: ...

    async def answer(self, ticket: Ticket) -> Any: ...

    def wants(self, deadline: float | None, priority: int) -> Wants: ...

    @property
    def serving(self) -> object: ...


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
        self._initial = copied(initial or {})
        self._state = self._initial
        self._held: Held | None = None  # the state, not yet made
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
            self._beginning, state, held = True, self._state, self._held
        try:
            if held is not None:
                ticket = self._following(args, kwargs, *held)
            else:
                ticket = self._model.ticket(*self._carry.call(args, kwargs, state))
            ticket.before_end, ticket.carry = self._end, self._carry
            ticket.worker, ticket.stays = self._worker, self._worker >= 0
            self._running = ticket
        finally:
            self._beginning = False
        return ticket

    def _following(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Kept,
        blocks: Blocks,
        row: int,
    ) -> Ticket:
        """The request of a step after one whose state was kept."""
        model = self._model
        form = None if kwargs else kept.forms.get(form_key(args))
        if form is not None:
            ticket = model.again(Late(form, args, blocks, row))
            if ticket is not None:
                return ticket
        dropped = model.dropped_plans
        tensors, state = kept.made(blocks, row)
        ticket = model.ticket(*self._carry.call(args, kwargs, state))
        if not kwargs and ticket.call is None and ticket.draws is None:
            kept.learn(args, tensors, ticket.entry, ticket.tensors, dropped)
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
                    state = {} if ticket.kept else self._carry.of(ticket.result)
                    self._state, self._held, self._worker = state, ticket.kept, ticket.worker
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
                self.end("it was idle for longer than its lifetime")

    def reset(self) -> None:
        """Begin anew, with the initial state."""
        with self._lock:
            self.check()
            if self._busy:
                raise SessionBusy()
            self._state, self._held = self._initial, None

    @property
    def state(self) -> dict[str, Any]:
        """What is carried into the next step, by argument: copies."""
        with self._lock:
            self.check()
            state, held = self._state, self._held
        return copied(state if held is None else held[0].made(*held[1:])[1])

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def close(self) -> None:
        """Free the state. Calling it again does nothing."""
        self.end("close() was called")

    def end(self, why: str) -> None:
        """Close it, and say why to whoever asks for a step."""
        with self._lock:
            if self._closed is not None:
                return
            self._closed = why
            self._state = self._initial = {}
            self._held = None
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


def pair_of(step: Any) -> tuple[Steps, Any]:
    """What `step_all` is given of one step."""
    if isinstance(step, tuple) and len(step) == 2 and isinstance(step[0], Steps):
        return step
    raise UnsupportedError(
        what=f"a step_all of a {type(step).__name__}",
        remedy="give pairs of a session and its arguments: [(session, (x,)), ...]",
    )
