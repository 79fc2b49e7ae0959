"""The binary TreeLSTM of the tree benchmark, as a user of each way would write it.

Tai, Socher, Manning: Improved Semantic Representations From Tree-Structured Long Short-Term Memory
Networks, ACL 2015, https://arxiv.org/abs/1503.00075 (equations 9 to 14). Leaves are tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellc.bench.shrinking import packed
from cellc.trees import Tree

State = tuple[Tensor, Tensor]
VOCABULARY, CLASSES = 10_000, 5


class Leaf(nn.Module):
    """A word's vector to a state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gates = nn.Linear(size, 3 * size)

    def forward(self, x: Tensor) -> State:
        i, o, u = self.gates(x).chunk(3, -1)
        c = torch.sigmoid(i) * torch.tanh(u)
        return torch.sigmoid(o) * torch.tanh(c), c


class Cell(nn.Module):
    """Two states to the state of the node above them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * size, 5 * size)

    def forward(self, left: State, right: State) -> State:
        gates = self.gates(torch.cat([left[0], right[0]], -1))
        i, o, u, f_left, f_right = gates.chunk(5, -1)
        c = torch.sigmoid(i) * torch.tanh(u)
        c = c + torch.sigmoid(f_left) * left[1] + torch.sigmoid(f_right) * right[1]
        return torch.sigmoid(o) * torch.tanh(c), c


class TreeLSTM(nn.Module):
    """Nested pairs of tokens in, scores of the root out: plain recursion."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(VOCABULARY, size)
        self.leaf, self.cell = Leaf(size), Cell(size)
        self.out = nn.Linear(size, CLASSES)

    def encode(self, tree: Any) -> State:
        if isinstance(tree, tuple):
            return self.cell(self.encode(tree[0]), self.encode(tree[1]))  # type: ignore[no-any-return]
        token = torch.tensor(tree, device=self.out.weight.device)
        return self.leaf(self.embedding(token))  # type: ignore[no-any-return]

    def forward(self, tree: Any) -> Tensor:
        return self.out(self.encode(tree)[0])  # type: ignore[no-any-return]


class ArrayTreeLSTM(nn.Module):
    """The same model on a `cellc.Tree` and the tokens of its leaves."""

    def __init__(self, model: TreeLSTM) -> None:
        super().__init__()
        self.model = model

    def node(self, children: list[State]) -> State:
        return self.model.cell(children[0], children[1])  # type: ignore[no-any-return]

    def leaf(self, token: Tensor) -> State:
        return self.model.leaf(self.model.embedding(token))  # type: ignore[no-any-return]

    def forward(self, tree: Tree, tokens: Tensor) -> Tensor:
        h, _ = tree.fold(self.node, self.leaf, leaves=tokens)
        return self.model.out(h)  # type: ignore[no-any-return]


class _Packed(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it."""

    def __init__(self, layer: nn.Linear, rows: int | None) -> None:
        super().__init__()
        self._product = packed(layer.weight.detach(), layer.bias.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


def with_packed_weights(model: TreeLSTM, rows: int | None = None) -> TreeLSTM:
    """The same model, for so many rows, or few rows of many units: PyTorch's own product of one row
    and a weight of more than a cache runs at half of the memory's speed on some processors, by one
    thread.
    """
    model = copy.deepcopy(model)
    for part in (model.leaf, model.cell):
        part.gates = _Packed(part.gates, rows)  # type: ignore[assignment]
    return model


def as_arrays(tree: Any) -> tuple[np.ndarray, list[int]]:
    """(children [nodes, 2], -1 at leaves; tokens of the leaves); children first, the root last."""
    children: list[tuple[int, int]] = []
    tokens: list[int] = []

    def add(node: Any) -> int:
        if isinstance(node, tuple):
            children.append((add(node[0]), add(node[1])))
        else:
            tokens.append(node)
            children.append((-1, -1))
        return len(children) - 1

    add(tree)
    return np.array(children), tokens


def run_levels(model: TreeLSTM, batch: Sequence[tuple[np.ndarray, Tensor]]) -> Tensor:
    """All trees together, level by level, as one would write it by hand: [trees, classes]."""
    sizes = np.array([len(children) for children, _ in batch])
    offsets = np.cumsum(sizes) - sizes
    moved = [np.where(c < 0, -1, c + o) for (c, _), o in zip(batch, offsets, strict=True)]
    children = np.concatenate(moved)
    is_leaf = children[:, 0] < 0
    level = np.zeros(len(children), np.int64)
    waiting = np.flatnonzero(~is_leaf)
    done = is_leaf.copy()
    levels: list[np.ndarray] = []
    while len(waiting):
        ready = done[children[waiting]].all(1)
        now, waiting = waiting[ready], waiting[~ready]
        done[now] = True
        level[now] = len(levels) + 1
        levels.append(now)
    there = model.out.weight.device
    h = torch.empty(len(children), model.size, device=there)
    c = torch.empty_like(h)
    leaves = torch.from_numpy(np.flatnonzero(is_leaf)).to(there)
    tokens = torch.cat([t for _, t in batch])
    h[leaves], c[leaves] = model.leaf(model.embedding(tokens))
    for now in levels:
        nodes, below = (torch.from_numpy(x).to(there) for x in (now, children[now]))
        left, right = below[:, 0], below[:, 1]
        h[nodes], c[nodes] = model.cell((h[left], c[left]), (h[right], c[right]))
    return model.out(h[torch.from_numpy(offsets + sizes - 1).to(there)])  # type: ignore[no-any-return]
