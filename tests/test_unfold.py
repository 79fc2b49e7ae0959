"""Unfolding: whatever Python structure a request holds, results equal eager PyTorch, and a new
structure is not traced again.
"""

from __future__ import annotations

import ast
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from comparing import assert_same_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc

SIZE, VOCABULARY = 6, 11
State = tuple[Tensor, Tensor]


class Merge(nn.Module):
    """Two states to one."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * SIZE, 3 * SIZE)

    def forward(self, left: State, right: State) -> State:
        i, f, o = self.gates(torch.cat([left[0], right[0]])).chunk(3)
        c = torch.sigmoid(f) * (left[1] + right[1]) + torch.tanh(i)
        return torch.sigmoid(o) * torch.tanh(c), c


class Recursive(nn.Module):
    """What the models below share: a table, a cell, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(VOCABULARY, SIZE)
        self.merge = Merge()
        self.inner = nn.Linear(2 * SIZE, SIZE)
        self.out = nn.Linear(SIZE, 3)

    def leaf(self, token: Any) -> State:
        x = self.table(torch.tensor(token))
        return torch.tanh(x), x


class Pairs(Recursive):
    def encode(self, tree: Any) -> State:
        if isinstance(tree, (tuple, list)):
            return self.merge(self.encode(tree[0]), self.encode(tree[1]))
        return self.leaf(tree)

    def forward(self, tree: Any) -> Tensor:
        return self.out(self.encode(tree)[0])


class Inline(Recursive):
    """No cell is a call: the operations stand in the recursion itself."""

    def encode(self, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return self.table(torch.tensor(tree))
        both = torch.cat([self.encode(tree[0]), self.encode(tree[1])])
        return torch.tanh(self.inner(both)) * torch.sigmoid(both[:SIZE])

    def forward(self, tree: Any) -> Tensor:
        return self.out(self.encode(tree))


class ModuleRecursion(Recursive):
    """The recursion is forward itself."""

    def forward(self, tree: Any) -> State:
        if isinstance(tree, int):
            return self.leaf(tree)
        return self.merge(self(tree[0]), self(tree[1]))


class Closure(Recursive):
    """The recursion is a function inside forward."""

    def forward(self, tree: Any) -> Tensor:
        def encode(node: Any) -> State:
            if isinstance(node, int):
                return self.leaf(node)
            return self.merge(*[encode(child) for child in node])

        return self.out(encode(tree)[0])


class Dicts(Recursive):
    def encode(self, tree: dict[str, Any]) -> State:
        if "token" in tree:
            return self.leaf(tree["token"])
        return self.merge(self.encode(tree["left"]), self.encode(tree["right"]))

    def forward(self, tree: dict[str, Any]) -> dict[str, Tensor]:
        h, c = self.encode(tree)
        return {"scores": self.out(h), "state": c}


@dataclass
class Node:
    token: int | None = None
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None


class Objects(Recursive):
    """Mutable objects that know their parents: a structure with circles."""

    def encode(self, node: Node) -> State:
        if not node.children:
            return self.leaf(node.token)
        state = self.encode(node.children[0])
        for child in node.children[1:]:
            state = self.merge(state, self.encode(child))
        return state

    def forward(self, node: Node) -> Tensor:
        return self.out(self.encode(node)[0])


class Branch(NamedTuple):
    left: Any
    right: Any
    weight: float


class Weighted(Recursive):
    """Floats that become tensors, and named tuples."""

    def encode(self, tree: Any) -> Tensor:
        if not isinstance(tree, Branch):
            return self.table(torch.tensor(tree))
        h = torch.cat([self.encode(tree.left), self.encode(tree.right)])
        return torch.tanh(self.inner(h)) * torch.tensor(tree.weight)

    def forward(self, tree: Any) -> Tensor:
        return self.out(self.encode(tree))


class Syntax(Recursive):
    """`ast` nodes: the class of a node chooses its vector."""

    def encode(self, node: ast.AST) -> Tensor:
        h = self.table.weight[len(type(node).__name__) % VOCABULARY]
        for child in ast.iter_child_nodes(node):
            h = torch.tanh(self.inner(torch.cat([h, self.encode(child)])))
        return h

    def forward(self, node: ast.AST) -> Tensor:
        return self.out(self.encode(node))


def pairs(leaves: int, draw: random.Random) -> Any:
    if leaves == 1:
        return draw.randrange(VOCABULARY)
    left = draw.randint(1, leaves - 1)
    return pairs(left, draw), pairs(leaves - left, draw)


def mapped(tree: Any, leaf: Callable[[int], Any], node: Callable[..., Any]) -> Any:
    if isinstance(tree, int):
        return leaf(tree)
    return node(*[mapped(child, leaf, node) for child in tree])


def with_parents(tree: Any) -> Node:
    node = mapped(tree, Node, lambda *children: Node(None, list(children)))
    stack = [node]
    while stack:
        one = stack.pop()
        for child in one.children:
            child.parent = one
            stack.append(child)
    return node


def branches(tree: Any) -> Any:
    return mapped(tree, int, lambda a, b: Branch(a, b, 0.5 + hash((str(a), 1)) % 7))


def as_dict(tree: Any) -> Any:
    return mapped(tree, lambda t: {"token": t}, lambda a, b: {"left": a, "right": b})


def syntax(tree: Any) -> ast.AST:
    text = mapped(tree, lambda t: "abc"[t % 3], lambda a, b: f"({a} + {b})")
    return ast.parse(text, mode="eval").body


KINDS: dict[str, tuple[type[nn.Module], Callable[[Any], Any]]] = {
    "tuples": (Pairs, lambda t: t),
    "lists": (Pairs, lambda t: mapped(t, int, lambda *c: list(c))),
    "tensors at leaves": (Pairs, lambda t: mapped(t, lambda i: i, lambda *c: c)),
    "inline": (Inline, lambda t: t),
    "recursion of forward": (ModuleRecursion, lambda t: (t, 1)),
    "closure": (Closure, lambda t: (t, 1)),
    "dicts": (Dicts, as_dict),
    "objects": (Objects, with_parents),
    "floats": (Weighted, branches),
    "ast": (Syntax, syntax),
}


def trees(seed: int, sizes: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 4, 7, 6, 9)) -> list[Any]:
    draw = random.Random(seed)
    return [pairs(n, draw) for n in sizes]


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_any_structure(kind: str) -> None:
    """Alone, together, seen and new; all but the first requests without a trace."""
    make, convert = KINDS[kind]
    model = make().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for seed in range(3):
            requests = [convert(t) for t in trees(seed)]
            wrapped = [(r,) for r in requests]
            for request, got in zip(requests, compiled.map(wrapped), strict=True):
                same(got, model(request))
            same(compiled(requests[3]), model(requests[3]))
        assert compiled._compiler.unfolder.reason is None
        assert compiled.stats()["plans_traced"] == 0
        assert compiled.stats()["plans_unfolded"] > 10


def test_numbers_at_leaves_are_data() -> None:
    """Two trees of one shape share a plan, whatever their tokens."""
    model = Pairs().eval()
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map([((1, (2, 3)),), ((1, 2),)])
        made = compiled.stats()["plans_unfolded"]
        for tree in ((4, (5, 6)), (7, (8, 9)), (10, 0)):
            same(compiled(tree), model(tree))
        assert compiled.stats()["plans_unfolded"] == made
        with pytest.raises(cellc.RequestError, match=rf"tree.*got {VOCABULARY}.*\[0, {VOCABULARY}"):
            compiled((1, (2, VOCABULARY)))
        with pytest.raises(cellc.RequestError, match="64 bits"):
            compiled((1, (2, 1 << 70)))
        same(compiled((1, (2, 3))), model((1, (2, 3))))


class Steered(Recursive):
    """Numbers that decide: which path, how often, which entry of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = {0: 1.0, 1: 2.0, 2: 0.5}

    def forward(self, tree: Any) -> Tensor:
        kind, times, token, rest = tree
        h = self.table(torch.tensor(token)) * self.scales[kind]
        if kind == 1:
            h = h + 1
        for _ in range(times):
            h = torch.tanh(self.inner(torch.cat([h, h])))
        return h if rest is None else h + self.forward(rest)


def test_numbers_that_steer() -> None:
    draw = random.Random(0)

    def tree(depth: int) -> Any:
        rest = tree(depth - 1) if depth else None
        return draw.randrange(3), draw.randrange(3), draw.randrange(VOCABULARY), rest

    model = Steered().eval()
    with cellc.compile(model, backend="eager") as compiled:
        requests = [(tree(draw.randrange(4)),) for _ in range(30)]
        for _ in range(2):
            for request, got in zip(requests, compiled.map(requests), strict=True):
                same(got, model(*request))
        first = compiled.stats()["plans_unfolded"]
        kind, times, token, rest = requests[0][0]
        other = (kind, times, (token + 1) % VOCABULARY, rest)
        same(compiled(other), model(other))  # the token is still data
        assert compiled.stats()["plans_unfolded"] == first


def test_a_number_that_steers_where_others_pass_containers() -> None:
    linear = nn.Linear(2 * SIZE, SIZE)

    def forward(tree: Any) -> Tensor:
        if isinstance(tree, int):
            return torch.zeros(SIZE) if tree == 3 else torch.ones(SIZE) * (tree % 2)
        return torch.tanh(linear(torch.cat([forward(tree[0]), forward(tree[1])])))

    with cellc.compile(forward, backend="eager") as compiled:
        for tree in ((1, 2), 7, 3, (3, (4, 7)), 4):
            same(compiled(tree), forward(tree))
    with cellc.compile(forward, backend="eager") as compiled:
        for got, tree in zip(compiled.map([(1,), ((1, 2),)]), (1, (1, 2)), strict=True):
            same(got, forward(tree))


class Impure(Recursive):
    """Methods that do more than return: each state is also kept elsewhere, or counted."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def encode(self, tree: Any, kept: list[Tensor] | None = None) -> Tensor:
        if isinstance(tree, int):
            h = self.table(torch.tensor(tree))
        else:
            both = torch.cat([self.encode(tree[0]), self.encode(tree[1])])
            h = torch.tanh(self.inner(both))
        if self.how == "keeps":
            self.states.append(h)
        else:
            self.count[0] += 1
            h = h * float(1 + self.count[0] % 3)
        return h

    def forward(self, tree: Any) -> Tensor:
        self.states: list[Tensor] = []
        self.count = [0]
        h = self.encode(tree)
        return torch.stack(self.states).sum(0) if self.how == "keeps" else h


@pytest.mark.filterwarnings("ignore:the forward sets")
@pytest.mark.parametrize("how", ["keeps", "counts"])
def test_methods_with_side_effects(how: str) -> None:
    model = Impure(how).eval()
    with cellc.compile(model, backend="eager") as compiled:
        for seed in range(4):
            requests = [(t,) for t in trees(seed, (2, 3, 5, 8, 8, 5, 13, 20))]
            for request, got in zip(requests, compiled.map(requests), strict=True):
                same(got, model(*request))


class FirstSteps(Recursive):
    """First steps that are special: zeros, a learned state, None."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        self.h0 = nn.Parameter(torch.randn(SIZE))
        self.c0 = nn.Parameter(torch.randn(SIZE))

    def forward(self, tokens: list[int]) -> Tensor:
        state = (self.h0, self.c0)
        if self.first == "zeros":
            state = (torch.zeros(SIZE), torch.zeros(SIZE))
        for token in tokens:
            state = self.merge(state, self.leaf(token))
        return self.out(state[0])


@pytest.mark.parametrize("first", ["zeros", "learned"])
def test_first_steps_do_not_split_a_cell(first: str) -> None:
    model = FirstSteps(first).eval()
    draw = random.Random(0)
    with cellc.compile(model, backend="eager") as compiled:
        requests = [([draw.randrange(VOCABULARY) for _ in range(n)],) for n in (1, 2, 3, 5, 4)]
        for request, got in zip(requests, compiled.map(requests), strict=True):
            same(got, model(*request))
        assert sum(cell.recurrent for cell in compiled.cells.values()) == 1


def test_shared_parts_and_circles() -> None:
    """A part that is there many times costs once; a circle that a forward runs into is an error."""
    model = Pairs().eval()
    shared: Any = (1, 2)
    for _ in range(60):
        shared = (shared, shared)  # 2 ** 61 leaves if it were walked
    deep: list[Any] = [1, 2]
    deep[1] = deep
    with cellc.compile(Memoised().eval(), backend="eager") as compiled:
        same(compiled(shared), Memoised().eval()(shared))
    with cellc.compile(model, backend="eager") as compiled:
        with pytest.raises(cellc.CellcError, match="recursion"):
            compiled(deep)
        same(compiled([1, [2, 3]]), model([1, [2, 3]]))


class Memoised(Recursive):
    """Remembers what it did, by identity."""

    def forward(self, tree: Any) -> Tensor:
        done: dict[int, State] = {}

        def encode(node: Any) -> State:
            if isinstance(node, int):
                return self.leaf(node)
            if id(node) not in done:
                done[id(node)] = self.merge(encode(node[0]), encode(node[1]))
            return done[id(node)]

        return self.out(encode(tree)[0])


def test_deeper_than_python_recurses() -> None:
    tree: Any = 1
    for i in range(5000):
        tree = (tree, i % VOCABULARY)
    model = Pairs().eval()
    state = model.leaf(1)
    for i in range(5000):
        state = model.merge(state, model.leaf(i % VOCABULARY))
    with cellc.compile(model, backend="eager") as compiled:
        same(compiled(tree), model.out(state[0]))
        same(compiled(3), model(3))


def test_results_do_not_depend_on_the_order_of_requests() -> None:
    """The first request decides nothing: small, large, alone, all at once."""
    model = Inline().eval()
    requests = [(t,) for t in trees(5)]
    want = [model(*r) for r in requests]
    for order in (range(10), range(9, -1, -1), [5, 0, 9, 2, 7, 1, 8, 3, 6, 4]):
        with cellc.compile(model, backend="eager") as compiled:
            for i in order:
                same(compiled(*requests[i]), want[i])
            for got, one in zip(compiled.map(requests), want, strict=True):
                same(got, one)


def test_plans_made_together_are_those_made_alone() -> None:
    model = Pairs().eval()
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map([(t,) for t in trees(0)])
        compiler = compiled._compiler
        requests = [(t,) for t in trees(1)]
        together = [t.entry.plan for t in compiled._tickets([(r, {}) for r in requests])]
        compiler.plans.clear()
        for request, plan in zip(requests, together, strict=True):
            assert_same_plan(plan, compiled._tickets([(request, {})])[0].entry.plan)


nested = st.recursive(
    st.integers(0, VOCABULARY - 1), lambda t: st.tuples(t, t), max_leaves=24
).filter(lambda t: isinstance(t, tuple))


@settings(max_examples=40, deadline=None)
@given(st.lists(nested, min_size=1, max_size=6))
def test_random_trees(requests: list[Any]) -> None:
    for model, compiled in _shared():
        for request, got in zip(requests, compiled.map([(r,) for r in requests]), strict=True):
            with torch.no_grad():
                same(got, model(request))


_compiled: list[tuple[nn.Module, cellc.Compiled]] = []


def _shared() -> list[tuple[nn.Module, cellc.Compiled]]:
    """Models that see all examples, so that what is learned from one meets the others."""
    if not _compiled:
        for make in (Pairs, Inline):
            model = make().eval()
            _compiled.append((model, cellc.compile(model, backend="eager")))
    return _compiled


def test_from_many_threads() -> None:
    model = Pairs().eval()
    wrong: list[BaseException] = []
    with cellc.compile(model, backend="eager") as compiled:

        def work(seed: int) -> None:
            try:
                with torch.no_grad():
                    for tree in trees(seed):
                        same(compiled(tree), model(tree))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert wrong == []


def test_the_model_is_left_as_it_was() -> None:
    """Nothing that unfolding puts into modules stays, whatever a forward raises."""
    model = Pairs().eval()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with cellc.compile(model, backend="eager") as compiled:
        compiled.map([((1, 2),), ((1, (2, 3)),)])
        with pytest.raises(cellc.CellcError):
            compiled(((1, 2, 3), "x"))
    for name, m in model.named_modules():
        assert vars(m).keys() == before[name].keys()
        assert all(vars(m)[k] is v for k, v in before[name].items())


# -- forwards that do more than return, and classes of the user's ----------------------------------


class Stateful(Recursive):
    """Methods read what the forward, or another method, left in the module."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.depth = 0
        self.known: dict[Any, Tensor] = {}

    def mix(self, a: Tensor, b: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.cat([a, b])))
        return h if self.mode == "sum" else -h

    def encode(self, tree: Any) -> Tensor:
        if self.how == "cache" and tree in self.known:
            return self.known[tree]
        if isinstance(tree, int):
            return self.table(torch.tensor(tree))
        self.depth += 1
        h = self.mix(self.encode(tree[0]), self.encode(tree[1]))
        if self.depth > 3:
            h = torch.relu(h)
        self.depth -= 1
        return h

    def forward(self, mode: str, tree: Any) -> Tensor:
        self.mode = mode
        return self.encode(tree)


@pytest.mark.filterwarnings("ignore:the forward sets")
def test_state_in_the_module() -> None:
    model = Stateful("plain").eval()
    with cellc.compile(model, backend="eager") as compiled:
        for mode in ("sum", "product", "sum"):
            requests = [(mode, t) for t in trees(2)]
            for request, got in zip(requests, compiled.map(requests), strict=True):
                same(got, model(*request))
        assert "sets self.mode" in str(compiled._compiler.unfolder.reason)
    assert model.depth == 0


class Kept(Recursive):
    """Keeps results in a dict of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Tensor] = {}

    def encode(self, tree: Any) -> Tensor:
        if isinstance(tree, str):
            if tree not in self.known:
                self.known[tree] = torch.tanh(self.table.weight[len(tree)])
            return self.known[tree]
        return torch.tanh(self.inner(torch.cat([self.encode(tree[0]), self.encode(tree[1])])))

    def forward(self, tree: Any) -> Tensor:
        return self.encode(tree)


def test_caches_of_the_model_stay_its_own() -> None:
    """What is refused is refused clearly, and no stand-in is left in the model."""
    model = Kept().eval()
    want = [Kept().eval()(t) for t in (("a", "bb"), (("a", "bb"), "a"))]
    with cellc.compile(model, backend="eager") as compiled:
        for tree in (("a", "bb"), (("a", "bb"), "a")):
            try:
                compiled(tree)
            except cellc.CellcError:
                pass
    model.known.clear()
    for tree, one in zip((("a", "bb"), (("a", "bb"), "a")), want, strict=True):
        same(model(tree), one)


class Parser(Recursive):
    """Takes its request apart as it goes."""

    def parse(self, tokens: list[str]) -> Tensor:
        token = tokens.pop(0)
        if token != "(":
            return self.table.weight[len(token)]
        left, right = self.parse(tokens), self.parse(tokens)
        tokens.pop(0)
        return torch.tanh(self.inner(torch.cat([left, right])))

    def forward(self, tokens: list[str]) -> Tensor:
        return self.parse(tokens)


def test_a_request_that_the_forward_consumes() -> None:
    model = Parser().eval()
    texts = ["a", "( a bb )", "( ( a bb ) ccc )", "( a ( bb ( a bb ) ) )", "( a bb )", "bb"]
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            for got, text in zip(compiled.map([(t.split(),) for t in texts]), texts, strict=True):
                same(got, model(text.split()))


class Named:
    """Compares by its name only."""

    def __init__(self, name: str, *children: Any) -> None:
        self.name, self.children = name, list(children)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


class Private:
    __slots__ = ("__left", "right")

    def __init__(self, left: Any, right: Any) -> None:
        self.__left, self.right = left, right

    @property
    def left(self) -> Any:
        return self.__left


class Labelled(list):  # type: ignore[type-arg]
    """A list with a label, as parsers make them."""

    def __init__(self, label: str, items: Any) -> None:
        super().__init__(items)
        self.label = label


class OwnClasses(Recursive):
    def encode(self, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return self.table(torch.tensor(tree))
        if isinstance(tree, Named):
            left, right = tree.children
        elif isinstance(tree, Private):
            left, right = tree.left, tree.right
        else:
            left, right = tree
        h = torch.tanh(self.inner(torch.cat([self.encode(left), self.encode(right)])))
        return -h if getattr(tree, "label", "") == "minus" else h

    def forward(self, tree: Any) -> Tensor:
        return self.encode(tree)


def test_classes_of_the_users() -> None:
    draw = random.Random(0)

    def convert(tree: Any) -> Any:
        def node(left: Any, right: Any) -> Any:
            kind = draw.randrange(3)
            if kind == 0:
                return Named("same", left, right)
            label = draw.choice(["minus", "plus"])
            return Private(left, right) if kind == 1 else Labelled(label, [left, right])

        return mapped(tree, int, node)

    model = OwnClasses().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for seed in range(3):
            requests = [(convert(t),) for t in trees(seed)]
            for request, got in zip(requests, compiled.map(requests), strict=True):
                same(got, model(*request))


class ByType(Recursive):
    """Decides by `type`, which no stand-in can pass."""

    def forward(self, tree: Any) -> Tensor:
        if type(tree) is int:
            return self.table(torch.tensor(tree))
        if type(tree) is str:
            return torch.zeros(SIZE)
        return torch.tanh(self.inner(torch.cat([self.forward(t) for t in tree])))


def test_types_asked_for() -> None:
    model = ByType().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for tree in (("a", "b"), (("a", "b"), "c"), (1, "a"), (2, (3, "a")), (4, "a")):
            same(compiled(tree), model(tree))


class Indexed(nn.Module):
    """Rows of a table chosen by a number that is an argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, SIZE)
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, k: int) -> Tensor:
        return torch.tanh(self.linear(x + self.table.weight[k]))


def test_many_constants() -> None:
    """Requests that are known stay right while constants are added; a wrong one fails alone."""
    model = Indexed().eval()
    requests = [(torch.randn(SIZE), k) for k in range(40)]
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            for request in requests:
                same(compiled(*request), model(*request))
        with pytest.raises(cellc.CellcError):
            compiled(torch.randn(SIZE), 99)
        for request, got in zip(requests, compiled.map(requests), strict=True):
            same(got, model(*request))


class Weighted(nn.Module):
    """Numbers of the request beside tensors: weights of edges, on either side of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, SIZE)
        self.inner = nn.Linear(SIZE, SIZE)

    def forward(self, tree: Any) -> Tensor:
        token, weight, rank, children = tree
        h = self.table(torch.tensor(token)) * weight - rank
        for child in children:
            h = h + child[1] * self.inner(self.forward(child)) / (1.5 + weight / 2)
        return torch.tanh(h)


def test_numbers_beside_tensors_are_data() -> None:
    draw = random.Random(1)

    def tree(children: int) -> Any:
        kids = [tree(draw.randrange(children)) for _ in range(children)]
        return draw.randrange(VOCABULARY), draw.random(), draw.randrange(4), kids

    class Scaled(Weighted):
        def forward(self, tree: Any) -> Tensor:
            token, weight, rank, children = tree
            h = weight * self.table(torch.tensor(token)) + rank
            return torch.tanh(sum([self.inner(self.forward(c)) for c in children], h) / 2)

    for kind, data in ((Scaled, True), (Weighted, False)):
        model = kind().eval()
        with cellc.compile(model, backend="eager") as compiled:
            requests = [(tree(draw.randrange(4)),) for _ in range(20)]
            for request, got in zip(requests, compiled.map(requests), strict=True):
                same(got, model(*request))
            assert compiled._compiler.unfolder.reason is None
            first = compiled.stats()["plans_unfolded"]
            token, weight, rank, children = requests[0][0]
            other = (token, weight + 1, rank, children)
            same(compiled(other), model(other))
            assert (compiled.stats()["plans_unfolded"] == first) is data


def test_floats_beside_whole_numbers() -> None:
    """A Python float makes integers f32, also where it differs from call to call, or is data."""

    def forward(parts: list[Any]) -> list[Tensor]:
        return [x * (0.5 + i) + weight for i, (x, weight) in enumerate(parts)]

    with cellc.compile(forward, backend="eager") as compiled:
        for length in (1, 1, 1, 3, 2):
            parts = [(torch.arange(4) + i, 0.1 * i) for i in range(length)]
            same(compiled(parts), forward(parts))
            whole = [(x, 2) for x, _ in parts]
            same(compiled(whole), forward(whole))
        assert compiled._compiler.unfolder.reason is None
