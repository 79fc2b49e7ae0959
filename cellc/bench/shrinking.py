"""A recurrence step by step, by hand: batches that shrink as their sequences end.

Duty: what a user of PyTorch writes who tunes it for one processor. Sequences of like lengths make
a batch; the input product of all steps goes first, as one; weights are packed for oneDNN once;
gates are computed in place, those with one activation together. No position is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

BATCH = 128  # sequences: the input products of more do not fit into the cache
Product = Callable[[Tensor], Tensor]


class Shrinking:
    """Sequences [T] or [T, I] to the last states [H]; `embed` is what comes before the recurrence,
    `product` makes layers of weights.
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        embed: Callable[[Tensor], Tensor],
        batch: int = BATCH,
        product: Callable[[Tensor, Tensor | None], Product] | None = None,
    ) -> None:
        self._embed, self._hidden, self._batch = embed, rnn.hidden_size, batch
        product = product or packed
        self._lstm = isinstance(rnn, nn.LSTM)
        order = (0, 1, 3, 2) if self._lstm else (0, 1, 2)  # i f o g, r z n: sigmoids first
        weights = dict(rnn.named_parameters())

        def reordered(name: str) -> Tensor:
            chunks = weights[name].detach().chunk(len(order))
            return torch.cat([chunks[k] for k in order])

        b_ih, b_hh = reordered("bias_ih_l0"), reordered("bias_hh_l0")
        first = b_ih + b_hh if self._lstm else b_ih
        self._of_inputs = product(reordered("weight_ih_l0"), first)
        self._of_states = product(reordered("weight_hh_l0"), None if self._lstm else b_hh)

    def __call__(self, requests: Sequence[Tensor]) -> list[Tensor]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
        results: list[Any] = [None] * len(order)
        for at in range(0, len(order), self._batch):
            batch = order[at : at + self._batch]
            last = self._last([requests[i] for i in batch])
            for i, row in zip(batch, last.unbind(), strict=True):
                results[i] = row
        return results

    def _last(self, batch: Sequence[Tensor]) -> Tensor:
        """[B, H], of sequences that are sorted, longest first."""
        sequences = pack_sequence(list(batch))
        inputs = self._of_inputs(self._embed(sequences.data))
        h = inputs.new_zeros(len(batch), self._hidden)
        c, at = torch.zeros_like(h), 0
        for n in sequences.batch_sizes.tolist():
            if self._lstm:
                self._lstm_step(inputs[at : at + n], h[:n], c[:n])
            else:
                self._gru_step(inputs[at : at + n], h[:n])
            at += n
        return h

    def _lstm_step(self, x: Tensor, h: Tensor, c: Tensor) -> None:
        gates = x.add_(self._of_states(h))
        i, f, o = gates[:, : 3 * self._hidden].sigmoid_().chunk(3, 1)
        new = gates[:, 3 * self._hidden :].tanh_()
        c.mul_(f).addcmul_(i, new)
        torch.mul(o, c.tanh(), out=h)

    def _gru_step(self, x: Tensor, h: Tensor) -> None:
        split, of_state = 2 * self._hidden, self._of_states(h)
        r, z = x[:, :split].add_(of_state[:, :split]).sigmoid_().chunk(2, 1)
        new = x[:, split:].addcmul_(r, of_state[:, split:]).tanh_()
        torch.lerp(new, h, z, out=h)


def linear(weight: Tensor, bias: Tensor | None) -> Product:
    """PyTorch's own."""
    return lambda x: nn.functional.linear(x, weight, bias)


def packed(weight: Tensor, bias: Tensor | None, rows: int | None = None) -> Product:
    """A layer whose weight lies as oneDNN wants it (for so many rows), where PyTorch has oneDNN:
    what `torch.compile` makes of one whose weights are frozen.
    """
    backends: Any = torch.backends
    if not backends.mkldnn.is_available():
        return linear(weight, bias)
    ops: Any = torch.ops.mkldnn
    kept = ops._reorder_linear_weight(weight, rows)
    return lambda x: ops._linear_pointwise(x, kept, bias, "none", [], "")
