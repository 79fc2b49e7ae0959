"""Patterns: new requests whose forwards need not run, since what they do on trees is known.

Duty: keep the pattern of every form of call (`frontends.pattern`), choose the requests that have
one, and write what their forwards do, all at once. What a pattern was not learned from, such as
nodes of another number of children or rows that do not fit, is left to the forward itself. Used by
`cellc.unfolder`; goes to `cellc.forests`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cellc import skeleton
from cellc.frontends.grove import LEAF, Grove
from cellc.frontends.pattern import Pattern, learn, stamp
from cellc.frontends.unfold import Recorder
from cellc.request import Request
from cellc.skeleton import TENSOR
from cellc.stand_ins import StandIns
from cellc.unfolded import Stamped, Unfolded, Wanted

MAX_PATTERNS = 1 << 10


@dataclass(frozen=True, eq=False)
class Form:
    """What calls of one form have: places of their trees in the tokens, and of their tensors among
    the arguments. One object each: equal ones are not the same form.
    """

    trees: tuple[int, ...]
    tensors: tuple[Hashable, ...]

    def trees_of(self, requests: Sequence[Request]) -> list[list[Any]]:
        """Place by place."""
        tokens: list[Any] = [request.tokens for request in requests]
        return [[given[at] for given in tokens] for at in self.trees]


class Known(NamedTuple):
    """Requests of one pattern: which of those wanted, their trees by place, rows of lists."""

    pattern: Pattern
    members: list[int]
    groves: list[Grove]
    lengths: dict[int, np.ndarray]


class Patterns:
    """Of one model."""

    def __init__(
        self, recorder: Recorder, forward: Callable[..., Any], stand_ins: StandIns
    ) -> None:
        self._recorder, self._forward, self._stand_ins = recorder, forward, stand_ins
        self._known: dict[Hashable, Pattern | None] = {}
        self._forms: dict[Hashable, Form | None] = {}
        self._epoch = 0

    def __len__(self) -> int:
        return sum(pattern is not None for pattern in self._known.values())

    def begin(self, epoch: int) -> None:
        """What was learned before another epoch is not known any more."""
        if epoch != self._epoch or len(self._known) > MAX_PATTERNS:
            self.forget()
            self._epoch = epoch

    def forget(self) -> None:
        """Learn all again."""
        self._known.clear()
        self._forms.clear()

    # -- learning --

    def learn(self, run: Unfolded) -> None:
        """A forward that was run on stand-ins has ended well: does it do that on any tree?"""
        key = self._key(run.request)
        if key is None or key in self._known or sys.getprofile() is not None:
            return
        if run.asked or run.generates or run.draws:
            self._known[key] = None
            return
        self._known[key] = learn(self._recorder, self._forward, run.call, run.data, _is_tree)

    def note(self, runs: Sequence[Unfolded]) -> None:
        """Nothing new was learned from these: which nodes were roots in them?"""
        for run in runs:
            pattern = self._known.get(self._key(run.request))
            if pattern is None or run.failed:
                continue
            form = self._form(run.request)
            assert form is not None
            trees = form.trees_of([run.request])
            for fold in pattern.folds:
                (tree,) = trees[fold.tree]
                count = int(tree.counts[tree.root])
                fold.roots.add(LEAF if count == 0 and LEAF in fold.site.rules else count)

    # -- choosing --

    def choose(self, requests: Sequence[Wanted]) -> tuple[list[Known], list[int]]:
        """Those that need not run, by pattern, and the places of the others."""
        groups: dict[Hashable, list[int]] = {}
        others: list[int] = []
        if not any(pattern is not None for pattern in self._known.values()):
            return [], list(range(len(requests)))
        for i, wanted in enumerate(requests):
            key = self._key(wanted.request)
            if key is None or self._known.get(key) is None:
                others.append(i)
            else:
                groups.setdefault(key, []).append(i)
        found = []
        for key, members in groups.items():
            pattern = self._known[key]
            assert pattern is not None
            known, left = self._fitting(pattern, members, [requests[i].request for i in members])
            others += left
            if known is not None:
                found.append(known)
        return found, sorted(others)

    def _fitting(
        self, pattern: Pattern, members: list[int], requests: list[Request]
    ) -> tuple[Known | None, list[int]]:
        """Requests on whose trees the pattern is known, and the others."""
        form = self._form(requests[0])
        assert form is not None
        trees = form.trees_of(requests)
        groves = [Grove(column) for column in trees]
        lengths = {
            leaf: np.array([r.tensors[leaf].shape[0] for r in requests], np.int64)
            for leaf in pattern.stacks
        }
        strange = np.zeros(len(members), bool)
        for rows in lengths.values():
            strange |= rows == 0
        for fold in pattern.folds:
            strange |= _strange(fold, groves[fold.tree], lengths)
        if not strange.any():
            return Known(pattern, members, groves, lengths), []
        good = np.flatnonzero(~strange).tolist()
        left = [members[i] for i in np.flatnonzero(strange).tolist()]
        if not good:
            return None, left
        groves = [Grove([column[i] for i in good]) for column in trees]
        lengths = {leaf: rows[good] for leaf, rows in lengths.items()}
        return Known(pattern, [members[i] for i in good], groves, lengths), left

    def _key(self, request: Request) -> Hashable | None:
        """What calls have in common that do the same but for their trees; None where trees are not
        all that there is.
        """
        if request.ints or request.floats or request.generators or not request.structured:
            return None
        form = self._form(request)
        if form is None:
            return None
        key: list[Hashable] = [form]
        is_list = self._stand_ins.is_list
        for tensor, place in zip(request.tensors, form.tensors, strict=True):
            rows, shape = is_list(tensor, place), tensor.shape
            key += (rows, tensor.dtype, shape[1:] if rows else shape)
        return tuple(key)

    def _form(self, request: Request) -> Form | None:
        tokens: tuple[Any, ...] = request.tokens  # type: ignore[assignment]
        named = tuple([type(t) if type(t) in skeleton.ARRAYS else t for t in tokens])
        if named not in self._forms:
            self._forms[named] = _form_of(tokens)
        return self._forms[named]

    # -- writing --

    def write(self, known: Known, requests: Sequence[Wanted]) -> Stamped:
        """What the forwards of requests do, into the recorder's segments."""
        recorder, pattern = self._recorder, known.pattern
        count = len(known.members)
        first_rows = {}
        data = []
        at = recorder.next_row
        for leaf in sorted([*pattern.stacks, *pattern.whole]):
            kind = pattern.stacks.get(leaf)
            rows = known.lengths[leaf] if kind is not None else np.ones(count, np.int64)
            first = first_rows[leaf] = at + rows.cumsum() - rows
            at += int(rows.sum())
            counts = rows if kind is not None else np.full(count, -1)
            kind = kind or pattern.whole[leaf]
            data.append((leaf, pattern.names[leaf], kind, first, counts))
        bases, returned, recorder.next_row = stamp(pattern, known.groves, first_rows, at)
        chosen = [requests[i].request for i in known.members]
        return Stamped(pattern, chosen, bases, data, returned)


def _is_tree(x: Any) -> bool:
    """Is it a `cellc.Tree`, and not of a class of the user's that may fold otherwise?"""
    return vars(type(x)).get("folds_to_one") is True


def _form_of(tokens: tuple[Any, ...]) -> Form | None:
    """Of a call with nothing but trees and tensors for arguments."""
    count = tokens[0]
    names = []
    for token in tokens[1:]:
        if type(token) is not str or token == TENSOR:
            break
        names.append(token)
    given = tokens[1 + len(names) :]
    if len(given) != count + len(names):
        return None
    trees: list[int] = []
    tensors: list[Hashable] = []
    places = (*range(count), *names)
    for at, (place, token) in enumerate(zip(places, given, strict=True), 1 + len(names)):
        if _is_tree(token):
            trees.append(at)
        elif token == TENSOR:
            tensors.append(("argument", place))
        else:
            return None
    return Form(tuple(trees), tuple(tensors)) if trees else None


def _strange(fold: Any, grove: Grove, lengths: dict[int, np.ndarray]) -> np.ndarray:
    """Structures with nodes of other kinds, or other kinds below each other, than were learned, or
    with other numbers of rows.
    """
    site, owner = fold.site, grove.owner
    has_leaves = LEAF in site.rules
    strange = np.zeros(len(grove.structures), bool)
    kinds = grove.kinds(has_leaves)
    number = np.full(max(*site.rules, int(kinds.max())) + 2, len(site.rules))
    number[np.array([*site.rules]) + 1] = np.arange(len(site.rules))
    numbers = number[kinds + 1]  # of rules; one more for nodes that have none
    strange[owner[numbers == len(site.rules)]] = True
    known = np.array([*site.pairs], np.int64).reshape(-1, 2)
    below = np.zeros((len(site.rules) + 1,) * 2, bool)
    below[number[known[:, 0] + 1], number[known[:, 1] + 1]] = True
    fits = below[numbers[grove.children], numbers.repeat(grove.counts)]
    strange[owner.repeat(grove.counts)[~fits]] = True
    strange |= ~np.isin(kinds[grove.starts + grove.roots], list(fold.roots))
    leaves = grove.num_leaves if has_leaves else np.zeros_like(grove.sizes)
    for leaf in fold.leaves:
        strange |= lengths[leaf] != leaves
    for leaf in fold.nodes:
        strange |= lengths[leaf] != grove.sizes - leaves
    return strange
