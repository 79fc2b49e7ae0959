"""Learning: what an operation gives, found out once by tracing it alone.

Duty: make an `Op` of a call or a torch function that was never met in this form: its inputs, and
what tracing says of its results. A call that cannot be alone is transparent: its body runs. Weights
that stand where values of the request stand elsewhere are operations without inputs. Stands between
`frontends.inplace` and `frontends.recording`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from cellc.errors import CellcError, ForwardError, ValueReadError
from cellc.frontends import stub as stubs
from cellc.frontends.callees import Callee, loop_of, refusal
from cellc.frontends.inplace import InPlace
from cellc.frontends.segments import Op, Study, fill, input_rows, template_of
from cellc.frontends.signature import has_values, holds_stub, line_of
from cellc.frontends.stub import CannotUnfold, Stack, Stub, StubType
from cellc.frontends.traced_writes import was_written

MANY_VALUES = 64  # variants of one call site by Python values: more, and its body runs instead

TRANSPARENT: Any = object()  # in place of an operation: the body of the call has to run
# What traces an operation alone: (what runs it, its inputs, is it a cell, are there lists among
# them, is it a call); None for a call that cannot be one operation.
StudyAlone: TypeAlias = """Callable[
    [Callable[..., Any], Sequence[tuple[StubType, int]], bool, bool, bool], Study | None
]"""


@dataclass
class ReadsValue:
    """A torch function that reads a value of a tensor; `why` it cannot be an operation."""

    why: str


class _Given:
    """A callable that gives one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


class Learner(InPlace):
    """A recorder of operations; `study` traces one alone."""

    def __init__(self, study: StudyAlone, device: torch.device) -> None:
        super().__init__()
        self._study, self.device = study, None if device.type == "cpu" else device
        self.ops: dict[Any, Any] = {}  # by place in the code and form
        self.all_ops: list[Op] = []
        self.components: dict[int, int] = {}  # by place in the code
        self._sites: dict[Any, int] = {}
        self._variants: dict[Hashable, int] = {}
        self._codes: list[Any] = []  # kept alive: they are known by id

    def _learn(
        self,
        run: Callable[..., Any],
        call: tuple[Any, Any],
        key: Any,
        name: str,
        frame: Any,
        callee: Callee | None,
    ) -> Any:
        """Trace an operation alone; `TRANSPARENT` for a call whose body has to run instead."""
        inputs: list[tuple[StubType, int]] = []
        args, kwargs = call
        slots = [0]
        template = (
            template_of(args, inputs, slots),
            {k: template_of(kwargs[k], inputs, slots) for k in sorted(kwargs)},
        )
        if callee is not None and self._varies(callee, call):
            self.ops[key] = TRANSPARENT
            return TRANSPARENT

        def alone(*tensors: Any) -> Any:
            args, kwargs = fill(template, tensors)
            result = run(*args, **kwargs)
            if any(map(was_written, pytree.tree_leaves((args, kwargs)))):
                raise CannotUnfold("an argument is written in place")
            return result

        study = self._studied(alone, inputs, name, frame, callee)
        if isinstance(study, ReadsValue):
            self.ops[key] = study
            return study
        if study is None:
            if callee is None:
                raise CannotUnfold(f"{name} has no fixed result", line_of(frame) if frame else "")
            self.ops[key] = TRANSPARENT
            return TRANSPARENT
        origin = line_of(frame) if frame is not None else ""
        if frame is not None:
            self._codes.append(frame.f_code)
        op = Op(
            run,
            template,
            inputs,
            study,
            name,
            origin,
            len(self.all_ops),
            callee is not None,
            callee is not None and callee.own,
            self._sites.setdefault(key[:3], len(self._sites)),
            frame.f_lasti if frame is not None else -1,
            loop_of(frame) if frame is not None else 0,
        )
        op.component = self.components.get(op.site, 0)
        self.ops[key] = op
        self.all_ops.append(op)
        return op

    def _varies(self, callee: Callee, call: tuple[Any, Any]) -> bool:
        """Take in a form of a call; True where Python values make too many of them."""
        for k, x in enumerate(call[0]):
            if holds_stub(x) and k not in callee.row_arguments:
                callee.row_arguments.add(k)
                self.relearn = True
        variants = self._variants[callee.key] = self._variants.get(callee.key, 0) + 1
        return variants > MANY_VALUES and not callee.marked and has_values(call)

    def _studied(
        self,
        alone: Callable[..., Any],
        inputs: list[tuple[StubType, int]],
        name: str,
        frame: Any,
        callee: Callee | None,
    ) -> Study | ReadsValue | None:
        rows = list(input_rows(inputs))
        self.on, target = False, stubs.current.target
        stubs.current.target, stubs.current.learning = None, True
        marked_calls = stubs.current.marked_calls
        try:
            lists = any(count == 1 for _, count in inputs)
            called = callee is not None
            own = callee is not None and callee.own
            study = self._study(alone, rows, own, lists, called)
            if study is None and callee is not None and callee.marked:
                holds_cells = callee.holds_cells or stubs.current.marked_calls > marked_calls
                if not holds_cells:  # it is a cell because the user says so, loops and all
                    study = self._study(alone, rows, False, lists, called)
            return study
        except (CannotUnfold, CellcError) as error:
            if callee is None:
                return _refused(error, name, frame)
            if callee.marked:
                raise refusal(callee, error, frame) from error
            return None
        finally:
            self.on, stubs.current.target, stubs.current.learning = True, target, False

    def _weights_as_rows(self, callee: Callee, args: Any) -> Any:
        """A weight where other calls have a value of the request (a learned first state) is a row
        like theirs.
        """
        for k in callee.row_arguments:
            if k < len(args) and is_weight(args[k]):
                args = (*args[:k], self._row_of(args[k]), *args[k + 1 :])
        return args

    def _row_of(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)([self._row_of(y) for y in x])
        return self._as_row(x) if is_weight(x) else x

    def _as_row(self, tensor: torch.Tensor) -> Any:
        key = ("weight", id(tensor))
        op = self.ops.get(key)
        if op is None:
            op = self._learn(_Given(tensor), ((), {}), key, "weight", None, None)
        made = self._constant(op) if op.study.constant is not None else self._record(op, [], None)
        return self.watch(op, (), {}, made) if self.writing else made


def is_weight(x: Any) -> bool:
    """A tensor of the model, or a tuple or list that holds one."""
    kind = type(x)
    if kind is tuple or kind is list:
        return any(map(is_weight, x))
    return kind is not Stub and kind is not Stack and isinstance(x, torch.Tensor)


def _refused(error: BaseException, name: str, frame: Any) -> ReadsValue:
    """What a torch function is that could not be traced alone; raises where that ends the run."""
    if isinstance(error, ValueReadError):
        return ReadsValue(f"{name} reads a value")
    if isinstance(error, ForwardError) and error.__cause__ is not None:
        raise error.__cause__ from None  # as PyTorch raises it
    raise CannotUnfold(f"{name}: {error}", line_of(frame) if frame else "") from error
