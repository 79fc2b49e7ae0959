"""Segments: stretches of operations that one activation of a user's function does in a row.

Duty: what one operation is (a call at one place of the user's code) and what a segment is: a node
of a trie, with the rows that its instances read and make. Written by `frontends.writer`, read by
`cellc.unfolder`, which runs `Segment.compute` to trace it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from cellc.frontends.stub import Stack, Stub, StubType
from cellc.frontends.tracing import replaying

SPARE = 1 << 48  # rows from here on stand for arguments of an observed function


class Slot(NamedTuple):
    """Stands for a tensor in the arguments of an operation; `rows` of a stack, or -1."""

    at: int
    rows: int


class OutType(NamedTuple):
    """A tensor that an operation gives: its type, and how many rows it has as a stack, or -1."""

    type: StubType
    rows: int


@dataclass(frozen=True)
class Study:
    """What tracing an operation alone said of it; None in place of one where it cannot be alone."""

    outputs: tuple[OutType, ...]
    returned: tuple[tuple[str, Any], ...]  # ("t", output) or ("v", value), one a leaf
    spec: Any
    constant: tuple[Hashable, ...] | None  # keys of its outputs where it depends on nothing
    positions: tuple[bool, ...]  # per input: would tracing take it apart along its first dimension?
    moves: bool  # it looks up and moves rows, and computes nothing


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
        self.num_rows = sum(max(1, o.rows) for o in study.outputs)
        self.shown: dict[Any, Any] = {}  # what its results show, by the places of its inputs
        self.alone: Segment | None = None  # one of this operation only, all it reads distinct
        self.single: StubType | None = None  # its result, where that is one row
        self.build: Callable[[int], Any] = self._rebuild
        outputs, leaves = study.outputs, study.returned
        if all(kind == "t" for kind, _ in leaves) and all(o.rows < 0 for o in outputs):
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
        return self.filled(made)

    def filled(self, made: Sequence[Any]) -> Any:
        leaves = [made[v] if kind == "t" else v for kind, v in self.study.returned]
        return (
            leaves[0] if self.study.spec is None else pytree.tree_unflatten(leaves, self.study.spec)
        )

    def __call__(self, tensors: Sequence[Any]) -> list[Any]:
        """Run it truly: its output tensors, from its input rows."""
        args, kwargs = fill(self.template, tensors)
        leaves = pytree.tree_leaves(self.run(*args, **kwargs))
        return [x for x in leaves if isinstance(x, torch.Tensor)]


LEAF = pytree.tree_structure(0)
_PAIR = pytree.tree_structure((0, 0))


def fill(template: Any, tensors: Sequence[Any]) -> Any:
    if type(template) is Slot:
        at, count = template
        return tensors[at] if count < 0 else torch.stack(list(tensors[at : at + count]))
    if type(template) is tuple:
        return tuple([fill(x, tensors) for x in template])
    if type(template) is list:
        return [fill(x, tensors) for x in template]
    if type(template) is dict:
        return {k: fill(x, tensors) for k, x in template.items()}
    if isinstance(template, tuple):
        made = [fill(x, tensors) for x in template]
        return type(template)(*made) if hasattr(template, "_fields") else type(template)(made)
    return template


class Segment:
    """Operations that one activation did in a row, all wired alike: a node of a trie by what comes
    next. Instance i reads rows reads[i * num_external ..] and made rows from made[i] on.
    """

    def __init__(self, before: Segment | None, op: Op | None, wiring: tuple[int, ...]) -> None:
        self.before, self.op, self.wiring = before, op, wiring
        self.next: dict[Any, Segment] = {}
        self.ops: tuple[Op, ...] = (*before.ops, op) if before and op else ()
        self.wirings: tuple[tuple[int, ...], ...] = (
            (*before.wirings, wiring) if before and op else ()
        )
        self.members = frozenset(self.ops)
        self.has_cell = any(o.is_cell for o in self.ops)
        self.moves = all(o.study.moves for o in self.ops)
        self.num_rows = sum(o.num_rows for o in self.ops)
        external = [~w for ws in self.wirings for w in ws if w < 0]
        self.num_external = max(external, default=-1) + 1
        self.sites = tuple([o.site for o in self.ops])
        self.escaping: set[int] = set()  # outputs (over all its operations) read elsewhere
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
        self._sorted = None

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
            for (type, _), w in zip(input_rows(op.inputs), wiring, strict=True):
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


def input_rows(inputs: Sequence[tuple[StubType, int]]) -> Iterator[tuple[StubType, int]]:
    for type, count in inputs:
        if count < 0:
            yield type, 1
        else:
            inner = StubType.of(type.shape[1:], type.dtype, type.device)
            for _ in range(count):
                yield inner, 1


def template_of(x: Any, inputs: list[tuple[StubType, int]], at: list[int]) -> Any:
    kind = type(x)
    if kind is Stub or kind is Stack:
        count = -1 if kind is Stub else len(x.items)
        inputs.append((x.type, count))
        slot = Slot(at[0], count)
        at[0] += max(1, count)
        return slot
    if kind is list:
        return [template_of(y, inputs, at) for y in x]
    if kind is dict:
        return {k: template_of(y, inputs, at) for k, y in x.items()}
    if isinstance(x, tuple) and kind is not torch.Size:
        made = [template_of(y, inputs, at) for y in x]
        return tuple(made) if kind is tuple else kind(*made)
    return x
