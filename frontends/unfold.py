"""Unfolding: a forward run on stubs, which records calls of cells only.

Duty: run the user's Python on `Stub`s and write down, for every stretch of operations that one
activation of a user's function does in a row, which stretch it is and which values it reads and
makes. A call of a module, of a module's method or of a function marked `@cellc.cell` that has
nothing but tensors for arguments and no recurrence inside is one operation: its body never runs
again. Comes in: a forward and a request; goes out, to `cellc.unfolder`: `Segment`s with their
instances as flat lists of numbers, from which plans are made by numpy.

What one operation gives (shapes, structure of its results) is learned once, by tracing it alone.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cellc.dtypes import DTYPE_NAMES
from cellc.errors import CellcError, UnsupportedError
from cellc.frontends import fold as folds
from cellc.frontends import stub as stubs
from cellc.frontends.memo import MAX_INSTANCES, MAX_MEMOS, Bases, Instance, Memo, Outside, Relative
from cellc.frontends.stub import CannotUnfold, FloatNumber, IntNumber, NumberSteers, Stack, Stub, StubType
from cellc.frontends.stubbing import Part
from cellc.frontends.tracer import replaying

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_STATIC = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
_NUMBERS = (IntNumber, FloatNumber)
_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
COMPARED = 24  # repetitions of a method that run all the same
LOOKED_INTO = 256  # calls of a method looked into for rows that leave it unseen
MAX_LEAVES = 8  # of a part that is kept: larger ones seldom repeat
SPARE = 1 << 48  # rows from here on stand for arguments of an observed function
MANY_VALUES = 64  # variants of one call site by Python values: more, and its body runs instead


class _Slot(NamedTuple):
    """Stands for a tensor in the arguments of an operation; `count` rows of a stack, or -1."""

    at: int
    count: int


class OutType(NamedTuple):
    """A tensor that an operation gives: its type, and how many rows it has as a stack, or -1."""

    type: StubType
    count: int


@dataclass(frozen=True)
class Study:
    """What tracing an operation alone said of it; None in place of one where it cannot be alone."""

    outputs: tuple[OutType, ...]
    returned: tuple[tuple[str, Any], ...]  # ("t", output) or ("v", value), one a leaf
    spec: Any
    constant: tuple[Hashable, ...] | None  # keys of its outputs where it depends on nothing
    positions: tuple[bool, ...]  # per input: would tracing take it apart along its first dimension?


class Op:
    """A call at one place of the user's code, with arguments of one form."""

    def __init__(
        self,
        run: Callable[..., Any],
        template: tuple[Any, Any],
        inputs: Sequence[tuple[StubType, int]],
        study: Study,
        name: str,
        origin: str,
        number: int,
        is_call: bool,
        is_cell: bool,
        site: int,
        offset: int,
        loop: int,
    ) -> None:
        self.run, self.template, self.inputs, self.study = run, template, tuple(inputs), study
        self.name, self.origin, self.number, self.is_call = name, origin, number, is_call
        self.site, self.offset = site, offset  # place in the code; in its function's bytecode
        self.loop = loop  # innermost loop of its function that it is in
        self.is_cell = is_cell  # a call of the user's own code: one cell, where it feeds itself
        self.component = 0  # of the graph of operations: 0 is none that feeds itself
        self.num_rows = sum(max(1, o.count) for o in study.outputs)
        self.alone: Segment | None = None  # one of this operation only, all it reads distinct
        self.single: StubType | None = None  # its result, where that is one row
        self.build: Callable[[int], Any] = self._rebuild
        outputs, leaves = study.outputs, study.returned
        if all(kind == "t" for kind, _ in leaves) and all(o.count < 0 for o in outputs):
            kinds = [outputs[v].type for _, v in leaves]
            plain = [v for _, v in leaves] == list(range(len(outputs)))
            if plain and len(kinds) == 1 and study.spec is None:
                self.single = kinds[0]
            elif plain and len(kinds) == 2 and study.spec == _PAIR:
                first, second = kinds
                self.build = lambda at: (Stub(at, first), Stub(at + 1, second))

    def __repr__(self) -> str:
        return f"{self.name} at {self.origin}"

    def _rebuild(self, at: int) -> Any:
        """The result, its rows numbered from `at` on."""
        made: list[Stub] = []
        for type, count in self.study.outputs:
            if count < 0:
                made.append(Stub(at, type))
                at += 1
            else:
                inner = StubType.of(type.shape[1:], type.dtype, type.device)
                made.append(Stack([Stub(at + i, inner) for i in range(count)]))
                at += count
        return self.fill(made)

    def fill(self, made: Sequence[Any]) -> Any:
        leaves = [made[v] if kind == "t" else v for kind, v in self.study.returned]
        return leaves[0] if self.study.spec is None else pytree.tree_unflatten(leaves, self.study.spec)

    def __call__(self, tensors: Sequence[Any]) -> list[Any]:
        """Run it truly: its output tensors, from its input rows."""
        args, kwargs = _fill(self.template, tensors)
        leaves = pytree.tree_leaves(self.run(*args, **kwargs))
        return [x for x in leaves if isinstance(x, torch.Tensor)]


LEAF = pytree.tree_structure(0)
_PAIR = pytree.tree_structure((0, 0))


def _fill(template: Any, tensors: Sequence[Any]) -> Any:
    if type(template) is _Slot:
        at, count = template
        return tensors[at] if count < 0 else torch.stack(list(tensors[at : at + count]))
    if type(template) is tuple:
        return tuple([_fill(x, tensors) for x in template])
    if type(template) is list:
        return [_fill(x, tensors) for x in template]
    if type(template) is dict:
        return {k: _fill(x, tensors) for k, x in template.items()}
    if isinstance(template, tuple):  # a named tuple
        return type(template)(*[_fill(x, tensors) for x in template])
    return template


class Segment:
    """Operations that one activation did in a row, all wired alike: a node of a trie by what comes
    next. Instance i reads rows reads[i * num_external ..] and made rows from made[i] on.
    """

    def __init__(self, before: Segment | None, op: Op | None, wiring: tuple[int, ...]) -> None:
        self.before, self.op, self.wiring = before, op, wiring
        self.next: dict[Any, Segment] = {}
        self.ops: tuple[Op, ...] = (*before.ops, op) if before and op else ()
        self.wirings: tuple[tuple[int, ...], ...] = (*before.wirings, wiring) if before and op else ()
        self.members = frozenset(self.ops)
        self.has_cell = any(o.is_cell for o in self.ops)
        self.num_rows = sum(o.num_rows for o in self.ops)
        external = [~w for ws in self.wirings for w in ws if w < 0]
        self.num_external = max(external, default=-1) + 1
        self.escaping: set[int] = set()  # outputs (over all its operations) read elsewhere
        self.templates: dict[Any, Any] = {}
        self.reads: list[int] = []
        self.made: list[int] = []
        self.more_reads: list[Any] = []  # arrays of the same, from memos
        self.more_made: list[Any] = []
        self.used: list[Segment] | None = None  # where segments with instances are listed
        self._sorted: Any = None

    def use(self) -> None:
        """An instance of it is written."""
        if not (self.made or self.more_made) and self.used is not None:
            self.used.append(self)

    def clear(self) -> None:
        self.reads, self.made, self.more_reads, self.more_made = [], [], [], []
        self._sorted = None

    def instances(self) -> tuple[Any, Any]:
        """(rows read [instances, inputs], first rows made [instances]), in order of time."""
        if self._sorted is None:
            made = np.concatenate([np.array(self.made, np.int64), *self.more_made])
            reads = np.concatenate([np.array(self.reads, np.int64), *self.more_reads])
            reads = reads.reshape(len(made), self.num_external)
            if not (made[1:] > made[:-1]).all():
                order = np.argsort(made)
                made, reads = made[order], reads[order]
            self._sorted = reads, made
        return self._sorted  # type: ignore[no-any-return]

    @property
    def outputs(self) -> list[OutType]:
        return [o for op in self.ops for o in op.study.outputs]

    def external_types(self) -> list[StubType]:
        found: dict[int, StubType] = {}
        for op, wiring in zip(self.ops, self.wirings, strict=True):
            for (type, _), w in zip(_input_rows(op.inputs), wiring, strict=True):
                if w < 0:
                    found[~w] = type
        return [found[i] for i in range(self.num_external)]

    def compute(self, external: Sequence[Any]) -> list[Any]:
        """Run its operations truly; every output tensor, in order."""
        rows: list[Any] = []
        made: list[Any] = []
        for op, wiring in zip(self.ops, self.wirings, strict=True):
            with replaying(("op", op.site), op.origin):
                outputs = op([external[~w] if w < 0 else rows[w] for w in wiring])
            made += outputs
            for (_, count), tensor in zip(op.study.outputs, outputs, strict=True):
                rows += [tensor] if count < 0 else list(tensor.unbind(0))
        return made

    def __repr__(self) -> str:
        return " + ".join(map(str, self.ops))


def _input_rows(inputs: Sequence[tuple[StubType, int]]) -> Iterator[tuple[StubType, int]]:
    for type, count in inputs:
        if count < 0:
            yield type, 1
        else:
            inner = StubType.of(type.shape[1:], type.dtype, type.device)
            for _ in range(count):
                yield inner, 1


class RefusedCell(UnsupportedError):
    """A marked cell that cannot be one."""


class _Structural(Exception):
    """An argument that is neither tensors nor small values."""


_TRANSPARENT: Any = object()
_VARIES: Any = object()
_ARITHMETIC = frozenset(
    f"{prefix}{name}{suffix}"
    for name in "add radd sub rsub mul rmul truediv rtruediv".split()
    for prefix, suffix in (("__", "__"), ("", ""))
) | {"div"}


class Callee:
    """Something whose calls may be operations: a module, a bound method, a marked function."""

    def __init__(
        self, name: str, run: Callable[..., Any], marked: bool, key: Hashable, own: bool
    ) -> None:
        self.name, self.run, self.marked, self.key = name, run, marked, key
        module = getattr(run, "__self__", None)
        inner = list(module.modules())[1:] if isinstance(module, nn.Module) else []
        self.holds_cells = any(_is_marked(m) for m in inner)
        self.own = own  # code of the user's, not of torch's
        self.transparent = False  # met arguments that are structure: its body runs
        self.repeats = True  # what its body does depends on its arguments alone
        self.compared = self.looked_into = 0  # calls for which that was looked at
        self.row_arguments: set[int] = set()  # positions where a call had a value of the request


@dataclass
class Returned:
    """What a forward gave: (rows of each tensor, its form), and the other leaves."""

    tensors: list[tuple[list[int], OutType]]
    leaves: list[tuple[str, Any]]
    spec: Any


class Recorder:
    """Runs forwards on stubs. One a model; `study` traces an operation alone."""

    def __init__(
        self,
        study: Callable[[Callable[..., Any], Sequence[tuple[StubType, int]], bool, bool], Study | None],
        device: torch.device,
    ) -> None:
        self._study, self._device = study, None if device.type == "cpu" else device
        self.ops: dict[Any, Any] = {}
        self.roots: dict[int, Segment] = {}
        self.used: list[Segment] = []  # segments that have instances
        self.all_ops: list[Op] = []
        self.callees: dict[Hashable, Callee] = {}
        self.constants: dict[int, Hashable] = {}  # by row number, from -2 down
        self._constant_rows: dict[Hashable, int] = {}
        self._sites: dict[Any, int] = {}
        self._numbers: dict[Any, Any] = {}  # by place in the code: the number met there
        self._variants: dict[Hashable, int] = {}
        self._user_code: dict[int, bool] = {}
        self._codes: list[Any] = []  # kept alive: they are known by id
        self.on = False
        self.relearn = False  # something was learned that earlier runs did not know
        self.parts: dict[int, Part] = {}  # what the request is made of, by id
        self.data: tuple[int, int, int, int] = (0, 0, 0, 0)  # first int, float, tensor row; end
        self.memos: dict[Any, Memo] = {}
        self.sites: dict[Hashable, folds.Site] = {}
        self.folding: set[Hashable] = set()  # sites with calls that are not written yet
        self.take_apart: set[int] = set()  # rows of tensors that are needed as lists of rows
        self._spare = 0
        self._thread = 0
        self.next_row = 0
        self._start()

    # -- a run --

    def _start(self) -> None:
        self._events: list[Any] = []  # instances and replays of this request
        self.spans: list[tuple[Callee, int, int, list[int]]] = []  # calls to look into
        self._frame: Any = None
        self._segment: Segment | None = None
        self._component = self._loop = -1
        self._external: dict[int, int] = {}  # slots of the segment's inputs, by row
        self._reads: list[int] = []  # and their rows
        self._first = self._offset = 0

    def reset(self) -> None:
        """Forget instances; keep what was learned."""
        for segment in self.used:
            segment.clear()
        self.used.clear()
        for site in self.sites.values():
            site.folds = []
        self.folding.clear()
        self.next_row = 0
        self._spare = SPARE
        self._start()

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Returned:
        """One request on stubs; the caller is inside `watching`."""
        self.on, stubs.current.target = True, self
        try:
            result = forward(*args, **kwargs)
        finally:
            self.on, stubs.current.target = False, None
            self._cut()
            self._frame = None
        return self._returned(result)

    def _returned(self, result: Any) -> Returned:
        if type(result) is Stub:
            return Returned([([result.id], OutType(result.type, -1))], [("t", 0)], LEAF)
        leaves, spec = pytree.tree_flatten(result)
        tensors: list[tuple[list[int], OutType]] = []
        kept: list[tuple[str, Any]] = []
        for leaf in leaves:
            kind = type(leaf)
            if kind is Stub:
                kept.append(("t", len(tensors)))
                tensors.append(([leaf.id], OutType(leaf.type, -1)))
            elif kind is Stack:
                kept.append(("t", len(tensors)))
                rows = [self._row(x) for x in leaf.items]
                tensors.append((rows, OutType(leaf.type, len(rows))))
            elif kind in _NUMBERS:
                raise NumberSteers(leaf.row)
            elif isinstance(leaf, (torch.Tensor, *_STATIC)) and not isinstance(leaf, _STATIC):
                raise CannotUnfold("a weight is returned as it is")
            elif isinstance(leaf, _STATIC):
                kept.append(("v", leaf))
            else:
                raise CannotUnfold(f"an object of {kind.__name__} is returned")
        return Returned(tensors, kept, spec)

    def _row(self, x: Any) -> int:
        if type(x) is not Stub:
            raise CannotUnfold("a stack of stacks is returned")
        return x.id

    # -- what the forward does --

    def call(self, callee: Callee, args: Any, kwargs: Any, frame: Any) -> Any:
        """A call of a callee: one operation, or its body."""
        if not self.on or self._thread != threading.get_ident():
            return callee.run(*args, **kwargs)
        if callee.transparent:
            return self._body(callee, args, kwargs)
        sign: list[Any] = [id(frame.f_code), frame.f_lasti, callee]
        rows: list[int] = []
        add = sign.append
        try:
            for k, x in enumerate(args):
                kind = type(x)
                if kind is Stub:
                    add(x.type)
                    rows.append(x.id)
                elif kind is tuple:
                    if id(x) in self.parts:
                        raise _Structural("part of the request's structure")
                    add(len(x))
                    for y in x:
                        if type(y) is Stub:
                            add(y.type)
                            rows.append(y.id)
                        else:
                            self._sign(y, sign, rows)
                elif isinstance(x, torch.Tensor) and kind is not Stack:
                    x = self._weight_argument(callee, k, x)
                    self._sign(x, sign, rows)
                    args = (*args[:k], x, *args[k + 1 :])
                else:
                    self._sign(x, sign, rows)
            for name in sorted(kwargs):
                add(name)
                self._sign(kwargs[name], sign, rows)
        except _Structural:
            if callee.marked:
                raise RefusedCell(
                    what=f"the cell {callee.name} called with Python structure",
                    remedy="give a cell tensors, tuples and lists of them, and plain values only",
                    origin=_line(frame),
                ) from None
            callee.transparent = self.relearn = True
            return self._body(callee, args, kwargs)
        op = self.ops.get(tuple(sign))
        if op is None:
            op = self._learn(callee.run, (args, kwargs), tuple(sign), callee.name, frame, callee)
        if op is _TRANSPARENT:
            return callee.run(*args, **kwargs)
        if op.study.constant is not None:
            return self._constant(op)
        return self._record(op, rows, frame)

    def _body(self, callee: Callee, args: Any, kwargs: Any) -> Any:
        """Run a call's body, or copy what it did on a part of the same shape."""
        if kwargs or not callee.repeats:
            return callee.run(*args, **kwargs)
        key: list[Any] = [callee]
        bases: tuple[int, ...] | None = None
        for x in args:
            kind = type(x)
            part = self.parts.get(id(x))
            if part is not None:
                if part[0] < 0 or bases is not None or part[4] - part[1] + part[6] - part[3] > MAX_LEAVES:
                    return callee.run(*args)
                bases = part[1:]
                key.append(part[0])
            elif kind is IntNumber and bases is None:
                bases = (x.row, 0, 0, x.row + 1, 0, 0)
                key.append(IntNumber)
            elif kind is FloatNumber and bases is None:
                bases = (0, x.row, 0, 0, x.row + 1, 0)
                key.append(FloatNumber)
            elif kind is Stub and bases is None and self.data[2] <= x.id < self.data[3]:
                bases = (0, 0, x.id, 0, 0, x.id + 1)
                key.append(x.type)
            elif kind in (int, bool, str, type(None)):
                key.append((kind, x))
            else:
                return callee.run(*args)
        if bases is None:
            return callee.run(*args)
        name = tuple(key)
        memo = self.memos.get(name)
        if memo is None or (memo.repeated == 0 and callee.compared < COMPARED):
            return self._observed(callee, args, name, memo, bases)
        self._cut()
        at = self.next_row
        self.next_row = at + memo.rows
        ints, floats, tensors = bases[0], bases[1], bases[2]
        memo.replays += (at, ints, floats, tensors)
        self._events.append((memo, at, ints, floats, tensors))
        return memo.build((0, at, ints, floats, tensors))

    def _observed(
        self, callee: Callee, args: Any, name: Any, known: Memo | None, bases: tuple[int, ...]
    ) -> Any:
        """Run a call's body, and keep what it did."""
        self._cut()
        first_event, start = len(self._events), self.next_row
        result = callee.run(*args)
        self._cut()
        if self._events and len(self._events) - first_event > MAX_INSTANCES:
            return result
        relative = Relative(Bases(*bases), self.data, start)
        instances: list[Instance] = []
        try:
            for event in self._events[first_event:]:
                if type(event[0]) is Memo:
                    instances += [relative.moved(i, *event[1:]) for i in event[0].instances]
                else:
                    segment, index = event
                    width = segment.num_external
                    rows = segment.reads[index * width : (index + 1) * width]
                    reads = tuple([relative.row(r) for r in rows])
                    instances.append(Instance(segment, reads, segment.made[index] - start))
            memo = Memo(instances, self.next_row - start, relative.result(result))
        except Outside:
            return result
        if len(instances) > MAX_INSTANCES:
            return result
        if known is None:
            if len(self.memos) >= MAX_MEMOS:
                self.memos.clear()
            self.memos[name] = memo
            if callee.looked_into < LOOKED_INTO:
                callee.looked_into += 1
                leaves = [x.id for x in pytree.tree_leaves(result) if type(x) is Stub]
                self.spans.append((callee, start, self.next_row, leaves))
        elif known.same(memo):
            known.repeated += 1
            callee.compared += 1
        else:
            self.distrust(callee)
        return result

    # -- folds over arrays --

    def fold(self, structure: Any, node: Any, leaf: Any, nodes: Any, leaves: Any) -> Any:
        """[states of the results] of `cellc.Dag.fold`; None where its calls have to be run."""
        if not self.on or self._thread != threading.get_ident():
            return None
        states = folds.fold(self, self.sites, structure, node, leaf, nodes, leaves)
        return None if states is None else [states]

    def spare_row(self) -> int:
        """A row that stands for an argument while a function is observed."""
        self._spare += 1
        return self._spare

    def observe(self, run: Callable[[], Any]) -> Any:
        """([(segment, reads, first row)], first row made, rows made, result) of a call that leaves
        no trace; None where it cannot be alone.
        """
        self._cut()
        first_event, start = len(self._events), self.next_row
        result = run()
        self._cut()
        events = []
        plain = True
        for event in reversed(self._events[first_event:]):
            if type(event[0]) is Memo:
                del event[0].replays[-4:]
                plain = False
                continue
            segment, _ = event
            width = segment.num_external
            reads = segment.reads[len(segment.reads) - width :]
            del segment.reads[len(segment.reads) - width :]
            events.append((segment, reads, segment.made.pop()))
            if not segment.made:
                self.used.remove(segment)
        del self._events[first_event:]
        rows, self.next_row = self.next_row - start, start
        return (events[::-1], start, rows, result) if plain else None

    def distrust(self, callee: Callee) -> None:
        """A method whose calls do not depend on their arguments alone: its body always runs."""
        callee.repeats = False
        self.relearn = True
        self.memos = {k: m for k, m in self.memos.items() if k[0] is not callee}

    def expand(self) -> None:
        """Write what was replayed."""
        for memo in self.memos.values():
            if memo.replays:
                memo.expand()
        for key in self.folding:
            self.sites[key].expand()
        self.folding.clear()

    def leaks(self) -> bool:
        """Do rows leave a call by another way than its result? Then its body always runs."""
        if not self.spans:
            return False
        until = np.full(self.next_row, self.next_row + 1, np.int64)
        whose = np.full(self.next_row, -1, np.int64)
        for k, (_, start, end, results) in enumerate(self.spans):
            kept = until[results], whose[results]
            rows = np.arange(start, end)[until[start:end] > end]
            until[rows], whose[rows] = end, k
            until[results], whose[results] = kept
        found = set()
        for segment in self.used:
            reads, made = segment.instances()
            late = (reads >= 0) & (until[np.maximum(reads, 0)] <= made[:, None])
            found.update(whose[reads[late]].tolist())
        for k in found:
            self.distrust(self.spans[k][0])
        return bool(found)

    def _weight_argument(self, callee: Callee, k: int, x: torch.Tensor) -> Any:
        """A weight where other calls have a value of the request (a learned first state) is a row
        like theirs.
        """
        if k in callee.row_arguments:
            return self._as_row(x)
        return x

    def _as_row(self, tensor: torch.Tensor) -> Any:
        key = ("weight", id(tensor))
        op = self.ops.get(key)
        if op is None:
            op = self._learn(_Given(tensor), ((), {}), key, "weight", None, None)
        return self._constant(op) if op.study.constant is not None else self._record(op, [], None)

    def function(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        """A torch function that met stubs or numbers, or makes a tensor."""
        if not self.on or self._thread != threading.get_ident():
            raise CannotUnfold("a value of the request is used from outside")
        while not self._is_user(frame.f_code):
            frame = frame.f_back
        if func in _MAKERS or func is torch.Tensor.new_tensor:
            made = self._tensor_of(func, args, kwargs)
            if made is not None:
                return made
        special = _STACKS.get(func)
        if special is not None:
            made = special(args, kwargs)
            if made is not None:
                return made
        site = (id(frame.f_code), frame.f_lasti, func)
        if _name(func) in _ARITHMETIC and not kwargs:
            args = self._scalars(site, args)
        sign: list[Any] = [*site]
        rows: list[int] = []
        try:
            for x in args:
                self._sign(x, sign, rows)
            for name in sorted(kwargs):
                sign.append(name)
                self._sign(kwargs[name], sign, rows)
        except _Structural as error:
            raise CannotUnfold(f"{_name(func)} of {error}", _line(frame)) from None
        if not rows and _tells_form(func):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "").endswith("_") and not func.__name__.endswith("__"):
            raise CannotUnfold(f"{func.__name__} writes in place", _line(frame))
        if kwargs.get("out") is not None:
            raise CannotUnfold("out= writes in place", _line(frame))
        key = tuple(sign)
        op = self.ops.get(key)
        if op is None:
            op = self._learn(func, (args, kwargs), key, _name(func), frame, None)
        if op.study.constant is not None:
            return self._constant(op)
        return self._record(op, rows, frame)

    def _scalars(self, site: Any, args: Any) -> Any:
        """A Python number that differs from call to call is a value, not part of the operation."""
        for k, x in enumerate(args):
            kind = type(x)
            if kind is int or kind is float:
                seen = self._numbers.setdefault((site, k), x)
                if seen is not _VARIES and seen != x:
                    self._numbers[site, k] = _VARIES
                    self.relearn = True
                    seen = _VARIES
                if seen is _VARIES:
                    dtype = torch.int64 if kind is int else torch.get_default_dtype()
                    name = "i64" if kind is int else DTYPE_NAMES[dtype]
                    form = StubType.of((), dtype, self._device)
                    row = self._constant_row(("full", (), name, x), form)
                    args = (*args[:k], Stub(row, form), *args[k + 1 :])
        return args

    def _sign(self, x: Any, sign: list[Any], rows: list[int]) -> None:
        """Append the form of an argument, and the rows in it."""
        kind = type(x)
        if kind is Stub:
            sign.append(x.type)
            rows.append(x.id)
        elif kind is Stack:
            sign.append(Stack)
            sign.append(x.type)
            for item in x.items:
                if type(item) is not Stub:
                    raise CannotUnfold("a stack of stacks")
                rows.append(item.id)
        elif kind in (tuple, list, torch.Size) or (
            issubclass(kind, tuple) and hasattr(kind, "_fields")
        ):
            if id(x) in self.parts:
                raise _Structural("part of the request's structure")
            sign.append((kind, len(x)))
            for y in x:
                self._sign(y, sign, rows)
        elif kind is dict:
            if id(x) in self.parts:
                raise _Structural("part of the request's structure")
            sign.append((dict, *x))
            for y in x.values():
                self._sign(y, sign, rows)
        elif kind is slice:
            for y in (x.start, x.stop, x.step):
                self._sign(y, sign, rows)
        elif kind in _NUMBERS:
            raise _Structural("a number")
        elif kind in _STATIC:
            sign.append(kind)
            sign.append(repr(x) if kind is float else x)
        elif isinstance(x, torch.Tensor):
            sign.append(("weight", id(x)))
        elif x is Ellipsis or isinstance(x, _STATIC):
            sign.append(x)
        else:
            raise _Structural(f"an object of {kind.__name__}")

    def _tensor_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor made of numbers of the request; None where there are none."""
        data = args[-1] if func is torch.Tensor.new_tensor else (args[0] if args else kwargs.get("data"))
        if type(data) in _NUMBERS:
            made: Any = data.stub
            if data.kind is float:
                made = made.to(torch.get_default_dtype())
        elif isinstance(data, (list, tuple)) and data and _has_number(data):
            made = self._nested(data)
        else:
            return None
        dtype = kwargs.get("dtype")
        if func is torch.Tensor.new_tensor and dtype is None:
            dtype = args[0].dtype
        return made if dtype is None or made.dtype is dtype else made.to(dtype)

    def _nested(self, data: Any) -> Any:
        items = []
        for x in data:
            if type(x) in _NUMBERS:
                items.append(x.stub if x.kind is int else x.stub.to(torch.get_default_dtype()))
            elif isinstance(x, (list, tuple)):
                items.append(self._nested(x))
            else:
                items.append(torch.tensor(x))
        return torch.stack(items)

    # -- recording --

    def _record(self, op: Op, rows: list[int], frame: Any) -> Any:
        segment = self._segment
        at = self.next_row
        if (
            segment is None
            or frame is not self._frame
            or (op.component != self._component and op.component)
            or op.loop != self._loop
            or op.offset < self._offset  # a loop went round
            or op in segment.members
            or (op.is_cell and segment.has_cell and op.component)
        ):
            if segment is not None:
                self._cut()
            self._frame, self._component, self._loop = frame, op.component, op.loop
            self._first = at
            external = self._external = dict(zip(rows, range(len(rows))))  # noqa: B905
            if op.alone is not None and (op.is_cell or len(external) == len(rows)):
                self._reads = rows
                following = op.alone
            else:
                external.clear()
                self._reads = []
                root = self.roots.setdefault(op.component, Segment(None, None, ()))
                following = self._following(root, op, self._wire(op, rows))
                if len(self._reads) == len(rows):
                    op.alone = following
        else:
            wiring = self._wire(op, rows)
            following = segment.next.get((op, *wiring)) or self._following(segment, op, wiring)
        self._segment, self._offset = following, op.offset
        self.next_row = at + op.num_rows
        single = op.single
        return Stub(at, single) if single is not None else op.build(at)

    def _wire(self, op: Op, rows: list[int]) -> list[int]:
        """Where an operation's rows come from: a row of the segment, or ~(input of the segment).

        A constant is an input of its own at each use, and so is every argument of a cell: whether
        two are the same row is chance.
        """
        external, reads, first = self._external, self._reads, self._first
        wiring = []
        for row in rows:
            if first <= row < SPARE:
                wiring.append(row - first)
                continue
            slot = None if op.is_cell or row < 0 else external.get(row)
            if slot is None:
                slot = len(reads)
                reads.append(row)
                external.setdefault(row, slot)
            wiring.append(~slot)
        return wiring

    def _following(self, segment: Segment, op: Op, wiring: list[int]) -> Segment:
        key = (op, *wiring)
        following = segment.next.get(key)
        if following is None:
            following = segment.next[key] = Segment(segment, op, tuple(wiring))
        following.used = self.used
        return following

    def _cut(self) -> None:
        """End the segment that is being recorded."""
        segment = self._segment
        if segment is not None:
            if not (segment.made or segment.more_made):
                self.used.append(segment)
            self._events.append((segment, len(segment.made)))
            segment.reads += self._reads
            segment.made.append(self._first)
            self._segment = None

    def _constant(self, op: Op) -> Any:
        """The result of an operation that depends on nothing: rows with numbers below zero."""
        made: list[Stub] = []
        keys = iter(op.study.constant or ())
        for type, count in op.study.outputs:
            inner = StubType.of(type.shape[1:], type.dtype, type.device) if count >= 0 else type
            items = [Stub(self._constant_row(next(keys), inner), inner) for _ in range(max(1, count))]
            made.append(items[0] if count < 0 else Stack(items))
        return op.fill(made)

    def _constant_row(self, key: Hashable, type: StubType) -> int:
        row = self._constant_rows.get((key, type))
        if row is None:
            row = self._constant_rows[key, type] = -2 - len(self._constant_rows)
            self.constants[row] = key
        return row

    # -- learning --

    def _learn(
        self,
        run: Callable[..., Any],
        call: tuple[Any, Any],
        key: Any,
        name: str,
        frame: Any,
        callee: Callee | None,
    ) -> Any:
        """Trace an operation alone; `_TRANSPARENT` for a call whose body has to run instead."""
        inputs: list[tuple[StubType, int]] = []
        args, kwargs = call
        slots = [0]
        template = (
            _template(args, inputs, slots),
            {k: _template(kwargs[k], inputs, slots) for k in sorted(kwargs)},
        )
        if callee is not None:
            for k, x in enumerate(call[0]):
                if _holds_stub(x) and k not in callee.row_arguments:
                    callee.row_arguments.add(k)
                    self.relearn = True
            variants = self._variants[callee.key] = self._variants.get(callee.key, 0) + 1
            if variants > MANY_VALUES and not callee.marked and _has_values(call):
                self.ops[key] = _TRANSPARENT
                return _TRANSPARENT
        rows = list(_input_rows(inputs))

        def alone(*tensors: Any) -> Any:
            args, kwargs = _fill(template, tensors)
            return run(*args, **kwargs)

        self.on, target = False, stubs.current.target
        stubs.current.target = None
        marked_calls = stubs.current.marked_calls
        try:
            study = self._study(
                alone,
                rows,
                callee is not None and callee.own,
                any(count == 1 for _, count in inputs),
            )
        except (CannotUnfold, CellcError) as error:
            if callee is None:
                raise CannotUnfold(f"{name}: {error}", _line(frame) if frame else "") from error
            if callee.marked:
                raise _refused(callee, error, frame) from error
            study = None
        finally:
            self.on, stubs.current.target = True, target
        if study is None:
            if callee is None:
                raise CannotUnfold(f"{name} has no fixed result", _line(frame) if frame else "")
            if callee.marked and stubs.current.marked_calls == marked_calls and not callee.holds_cells:
                raise _refused(callee, None, frame)
            self.ops[key] = _TRANSPARENT
            return _TRANSPARENT
        origin = _line(frame) if frame is not None else ""
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
            _loop_of(frame) if frame is not None else 0,
        )
        self.ops[key] = op
        self.all_ops.append(op)
        return op

    def _is_user(self, code: Any) -> bool:
        known = self._user_code.get(id(code))
        if known is None:
            self._codes.append(code)
            known = not code.co_filename.startswith((_TORCH, _HERE, "<string>"))
            self._user_code[id(code)] = known
        return known

    # -- interception --

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, calls of these modules and of their own methods come to `call` (in this thread,
        while a request is run).
        """
        self._thread = threading.get_ident()
        placed: list[tuple[dict[str, Any], str, Any]] = []
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit * 4 + 200)  # our frames are on the stack, too
        try:
            for name, module in modules.items():
                self._watch(name, module, placed)
            with torch.no_grad(), _Functions(self):
                yield
        finally:
            sys.setrecursionlimit(limit)
            for place, attribute, before in reversed(placed):
                if before is _TRANSPARENT:
                    place.pop(attribute, None)
                else:
                    place[attribute] = before

    def _watch(
        self, name: str, module: nn.Module, placed: list[tuple[dict[str, Any], str, Any]]
    ) -> None:
        place = vars(module)

        def put(attribute: str, value: Any) -> None:
            placed.append((place, attribute, place.get(attribute, _TRANSPARENT)))
            place[attribute] = value

        for child, value in module._modules.items():
            if value is not None and child not in place and not hasattr(type(module), child):
                put(child, value)  # found without nn.Module.__getattr__
        if name and module._compiled_call_impl is None:
            callee = self._callee(("module", name), name, module._call_impl, _is_marked(module))
            put("_compiled_call_impl", self._interceptor(callee, 2))
        for method, function in _methods(type(module)).items():
            callee = self._callee(
                ("method", name, method), f"{name}.{method}" if name else method,
                types.MethodType(function, module), False,
            )
            if method not in place and not (callee.transparent and not callee.repeats):
                put(method, self._interceptor(callee, 1))

    def _callee(
        self, key: Hashable, name: str, run: Callable[..., Any], marked: bool
    ) -> Callee:
        callee = self.callees.get(key)
        if callee is None:
            own = not isinstance(getattr(run, "__self__", None), nn.Module) or not type(
                run.__self__  # type: ignore[attr-defined]
            ).__module__.startswith("torch.")
            callee = self.callees[key] = Callee(name, run, marked, key, own)
        callee.run = run
        return callee

    def _interceptor(self, callee: Callee, depth: int) -> Callable[..., Any]:
        record, frame_of = self.call, sys._getframe

        def called(*args: Any, **kwargs: Any) -> Any:
            return record(callee, args, kwargs, frame_of(depth))

        called.callee = callee  # type: ignore[attr-defined]
        return called

    def marked(self, function: Callable[..., Any], args: Any, kwargs: Any, frame: Any) -> Any:
        """A call of a function or method marked `@cellc.cell`."""
        owner = args[0] if args and isinstance(args[0], nn.Module) else None
        run: Callable[..., Any] = function
        if owner is not None:
            run, args = types.MethodType(function, owner), args[1:]
        key = ("marked", id(function), id(owner))
        name = getattr(function, "__qualname__", "cell")
        return self.call(self._callee(key, name, run, True), args, kwargs, frame)


class _Given:
    """A callable that gives one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


class _Functions(TorchFunctionMode):
    """Sees every torch function of a run, those without stubs too: they make constants."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.on or self._recorder._thread != threading.get_ident():
            return func(*args, **(kwargs or {}))
        return self._recorder.function(func, args, kwargs or {}, sys._getframe(1))


def _template(x: Any, inputs: list[tuple[StubType, int]], at: list[int]) -> Any:
    kind = type(x)
    if kind is Stub or kind is Stack:
        count = -1 if kind is Stub else len(x.items)
        inputs.append((x.type, count))
        slot = _Slot(at[0], count)
        at[0] += max(1, count)
        return slot
    if kind is list:
        return [_template(y, inputs, at) for y in x]
    if kind is dict:
        return {k: _template(y, inputs, at) for k, y in x.items()}
    if isinstance(x, tuple) and kind is not torch.Size:
        made = [_template(y, inputs, at) for y in x]
        return tuple(made) if kind is tuple else kind(*made)
    return x


def _has_number(data: Any) -> bool:
    return any(
        type(x) in _NUMBERS or (isinstance(x, (list, tuple)) and _has_number(x)) for x in data
    )


def _holds_stub(x: Any) -> bool:
    return type(x) in (Stub, Stack) or (
        isinstance(x, (tuple, list)) and any(_holds_stub(y) for y in x)
    )


def _has_values(call: Any) -> bool:
    """Do its arguments hold Python numbers or strings?"""
    return any(isinstance(x, (int, float, str)) and not isinstance(x, bool)
               for x in pytree.tree_leaves(call))


def _tells_form(func: Any) -> bool:
    """A function that says something about a tensor of the model, and makes none."""
    return _name(func) in _FORMS


_FORMS = frozenset(
    "__get__ size dim ndim numel nelement stride is_floating_point is_complex is_contiguous "
    "data_ptr element_size get_device type __len__ __repr__ __format__ is_tensor __hash__ "
    "result_type promote_types can_cast get_default_dtype is_grad_enabled".split()
)


def _name(func: Any) -> str:
    return getattr(func, "__name__", None) or type(func).__name__


def _line(frame: Any) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _stack(args: Any, kwargs: Any) -> Any:
    items = args[0] if args else kwargs.get("tensors")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 0 or not isinstance(items, (list, tuple)) or not items:
        return None
    if all(type(x) is Stub and x.type is items[0].type for x in items):
        return Stack(items)
    return None


def _cat(args: Any, kwargs: Any) -> Any:
    items = args[0] if args else kwargs.get("tensors")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 0 or not isinstance(items, (list, tuple)) or not items:
        return None
    if all(type(x) is Stack and x.items[0].type is items[0].items[0].type for x in items):
        return Stack([y for x in items for y in x.items])
    return None


def _unbind(args: Any, kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return tuple(args[0].items) if type(args[0]) is Stack and dim == 0 else None


def _flip(args: Any, kwargs: Any) -> Any:
    if type(args[0]) is Stack and len(args) > 1:
        return args[0].flip(*args[1:]) if args[1:] in (((0,),), ([0],), (0,)) else None
    return None


_STACKS: dict[Any, Callable[[Any, Any], Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.unbind: _unbind,
    torch.flip: _flip,
}


@functools.cache
def _methods(kind: type) -> dict[str, Any]:
    """Methods that a module's class defines outside torch."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.split(".")[0] == "torch" or base is object:
            continue
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                found[name] = value
    found.pop("forward", None)
    return {n: f for n, f in found.items() if not getattr(f, "_cellc_cell", False)}


def _is_marked(module: nn.Module) -> bool:
    return bool(getattr(type(module), "_cellc_cell", False))


def _loop_of(frame: Any) -> int:
    """The innermost loop of a function that its frame is in, by where its body begins; 0: none."""
    at = frame.f_lasti
    around = [(end - start, start) for start, end in _loops(frame.f_code) if start <= at <= end]
    return min(around)[1] if around else 0


@functools.lru_cache(maxsize=4096)
def _loops(code: types.CodeType) -> list[tuple[int, int]]:
    """Stretches of bytecode that jumps backward repeat."""
    return [
        (i.argval, i.offset)
        for i in dis.get_instructions(code)
        if "JUMP" in i.opname and isinstance(i.argval, int) and i.argval < i.offset
    ]


def _refused(callee: Callee, error: BaseException | None, frame: Any) -> CellcError:
    if isinstance(error, CellcError):
        reason = str(error).splitlines()[0]
    elif error is None:
        reason = "it holds a loop whose state feeds itself"
    else:
        reason = "it uses a value of the request that is none of its arguments"
    return RefusedCell(
        what=f"the cell {callee.name}: {reason}",
        remedy="a cell takes all it needs as arguments, reads no values, and is one step",
        origin=_line(frame) if frame is not None else None,
    )
