"""Attention and pooling over vectors of any length: one cell, equal to eager on every backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import kernel_cells as kc
import pytest
import torch
import torch.nn.functional as F
from comparing import alike
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc
from cellc.cells import Cell, Operand
from cellc.kernels.cpp import CppBackend
from cellc.kernels.eager import EagerBackend
from cellc.kernels.triton_backend import TritonBackend

SIZE, STEPS = 8, 3
Score = Callable[["Decoder", Tensor, Tensor], Tensor]


def dot(model: Decoder, h: Tensor, memory: Tensor) -> Tensor:
    return memory @ h


def general(model: Decoder, h: Tensor, memory: Tensor) -> Tensor:
    return model.keys(memory) @ h


def additive(model: Decoder, h: Tensor, memory: Tensor) -> Tensor:
    return model.v(torch.tanh(model.keys(memory) + model.query(h))).squeeze(-1)


def scaled(model: Decoder, h: Tensor, memory: Tensor) -> Tensor:
    query, keys = model.query(h)[None, None], model.keys(memory)[None]
    return F.scaled_dot_product_attention(query, keys, memory[None])[0, 0]


def scaled_masked(model: Decoder, h: Tensor, memory: Tensor) -> Tensor:
    query, keys = model.query(h)[None, None], model.keys(memory)[None]
    mask = (memory[:, 0] > 0)[None, None]  # hides all of some
    return F.scaled_dot_product_attention(query, keys, memory[None], attn_mask=mask)[0, 0]


def masked(model: Decoder, h: Tensor, memory: Tensor) -> Tensor:
    scores = memory @ h
    return scores.masked_fill(memory[:, 0] < 0, -1e4)


class Decoder(nn.Module):
    """Tokens [T] in; what a few steps of a decoder that attends to all of them make, out."""

    def __init__(self, score: Score, num_heads: int = 1) -> None:
        super().__init__()
        self.score, self.num_heads = score, num_heads
        self.embedding = nn.Embedding(12, SIZE)
        self.encoder, self.decoder = nn.LSTM(SIZE, SIZE), nn.LSTMCell(SIZE, SIZE)
        self.keys, self.query = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.v, self.out = nn.Linear(SIZE, 1), nn.Linear(2 * SIZE, SIZE)

    def attend(self, h: Tensor, memory: Tensor) -> Tensor:
        if self.score in (scaled, scaled_masked):
            return self.score(self, h, memory)
        if self.num_heads == 1:
            return self.score(self, h, memory).softmax(0) @ memory
        keys = memory.view(-1, self.num_heads, SIZE // self.num_heads)
        scores = (keys * h.view(self.num_heads, -1)).sum(-1)
        return (scores.softmax(0).unsqueeze(-1) * keys).sum(0).flatten()

    def forward(self, tokens: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.embedding(tokens))
        h, c, x = h[0], c[0], self.embedding.weight[0]
        said = []
        for _ in range(STEPS):
            h, c = self.decoder(x, (h, c))
            x = torch.tanh(self.out(torch.cat([h, self.attend(h, memory)])))
            said.append(x)
        return torch.stack(said)


class Pooled(nn.Module):
    """Tokens [T] in; the maximum and the mean of what is made of each, out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(12, SIZE), nn.Linear(2 * SIZE, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = torch.tanh(self.embedding(tokens) * 2)
        return self.out(torch.cat([rows.amax(0), F.silu(rows).mean(0)]))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dot": lambda: Decoder(dot),
    "general": lambda: Decoder(general),
    "additive": lambda: Decoder(additive),
    "masked": lambda: Decoder(masked),
    "scaled": lambda: Decoder(scaled),
    "scaled masked": lambda: Decoder(scaled_masked),
    "heads": lambda: Decoder(dot, 2),
    "pooled": Pooled,
}


def requests() -> list[Tensor]:
    draw = random.Random(0)
    lengths = (5, 2, 1, 7, 3, 13, 5)
    return [torch.tensor([draw.randrange(12) for _ in range(n)]) for n in lengths]


@pytest.mark.parametrize("backend", ["eager", "cpp", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_together(name: str, backend: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    asked = requests()
    with cellc.compile(model, backend=backend) as compiled, torch.no_grad():
        together = compiled.map(asked)
        for x, got in zip(asked, together, strict=True):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
            if backend == "triton":  # whatever the neighbours are
                assert torch.equal(compiled(x), got)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"pooled", "scaled masked"}))
def test_a_step_is_one_call(name: str) -> None:
    """Keys are projected once a position, and all the rest of a step is one call."""
    torch.manual_seed(0)
    tokens = torch.arange(9)
    with cellc.compile(MODELS[name]().eval(), backend="eager") as compiled:
        compiled(torch.arange(5))
        compiled(tokens)
        groups = compiled._compiler.calls.groups
    steps = [g for g in groups if any(i.ragged for i in g.cell.inputs)]
    assert [g.num_calls for g in steps] == [STEPS]
    heavy = [g.num_calls for g in groups if any("keys" in p.name for p in g.cell.params)]
    times = STEPS if name in ("general", "additive", "scaled") else 0
    assert all(n <= len(tokens) * times for n in heavy)


def test_what_others_read_stays() -> None:
    """Weights that are returned are rows of their own, as before."""

    def weights(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        given = (x @ q).softmax(0)
        return given, given @ x

    x, q = torch.randn(6, SIZE), torch.randn(SIZE)
    with cellc.compile(weights, backend="cpp") as compiled:
        for got, want in zip(compiled(x, q), weights(x, q), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["product", "fused"])
def test_memory_from_the_request(form: str) -> None:
    """Its rows are positions, though nothing but products reads them: all lengths share cells."""
    cell, query = nn.GRUCell(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def attend(memory: Tensor) -> Tensor:
        h = torch.zeros(SIZE)
        for _ in range(STEPS):
            q = query(h)
            if form == "product":
                seen = (memory @ q).softmax(0) @ memory
            else:
                seen = F.scaled_dot_product_attention(q[None], memory, memory)[0]
            h = cell(seen, h)
        return h

    asked = [torch.randn(n, SIZE) for n in (3, 1, 5, 2, 9, 4, 7, 6)]
    with cellc.compile(attend, backend="eager") as compiled, torch.no_grad():
        for _ in range(2):
            for x, got in zip(asked, compiled.map(asked), strict=True):
                torch.testing.assert_close(got, attend(x), rtol=1e-4, atol=1e-5)
        assert len(compiled.cells) < 6


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_nothing_to_attend_to(backend: Any) -> None:
    """Softmax and logsumexp of no scores, beside requests that have some."""
    model = nn.Linear(SIZE, SIZE).eval()

    def attend(memory: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        scores = model(memory) @ query
        seen = F.scaled_dot_product_attention(query[None], memory, memory)[0]
        return scores.softmax(0) @ memory, scores.log_softmax(0), scores.logsumexp(0), seen

    asked = [(torch.randn(n, SIZE), torch.randn(SIZE)) for n in (3, 0, 1, 0, 5)]
    with cellc.compile(attend, backend=backend) as compiled, torch.no_grad():
        for _ in range(2):
            for request, got in zip(asked, compiled.map(asked), strict=True):
                alike(got, attend(*request), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_products_and_truths_along_vectors(backend: Any) -> None:
    """What is reduced is made of each row and of what the rows before gave."""
    embedding = nn.Embedding(12, SIZE)

    def pool(tokens: Tensor) -> tuple[Tensor, ...]:
        h, rows = torch.zeros(SIZE), torch.tanh(embedding(tokens))
        for _ in range(2):
            missed = (1 - torch.sigmoid(rows * h)).prod(0)
            h = missed + (rows > h).any(0).float() - (rows < h - 0.1).all(0).float()
        return h, (rows * h).argmax(1).sum(0)

    asked = requests()
    with cellc.compile(pool, backend=backend) as compiled, torch.no_grad():
        for x, got in zip(asked, compiled.map(asked), strict=True):
            alike(got, pool(x), rtol=1e-4, atol=1e-5)


POINTWISE = ("tanh", "sigmoid", "neg", "exp", "relu")


@st.composite
def bodies(draw: st.DrawFn) -> Cell:
    """Maps over two vectors, a row and a weight, and reductions of what they make."""
    size = draw(st.sampled_from([1, 3, 17]))
    b = kc.Builder()
    made = [b.input("a", size, ragged=True), b.input("b", size, ragged=True)]
    rows = [b.input("x", size), b.param("w", size)]
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["one", "two", "row", "sum", "dot", "again"]))
        x = draw(st.sampled_from(made))
        if kind == "one":
            made.append(b("tanh", b(draw(st.sampled_from(POINTWISE)), x)))
        elif kind == "two":
            made.append(b(draw(st.sampled_from(["add", "mul"])), x, draw(st.sampled_from(made))))
        elif kind == "row":
            made.append(b(draw(st.sampled_from(["sub", "mul"])), x, draw(st.sampled_from(rows))))
        elif kind == "sum":
            made.append(
                b("expand", b("reshape", b("sum", x, dims=(0,)), shape=(1,)), shape=(size,))
            )
        elif kind == "dot":
            made.append(b("mul", x, b("linear", x, b.param(f"v{len(made)}", size, 1))))
        else:
            rows.append(b(f"ragged_{draw(st.sampled_from(['sum', 'mean', 'amax']))}", x))
            made.append(b("sub", x, rows[-1]))
    outs = [b(f"ragged_{draw(st.sampled_from(['sum', 'mean', 'amin']))}", made[-1])]
    outs += rows[2:4]
    return b.cell("drawn", *outs)


@settings(max_examples=8, deadline=None)
@given(bodies(), st.integers(1, 9))
def test_any_map_then_reduction(cell: Cell, num_rows: int) -> None:
    params = kc.random_params(cell)
    run = kc.make_run(cell, num_rows, seed=num_rows)
    reference = EagerBackend().kernel(cell, params)
    kc.check(TritonBackend("cpu").kernel(cell, params), reference, run, 1e-4, 1e-4)
    backend = CppBackend()
    kc.check(backend.kernel(cell, params), reference, run, 1e-4, 1e-4)
    backend.close()


def test_eager_repeats_rows_along_vectors() -> None:
    """The reference itself, against a loop."""
    cell = kc.dot_cell(5)
    params = kc.random_params(cell)
    run = kc.make_run(cell, 4)
    memory = run.launch.inputs[1]
    EagerBackend().kernel(cell, params)(run.launch, run.arenas)
    kind = cell.inputs[1].type
    for r, (context, query) in enumerate(zip(*run.outputs(), strict=True)):
        slots = memory.slots[memory.offsets[r] : memory.offsets[r + 1]]  # type: ignore[union-attr]
        rows = run.arenas[kind][torch.from_numpy(slots.astype("int64"))]
        torch.testing.assert_close(context, (rows @ query).softmax(0) @ rows)


def test_vectors_of_a_cell() -> None:
    cell = kc.additive_cell(4)
    assert cell.lengths == (0, 1, 1)
    assert cell.vector_of(Operand("input", 2)) == 1 and cell.vector_of(Operand("input", 0)) is None
    assert cell.vector_of(cell.outputs[0]) is None
