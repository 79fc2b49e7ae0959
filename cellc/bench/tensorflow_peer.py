"""Keras's LSTM on masked batches, as one TensorFlow function, with a PyTorch module's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from cellc.bench.peers import Array, pad


class TensorflowLSTM:
    """Rows [T, I] of a batch to the last states [B, H]."""

    def __init__(self, rnn: nn.LSTM) -> None:
        import tensorflow as tf

        layer = tf.keras.layers.LSTM(rnn.hidden_size)
        layer.build((None, None, rnn.input_size))
        weights = {k: v.detach().numpy() for k, v in rnn.named_parameters()}
        bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        layer.set_weights([weights["weight_ih_l0"].T, weights["weight_hh_l0"].T, bias])
        signature = [
            tf.TensorSpec([None, None, rnn.input_size], tf.float32),
            tf.TensorSpec([None, None], tf.bool),
        ]
        self._run: Any = tf.function(lambda x, mask: layer(x, mask=mask), input_signature=signature)

    def __call__(self, rows: Sequence[Array]) -> Array:
        x, lengths = pad(rows)
        there = np.arange(x.shape[1]) < lengths[:, None]
        states: Array = self._run(x, there).numpy()
        return states
