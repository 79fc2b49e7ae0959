"""Patterns: what a forward does on any tree of arrays.

Duty: a forward that only folds its `cellc.Tree`s over tensors that it was given does the same on
every tree, but for the folds' calls. Run once on stand-ins that can do nothing else, it leaves a
`Pattern`; what it does on other trees is then written by numpy, for many requests at once, and its
Python does not run. Comes in from `cellc.patterns`, goes out as instances of segments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch.utils import _pytree as pytree

from cellc.frontends import stub as stubs
from cellc.frontends.fold import Site, site_key
from cellc.frontends.grove import LEAF, Grove, fold_rows
from cellc.frontends.segments import SPARE, OutType, Segment
from cellc.frontends.stub import CannotUnfold, NumberSteers, Stack, Stub, StubType

if TYPE_CHECKING:
    from cellc.frontends.unfold import Recorder, Returned

I64 = npt.NDArray[np.int64]


class NoPattern(BaseException):
    """A forward does more with a tree, or with a list of rows, than fold it: what it does may
    depend on what is in them. No Exception, so that no handler in the forward hides it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        stubs.current.end(self)


class _Closed:
    """Can be handed on, and nothing else."""

    def __getattribute__(self, name: str) -> Any:
        raise NoPattern(name)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise NoPattern("a torch function")


def _closed(name: str) -> Callable[..., Any]:
    def used(self: Any, *_: Any, **__: Any) -> Any:
        raise NoPattern(name)

    return used


for _name in (
    "len iter getitem setitem delitem contains bool eq ne lt le gt ge hash repr str format "
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul "
    "rmatmul and rand or ror xor rxor lshift rlshift rshift rrshift neg pos abs invert int float "
    "index round divmod rdivmod reversed enter exit next array iadd isub imul itruediv ifloordiv "
    "imod ipow imatmul iand ior ixor ilshift irshift setattr delattr reduce_ex copy deepcopy dir"
).split():
    setattr(_Closed, f"__{_name}__", _closed(_name))


class Rows(_Closed):
    """Stands for a list of rows of the request."""


class TreeStandIn(_Closed):
    """Stands for a tree."""

    def __getattribute__(self, name: str) -> Any:
        if name == "fold":
            return object.__getattribute__(self, name)
        raise NoPattern(name)

    def fold(self, node: Any, leaf: Any = None, *, nodes: Any = (), leaves: Any = ()) -> Any:
        watch: _Watch = object.__getattribute__(self, "__dict__")["watch"]
        return watch.fold(self, node, leaf, _listed(nodes), _listed(leaves))


def _listed(rows: Any) -> list[Any]:
    return list(rows) if type(rows) in (tuple, list) else [rows]


@dataclass
class FoldNote:
    """One fold of a pattern."""

    tree: int  # which of the request's trees
    site: Site
    nodes: list[int]  # which of its tensors hold rows of nodes, of leaves
    leaves: list[int]
    at: int  # rows that the forward makes before it, those of folds aside
    roots: set[int] = field(default_factory=set)  # kinds of nodes that were roots


@dataclass
class Pattern:
    """What a forward does. A place is (column, offset): see `Stamp.table`."""

    folds: list[FoldNote]
    instances: list[tuple[Segment, I64, I64, tuple[int, int]]]  # columns, offsets, first row made
    rows: int  # that it makes, those of folds aside
    stacks: dict[int, StubType]  # types of rows of its lists, by tensor
    whole: dict[int, StubType]  # types of its other tensors
    names: dict[int, str]
    returned: Returned
    places: list[tuple[int, int]]  # of the rows that are returned
    forms: list[tuple[int, OutType]]  # (rows, type) of each tensor that is returned


class _Watch:
    """Notes the folds of a run on stand-ins."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.start = recorder.next_row
        self.folds: list[FoldNote] = []
        self.places: dict[int, tuple[int, int]] = {}  # of rows of states: (fold, row of a state)
        self.trees: list[TreeStandIn] = []
        self.rows: list[tuple[Rows, StubType, int]] = []  # with their types, which tensors

    def tree(self) -> TreeStandIn:
        made = TreeStandIn.__new__(TreeStandIn)
        object.__getattribute__(made, "__dict__")["watch"] = self
        self.trees.append(made)
        return made

    def list_of(self, inner: StubType, leaf: int) -> Rows:
        made = Rows.__new__(Rows)
        self.rows.append((made, inner, leaf))
        return made

    def fold(
        self, tree: TreeStandIn, node: Any, leaf: Any, nodes: list[Any], leaves: list[Any]
    ) -> Any:
        recorder = self.recorder
        given = [[self._known(x) for x in part] for part in (nodes, leaves)]
        key = site_key(node, leaf, *[[inner for inner, _ in part] for part in given])
        site = recorder.sites.get(key) if key is not None else None
        if site is None or not site.rules or recorder.writing:
            raise NoPattern("a fold that is not known")
        recorder._cut()
        at = recorder.next_row - self.start
        which = next(i for i, known in enumerate(self.trees) if known is tree)
        of_nodes, of_leaves = ([number for _, number in part] for part in given)
        self.folds.append(FoldNote(which, site, of_nodes, of_leaves, at))
        rule = next(iter(site.rules.values()))
        stubs = [Stub(recorder.spare_row(), kind) for kind in rule.types]
        for k, stub in enumerate(stubs):
            self.places[stub.id] = len(self.folds) - 1, k
        return pytree.tree_unflatten(stubs, rule.spec)

    def _known(self, x: Any) -> tuple[StubType, int]:
        for rows, inner, leaf in self.rows:
            if rows is x:
                return inner, leaf
        raise NoPattern("rows that the forward made")


def learn(
    recorder: Recorder,
    forward: Callable[..., Any],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    data: Sequence[tuple[int, int, StubType, int, str]],
    is_tree: Callable[[Any], bool],
) -> Pattern | None:
    """Run a forward on stand-ins, and keep what it did; None where that may depend on more than the
    types of its arguments. `data`: of the call's tensors (see `Unfolded`). Nobody else profiles
    this thread.
    """
    leaf_of = {row: leaf for leaf, row, *_ in data}
    watch = _Watch(recorder)

    def stand_in(x: Any) -> Any:
        kind = type(x)
        if kind is Stack and x.first in leaf_of:
            return watch.list_of(x.inner, leaf_of[x.first])
        if is_tree(x):
            return watch.tree()
        if kind is Stub or x is None or kind in (bool, str):
            return x
        raise NoPattern("an argument that holds more")

    repeating, recorder.repeating = recorder.repeating, False
    codes: dict[CodeType, dict[str, Any]] = {}  # with their globals
    recorder.begin((), 0, -1)
    try:
        args, kwargs = call
        given = [stand_in(x) for x in args], {k: stand_in(x) for k, x in kwargs.items()}
        sys.setprofile(lambda frame, *_: codes.update({frame.f_code: frame.f_globals}))
        try:
            noted = recorder.observe(lambda: recorder.run(forward, *given))
        finally:
            sys.setprofile(None)
        recorder.holdings.check()
    except (Exception, NoPattern, CannotUnfold, NumberSteers):
        return None
    finally:
        recorder.repeating, stubs.current.ended = repeating, None
    if noted is None or recorder.num_decided() or recorder.generates or not watch.folds:
        return None
    if any(_names_type(*known) and recorder._is_user(known[0]) for known in codes.items()):
        return None  # it may ask what a stand-in is, and be told
    return _pattern(watch, noted, data)


def _names_type(code: CodeType, known: dict[str, Any]) -> bool:
    """May a function call `type`, by whatever name?"""
    return any(name == "type" or known.get(name) is type for name in code.co_names)


def _pattern(watch: _Watch, noted: Any, data: Sequence[tuple[Any, ...]]) -> Pattern | None:
    events, start, rows, returned = noted
    if returned is None:
        return None
    stacks = {leaf: kind for leaf, _, kind, count, _ in data if count >= 0}
    whole = {leaf: kind for leaf, _, kind, count, _ in data if count < 0}
    columns = Columns(list(stacks), list(whole), watch.folds)
    row_of = {row: leaf for leaf, row, _, count, _ in data if count < 0}

    def place(row: int) -> tuple[int, int]:
        if row < 0:
            return columns.constant, row
        if row in watch.places:
            return columns.state(*watch.places[row])
        if row in row_of:
            return columns.whole[row_of[row]], 0
        if start <= row < SPARE:
            return columns.made(row - start), row - start
        raise NoPattern("a row of a list")

    instances = []
    places = []
    forms = []
    try:
        for segment, reads, first in events:
            found = np.array([place(row) for row in reads], np.int64).reshape(-1, 2)
            instances.append((segment, found[:, 0], found[:, 1], place(first)))
        for given, out in returned.tensors:
            places += [place(row) for row in given]
            forms.append((len(given), out))
    except NoPattern:
        return None
    names = {leaf: name for leaf, _, _, _, name in data}
    return Pattern(watch.folds, instances, rows, stacks, whole, names, returned, places, forms)


class Columns:
    """Which column of a stamp's table holds what: zeros; the first rows of lists, and the rows of
    other tensors; for every fold, its state; where rows made after so many folds are counted from.
    """

    def __init__(self, stacks: Sequence[int], whole: Sequence[int], folds: Sequence[FoldNote]):
        self.constant = 0
        self.whole = {leaf: 1 + k for k, leaf in enumerate(whole)}
        at = 1 + len(whole)
        self.states = []
        for note in folds:
            self.states.append(at)
            at += len(next(iter(note.site.rules.values())).state)
        self.bases = at
        self._ends = [note.at for note in folds]
        self.width = at + len(folds) + 1

    def state(self, fold: int, row: int) -> tuple[int, int]:
        return self.states[fold] + row, 0

    def made(self, row: int) -> int:
        """Column of a row that the forward made."""
        return self.bases + sum(row >= end for end in self._ends)


def stamp(
    pattern: Pattern,
    groves: Sequence[Grove],
    first_rows: dict[int, I64],
    first_made: int,
) -> tuple[I64, I64, int]:
    """Write what a forward does on many requests. `groves`: their trees, by place among their
    arguments; first_rows: of every tensor, by request; their own rows are made from `first_made`
    on. Returns (their first rows made, rows that they return [requests, rows], the next row).
    """
    count = len(groves[0].structures)
    columns = Columns(list(pattern.stacks), list(pattern.whole), pattern.folds)
    table = np.zeros((count, columns.width), np.int64)
    for leaf, column in columns.whole.items():
        table[:, column] = first_rows[leaf]
    sizes = []  # by fold: {kind: rows that its nodes make}
    total = np.full(count, pattern.rows, np.int64)
    for note in pattern.folds:
        grove = groves[note.tree]
        kinds = grove.kinds(LEAF in note.site.rules)
        made = {
            kind: rule.rows * np.bincount(grove.owner[kinds == kind], minlength=count)
            for kind, rule in sorted(note.site.rules.items())
        }
        sizes.append(made)
        total += sum(made.values())
    base: I64 = first_made + total.cumsum() - total
    at: I64 = base
    table[:, columns.bases] = at
    for k, (note, made) in enumerate(zip(pattern.folds, sizes, strict=True)):
        grove = groves[note.tree]
        first_of = {}
        following: I64 = at + note.at
        for kind, rows in made.items():
            first_of[kind] = following
            following = following + rows
        at = following - note.at
        table[:, columns.bases + k + 1] = at
        nodes, leaves = (
            np.array([first_rows[leaf] for leaf in part], np.int64).reshape(len(part), count).T
            for part in (note.nodes, note.leaves)
        )
        states = fold_rows(grove, note.site.rules, first_of, nodes, leaves)
        start = columns.states[k]
        table[:, start : start + states.shape[1]] = states[grove.starts + grove.roots]
    for segment, chosen, offsets, (first_column, first) in pattern.instances:
        segment.use()
        segment.more_reads.append((table[:, chosen] + offsets).reshape(-1))
        segment.more_made.append(table[:, first_column] + first)
    place = np.array(pattern.places, np.int64).reshape(-1, 2)
    returned = table[:, place[:, 0]] + place[:, 1]
    return base, returned, first_made + int(total.sum())
