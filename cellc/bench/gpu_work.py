"""What the GPU benchmark runs: recurrences, trees and a decoder, and their peers in PyTorch.

Duty: one `Work` a kind: a model for cellc, B requests of equal length, the same as one batch, and
how PyTorch runs that batch: by its library (cuDNN on a card) or by hand, and by `torch.compile` of
the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cellc.bench.tree_models import Cell, Leaf, State

STEPS = 24
LEAVES = 16  # of a tree: five levels
VOCABULARY = 1000
KINDS: Mapping[str, Callable[[int, int], nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
BY_STEP = "torch.compile"

Step = Callable[..., Any]
Made = Callable[[Step], Step]
"""What makes a function of a step faster, or leaves it."""


@dataclass(frozen=True)
class Work:
    """One model. `peer`: what PyTorch has for it; `by_step`: step by step."""

    name: str
    steps: int  # of a request
    model: nn.Module
    batch: Callable[[int], Tensor]
    requests: Callable[[Tensor], list[Any]]
    result: Callable[[Any], Tensor]
    peer: Callable[[Tensor], Sequence[Tensor]]
    by_step: Callable[[Tensor, Made], Sequence[Tensor]]


def make(kind: str, hidden: int, name: str, device: torch.device) -> Work:
    """`kind`: lstm, gru, treelstm or decoder; `name`: of the dtype."""
    torch.manual_seed(0)
    exact = name != "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    made = {"treelstm": _trees, "decoder": _decoder}.get(kind, partial(_recurrence, kind))
    return made(hidden, partial(_ready, device=device, dtype=DTYPES[name]))


def _ready(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = model.eval().requires_grad_(False).to(device, dtype)
    if isinstance(model, nn.RNNBase):
        model.flatten_parameters()
    return model


def _like(model: nn.Module, *shape: int) -> Tensor:
    weight = next(model.parameters())
    return torch.randn(*shape, device=weight.device, dtype=weight.dtype)


# -- library recurrences ---------------------------------------------------------------------------


def _recurrence(kind: str, hidden: int, ready: Callable[[nn.Module], nn.Module]) -> Work:
    model = ready(KINDS[kind](hidden, hidden))
    cells: Mapping[str, Callable[[int, int], nn.Module]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
    cell = ready(cells[kind](hidden, hidden))
    named = {k.removesuffix("_l0"): v for k, v in model.named_parameters()}
    cell.load_state_dict(named)

    def by_step(x: Tensor, step: Made) -> Sequence[Tensor]:
        run = step(cell)
        h = x.new_zeros(x.shape[1], hidden)
        state: Any = (h, h) if kind == "lstm" else h
        out = []
        for row in x:
            state = run(row, state)
            out.append(state[0] if kind == "lstm" else state)
        return torch.stack(out).unbind(1)

    return Work(
        f"{kind}-{hidden}", STEPS, model,
        batch=lambda B: _like(model, STEPS, B, hidden),
        requests=lambda x: list(x.unbind(1)),
        result=lambda made: made[0],
        peer=lambda x: model(x)[0].unbind(1),
        by_step=by_step,
    )  # fmt: skip


# -- trees -----------------------------------------------------------------------------------------


class Trees(nn.Module):
    """A binary TreeLSTM over a complete tree: [LEAVES, H] to the state of its root."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.leaf, self.cell = Leaf(hidden), Cell(hidden)

    def forward(self, x: Tensor) -> Tensor:
        states = [self.leaf(row) for row in x]
        while len(states) > 1:
            pairs = zip(states[::2], states[1::2], strict=True)
            states = [self.cell(left, right) for left, right in pairs]
        return states[0][0]  # type: ignore[no-any-return]


def _trees(hidden: int, ready: Callable[[nn.Module], nn.Module]) -> Work:
    trees = Trees(hidden)
    model = ready(trees)

    def by_step(x: Tensor, step: Made) -> Sequence[Tensor]:
        leaf, cell = step(trees.leaf), step(trees.cell)
        h, c = leaf(x)  # [B, LEAVES, H]
        while h.shape[1] > 1:
            left, right = ((h[:, k::2], c[:, k::2]) for k in range(2))
            state: State = cell(left, right)
            h, c = state
        roots: Tensor = h[:, 0]
        return roots.unbind()

    return Work(
        f"treelstm-{hidden}", LEAVES.bit_length(), model,
        batch=lambda B: _like(model, B, LEAVES, hidden),
        requests=lambda x: list(x.unbind()),
        result=lambda made: made,
        peer=partial(by_step, step=lambda f: f),
        by_step=by_step,
    )  # fmt: skip


# -- decoding --------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Says STEPS tokens from one, each the best after those before; returns its first state, too.

    What is said may differ in a tie; the first state does not.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY)
        self.cell = nn.LSTMCell(hidden, hidden)

    def step(self, token: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = self.cell(self.embedding(token), (h, c))
        return self.head(h).argmax(-1), h, c

    def forward(self, token: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        c, said, states = h, [], []
        for _ in range(STEPS):
            token, h, c = self.step(token, h, c)
            said.append(token)
            states.append(h)
        return torch.stack(said), states[0]


def _decoder(hidden: int, ready: Callable[[nn.Module], nn.Module]) -> Work:
    decoder = Decoder(hidden)
    model = ready(decoder)
    zero = torch.zeros_like(next(model.parameters())[0, :hidden])

    def by_step(tokens: Tensor, step: Made) -> Sequence[Tensor]:
        run = step(decoder.step)
        h = zero.expand(len(tokens), hidden)
        token, c, states = tokens, h, list[Tensor]()
        for _ in range(STEPS):
            token, h, c = run(token, h, c)
            states.append(h)
        return states[0].unbind()

    return Work(
        f"decoder-{hidden}", STEPS, model,
        batch=lambda B: torch.randint(VOCABULARY, (B,), device=zero.device),
        requests=lambda tokens: [(token, zero) for token in tokens.unbind()],
        result=lambda made: made[1],
        peer=partial(by_step, step=lambda f: f),
        by_step=by_step,
    )  # fmt: skip
