"""Tracing for a GPU that need not be here: the forward sees it, torch's own code does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellc.frontends import tracing
from cellc.frontends.placeholder import row_major
from cellc.modules import named_tensors
from cellc.printer import print_graph

CUDA = torch.device("cuda", 0)


class Model(nn.Module):
    """Fused kernels of a GPU behind each of its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(8, 16), nn.LSTMCell(16, 16)
        self.seen: list[torch.device] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.device)
        h = torch.zeros(16, device=x.device)
        for step in x:
            h = self.gru(step, h)
        h, _ = self.lstm(h, (torch.zeros(16), h))  # made without a device
        q = h.view(1, 2, 2, 4)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).flatten()


def traced(model: Model, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    def placed(shape: Any, dtype: torch.dtype, _: torch.device) -> Any:
        return row_major(shape, dtype, device)

    monkeypatch.setattr(tracing, "row_major", placed)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    found = tracing.trace(model, named_tensors(model), {}, (torch.randn(3, 8),), {}, ["x"])
    return print_graph(found.graph)


def test_a_gpu_traces_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    graphs = [traced(model, device, monkeypatch) for device in (torch.device("cpu"), CUDA)]
    assert graphs[0] == graphs[1]
    assert model.seen == [torch.device("cpu"), CUDA]
    assert "fused" not in graphs[1] and "flash" not in graphs[1]
