"""Library recurrences as loops over their cells.

Duty: while tracing, `nn.LSTM`, `nn.GRU` and `nn.RNN` (through the torch functions that they call)
run as the same recurrence written out, one cell a position, so that its cells are found like those
of any other loop. Equal to PyTorch's definitions (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN
documentation): layers, directions, projections, with or without bias, batch first or not. Dropout
between layers is off in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from cellc.errors import UnsupportedError

Tensor = torch.Tensor
State = tuple[Tensor, ...]
Weights = Sequence[Tensor]
# Marks what is traced inside as another program point: layers share these lines but not their
# cells.
Scope = Callable[[Hashable], AbstractContextManager[None]]


def _lstm_step(x: Tensor, state: State, weights: Weights, bias: bool) -> State:
    """One position: `x` is the input's product [B, 4H], state is (h [B, H or P], c [B, H])."""
    h, c = state
    gates = x + F.linear(h, weights[1], weights[3] if bias else None)
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if len(weights) % 2 == 1:
        h = F.linear(h, weights[-1])
    return h, c


def _gru_step(x: Tensor, state: State, weights: Weights, bias: bool) -> State:
    (h,) = state
    xr, xz, xn = x.chunk(3, 1)
    hr, hz, hn = F.linear(h, weights[1], weights[3] if bias else None).chunk(3, 1)
    r = torch.sigmoid(xr + hr)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def step(x: Tensor, state: State, weights: Weights, bias: bool) -> State:
        return (activation(x + F.linear(state[0], weights[1], weights[3] if bias else None)),)

    return step


def _direction(
    step: Callable[..., State], x: Tensor, state: State, weights: Weights, bias: bool, reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction over x [T, B, I]; returns ([T, B, H], last state)."""
    product = F.linear(x, weights[0], weights[2] if bias else None)
    steps = range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0])
    outputs: list[Tensor] = [product] * x.shape[0]
    for t in steps:
        state = step(product[t], state, weights, bias)
        outputs[t] = state[0]
    return torch.stack(outputs), state


def packed(origin: str | None = None) -> UnsupportedError:
    """What is said to a forward that packs sequences."""
    return UnsupportedError(
        what="a PackedSequence",
        remedy="pass each sequence as a request of its own, unpadded",
        origin=origin,
    )


def _loop(step: Callable[..., State], num_states: int) -> Callable[..., Any]:
    def run(
        x: Tensor,
        hx: Any,
        flat: Weights,
        has_biases: bool,
        num_layers: Any,
        dropout: Any,
        train: Any,
        bidirectional: Any,
        batch_first: Any = False,
        *,
        scope: Scope,
    ) -> Any:
        if isinstance(flat, bool):
            raise packed()
        if x.shape[1 if batch_first else 0] == 0:
            raise ValueError("expected a sequence of at least one position")
        states = tuple(hx) if num_states > 1 else (hx,)
        if batch_first:
            x = x.transpose(0, 1)
        directions = 2 if bidirectional else 1
        per = len(flat) // (num_layers * directions)
        last: list[State] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                weights = flat[k * per : (k + 1) * per]
                start = tuple(s[k] for s in states)
                with scope(("layer", layer, "direction", direction)):
                    out, state = _direction(step, x, start, weights, has_biases, direction == 1)
                outputs.append(out)
                last.append(state)
            with scope(("layer", layer)):
                x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        y = x.transpose(0, 1) if batch_first else x
        return (y, *(torch.stack([s[i] for s in last]) for i in range(num_states)))

    return run


LOOPS: dict[str, Callable[..., Any]] = {
    "lstm": _loop(_lstm_step, 2),
    "gru": _loop(_gru_step, 1),
    "rnn_tanh": _loop(_rnn_step(torch.tanh), 1),
    "rnn_relu": _loop(_rnn_step(torch.relu), 1),
}
