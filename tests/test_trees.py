"""cellc.Tree and cellc.Dag: folds equal recursion, and wrong arrays are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc

SIZE, VOCABULARY = 5, 9
State = tuple[Tensor, Tensor]


class ChildSum(nn.Module):
    """Every node has a token; a node's children are a list of any length, or none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(VOCABULARY, SIZE)
        self.gates = nn.Linear(2 * SIZE, 3 * SIZE)
        self.forget = nn.Linear(2 * SIZE, SIZE)

    def node(self, token: Tensor, children: list[State]) -> State:
        x = self.table(token)
        total = torch.zeros(SIZE)
        kept = torch.zeros(SIZE)
        if children:
            h = torch.stack([h for h, _ in children])
            c = torch.stack([c for _, c in children])
            total = h.sum(0)
            f = torch.sigmoid(self.forget(torch.cat([x.expand(len(children), SIZE), h], -1)))
            kept = (f * c).sum(0)
        i, o, u = self.gates(torch.cat([x, total])).chunk(3)
        c = torch.sigmoid(i) * torch.tanh(u) + kept
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, structure: cellc.Dag, tokens: Tensor) -> Any:
        return structure.fold(self.node, nodes=tokens)


class Leaves(nn.Module):
    """Vectors at the leaves, nothing at inner nodes; two children each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.leaf = nn.Linear(SIZE, SIZE)
        self.inner = nn.Linear(2 * SIZE, SIZE)

    def node(self, children: list[Tensor]) -> Tensor:
        return torch.tanh(self.inner(torch.cat(children)))

    def forward(self, tree: cellc.Tree, vectors: Tensor) -> Tensor:
        return tree.fold(self.node, self.leaf, leaves=vectors)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def random_parents(n: int, rng: np.random.Generator) -> np.ndarray:
    """Of a tree whose root is last."""
    return np.array([*[rng.integers(i + 1, n) for i in range(n - 1)], -1])


def test_trees_by_parents() -> None:
    rng = np.random.default_rng(0)
    model = ChildSum().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            requests = []
            for n in (1, 2, 3, 7, 12, 20):
                tokens = torch.from_numpy(rng.integers(0, VOCABULARY, n))
                requests.append((cellc.Tree(parents=random_parents(n, rng)), tokens))
            for request, got in zip(requests, compiled.map(requests), strict=True):
                same(got, model(*request))
            same(compiled(*requests[3]), model(*requests[3]))
        assert compiled._compiler.unfolder.reason is None
        assert compiled.stats()["plans_traced"] == 0


def test_trees_by_children() -> None:
    """Any order of nodes; vectors at leaves only."""
    shapes = [
        [[-1, -1]],
        [[-1, -1], [-1, -1], [0, 1]],
        [[1, 4], [2, 3], [-1, -1], [-1, -1], [-1, -1]],
        [[-1, -1], [-1, -1], [3, 1], [0, 4], [-1, -1]],
    ]
    model = Leaves().eval()
    with cellc.compile(model, backend="eager") as compiled:
        requests = []
        for shape in shapes:
            tree = cellc.Tree(np.array(shape))
            requests.append((tree, torch.randn(int((tree.counts == 0).sum()), SIZE)))
        for request, got in zip(requests, compiled.map(requests), strict=True):
            same(got, model(*request))
        assert compiled.stats()["plans_traced"] == 0
        assert sum(cell.recurrent for cell in compiled.cells.values()) == 1


@st.composite
def dags(draw: st.DrawFn) -> list[list[int]]:
    n = draw(st.integers(1, 12))
    children = [draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else [] for i in range(n)]
    order = draw(st.permutations(range(n)))
    moved: list[list[int]] = [[] for _ in range(n)]
    for i, row in enumerate(children):
        moved[order[i]] = [order[j] for j in row]
    return moved


_compiled: list[tuple[nn.Module, cellc.Compiled]] = []


@settings(max_examples=40, deadline=None)
@given(st.lists(dags(), min_size=1, max_size=4), st.integers(0, 1000))
def test_random_dags(structures: list[list[list[int]]], seed: int) -> None:
    if not _compiled:
        model = ChildSum().eval()
        _compiled.append((model, cellc.compile(model, backend="eager")))
    model, compiled = _compiled[0]
    generator = torch.Generator().manual_seed(seed)
    requests = [
        (cellc.Dag(s), torch.randint(VOCABULARY, (len(s),), generator=generator))
        for s in structures
    ]
    for request, got in zip(requests, compiled.map(requests), strict=True):
        with torch.no_grad():
            want = model(*request)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)


WRONG: dict[str, tuple[Any, str]] = {
    "circle": (lambda: cellc.Tree([[1], [2], [0]]), "circle"),
    "itself": (lambda: cellc.Dag([[0]]), "circle"),
    "child out of range": (lambda: cellc.Tree([[1], [7], []]), r"child 7 of node 1.*\[0, 3\)"),
    "negative child": (lambda: cellc.Dag([[-2], []]), "child -2 of node 0"),
    "parent out of range": (lambda: cellc.Tree(parents=[3, -1]), "parent 3 of node 0"),
    "two roots": (lambda: cellc.Tree(parents=[-1, -1]), "2 roots"),
    "two parents": (lambda: cellc.Tree([[2], [2], [], [0, 1]]), "node 2 as a child twice"),
    "no node": (lambda: cellc.Dag([]), "no nodes"),
    "both": (lambda: cellc.Tree([[]], parents=[-1]), "both or neither"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arrays(kind: str) -> None:
    make, message = WRONG[kind]
    with pytest.raises(cellc.RequestError, match=message):
        make()


def test_rows_that_do_not_fit() -> None:
    model = ChildSum().eval()
    with cellc.compile(model, backend="eager") as compiled:
        tree = cellc.Tree(parents=[1, -1])
        with pytest.raises(cellc.CellcError, match="3 rows.*2, one a node"):
            compiled(tree, torch.tensor([1, 2, 3]))
        same(compiled(tree, torch.tensor([1, 2])), model(tree, torch.tensor([1, 2])))
        with pytest.raises(cellc.RequestError, match=rf"tokens.*{VOCABULARY}"):
            compiled(tree, torch.tensor([1, VOCABULARY]))


@pytest.mark.parametrize("rows", [torch.randn(3, SIZE), torch.arange(12).reshape(3, 4)])
def test_states_that_are_rows_as_they_are(rows: Tensor) -> None:
    structure = cellc.Dag([[], [0], [0, 1]])

    def forward(dag: cellc.Dag, x: Tensor) -> Any:
        return dag.fold(lambda x, below: x + sum(below) if below else x, nodes=x)

    with cellc.compile(forward, backend="eager") as compiled:
        for got, want in zip(compiled(structure, rows), forward(structure, rows), strict=True):
            same(got, want)


def test_a_long_chain() -> None:
    n = 5000
    model = Leaves().eval()
    children = np.full((2 * n + 1, 2), -1)
    for i in range(n):
        children[2 * i + 2] = [2 * i, 2 * i + 1]
    tree = cellc.Tree(children)
    vectors = torch.randn(n + 1, SIZE)
    with cellc.compile(model, backend="eager") as compiled:
        same(compiled(tree, vectors), model(tree, vectors))
