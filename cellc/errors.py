"""Errors: one class per kind of mistake, each ending with its remedy.

`CellcError` is the root. A message is a template on the class; where the mistake lies in the user's
own code the file and line are appended. `assert` in this package means a bug of ours, these classes
mean theirs.
"""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MODEL_CLOSED = "its model was closed"


class CellcError(Exception):
    """Root of every error that cellc raises on purpose."""

    template = "{message}"

    def __init__(self, message: str = "", *, origin: str | None = None, **fields: object) -> None:
        self.origin = origin
        text = self.template.format(message=message, **fields)
        super().__init__(f"{text}\n  at {origin}" if origin else text)


class RequestError(CellcError):
    """A request does not fit the model; it failed alone, before it shared a batch."""

    template = "argument {argument!r}: got {got}, expected {expected}"


class ForwardError(CellcError):
    """The model's own forward raised while it was traced on shapes alone."""

    template = "the model's forward raised {kind}: {message}"

    def __init__(self, message: str = "", *, kind: str, origin: str | None = None) -> None:
        super().__init__(message, kind=kind, origin=origin)
        self.reason, self.kind = message, kind


class ValueReadError(CellcError):
    """The forward read a tensor's value, which is not known while tracing."""

    template = (
        "the forward reads the value of a tensor ({what}), so its structure depends on data; "
        "make the structure depend on shapes or on Python values passed as arguments"
    )


class UnsupportedError(CellcError):
    """An operation, a type or an option that cellc cannot handle."""

    template = "{what} is not supported; {remedy}"


class BackendError(CellcError):
    """A backend cannot run here, or its compiler failed."""

    template = "backend {backend!r}: {message}"


class ClosedError(CellcError):
    """The compiled model, or a session of it, was used after close()."""

    template = "{what} is closed; call cellc.compile again"


class SessionClosed(ClosedError):
    """A session was used after it was closed, or after it expired."""

    template = "this session is closed ({why}); {remedy}"

    def __init__(self, why: str) -> None:
        model = why == MODEL_CLOSED
        remedy = "call cellc.compile again" if model else "open another with session()"
        super().__init__(why=why, remedy=remedy)


class SessionBusy(CellcError):
    """A session was asked for a step while another of its steps runs."""

    template = "a step of this session still runs; wait for its result before the next"


class GeneratorForward(UnsupportedError):
    """The forward is a generator, where one that returns is needed."""


class CallbackWait(UnsupportedError):
    """A callback of a future waits for a request, which its own thread would have to run."""


class StepsError(CellcError):
    """A forward read more values than `max_steps` allows: it may never end."""

    template = (
        "the forward read {limit} values and asks for more; it may never end: give it a limit of "
        "its own, or raise options={{'max_steps': ..}}"
    )


class RequestTimeout(CellcError, TimeoutError):
    """A request took longer than the `timeout` that its caller gave."""

    template = (
        "the request did not end within {seconds} s; raise options={{'timeout': ..}}, or give "
        "its loop a limit"
    )


class CallsError(CellcError):
    """A request has more calls of cells than `max_calls` allows."""

    template = (
        "the request has {calls} calls of cells, the limit is {limit}; send less at once, or raise "
        "options={{'max_calls': ..}}"
    )


class TooLarge(CellcError):
    """One request needs more memory than all may have."""

    template = (
        "the request alone needs {needed} bytes of rows, the limit is {limit}; send less at once, "
        "or raise options={{'memory_limit': ..}}"
    )


class WorkerError(CellcError):
    """The thread that ran a request met what it should not; the cause says what."""

    template = "the thread that ran the request was ended by {what}; send the request again"


class Overloaded(CellcError):
    """The queue is full; try again later or raise `max_queue`."""

    template = (
        "{waiting} requests are waiting, the limit is {limit}; retry later or raise max_queue"
    )


class DeadlineError(CellcError, TimeoutError):
    """A request was shed, since it cannot end before its deadline; others keep theirs."""

    template = (
        "the request was shed: its deadline is in {left:.1f} ms, and it cannot end by then beside "
        "the others; give it more time, or send fewer"
    )


class PolicyError(CellcError):
    """A policy of the user's own chose what it may not."""

    template = "pick() of policy {policy} returned {got}; return one of the queues it is given"


class VerifyError(CellcError):
    """The IR broke one of its own rules: a bug in cellc, please report it."""

    template = (
        "after {stage}: {message}; this is a bug in cellc, please report it with CELLC_DUMP output"
    )


class UsageError(CellcError):
    """Wrong use of the command line or of an option (exit code 2)."""


FORKED = UnsupportedError(
    what="a compiled model in a forked process", remedy="call cellc.compile in the child process"
)


def hint(wrong: str, names: Iterable[str]) -> str:
    """What was meant, where a name is like it; else what there is.

    >>> hint("polcy", ["policy", "weights"])
    'did you mean policy?'
    """
    names = list(names)
    near = difflib.get_close_matches(wrong, names)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def twin(error: BaseException) -> BaseException:
    """An exception like another, for one more caller: what either adds to it stays its own."""
    kind = type(error)
    try:
        base: Any = next(b for b in kind.__mro__ if b.__module__ == builtins.__name__)
        _, args, *state = base.__reduce__(error)
        made = kind.__new__(kind, *args)
        base.__init__(made, *args)
        if state:
            made.__setstate__(*state)
        if "__notes__" in made.__dict__:
            made.__dict__["__notes__"] = list(made.__dict__["__notes__"])
    except Exception:  # it cannot be made so
        return error
    made.__cause__, made.__context__ = error.__cause__, error.__context__
    made.__suppress_context__ = error.__suppress_context__
    return made.with_traceback(error.__traceback__)


def distinct(errors: Sequence[BaseException]) -> list[BaseException]:
    """Errors of several callers: each its own, where some are the same object."""
    seen: set[int] = set()
    made = []
    for error in errors:
        made.append(twin(error) if id(error) in seen else error)
        seen.add(id(error))
    return made
