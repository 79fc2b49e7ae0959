"""onnxruntime's LSTM and GRU with a PyTorch module's weights.

Gate orders and the place of the reset gate: ONNX operators LSTM-14 and GRU-14.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[Any]


def why_not() -> str:
    """Why this peer cannot run here, or nothing."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        return f"not installed: pip install {error.name}"
    return "" if onnx and onnxruntime else "not installed"


class RecurrentSession:
    """The last state of padded sequences [T, B, I] with their lengths."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            _model(rnn), options, providers=["CPUExecutionProvider"]
        )

    def padded(self, rows: Sequence[Array], batches: Sequence[Sequence[int]]) -> list[Tensor]:
        """Batch by batch, padded to its longest; results in the order of the batches' members."""
        found: dict[int, Tensor] = {}
        for batch in batches:
            lengths = np.array([len(rows[i]) for i in batch], np.int32)
            if len(batch) == 1:
                x = rows[batch[0]][:, None]
            else:
                x = np.zeros((int(lengths.max()), len(batch), rows[0].shape[1]), np.float32)
                for k, i in enumerate(batch):
                    x[: lengths[k], k] = rows[i]
            (last,) = self._session.run(None, {"x": x, "lengths": lengths})
            found |= zip(batch, torch.from_numpy(last[0]).unbind(), strict=True)
        return [found[i] for i in sorted(found)]


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
