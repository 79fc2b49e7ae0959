"""The tree benchmark's model in DyNet, with automatic batching (the dynet38 package), and in
torchfold, which batches a model's calls by depth.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cellc.bench import dynet_peer
from cellc.bench.tree_models import TreeLSTM


class DynetTreeLSTM:
    """Builds one graph of all trees, and runs it batched."""

    def __init__(self, model: TreeLSTM) -> None:
        self._dy: Any = dynet_peer.load()
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
        return torch.from_numpy(np.stack([o.npvalue() for o in outputs]).astype(np.float32))


class _Plain:
    """torch.autograd.Variable as torchfold calls it: what it is given."""

    def __new__(cls, data: Any, volatile: bool = False) -> Any:
        return data


def _load_torchfold() -> Any:
    """The module, on today's torch: version 0.1.0 was written for names that are gone."""
    module = importlib.import_module("torchfold.torchfold")
    names: Any = module
    old = SimpleNamespace(_TensorBase=Tensor)
    names.Variable = _Plain
    names.torch = SimpleNamespace(
        tensor=old, LongTensor=torch.LongTensor, cat=torch.cat, chunk=torch.chunk
    )
    return module


class TorchfoldTreeLSTM:
    """Folds all trees, then runs each depth's calls at once: [trees, classes]. A state is one
    tensor, h and c side by side: folding costs by the argument. Where products are large, more
    trees at once are faster.
    """

    def __init__(self, model: TreeLSTM) -> None:
        self._model, self._fold = model, _load_torchfold().Fold
        self._batch = 128 if model.size < 1024 else 512

    def leaf(self, token: Tensor) -> Tensor:
        return torch.cat(self._model.leaf(self._model.embedding(token)), 1)

    def node(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat(self._model.cell(left.chunk(2, 1), right.chunk(2, 1)), 1)

    def out(self, state: Tensor) -> Tensor:
        return self._model.out(state[:, : self._model.size])  # type: ignore[no-any-return]

    def _encode(self, fold: Any, tree: Any) -> Any:
        if not isinstance(tree, tuple):
            return fold.add("leaf", tree)
        return fold.add("node", self._encode(fold, tree[0]), self._encode(fold, tree[1]))

    def __call__(self, trees: Sequence[Any]) -> Tensor:
        found = []
        for at in range(0, len(trees), self._batch):
            fold = self._fold()
            nodes = [
                fold.add("out", self._encode(fold, tree)) for tree in trees[at : at + self._batch]
            ]
            found.append(fold.apply(self, [nodes])[0])
        return torch.cat(found)
