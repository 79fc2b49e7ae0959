"""Child-Sum TreeLSTM over Python's syntax trees: nodes are (kind, (children...)), from `ast`.

Tai, Socher, Manning, ACL 2015, https://arxiv.org/abs/1503.00075 (equations 2 to 8), over syntax
trees of programs as in Shido, Kobayashi, Yamamoto, Miyamoto, Matsumura: Automatic Source Code
Summarization with Extended Tree-LSTM, 2019, https://arxiv.org/abs/1906.08094.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 8
KINDS = ["Add", "BinOp", "Call", "Compare", "Constant", "Gt", "IfExp", "List", "Lt", "Mult", "Name"]
KINDS += ["Sub", "Subscript", "USub", "UnaryOp"]
SOURCES = [
    "x",
    "-x",
    "x + 1",
    "f(x, y)",
    "f()",
    "a * b + c",
    "[a, b, 3, d]",
    "a[0] < b",
    "f(g(x), -y)",
    "a if b > 0 else c",
    "f(a + b, c * (d - 1))",
]


class ChildSumCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates_x = nn.Linear(SIZE, 4 * SIZE)
        self.iou_h = nn.Linear(SIZE, 3 * SIZE, bias=False)
        self.forget_h = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor, children: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        gates, f_x = self.gates_x(x).split([3 * SIZE, SIZE], -1)
        total = sum((h for h, _ in children), torch.zeros(SIZE))
        i, o, u = (gates + self.iou_h(total)).chunk(3, -1)
        c = torch.sigmoid(i) * torch.tanh(u)
        for h_k, c_k in children:
            c = c + torch.sigmoid(f_x + self.forget_h(h_k)) * c_k
        return torch.sigmoid(o) * torch.tanh(c), c


class ASTEncoder(nn.Module):
    """A syntax tree in, its root's hidden state and memory out."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(len(KINDS), SIZE)
        self.cell = ChildSumCell()

    def forward(self, tree: Any) -> tuple[Tensor, Tensor]:
        kind, children = tree
        return self.cell(self.kinds(kind), [self.forward(child) for child in children])


def make() -> nn.Module:
    return ASTEncoder()


def requests() -> list[Any]:
    def tree(node: ast.AST) -> Any:
        below = [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr_context)]
        return torch.tensor(KINDS.index(type(node).__name__)), tuple(tree(n) for n in below)

    return [(tree(ast.parse(source, mode="eval").body),) for source in SOURCES]
