"""DyNet with automatic batching (the dynet38 package): its LSTM with a PyTorch module's weights.

Neubig, Goldberg, Dyer: On-the-fly Operation Batching in Dynamic Computation Graphs, NIPS 2017,
arXiv:1705.07860.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cellc.bench.peers import Array

MEGABYTES = 2048  # of its memory pool, which grows where that is too little


def load() -> Any:
    """The module, set to batch by itself."""
    importlib.import_module("dynet_config").set(autobatch=1, mem=str(MEGABYTES), random_seed=1)
    module = importlib.import_module("dynet")
    torch.set_flush_denormal(False)  # which loading it turned on, for all that this thread does
    return module


class DynetLSTM:
    """Rows [T, I] of a batch to the last states [B, H]; building the graph is part of it."""

    def __init__(self, rnn: nn.LSTM) -> None:
        self._dy = dy = load()
        self._parameters = dy.ParameterCollection()
        self._lstm = dy.VanillaLSTMBuilder(
            1, rnn.input_size, rnn.hidden_size, self._parameters, forget_bias=0.0
        )
        weights = {k: v.detach().numpy() for k, v in rnn.named_parameters()}

        def reordered(value: Array) -> Array:
            i, f, g, o = np.split(value, 4)
            return np.concatenate([i, f, o, g])

        bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        values = [weights["weight_ih_l0"], weights["weight_hh_l0"], bias]
        for parameter, value in zip(self._lstm.get_parameters()[0], values, strict=True):
            parameter.set_value(reordered(value))

    def __call__(self, rows: Sequence[Array]) -> Array:
        dy = self._dy
        dy.renew_cg()
        outputs = [self._last(row) for row in rows]
        dy.forward(outputs)
        return np.stack([o.npvalue() for o in outputs]).astype(np.float32)

    def _last(self, row: Array) -> Any:
        dy = self._dy
        x = dy.inputTensor(row.T)  # one node a sequence: faster than one a step
        steps = [dy.pick(x, t, dim=1) for t in range(len(row))]
        return self._lstm.initial_state().transduce(steps)[-1]
