"""Every model of tests/models.py equals eager PyTorch: every backend, any order of lengths."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from graphs import told
from models import LENGTHS, MODELS, H, I, LstmLoop, MatmulLstm, TwoCells, V
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cellc
from cellc.modules import evaluating
from cellc.request import as_call

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def call(model: Any, request: Any) -> Any:
    with torch.no_grad(), evaluating(model):
        if isinstance(request, dict):
            return model(**request)
        return model(*request) if isinstance(request, tuple) else model(request)


def assert_same(got: Any, expected: Any) -> None:
    """Same pytree, Python values, shapes and dtypes; tensors close."""
    a, a_spec = pytree.tree_flatten(got)
    b, b_spec = pytree.tree_flatten(expected)
    assert a_spec == b_spec
    for x, y in zip(a, b, strict=True):
        if isinstance(y, Tensor):
            assert isinstance(x, Tensor)
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        else:
            assert type(x) is type(y) and x == y


def compiled_on(model: Any, backend: str, **options: Any) -> cellc.Compiled:
    try:
        return cellc.compile(model, backend=backend, **options)
    except cellc.BackendError as error:
        pytest.skip(str(error))


# Between them: every kind of library module, loops over cells, cells by hand, layer norm, softmax,
# pooling, positional tables, outputs written by index, numbers that count, attention, a tree. The
# other models run on these backends with `--slow`.
ON_CPP = frozenset(
    """
    lstm_plain lstm_two_layers lstm_bidirectional lstm_batch_first lstm_projection gru_unbatched
    gru_given_state rnn_plain relu_no_bias
    Tagger LstmThenGru MeanPool MaxPool Positional LstmLoop WriteColumns TwoCells
    MatmulLstm_batch LayerNormLstm MinimalGatedUnit SoftmaxCell RunningMean SeveralInputs
    EncoderDecoder MaskedUpdate SelfAttentionHead MultiHeadState RecursiveHalves
    """.split()
)
ON_TRITON = frozenset(
    """
    lstm_two_layers lstm_projection gru_plain relu_plain
    Tagger MeanPool MaxPool PositionalEmbedding LstmLoop RnnLoopIndexed WriteColumns
    FourLinears MatmulLstm_view LayerNormLstm PeepholeLstm SoftmaxCell RunningMean SecondOrder
    EncoderDecoder MaskedUpdate SelfAttentionHead MultiHeadState
    """.split()
)
assert ON_CPP | ON_TRITON <= set(MODELS)


def slow_but(chosen: frozenset[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in chosen else pytest.mark.slow) for name in MODELS]


def check(compiled: cellc.Compiled, model: Any, requests: list[Any]) -> None:
    for request, result in zip(requests, compiled.map(requests), strict=True):
        assert_same(result, call(model, request))


def check_derived(compiled: cellc.Compiled, requests: list[Any]) -> None:
    """Where a call graph is derived, it is the one that tracing gives."""
    compiler = compiled._compiler
    for request in requests:
        args, kwargs = compiler.arguments.bind(*as_call(request))
        structure = compiler.arguments.flatten(args, kwargs).structure
        derived = compiler.plans.derive(structure)
        if derived is not None:
            names = compiler.arguments.leaf_names(args, kwargs)
            assert told(derived[0]) == told(compiler.pipeline.calls(args, kwargs, names)[1])


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str) -> None:
    """First a request in which no recurrence shows, then others one at a time, then all at once."""
    spec, rng = MODELS[name], random.Random(name)
    model = spec.model()
    with cellc.compile(model, backend="eager") as compiled:
        for request in spec.requests([1, *rng.sample([9, 4, 2], 3)]):
            check(compiled, model, [request])
        check_derived(compiled, spec.requests(rng.sample([3, 5, 6, 7], 2)))
        check(compiled, model, spec.requests(LENGTHS))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ON_TRITON))
def test_random_order(name: str) -> None:
    """Lengths in any order teach the same."""
    spec, rng = MODELS[name], random.Random(name)
    model = spec.model()
    with cellc.compile(model, backend="eager") as compiled:
        for request in spec.requests(rng.sample(range(2, 9), 3)):
            check(compiled, model, [request])
        check(compiled, model, spec.requests(rng.sample(range(1, 17), 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_at_every_length(name: str) -> None:
    spec, rng = MODELS[name], random.Random(name)
    model = spec.model()
    for _ in range(2):
        with cellc.compile(model, backend="eager") as compiled:
            for request in spec.requests(rng.sample(range(1, 17), 16)):
                check(compiled, model, [request])
            check(compiled, model, spec.requests(LENGTHS))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_length_is_derived_right(name: str) -> None:
    spec = MODELS[name]
    with cellc.compile(spec.model(), backend="eager") as compiled:
        compiled.map(spec.requests([1, 16, 8, 2, 12]))
        check_derived(compiled, spec.requests([3, 5, 6, 7, 9, 10, 11, 13, 14, 15]))


@pytest.mark.parametrize("name", slow_but(ON_CPP))
def test_equals_eager_on_cpp(name: str) -> None:
    model = MODELS[name].model()
    with compiled_on(model, "cpp") as compiled:
        check(compiled, model, MODELS[name].requests(LENGTHS))


@pytest.mark.parametrize("name", slow_but(ON_TRITON))
def test_equals_eager_interpreted(name: str) -> None:
    model = MODELS[name].model()
    with compiled_on(model, "triton") as compiled:
        check(compiled, model, MODELS[name].requests(LENGTHS))


class HandLstm(nn.Module):
    """nn.LSTM written as loops: layers, directions, cells from a list."""

    def __init__(self, layers: int, directions: int) -> None:
        super().__init__()
        self.directions = directions
        self.cells = nn.ModuleList(
            nn.LSTMCell(I if k < directions else H * directions, H)
            for k in range(layers * directions)
        )

    def direction(self, cell: nn.LSTMCell, x: Tensor, backwards: bool) -> Tensor:
        h, c = torch.zeros(H), torch.zeros(H)
        out: list[Any] = [None] * len(x)
        for t in reversed(range(len(x))) if backwards else range(len(x)):
            h, c = cell(x[t], (h, c))
            out[t] = h
        return torch.stack(out)

    def forward(self, x: Tensor) -> Tensor:
        for k in range(0, len(self.cells), self.directions):
            pair = self.cells[k : k + self.directions]
            x = torch.cat([self.direction(cell, x, d == 1) for d, cell in enumerate(pair)], -1)
        return x


def groups_of(model: nn.Module, request: Tensor) -> list[Any]:
    with cellc.compile(model, backend="eager") as compiled:
        compiled(request)
        assert compiled._compiler.calls is not None
        return compiled._compiler.calls.groups


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("length", [2, 7])
def test_cells_of_lstm(layers: int, directions: int, by_hand: bool, length: int) -> None:
    """One recurrent cell a layer and direction, called once a position; projections outside."""
    model = (
        HandLstm(layers, directions)
        if by_hand
        else nn.LSTM(I, H, layers, bidirectional=directions == 2)
    )
    groups = groups_of(model.eval(), torch.randn(length, I))
    recurrent = [g for g in groups if g.cell.recurrent]
    assert [g.num_calls for g in recurrent] == [length] * (layers * directions)
    for group in recurrent:
        products = [op for op in group.cell.ops if op.op == "linear"]
        assert [group.cell.shape_of(op.operands[1]) for op in products] == [(H, 4 * H)]
    outside = [
        g for g in groups if not g.cell.recurrent and any(o.op == "linear" for o in g.cell.ops)
    ]
    projections, left = divmod(sum(g.num_calls for g in outside), length)
    assert left == 0 and layers <= projections <= layers * directions  # one input: one product


@pytest.mark.parametrize("make", [LstmLoop, lambda: MatmulLstm("slice")])
def test_cells_of_loops(make: Any) -> None:
    groups = groups_of(make().eval(), torch.randn(6, I))
    assert [g.num_calls for g in groups if g.cell.recurrent] == [6]
    (cell,) = [g.cell for g in groups if g.cell.recurrent]
    assert [cell.shape_of(o.operands[1]) for o in cell.ops if o.op == "linear"] == [(H, 4 * H)]


def test_stacked_cells_stay_apart() -> None:
    groups = groups_of(TwoCells().eval(), torch.randn(6, I))
    assert [g.num_calls for g in groups if g.cell.recurrent] == [6, 6]


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_batch_dim(backend: str) -> None:
    """A call with B in dimension 0 is B requests, results stacked again."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(V, I)
            self.rnn = nn.LSTM(I, H, batch_first=True)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y, (h, c) = self.rnn(self.emb(x))
            return {"y": y, "h": h, "c": c, "last": y[:, -1]}

    model = Model().eval()
    with compiled_on(model, backend, batch_dim=0) as compiled:
        requests = [torch.randint(V, (b, n)) for b, n in [(3, 4), (1, 1), (5, 2), (2, 7), (3, 1)]]
        for request in requests:
            assert_same(compiled(request), call(model, request))
        for request, result in zip(requests, compiled.map(requests), strict=True):
            assert_same(result, call(model, request))


class SplitSums(nn.Module):
    """One line works on rows of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I, 9)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part.sum(-1) for part in self.linear(x).split([2, 3, 4], -1)])


class Rolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I, I)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.stack([self.linear(y.roll(j, -1)) for j in (1, 2)])


class LargeConstant(nn.Module):
    def forward(self, xs: Tensor) -> Tensor:
        h = torch.full((I,), -1e30)
        for x in xs:
            h = torch.maximum(h, x)
        return h


class SignedZeros(nn.Module):
    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.full((I,), 0.0), torch.full((I,), -0.0)
        for x in xs:
            a, b = a * x.abs(), b * x.abs()
        return 1 / a, 1 / b


class EinsumWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, I, I))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,kij->tkj", x, self.weight)


class Patched(nn.Module):
    """Its first and last steps differ: roles meet in some requests only."""

    def forward(self, xs: Tensor) -> Tensor:
        h, out = torch.zeros(I), []
        for x in xs:
            h = torch.tanh(h * 0.5 + x)
            out.append(h)
        out[-1] = out[-1] * 2
        out[0] = out[0] + 1
        return torch.stack(out)


class Inferring(nn.Module):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        z = y.t().contiguous()
        z.add_(1)
        return y @ z + x[0].sum()


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        a, b, c = copy.deepcopy(x), x.clone(), x.abs()
        a.pow_(2)
        b.transpose_(0, 1)
        c.floor_divide_(2)
        return [a, b, c]


class Numerics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(I))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.start * 2
        h += x[0]
        none = x * 0 - float("inf")
        return [
            h,
            torch.logsumexp(none, 1),
            x.norm(p=0, dim=1),
            x.norm(p=-float("inf"), dim=1),
            torch.linalg.vector_norm(x, keepdim=True),
            torch.addmm(none, x, x.t() @ x, beta=0),
            x.long().fill_(2.5),
            torch.tensor([]),
        ]


WRONG = [
    SplitSums, Rolled, LargeConstant, SignedZeros, EinsumWeights, Patched, Inferring, InPlace,
    Numerics,
]  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_once_wrong(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    with cellc.compile(model, backend="eager") as compiled:
        for n in (1, 2, 5, 3, 4, 7):
            x = torch.randn(n, I)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
