"""The tree benchmark's model in DyNet, with automatic batching (the dynet38 package)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellc.bench.tree_models import TreeLSTM


class DynetTreeLSTM:
    """Builds one graph of all trees, and runs it batched. Raises ImportError without dynet38."""

    def __init__(self, model: TreeLSTM, megabytes: int = 2048) -> None:
        importlib.import_module("dynet_config").set(autobatch=1, mem=str(megabytes), random_seed=1)
        self._dy: Any = importlib.import_module("dynet")
        self._size = model.size
        self._parameters = self._dy.ParameterCollection()
        weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
        self._words = self._parameters.lookup_parameters_from_numpy(weights["embedding.weight"])
        self._leaf, self._cell, self._out = (
            [self._add(weights[f"{name}.bias"]), self._add(weights[f"{name}.weight"])]
            for name in ("leaf.gates", "cell.gates", "out")
        )

    def _add(self, weight: npt.NDArray[np.float32]) -> Any:
        return self._parameters.parameters_from_numpy(weight)

    def _encode(self, tree: Any) -> tuple[Any, Any]:
        dy, n = self._dy, self._size
        if not isinstance(tree, tuple):
            g = dy.affine_transform([*self._leaf, self._words[tree]])
            c = dy.cmult(dy.logistic(g[:n]), dy.tanh(g[2 * n :]))
            return dy.cmult(dy.logistic(g[n : 2 * n]), dy.tanh(c)), c
        (h_left, c_left), (h_right, c_right) = self._encode(tree[0]), self._encode(tree[1])
        g = dy.affine_transform([*self._cell, dy.concatenate([h_left, h_right])])
        c = dy.cmult(dy.logistic(g[:n]), dy.tanh(g[2 * n : 3 * n]))
        c = c + dy.cmult(dy.logistic(g[3 * n : 4 * n]), c_left)
        c = c + dy.cmult(dy.logistic(g[4 * n :]), c_right)
        return dy.cmult(dy.logistic(g[n : 2 * n]), dy.tanh(c)), c

    def __call__(self, trees: Sequence[Any]) -> torch.Tensor:
        """[trees, classes]; building the graph is part of it."""
        dy = self._dy
        dy.renew_cg()
        outputs = [dy.affine_transform([*self._out, self._encode(t)[0]]) for t in trees]
        dy.forward(outputs)
        return torch.from_numpy(np.stack([o.npvalue() for o in outputs]))
