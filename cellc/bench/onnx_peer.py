"""onnxruntime's LSTM and GRU with a PyTorch module's weights.

Gate orders and the place of the reset gate: ONNX operators LSTM-14 and GRU-14.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cellc.bench.peers import Array, pad


class RecurrentSession:
    """Rows [T, I] of a batch to the last states [B, H]. `spinning`: threads that wait do not
    sleep, which is onnxruntime's default.
    """

    def __init__(self, rnn: nn.RNNBase, spinning: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        self._session = onnxruntime.InferenceSession(
            _model(rnn), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, rows: Sequence[Array]) -> Array:
        x, lengths = pad(rows, time_first=True)
        last: Array = self._session.run(None, {"x": x, "lengths": lengths})[0][0]
        return last


def _model(rnn: nn.RNNBase) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    lstm = isinstance(rnn, nn.LSTM)
    order = (0, 3, 1, 2) if lstm else (1, 0, 2)  # PyTorch: i f g o, r z n; ONNX: i o f c, z r h

    tensors = dict(rnn.named_parameters())

    def reordered(name: str) -> Array:
        chunks = tensors[name].detach().chunk(len(order))
        return torch.cat([chunks[k] for k in order]).numpy()[None]

    bias = np.concatenate([reordered("bias_ih_l0"), reordered("bias_hh_l0")], 1)
    weights = {"w": reordered("weight_ih_l0"), "r": reordered("weight_hh_l0"), "b": bias}
    node = helper.make_node(
        "LSTM" if lstm else "GRU",
        ["x", "w", "r", "b", "lengths"],
        ["", "last"],
        hidden_size=rnn.hidden_size,
    )
    if not lstm:
        node.attribute.append(helper.make_attribute("linear_before_reset", 1))
    graph = helper.make_graph(
        [node],
        "recurrent",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", rnn.input_size]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]),
        ],
        [helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, "B", rnn.hidden_size])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized
