"""Legs: what a request runs at a time.

Duty: an `Entry` is a plan with the way its outputs become what the forward returns. A forward that
reads values is run in legs: a `Leg` is what it does from an answer on, along the answers expected,
to its end or to a question that nobody has answered. Its *events* say which calls answer questions
or make what is yielded. Another answer than expected leads, by a `Branch`, to another leg: rows
that it needs are copied from the region of the leg before. Made by `cellc.compiler`, run by
`cellc.engine`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from cellc.frontends.asking import Asked
from cellc.frontends.drawing import Draw
from cellc.frontends.points import told
from cellc.frontends.reads import OPEN, Answer
from cellc.frontends.segments import LEAF
from cellc.frontends.unfold import Returned
from cellc.plan import (
    CHAIN,
    I64,
    NUM_SUCCESSORS,
    SUCCESSOR,
    UNEXPECTED,
    YIELDED,
    OutputRows,
    Places,
    Plan,
    ragged_range,
)
from cellc.unfolded import Unfolded, Wanted

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Result:
    """How tensors become a return value, or a piece that is yielded."""

    returned: tuple[tuple[str, Any], ...]  # ("t", tensor), ("n", number in a tensor), ("v", value)
    spec: Any  # torch pytree; None for one bare tensor

    @classmethod
    def of(cls, given: Returned) -> Result:
        kept = tuple(given.leaves)
        return cls(kept, None if given.spec == LEAF and kept[0][0] == "t" else given.spec)

    @cached_property
    def rebuild(self) -> Callable[[Sequence[torch.Tensor]], Any]:
        """What makes the value of its tensors."""
        if self.spec is None:
            return operator.itemgetter(0)
        returned, spec = self.returned, self.spec

        def leaves(tensors: Sequence[torch.Tensor]) -> list[Any]:
            return [
                tensors[v] if kind == "t" else (tensors[v].item() if kind == "n" else v)
                for kind, v in returned
            ]

        form = pytree.tree_unflatten(list(range(len(returned))), spec)
        plain = _as_code(form)
        if plain is None:
            return lambda tensors: pytree.tree_unflatten(leaves(tensors), spec)
        if all(kind == "t" and v == i for i, (kind, v) in enumerate(returned)):
            build: Callable[[Sequence[torch.Tensor]], Any] = eval(f"lambda x: {plain}")
            return build
        arrange = eval(f"lambda x: {plain}")
        return lambda tensors: arrange(leaves(tensors))


def _as_code(form: Any) -> str | None:
    """Nested tuples, lists and dicts of leaf numbers as an expression; None where there is more."""
    kind = type(form)
    if kind is int:
        return f"x[{form}]"
    if kind in (tuple, list):
        parts = [_as_code(y) for y in form]
        if None in parts:
            return None
        inside = "".join(f"{part}, " for part in parts)
        return f"({inside})" if kind is tuple else f"[{inside}]"
    if kind is dict and all(type(k) is str for k in form):
        named = [(k, _as_code(y)) for k, y in form.items()]
        if any(part is None for _, part in named):
            return None
        return "{" + "".join(f"{k!r}: {part}, " for k, part in named) + "}"
    return None


@dataclass(frozen=True, eq=False)
class Entry:
    """A planned structure: the plan, and how its outputs become the forward's return value."""

    plan: Plan
    result: Result
    names: tuple[str, ...] = ()  # of the tensor leaves
    version: int = 0

    @property
    def outputs(self) -> tuple[OutputRows, ...]:
        return self.plan.outputs

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        return self.result.rebuild(tensors)


@dataclass(frozen=True)
class Yield:
    """A piece that the forward yields, after `before` of its questions."""

    before: int
    at: int  # first row that is made after it
    outputs: slice  # of the plan's
    result: Result
    makers: tuple[int, ...]  # local calls that make its rows


@dataclass(eq=False)
class Root:
    """A structure whose requests run in legs: a request of it with nothing but shapes."""

    wanted: Wanted

    def plain(self) -> Root:
        """With what is read asked for."""
        return Root(self.wanted._replace(plain=True))


@dataclass(frozen=True, eq=False)
class Leg(Entry):
    """See the module. Questions are numbered from the request's begin, yields too."""

    root: Root = field(kw_only=True)
    script: tuple[Answer, ...] = field(kw_only=True)  # answers before it
    asked: tuple[Asked, ...] = field(kw_only=True)  # from the request's begin to the leg's end
    first: int = field(kw_only=True)  # the first question that the leg answers
    yields: dict[int, Yield] = field(kw_only=True)  # by number
    final: int = field(kw_only=True)  # outputs of yields; what is returned follows
    open: bool = field(kw_only=True)  # it ends in a question, not in the forward's end
    error: Exception | None = field(kw_only=True)  # that a generator raises at its end
    carried: tuple[I64, ...] = field(kw_only=True)  # rows to copy from the leg before, by type
    output_rows: tuple[I64, ...] = field(kw_only=True)  # of what is returned; -1 for constants
    generates: bool = field(kw_only=True)  # its forward is a generator
    draws: tuple[Draw, ...] = field(kw_only=True)  # from the request's begin to the leg's end
    epoch: int = field(kw_only=True)  # rows are numbered anew when that changes
    _earlier: dict[int, I64] = field(default_factory=dict, kw_only=True)
    outcomes: dict[int, int] = field(default_factory=dict, kw_only=True)  # answers met, a question

    @property
    def outputs(self) -> tuple[OutputRows, ...]:
        return self.plan.outputs[self.final :]

    @property
    def places(self) -> Places:
        assert self.plan.places is not None
        return self.plan.places

    @cached_property
    def asking(self) -> I64:
        """Local call of each question that the leg answers."""
        rows = np.array([q.row for q in self.asked[self.first :]], np.int64)
        return self.places.calls[rows]

    def waits_for(self, number: int, calls: I64) -> I64:
        """Which of some calls may not have run when the call that answers a question has."""
        calls = np.unique(calls)
        return calls[~self._before(number)[calls]] if len(calls) else calls

    def _before(self, number: int) -> npt.NDArray[np.bool_]:
        """Calls that the answer of a question depends on, and the one that gives it."""
        plan = self.plan
        sources = np.repeat(np.arange(plan.num_calls), plan.calls[:, NUM_SUCCESSORS])
        starts = plan.calls[:, SUCCESSOR]
        targets = plan.successors[ragged_range(starts, plan.calls[:, NUM_SUCCESSORS])]
        chained = np.flatnonzero(plan.calls[:, CHAIN] > 1)
        sources = np.concatenate([sources, chained])
        targets = np.concatenate([targets, chained + 1])
        found = np.zeros(plan.num_calls, bool)
        found[self.asking[number - self.first]] = True
        count = 0
        while count != (count := int(found.sum())):
            found[sources[found[targets]]] = True
        return found

    def earlier(self, number: int) -> I64:
        """Calls to run, besides the one that answers a question, until all questions before it are
        answered.
        """
        known = self._earlier.get(number)
        if known is None:
            asking = self.asking[: number - self.first]
            known = self._earlier[number] = self.waits_for(number, asking)
        return known

    def before(self, number: int) -> I64:
        """Calls to run, besides the one that answers a question, until all that the forward asked
        and yielded before that answer is there.
        """
        return self.waits_for(number, np.concatenate(self.needs_of(number)))

    def needs_of(self, number: int) -> list[I64]:
        """Calls that answer questions before one, or make what is yielded before it."""
        made = [np.array(y.makers, np.int64) for y in self.yields.values() if y.before <= number]
        return [self.asking[: number - self.first], *made]

    @cached_property
    def ends(self) -> list[int]:
        """Of each question, from the request's begin, the first row that is made after it."""
        return [q.until for q in self.asked]

    def script_to(self, number: int, answer: Answer) -> tuple[Answer, ...]:
        """Answers up to that of a question."""
        return (*[q.answer for q in self.asked[:number]], answer)


@dataclass(frozen=True, eq=False)
class Branch:
    """Where an answer leads: to a leg, with (type, slots, owned, first slot there) of rows to copy;
    or from the start again, with answers known; or to outputs that are there already.
    """

    leg: Leg
    moves: tuple[tuple[int, I64, I64, int], ...] = ()
    again: bool = False
    outputs: tuple[OutputRows, ...] | None = None
    needs: I64 = field(kw_only=True)  # local calls of the leg before that have to have run


def make_leg(run: Unfolded, root: Root, script: tuple[Answer, ...], plan: Plan, epoch: int) -> Leg:
    """The leg that a run on stubs was; rows are numbered from the run's first on."""
    own = run.own(np.array([q.row for q in run.asked], np.int64)).tolist()
    ends = run.own(np.array([q.until for q in run.asked], np.int64)).tolist()
    asked = tuple(
        [
            replace(q, row=row, until=end, live=frozenset())
            for q, row, end in zip(run.asked, own, ends, strict=True)
        ]
    )
    assert plan.places is not None
    places = replace(plan.places, when=run.own(plan.places.when))
    first = len(script)
    events: list[tuple[int, ...]] = []
    for number in range(first, len(asked)):
        question = asked[number]
        row = question.row
        expected = _as_stored(question)
        event = (places.calls[row], places.types[row], places.slots[row], places.owned[row])
        events.append((*map(int, event), expected, number))
    yields: dict[int, Yield] = {}
    final = 0
    for number, (before, at, piece) in enumerate(run.yields):
        if before < run.start:
            continue
        count = len(piece.tensors)
        rows = np.array([r for rows, _ in piece.tensors for r in rows], np.int64)
        calls = places.calls[run.own(rows[rows >= 0])]
        makers = np.unique(calls[calls >= 0]).tolist()
        outputs = slice(final, final + count)
        end = int(run.own(np.array([at]))[0])
        yields[number] = Yield(before, end, outputs, Result.of(piece), tuple(makers))
        final += count
        events += [(call, YIELDED, 0, 0, UNEXPECTED, number) for call in makers]
    events.sort()
    result = Result((), None) if run.returned is None else Result.of(run.returned)
    output_rows = []
    for given, _ in run.returned.tensors if run.returned is not None else []:
        rows = np.array(given, np.int64)
        output_rows.append(np.where(rows < 0, -1, run.own(rows)))
    return Leg(
        replace(plan, events=np.array(events, np.int64).reshape(-1, 6), places=places),  # type: ignore[arg-type]
        result,
        root=root,
        script=script,
        asked=asked,
        first=first,
        yields=yields,
        final=final,
        open=run.open,
        error=run.error and told(run.error),
        carried=tuple(run.carried),
        output_rows=tuple(output_rows),
        generates=run.generates,
        draws=tuple(run.draws),
        epoch=epoch,
    )


def _as_stored(question: Asked) -> int:
    """What the row of a question holds if the answer is as expected; UNEXPECTED if nothing is."""
    answer = question.answer
    if answer is OPEN or question.kind is float:
        return UNEXPECTED
    value = int(not answer) if question.kind is bool else -int(answer)
    return value if _INT32.min < value <= _INT32.max else UNEXPECTED


def make_branch(source: Leg, number: int, leg: Leg, *, again: bool) -> Branch | None:
    """The way from question `number` of a leg to a leg that starts there; None where rows are
    needed that it does not keep. `again`: to a leg that starts from the request's data.
    """
    places = source.places
    needs = source.needs_of(number)
    if again:
        return Branch(leg, again=True, needs=source.waits_for(number, np.concatenate(needs)))
    if source.epoch != leg.epoch:
        return None
    moves = []
    starts = {~rows.leaf: (rows.type, rows.start) for rows in leg.plan.data if rows.leaf < 0}
    for k, rows in enumerate(leg.carried):
        if rows.max() >= len(places.slots) or (places.slots[rows] < 0).any():
            return None
        type, start = starts[k]
        moves.append((type, places.slots[rows], places.owned[rows], start))
        needs.append(places.calls[rows])
    outputs = _outputs_there(places, leg, needs)
    calls = np.concatenate(needs)
    needed = source.waits_for(number, calls[calls >= 0])
    return Branch(leg, tuple(moves), outputs=outputs, needs=needed)


def _outputs_there(places: Places, leg: Leg, needs: list[I64]) -> tuple[OutputRows, ...] | None:
    """What a leg without calls returns, where it is in the region of the leg before; else None."""
    if leg.plan.num_calls or leg.open or leg.yields:
        return None
    outputs = []
    for output, rows in zip(leg.outputs, leg.output_rows, strict=True):
        if not len(rows) or rows.min() < 0 or rows.max() >= len(places.slots):
            return None  # nothing, or constants: there may be no place for them yet
        if (places.slots[rows] < 0).any():
            return None
        needs.append(places.calls[rows])
        outputs.append(
            replace(
                output,
                slots=places.slots[rows].astype(np.int32),
                owned=places.owned[rows].astype(np.int32),
                contiguous=False,
            )
        )
    return tuple(outputs)
