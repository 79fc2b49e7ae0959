"""Recurrent models as their users write them: nothing here knows of cellc.

Every model's structure follows from shapes and Python values alone. `MODELS` maps a name to an
`Example`: how to make the model, and requests of lengths 1 to 16. Sizes are small; what matters is
how the code is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

I, H, V = 5, 8, 11  # noqa: E741 - input size, hidden size, vocabulary
LENGTHS = (7, 1, 4, 16, 2, 9, 3, 12, 5, 15, 6, 10, 8, 14, 11, 13)


@dataclass(frozen=True)
class Example:
    """A model and its requests; `request(n)` is one of length n."""

    make: Callable[[], Any]
    request: Callable[[int], Any]

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.make()
        return model.eval() if isinstance(model, nn.Module) else model

    def requests(self, lengths: Sequence[int] = LENGTHS) -> list[Any]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return [self.request(n) for n in lengths]


MODELS: dict[str, Example] = {}


def example(
    request: Callable[[int], Any], *arguments: Any, name: str | None = None, **keywords: Any
) -> Callable[[Any], Any]:
    """Register a class (or factory) called with `arguments`."""

    def register(make: Any) -> Any:
        key = name or make.__name__
        assert key not in MODELS, key
        MODELS[key] = Example(lambda: make(*arguments, **keywords), request)
        return make

    return register


def add(name: str, make: Callable[[], Any], request: Callable[[int], Any]) -> None:
    assert name not in MODELS, name
    MODELS[name] = Example(make, request)


# -- requests --------------------------------------------------------------------------------------


def tokens(n: int) -> Tensor:
    return torch.randint(V, (n,))


def vectors(n: int) -> Tensor:
    return torch.randn(n, I)


def batch_of(size: int, *, first: bool = False) -> Callable[[int], Tensor]:
    def make(n: int) -> Tensor:
        return torch.randn(size, n, I) if first else torch.randn(n, size, I)

    return make


# -- library modules -------------------------------------------------------------------------------

_KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
_VARIANTS: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "plain": ({}, batch_of(1)),
    "unbatched": ({}, vectors),
    "two_layers": ({"num_layers": 2}, vectors),
    "bidirectional": ({"bidirectional": True}, batch_of(1)),
    "batch_first": ({"batch_first": True}, batch_of(3, first=True)),
    "no_bias": ({"bias": False}, vectors),
}
for _kind, _make in _KINDS.items():
    for _variant, (_options, _request) in _VARIANTS.items():
        if _kind in ("lstm", "gru") or _variant in ("plain", "two_layers", "no_bias"):
            add(
                f"{_kind}_{_variant}",
                lambda make=_make, options=_options: make(I, H, **options),
                _request,
            )
add("lstm_three_layers_dropout", lambda: nn.LSTM(I, H, 3, dropout=0.5), batch_of(2))
add("lstm_projection", lambda: nn.LSTM(I, H, proj_size=3), vectors)
add(
    "lstm_everything",
    lambda: nn.LSTM(I, H, 2, bias=False, batch_first=True, bidirectional=True, proj_size=3),
    batch_of(2, first=True),
)
add("gru_deep_bidirectional", lambda: nn.GRU(I, H, 2, bidirectional=True), vectors)
add(
    "lstm_given_state",
    lambda: nn.LSTM(I, H, 2),
    lambda n: (torch.randn(n, I), (torch.randn(2, H), torch.randn(2, H))),
)
add("gru_given_state", lambda: nn.GRU(I, H), lambda n: (torch.randn(n, 3, I), torch.randn(1, 3, H)))


@example(tokens)
class Tagger(nn.Module):
    """Embedding, bidirectional LSTM, a label a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, I)
        self.lstm = nn.LSTM(I, H, bidirectional=True)
        self.head = nn.Linear(2 * H, 4)

    def forward(self, words: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(words).unsqueeze(1))
        return F.log_softmax(self.head(out.squeeze(1)), dim=-1)


@example(tokens)
class Sentiment(nn.Module):
    """Last hidden state into a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, I, padding_idx=0)
        self.rnn = nn.LSTM(I, H, num_layers=2, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(H, 1)

    def forward(self, text: Tensor) -> Tensor:
        _, (hidden, _) = self.rnn(self.embed(text)[None])
        return torch.sigmoid(self.fc(self.drop(hidden[-1]))).squeeze()


@example(vectors)
class LstmThenGru(nn.Module):
    """Different recurrences in a row with an MLP between, residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(I, H)
        self.mlp = nn.Sequential(
            nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, H), nn.LayerNorm(H)
        )
        self.second = nn.GRU(H, H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, _ = self.first(x)
        b = a + self.mlp(a)
        c, h = self.second(b)
        return b + c, h


@example(vectors)
class MeanPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(I, H, bidirectional=True)
        self.out = nn.Linear(2 * H, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.out(y.mean(0))


@example(tokens)
class MaxPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, I)
        self.rnn = nn.LSTM(I, H, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.table(x)[:, None])
        values, _ = y.max(dim=0)
        return values


@example(tokens)
class Positional(nn.Module):
    """Positional table sliced to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, H)
        self.pos = nn.Parameter(torch.randn(32, H))
        self.rnn = nn.RNN(H, H)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos[: ids.shape[0]]
        return self.rnn(x)[0]


@example(tokens)
class PositionalEmbedding(nn.Module):
    """Positions looked up with arange."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, H)
        self.pos = nn.Embedding(32, H)
        self.cell = nn.GRUCell(H, H)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos(torch.arange(len(ids), device=ids.device))
        h = torch.zeros(H)
        for row in x:
            h = self.cell(row, h)
        return h


@example(tokens)
class SinusoidBuffer(nn.Module):
    """A registered buffer as table, scaled by a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, H)
        at = torch.arange(32).unsqueeze(1) * torch.exp(
            torch.arange(0, H, 2) * (-math.log(100.0) / H)
        )
        self.register_buffer("pe", torch.stack([at.sin(), at.cos()], -1).reshape(32, H))
        self.lstm = nn.LSTM(H, H)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) * math.sqrt(H) + self.pe[: ids.size(0), :]
        return self.lstm(x)[0][-1]


# -- loops over library cells ----------------------------------------------------------------------


@example(vectors)
class LstmLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(H)
        c = x.new_zeros(H)
        out = []
        for t in range(x.shape[0]):
            h, c = self.cell(x[t], (h, c))
            out.append(h)
        return torch.stack(out)


@example(batch_of(3))
class LstmLoopBatch(nn.Module):
    """State left out at the first step; B = 3 inside one request; results concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        out = []
        for row in x:
            state = self.cell(row, state)
            out.append(state[0].unsqueeze(0))
        return torch.cat(out)


@example(tokens)
class GruLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, I)
        self.cell = nn.GRUCell(I, H)
        self.out = nn.Linear(H, V)

    def forward(self, words: Tensor) -> Tensor:
        h = torch.zeros(1, H, device=words.device)
        logits = []
        for word in words:
            h = self.cell(self.embedding(word).view(1, -1), h)
            logits.append(self.out(h))
        return torch.cat(logits, dim=0)


@example(vectors)
class RnnLoopIndexed(nn.Module):
    """Results written into a tensor made before the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(I, H, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), H)
        h = torch.zeros(H)
        for t, row in enumerate(x):
            h = self.cell(row, h)
            out[t] = h
        return out


@example(batch_of(2))
class WriteColumns(nn.Module):
    """`out[:, t] = h` in a batch-first result, zeros where nothing was written."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch, _ = x.shape
        out = torch.zeros(batch, steps + 1, H)
        h = torch.zeros(batch, H)
        for t in range(steps):
            h = self.cell(x[t], h)
            out[:, t + 1] = h
        return out


@example(vectors)
class TwoCells(nn.Module):
    """Two stacked cells in one loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.LSTMCell(I, H)
        self.upper = nn.LSTMCell(H, H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h1 = c1 = h2 = c2 = torch.zeros(1, H)
        for t in range(x.size(0)):
            h1, c1 = self.lower(x[t : t + 1], (h1, c1))
            h2, c2 = self.upper(h1, (h2, c2))
        return h2, c2


@example(vectors)
class CellList(nn.Module):
    """ModuleList of cells, a list of states."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(I if k == 0 else H, H) for k in range(3)])

    def forward(self, x: Tensor) -> dict[str, Any]:
        states = [torch.zeros(H) for _ in self.cells]
        top = []
        for row in x.unbind(0):
            inputs = row
            for k, cell in enumerate(self.cells):
                states[k] = cell(inputs, states[k])
                inputs = states[k]
            top.append(inputs)
        return {"top": torch.stack(top, dim=1), "states": states}


@example(vectors)
class ResidualCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(I, H)
        self.cells = nn.ModuleList([nn.RNNCell(H, H) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inp(x))
        for cell in self.cells:
            h = y.new_zeros(H)
            rows = []
            for t in range(len(y)):
                h = cell(y[t], h)
                rows.append(h + y[t])
            y = torch.stack(rows)
        return y


@example(vectors)
class BidirectionalByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fw = nn.LSTMCell(I, H)
        self.bw = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        forward, backward = [], [None] * n
        h, c = torch.zeros(H), torch.zeros(H)
        for t in range(n):
            h, c = self.fw(x[t], (h, c))
            forward.append(h)
        h, c = torch.zeros(H), torch.zeros(H)
        for t in reversed(range(n)):
            h, c = self.bw(x[t], (h, c))
            backward[t] = h
        return torch.stack([torch.cat(pair) for pair in zip(forward, backward, strict=True)])


@example(vectors)
class FlippedDirection(nn.Module):
    """The same cell over the sequence and over its flip, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(I, H)

    def run(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        out = []
        for row in x:
            h = self.cell(row, h)
            out.append(h)
        return torch.stack(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + self.run(x.flip(0)).flip(0)


# -- cells written by hand -------------------------------------------------------------------------


def loop(step: Callable[[Tensor, Any], Any], x: Tensor, state: Any) -> Tensor:
    """The usual loop: first element of the state is the output."""
    out = []
    for row in x:
        state = step(row, state)
        out.append(state[0])
    return torch.stack(out)


@example(vectors)
class FourLinears(nn.Module):
    """LSTM with two nn.Linear a gate."""

    def __init__(self) -> None:
        super().__init__()
        for gate in "ifgo":
            setattr(self, f"x{gate}", nn.Linear(I, H))
            setattr(self, f"h{gate}", nn.Linear(H, H, bias=False))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i = torch.sigmoid(self.xi(x) + self.hi(h))
        f = torch.sigmoid(self.xf(x) + self.hf(h))
        g = torch.tanh(self.xg(x) + self.hg(h))
        o = torch.sigmoid(self.xo(x) + self.ho(h))
        c = f * c + i * g
        return o * torch.tanh(c), c

    def forward(self, x: Tensor) -> Tensor:
        return loop(self.step, x, (torch.zeros(H), torch.zeros(H)))


@example(vectors)
class ConcatenatedGates(nn.Module):
    """Linear layers on [x, h] joined."""

    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(I + H, H)
        self.input = nn.Linear(I + H, H)
        self.cand = nn.Linear(I + H, H)
        self.output = nn.Linear(I + H, H)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = torch.zeros(1, H), torch.zeros(1, H)
        out = []
        for t in range(x.shape[0]):
            joined = torch.cat((x[t].unsqueeze(0), h), 1)
            f, i = torch.sigmoid(self.forget(joined)), torch.sigmoid(self.input(joined))
            c = c * f + i * torch.tanh(self.cand(joined))
            h = torch.sigmoid(self.output(joined)) * c.tanh()
            out += [h]
        return torch.cat(out, 0), (h, c)


class MatmulLstm(nn.Module):
    """One matmul with parameters used directly; gates by chunk, split, slicing or a view."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.W = nn.Parameter(torch.randn(I, 4 * H) * 0.3)
        self.U = nn.Parameter(torch.randn(H, 4 * H) * 0.3)
        self.b = nn.Parameter(torch.randn(4 * H))

    def gates(self, z: Tensor) -> Sequence[Tensor]:
        if self.how == "chunk":
            return z.chunk(4, dim=-1)
        if self.how == "split":
            return torch.split(z, H, dim=-1)
        if self.how == "slice":
            return z[..., :H], z[..., H : 2 * H], z[..., 2 * H : 3 * H], z[..., 3 * H :]
        return z.view(*z.shape[:-1], 4, H).unbind(-2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(*x.shape[1:-1], H)
        c = torch.zeros(*x.shape[1:-1], H)
        out = []
        for t in range(x.shape[0]):
            i, f, g, o = self.gates(x[t] @ self.W + h @ self.U + self.b)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out)


for _how in ("chunk", "split", "slice", "view"):
    add(f"MatmulLstm_{_how}", lambda how=_how: MatmulLstm(how), vectors)
add("MatmulLstm_batch", lambda: MatmulLstm("chunk"), batch_of(3))


@example(vectors)
class LayerNormLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ih = nn.Linear(I, 4 * H, bias=False)
        self.hh = nn.Linear(H, 4 * H, bias=False)
        self.ln_ih = nn.LayerNorm(4 * H)
        self.ln_hh = nn.LayerNorm(4 * H)
        self.ln_c = nn.LayerNorm(H)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (self.ln_ih(self.ih(x)) + self.ln_hh(self.hh(h))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.ln_c(c)), c

    def forward(self, x: Tensor) -> Tensor:
        return loop(self.step, x, (torch.zeros(H), torch.zeros(H)))


@example(vectors)
class PeepholeLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(I, 4 * H)
        self.h = nn.Linear(H, 4 * H, bias=False)
        self.pi = nn.Parameter(torch.randn(H))
        self.pf = nn.Parameter(torch.randn(H))
        self.po = nn.Parameter(torch.randn(H))

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(H)
        for row in x:
            i, f, g, o = torch.chunk(self.x(row) + self.h(h), 4)
            i = torch.sigmoid(i + self.pi * c)
            f = torch.sigmoid(f + self.pf * c)
            c = f * c + i * torch.tanh(g)
            h = torch.sigmoid(o + self.po * c) * torch.tanh(c)
        return h


@example(vectors)
class CoupledGates(nn.Module):
    """The input gate is what the forget gate leaves: c = f * c + (1 - f) * g."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(I + H, H)
        self.g = nn.Linear(I + H, H)
        self.o = nn.Linear(I + H, H)

    def forward(self, x: Tensor) -> Tensor:
        h, c = torch.zeros(H), torch.zeros(H)
        outputs = []
        for row in x:
            z = torch.cat([row, h], dim=-1)
            f = torch.sigmoid(self.f(z))
            c = f * c + (1.0 - f) * torch.tanh(self.g(z))
            h = torch.sigmoid(self.o(z)) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs)


@example(vectors)
class MinimalGatedUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wf, self.uf = nn.Linear(I, H), nn.Linear(H, H, bias=False)
        self.wh, self.uh = nn.Linear(I, H), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        for row in x:
            f = torch.sigmoid(self.wf(row) + self.uf(h))
            h = torch.lerp(h, torch.tanh(self.wh(row) + self.uh(f * h)), f)
        return h


@example(vectors)
class SoftmaxCell(nn.Module):
    """Softmax inside the cell: a mixture of slots addressed by the state."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(H, 6)
        self.memory = nn.Parameter(torch.randn(6, H))
        self.inp = nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(1, H)
        for row in x.split(1):
            weights = F.softmax(self.query(h), dim=-1)
            h = torch.tanh(self.inp(row) + weights @ self.memory)
        return h


@example(vectors)
class RunningMean(nn.Module):
    """A loop counter used as number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        mean = torch.zeros(H)
        means = []
        for t, row in enumerate(x):
            h = self.cell(row, h)
            mean = mean + (h - mean) / (t + 1)
            means.append(mean)
        return torch.stack(means)


@example(vectors)
class Decay(nn.Module):
    """The length itself as number, and numbers that no whole step separates."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        total = torch.zeros(H)
        for t in range(len(x)):
            h = self.cell(x[t], h)
            total = total + h * 0.9 ** (len(x) - t)
        return total / len(x)


@example(vectors)
class LearnedStart(nn.Module):
    """Initial state is a parameter, expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.h0 = nn.Parameter(torch.randn(1, H))
        self.c0 = nn.Parameter(torch.randn(H))
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.h0.expand(2, -1), torch.tanh(self.c0).repeat(2, 1)
        out = []
        for row in x:
            h, c = self.cell(torch.stack([row, -row]), (h, c))
            out.append(h)
        return torch.stack(out, dim=1)


@example(lambda n: {"h": torch.randn(H), "x": torch.randn(n, I)})
class StateArgument(nn.Module):
    """Initial state as keyword argument; the last state as well as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        if h is None:
            h = torch.zeros(H)
        out: list[Tensor] = []
        for t in range(len(x)):
            h = self.cell(x[t], h)
            out.append(h)
        return out, h


class Result(NamedTuple):
    states: Tensor
    last: Tensor
    length: int
    kind: str


@example(vectors)
class NamedResult(nn.Module):
    """A named tuple with values that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(I, H)

    def forward(self, x: Tensor) -> Result:
        y, h = self.rnn(x)
        return Result(y, h, len(x), "rnn")


@example(vectors)
class DictOfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> dict[str, Any]:
        state = (torch.zeros(H), torch.zeros(H))
        hs, cs = [], []
        for row in x:
            state = self.cell(row, state)
            hs.append(state[0])
            cs.append(state[1])
        return {"hidden": hs, "final": tuple(state), "steps": len(hs), "cells": torch.stack(cs, -1)}


@example(lambda n: (torch.randint(V, (n,)), torch.randn(n, 3), torch.randn(4)))
class SeveralInputs(nn.Module):
    """Words, features of every word and features of the sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V, 4)
        self.meta = nn.Linear(4, 2)
        self.rnn = nn.GRU(4 + 3 + 2, H)

    def forward(self, words: Tensor, features: Tensor, meta: Tensor) -> Tensor:
        m = torch.relu(self.meta(meta)).expand(len(words), 2)
        x = torch.cat([self.words(words), features, m], dim=1)
        return self.rnn(x)[0]


@example(lambda n: {"source": torch.randint(V, (n,)), "target": torch.randint(V, (17 - n,))})
class EncoderDecoder(nn.Module):
    """Teacher-forced sequence to sequence; two lengths that move against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, I)
        self.encoder = nn.LSTM(I, H)
        self.decoder = nn.LSTMCell(I, H)
        self.out = nn.Linear(H, V)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, (h, c) = self.encoder(self.embedding(source))
        state = (h[0], c[0])
        logits = []
        for word in self.embedding(target):
            state = self.decoder(word, state)
            logits.append(self.out(state[0]))
        return torch.stack(logits)


@example(lambda n: (torch.randn(n, I), 2, True))
class PythonValues(nn.Module):
    """Structure that follows from Python values passed as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor, repeats: int, normalize: bool = False) -> Tensor:
        h = torch.zeros(H)
        for row in x:
            for _ in range(repeats):
                h = self.cell(row, h)
        return F.normalize(h, dim=0) if normalize else h


@example(vectors)
class SecondOrder(nn.Module):
    """h[t] from h[t - 1] and h[t - 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.a, self.b = nn.Linear(I, H), nn.Linear(H, H), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hs = [torch.zeros(H), torch.zeros(H)]
        for row in x:
            hs.append(torch.tanh(self.x(row) + self.a(hs[-1]) + self.b(hs[-2])))
        return torch.stack(hs[2:])


@example(vectors)
class Clockwork(nn.Module):
    """A second state that moves at every other position only."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.GRUCell(I + H, H), nn.GRUCell(H, H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.zeros(H), torch.zeros(H)
        for t in range(len(x)):
            a = self.fast(torch.cat([x[t], b]), a)
            if t % 2 == 0:
                b = self.slow(a, b)
        return a, b


@example(vectors)
class Pyramid(nn.Module):
    """Pairs of positions joined between two layers; odd lengths are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTM(I, H), nn.LSTM(2 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lower(x)
        if len(y) % 2 == 1:
            y = F.pad(y, (0, 0, 0, 1))
        return self.upper(y.reshape(len(y) // 2, 2 * H))[0]


@example(vectors)
class ShiftedTargets(nn.Module):
    """Outputs at t and inputs at t + 1 meet; the first position is special."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(I, H)
        self.start = nn.Parameter(torch.randn(1, H))
        self.mix = nn.Linear(H + I, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        before = torch.cat([self.start, y[:-1]])
        return torch.relu(self.mix(torch.cat([before, x], -1)))


@example(vectors)
class MaskedUpdate(nn.Module):
    """torch.where on what the data says, inside the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        for row in x:
            new = self.cell(row, h)
            h = torch.where(row.sum() > 0, new, h)
        return h


@example(vectors)
class SelfAttentionHead(nn.Module):
    """Attention of the last state over all states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(I, H)
        self.key = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.rnn(x)
        scores = (self.key(y) * h).sum(-1) / math.sqrt(H)
        return (torch.softmax(scores, 0).unsqueeze(1) * y).sum(0)


@example(vectors)
class SharedWeights(nn.Module):
    """One layer applied three times in a row, as in a recurrent-depth network."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.layer = nn.Linear(I, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        for _ in range(3):
            y = y + torch.tanh(self.layer(y))
        return y.sum(0)


@example(vectors)
class Dilated(nn.Module):
    """Rows taken with a step, from both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(2 * I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        for a, b in zip(x[::2], x.flip(0)[::2], strict=True):
            h = self.cell(torch.cat([a, b]), h)
        return h


@example(vectors)
class EinsumCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(H, H) * 0.3)
        self.v = nn.Parameter(torch.randn(I, H) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(H)
        for row in torch.einsum("ti,ih->th", x, self.v):
            h = torch.tanh(row + torch.einsum("h,hk->k", h, self.w))
        return h


@example(vectors)
class MultiHeadState(nn.Module):
    """The state reshaped into heads, an outer-product memory read by a query."""

    def __init__(self) -> None:
        super().__init__()
        self.kvq = nn.Linear(I, 3 * H)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.zeros(2, H // 2, H // 2)
        out = []
        for row in x:
            k, v, q = self.kvq(row).view(3, 2, H // 2)
            memory = 0.9 * memory + k.unsqueeze(2) * v.unsqueeze(1)
            out.append(torch.matmul(q.unsqueeze(1), memory).reshape(H))
        return torch.stack(out)


@example(vectors)
class RecursiveHalves(nn.Module):
    """A balanced tree over the sequence: recursion on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.join = nn.Linear(I, H), nn.Linear(2 * H, H)

    def reduce(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return self.leaf(x[0])
        middle = len(x) // 2
        pair = torch.cat([self.reduce(x[:middle]), self.reduce(x[middle:])])
        return torch.tanh(self.join(pair))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(x)


def closure_model() -> Callable[[Tensor], Tensor]:
    """A plain function using modules from its closure."""
    cell = nn.LSTMCell(I, H).eval()
    head = nn.Linear(H, 2).eval()

    def run(x: Tensor) -> Tensor:
        state = None
        for row in x:
            state = cell(row, state)
        return head(state[0])

    return run


add("closure_model", closure_model, vectors)
