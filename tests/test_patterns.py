"""Patterns: forwards that only fold trees run once, and give what they give when they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_same_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc
from cellc import intake
from cellc.unfolder import Unfolder

SIZE, VOCABULARY = 5, 9
State = tuple[Tensor, Tensor]


class Twice(nn.Module):
    """Two folds, one of them over leaves, with a vector of the request's before and after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(VOCABULARY, SIZE)
        self.leaf_gate, self.gate = nn.Linear(SIZE, SIZE), nn.Linear(2 * SIZE, SIZE)
        self.sum_gate, self.start = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.out = nn.Linear(3 * SIZE, 3)

    def leaf(self, token: Tensor) -> State:
        x = self.table(token)
        return torch.tanh(self.leaf_gate(x)), x

    def node(self, children: list[State]) -> State:
        h = torch.stack([h for h, _ in children]).sum(0)
        return torch.tanh(self.gate(torch.cat([h, children[0][1]]))), children[-1][0]

    def add(self, x: Tensor, children: list[Tensor]) -> Tensor:
        x = torch.sigmoid(self.sum_gate(x))
        return x + torch.stack(children).sum(0) if children else x

    def forward(self, tree: cellc.Tree, tokens: Tensor, x: Tensor, vectors: Tensor) -> Any:
        first = torch.relu(self.start(x))
        h, c = tree.fold(self.node, self.leaf, leaves=tokens)
        second = torch.tanh(self.start(h)) + first
        total = tree.fold(self.add, nodes=vectors)
        return {"out": self.out(torch.cat([second, total, x])), "state": (h, c), "none": None}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@st.composite
def trees(draw: st.DrawFn) -> list[list[int]]:
    """Children of every node, nodes in any order."""
    n = draw(st.integers(1, 14))
    children: list[list[int]] = [[] for _ in range(n)]
    for i in range(n - 1):
        children[draw(st.integers(i + 1, min(i + 4, n - 1)))].append(i)
    order = draw(st.permutations(range(n)))
    moved: list[list[int]] = [[] for _ in range(n)]
    for i, row in enumerate(children):
        moved[order[i]] = [order[j] for j in row]
    return moved


def request(children: list[list[int]], seed: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    tree = cellc.Tree(children)
    leaves = int((tree.counts == 0).sum())
    tokens = torch.randint(VOCABULARY, (leaves,), generator=g)
    vectors = torch.randn(len(children), SIZE, generator=g)
    return tree, tokens, torch.randn(SIZE, generator=g), vectors


_compiled: list[tuple[nn.Module, cellc.Compiled, cellc.Compiled]] = []


def shared() -> tuple[nn.Module, cellc.Compiled, cellc.Compiled]:
    """A model, compiled twice: the second time its forward always runs."""
    if not _compiled:
        model = Twice().eval()
        stamped, run = (cellc.compile(model, backend="eager") for _ in range(2))
        run._compiler.unfolder._may_stamp = lambda: False  # type: ignore[method-assign]
        _compiled.append((model, stamped, run))
    return _compiled[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=5), st.integers(0, 1000))
def test_random_trees(structures: list[list[list[int]]], seed: int) -> None:
    model, stamped, run = shared()
    requests = [request(s, seed + i) for i, s in enumerate(structures)]
    for one, got, other in zip(requests, stamped.map(requests), run.map(requests), strict=True):
        with torch.no_grad():
            want = model(*one)
        same(got, want)
        same(other, want)
    assert not len(run._compiler.unfolder.patterns)
    assert stamped._compiler.unfolder.reason is None
    for compiled in (stamped, run):
        compiled._compiler.plans.clear()
    calls = [(r, {}) for r in requests]
    for a, b in zip(stamped._tickets(calls), run._tickets(calls), strict=True):
        assert_same_plan(a.entry.plan, b.entry.plan)


class Runs:
    """How often forwards ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, run = 0, Unfolder._run

        def counted(*given: Any) -> None:
            self.count += 1
            run(*given)

        monkeypatch.setattr(Unfolder, "_run", counted)


CHAIN = [[], [], [0, 1], [], [2, 3], [], [4, 5]]
BALANCED = [[], [], [0, 1], [], [], [3, 4], [2, 5]]
THREE = [[], [], [], [0, 1, 2]]


def test_forwards_do_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = Runs(monkeypatch), Twice().eval()
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map([request(CHAIN, 0), request(BALANCED, 1)])
        runs.count = 0
        requests = [request([*CHAIN, [], [6, 7]], 2), request([[1, 2], [], []], 3)]
        for one, got in zip(requests, compiled.map(requests), strict=True):
            same(got, model(*one))
        assert runs.count == 0
        strange = [requests[0], request([*BALANCED, [6]], 4), request([[]], 5), request(THREE, 6)]
        requests = [request([[], *[[c + 1 for c in row] for row in BALANCED], [0, 7]], 7), *strange]
        for one, got in zip(requests, compiled.map(requests), strict=True):
            same(got, model(*one))
        assert runs.count > 0  # nodes of one child and of three, and a leaf that is the root
        runs.count = 0
        same(compiled(*request([*THREE, [3]], 8)), model(*request([*THREE, [3]], 8)))
        assert runs.count > 0  # one with three below one with one
        runs.count = 0
        same(compiled(*request([*THREE, [3]], 9)), model(*request([*THREE, [3]], 9)))
        assert compiled.stats()["plans_traced"] == 0


def test_requests_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = Runs(monkeypatch), Twice().eval()
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map([request(CHAIN, 0), request(BALANCED, 1)])
        runs.count = 0
        good = [request([*CHAIN, [], [6, 7]], 2), request([[1, 2], [], []], 3)]
        tree, tokens, x, vectors = request([*BALANCED, [], [6, 7]], 4)
        outside = tree, torch.full_like(tokens, VOCABULARY), x, vectors
        few = tree, tokens[1:], x, vectors
        many = tree, tokens, x, torch.cat([vectors, vectors])
        wide = tree, tokens, torch.randn(SIZE + 1), vectors
        calls = [good[0], outside, few, good[1], many, wide]
        got = compiled.map(calls, return_exceptions=True)
        same([got[0], got[3]], [model(*good[0]), model(*good[1])])
        assert "tokens" in str(got[1]) and f"[0, {VOCABULARY})" in str(got[1])
        assert "4 rows" in str(got[2]) and "5, one a node without children" in str(got[2])
        assert "18 rows" in str(got[4])
        assert isinstance(got[5], cellc.CellcError)
        assert runs.count > 0
        same(compiled(*good[0]), model(*good[0]))


@settings(max_examples=25, deadline=None)
@given(st.lists(trees(), min_size=3, max_size=14), st.integers(0, 1000), st.data())
def test_the_first_begin_while_others_are_bound(
    structures: list[list[list[int]]], seed: int, data: st.DataObject
) -> None:
    """In order, whatever comes twice, in any portion, or fails."""
    model, compiled, _ = shared()
    kinds = data.draw(st.lists(st.sampled_from(["good", "twice", "outside", "few", "no tree"]),
                               min_size=len(structures), max_size=len(structures)))  # fmt: skip
    calls: list[Any] = []
    for i, (structure, kind) in enumerate(zip(structures, kinds, strict=True)):
        tree, tokens, x, vectors = request(structure, seed + i)
        if kind == "outside":
            tokens = torch.full_like(tokens, VOCABULARY)
        elif kind == "few":
            vectors = vectors[1:]
        elif kind == "no tree":
            tree = 3  # type: ignore[assignment]
        calls.append(calls[0] if kind == "twice" and calls else (tree, tokens, x, vectors))
    begun: list[int] = []
    enqueue = compiled._serving.enqueue

    def noting(tickets: Any, **kwargs: Any) -> None:
        begun.append(len(tickets))
        enqueue(tickets, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(intake, "TOGETHER", 1)
        patched.setattr(intake, "MANY", 3)
        patched.setattr(compiled._serving, "enqueue", noting)
        compiled._compiler.plans.clear()
        made = compiled.map(calls, return_exceptions=True)
    for call, got in zip(calls, made, strict=True):
        try:
            want = model(*call)
        except Exception:
            assert isinstance(got, cellc.CellcError)
        else:
            same(got, want)
    if len(compiled._compiler.unfolder.patterns) and compiled._compiler.unfolder.to_check <= 0:
        assert len(begun) > len(calls) // 3
    stats = compiled.stats()
    assert stats["running"] == stats["waiting"] == stats["live_bytes"] == 0


def test_a_chain_deeper_than_recursion_and_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Twice().eval()
    n = 5000
    children: list[list[int]] = [[]]
    for i in range(n):
        children += [[], [2 * i, 2 * i + 1]]
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map([request(CHAIN, 0), request(BALANCED, 1), request([[]], 2)])
        runs = Runs(monkeypatch)
        requests = [request(children, 3), request([[]], 4)]
        for one, got in zip(requests, compiled.map(requests), strict=True):
            same(got, model(*one))
        assert runs.count == 0


def _node(x: Tensor, below: list[Tensor]) -> Tensor:
    return torch.tanh(x + sum(below)) if below else torch.tanh(x)


def looks(find: Callable[[cellc.Tree, Tensor], Any]) -> Callable[..., Any]:
    def forward(tree: cellc.Tree, x: Tensor) -> Any:
        factor = 2.0 if find(tree, x) else 1.0
        return tree.fold(_node, nodes=x) * factor

    return forward


LOOKS: dict[str, Callable[[cellc.Tree, Tensor], Any]] = {
    "number of nodes": lambda tree, x: tree.num_nodes > 3,
    "rows": lambda tree, x: len(x) > 3,
    "shape": lambda tree, x: x.shape[0] > 3,
    "children": lambda tree, x: len(tree.children_of(0)) > 0,
    "counts": lambda tree, x: tree.counts[0] > 0,
    "text": lambda tree, x: "(3" in str(tree),
    "equality": lambda tree, x: tree == cellc.Tree([[], [0]]),
    "type": lambda tree, x: type(tree) is cellc.Tree and tree.num_nodes > 3,
    "type by another name": lambda tree, x: class_of(tree) is cellc.Tree,
    "handled": lambda tree, x: _handled(x),
    "handled by all means": lambda tree, x: _handled_by_all_means(tree),
}


class_of = type


def _handled(x: Tensor) -> bool:
    try:
        return x.size(0) > 3
    except Exception:
        return False


def _handled_by_all_means(tree: cellc.Tree) -> bool:
    try:
        return tree.num_nodes > 3
    except BaseException:
        return False


@pytest.mark.parametrize("name", LOOKS)
def test_forwards_that_look_at_trees_run(name: str) -> None:
    forward = looks(LOOKS[name])
    shapes = [
        [[], [0]],
        [[1], []],
        [[], [0], [1]],
        [[1], [2], []],
        [[], [0], [1], [2]],
        [[1], [2], [3], []],
    ]
    with cellc.compile(forward, backend="eager") as compiled:
        for _ in range(2):
            for shape in shapes:
                one = cellc.Tree(shape), torch.randn(len(shape), SIZE)
                same(compiled(*one), forward(*one))
        assert not len(compiled._compiler.unfolder.patterns)


def test_forwards_that_only_fold_have_a_pattern() -> None:
    """The forward of `looks`, if it does not look."""
    forward = looks(lambda tree, x: True)
    with cellc.compile(forward, backend="eager") as compiled:
        for n in (2, 3, 4, 5):
            one = cellc.Tree(parents=[*range(1, n), -1]), torch.randn(n, SIZE)
            same(compiled(*one), forward(*one))
        assert len(compiled._compiler.unfolder.patterns) == 1


class Doubled(cellc.Tree):
    """Folds otherwise."""

    def fold(self, *given: Any, **named: Any) -> Any:
        return 2 * super().fold(*given, **named)


def test_trees_of_other_classes_fold_as_they_say() -> None:
    forward = looks(lambda tree, x: True)
    with cellc.compile(forward, backend="eager") as compiled:
        for kind in (cellc.Tree, Doubled):
            for n in (2, 3, 4, 5):
                one = kind(parents=[*range(1, n), -1]), torch.randn(n, SIZE)
                same(compiled(*one), forward(*one))


def test_stand_ins_can_be_called_as_little_as_what_they_stand_for() -> None:
    forward = looks(lambda tree, x: callable(tree) or callable(x))
    with cellc.compile(forward, backend="eager") as compiled:
        for n in (2, 3, 4, 5):
            one = cellc.Tree(parents=[*range(1, n), -1]), torch.randn(n, SIZE)
            same(compiled(*one), forward(*one))


class Holding(cellc.Tree):
    """Holds more than a structure."""

    def __init__(self, children: Any, held: Any) -> None:
        super().__init__(children)
        self.held = held


def test_what_trees_hold_besides_is_told_apart_or_refused() -> None:
    def forward(tree: Any, x: Tensor) -> Any:
        return tree.fold(_node, nodes=x) * (getattr(tree, "held", None) or 1.0)

    shape, x = [[], [0], [1]], torch.randn(3, SIZE)
    plain = cellc.Tree(shape)
    plain.held = 7.0  # type: ignore[attr-defined]
    kinds = [Holding(shape, held) for held in (2.0, 3.0, 3, None, True)]
    with cellc.compile(forward, backend="eager") as compiled:
        for _ in range(2):
            for tree in (plain, cellc.Tree(shape), *kinds):
                same(compiled(tree, x), forward(tree, x))
        with pytest.raises(cellc.RequestError, match="'tree': got a Holding that also holds held"):
            compiled(Holding(shape, x), x)


def test_trees_of_arrays_are_those_of_lists() -> None:
    """The short way to a tree gives what the long one does, or refuses as it does."""
    rng = np.random.default_rng(0)
    for n in [1, 2, 3, *rng.integers(1, 12, 60).tolist()]:
        rows: list[list[int]] = [[] for _ in range(n)]
        for i in range(n - 1):
            rows[rng.integers(i + 1, n)].append(i)
        width = max(map(len, rows)) + 1
        array = np.array([[*row, *[-1] * (width - len(row))] for row in rows])
        one, other = cellc.Tree(array), cellc.Tree(rows)
        assert one == other and hash(one) == hash(other)
        for name in ("counts", "flat", "results", "num_readers", "starts"):
            a, b = getattr(one, name), getattr(other, name)
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert one.num_nodes == n
        array[rng.integers(n), rng.integers(width)] = rng.integers(-3, n + 2)
        lists = [[c for c in row if c != -1] for row in array.tolist()]
        try:
            want: Any = cellc.Tree(lists)
        except cellc.RequestError as error:
            with pytest.raises(cellc.RequestError) as raised:
                cellc.Tree(array)
            assert str(raised.value) == str(error)
        else:
            assert cellc.Tree(array) == want
