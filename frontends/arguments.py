"""Arguments of traced operations, read.

Duty: names and arguments of a graph's nodes as Python values, and how reshapes and permutations
move dimensions. Used by `frontends.dims` and the rules of `frontends.lower`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cellc.graph import Node, Ref


def base_name(op: str) -> str:
    """`aten.addmm.default` -> `addmm`."""
    return op.split(".")[1]


def constant(template: Any) -> Any:
    """Python value of an argument template without tensors."""
    kind, value = template
    if kind == "l":
        return [constant(x) for x in value]
    return value


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """A non-tensor argument by position or name."""
    if index < len(node.args):
        return constant(node.args[index])
    return next((constant(v) for k, v in node.kwargs if k == name), default)


def tensors(template: Any, operands: Sequence[Ref]) -> list[Ref]:
    kind, value = template
    if kind == "t":
        return [operands[value]]
    if kind == "l":
        return [v for x in value for v in tensors(x, operands)]
    return []


def permutation(node: Node, rank: int) -> list[int]:
    """Source dimension of every dimension of a permute, transpose or t."""
    name = base_name(node.op)
    if name == "permute":
        return [i % rank for i in argument(node, 1, "dims")]
    order = list(range(rank))
    if name == "t":
        return order[::-1]
    a, b = argument(node, 1, "dim0") % rank, argument(node, 2, "dim1") % rank
    order[a], order[b] = order[b], order[a]
    return order


def segments(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into its smallest independent pieces; dimensions of size 1 are left out.

    >>> segments((6, 4), (2, 3, 4))
    [([0], [0, 1]), ([1], [2])]
    """
    a = [i for i, size in enumerate(source) if size != 1]
    b = [i for i, size in enumerate(target) if size != 1]
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = [a[i]] if i < len(a) else [], [b[j]] if j < len(b) else []
        x, y = (source[a[i]] if left else 1), (target[b[j]] if right else 1)
        i, j = i + 1, j + 1
        while x != y and (i < len(a) or j < len(b)):
            if x < y and i < len(a):
                x *= source[a[i]]
                left.append(a[i])
                i += 1
            elif j < len(b):
                y *= target[b[j]]
                right.append(b[j])
                j += 1
            else:
                break
        out.append((left, right))
    return out
