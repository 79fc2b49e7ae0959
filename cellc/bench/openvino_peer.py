"""OpenVINO's LSTM with a PyTorch module's weights.

OpenVINO's order of gates is f i g o. The state after each sequence's own last step is taken out of
all states, inside the graph: on CPUs the last state that it returns is that of the padded end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cellc.bench.peers import Array, pad


class OpenvinoLSTM:
    """Rows [T, I] of a batch to the last states [B, H]."""

    def __init__(self, rnn: nn.LSTM) -> None:
        import openvino
        from openvino import opset13 as op

        weights = {k: v.detach().numpy() for k, v in rnn.named_parameters()}

        def reordered(value: Array) -> Array:
            i, f, g, o = np.split(value, 4)
            return np.concatenate([f, i, g, o])[None]

        bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        x = op.parameter([-1, -1, rnn.input_size], np.float32)
        state = op.parameter([-1, 1, rnn.hidden_size], np.float32)
        lengths = op.parameter([-1], np.int32)
        arrays = [weights["weight_ih_l0"], weights["weight_hh_l0"], bias]
        constants = [op.constant(reordered(a)) for a in arrays]
        node = op.lstm_sequence(x, state, state, lengths, *constants, rnn.hidden_size, "forward")
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        states = op.squeeze(node.output(0), op.constant(np.array([1])))
        ends = op.convert(op.subtract(lengths, op.constant(np.array(1, np.int32))), "i64")
        last = op.gather_nd(states, op.unsqueeze(ends, op.constant(np.array([1]))), 1)
        model = openvino.Model([last], [x, state, lengths], "lstm")
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self._request, self._hidden = compiled.create_infer_request(), rnn.hidden_size

    def __call__(self, rows: Sequence[Array]) -> Array:
        x, lengths = pad(rows)
        zeros = np.zeros((len(rows), 1, self._hidden), np.float32)
        last: Array = self._request.infer([x, zeros, lengths], share_inputs=True)[0]
        return last
