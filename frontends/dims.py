"""Dimensions: which dimensions of a traced request's tensors are positions, and which are part of a
row.

Duty: decide, before lowering, for every dimension of every value whether it is a *position* (time,
tree node, batch: indexing along it moves references, never data) or a *row dimension* (features:
what one call of a cell computes on). Comes in: a `Graph`; goes out: a function of (node, port,
dim), to `frontends.lower`. The choice is about speed alone: lowering converts where an operation
wants it otherwise, so any answer gives right results.

Method: union-find over dimensions that operations force to be alike, then evidence a class,
strongest first: contracted or broadcast against a weight: row; indexed one element at a time,
stacked or unbound: position; contracted between matrices of data, or the last of several dimensions
of a float tensor: row; else position.
"""

from __future__ import annotations

from collections.abc import Callable

from cellc.frontends.arguments import argument, base_name, permutation, segments, tensors
from cellc.frontends.windows import find
from cellc.graph import Graph, Node, Ref

STRONG, STEP, WEAK = 4, 2, 1
STEPS = 32  # positions in a window of a convolution along them


class Dims:
    """Classes of dimensions of one graph's values."""

    def __init__(self, graph: Graph, *, whole: bool = False) -> None:
        self._graph, self._whole = graph, whole  # whole: an input is one row
        self.cuts = {} if whole else find(graph)
        self._decide()
        kept = {i: cut for i, cut in self.cuts.items() if all(map(self._in_rows, cut.pieces))}
        if len(kept) < len(self.cuts):
            self.cuts = kept
            self._decide()

    def _in_rows(self, piece: int) -> bool:
        """Is all of a window a row?"""
        many = base_name(self._graph.node(piece).op) == "unfold"
        return all(self.row_dims(piece)[many:])

    def _decide(self) -> None:
        graph, total = self._graph, 0
        self._ports: list[list[int]] = []
        for node in graph:
            ports = []
            for shape, _ in node.outputs:
                ports.append(total)
                total += len(shape)
            self._ports.append(ports)
        self._parent = list(range(total))
        self._evidence = [0] * total
        self._pieces = {piece for cut in self.cuts.values() for piece in cut.pieces}
        for node in graph:
            self._visit(node)
        self._merge_evidence()

    def row_dims(self, node: int, port: int = 0) -> tuple[bool, ...]:
        """For each dimension of a value: True where it is part of a row."""
        start = self._ports[node][port]
        shape = self._graph.node(node).outputs[port][0]
        return tuple(self._is_row(self._find(start + d)) for d in range(len(shape)))

    def _is_row(self, root: int) -> bool:
        evidence = self._classes[root]
        if evidence & STRONG:
            return True
        return bool(evidence & WEAK) and not evidence & STEP

    def _merge_evidence(self) -> None:
        self._classes: dict[int, int] = {}
        for i, evidence in enumerate(self._evidence):
            root = self._find(i)
            self._classes[root] = self._classes.get(root, 0) | evidence

    def _find(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def at(self, value: Ref, dim: int) -> int:
        shape = self._graph.node(value[0]).outputs[value[1]][0]
        return self._ports[value[0]][value[1]] + dim % max(len(shape), 1)

    def tie(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self._parent[a] = b

    def mark(self, i: int, evidence: int) -> None:
        self._evidence[i] |= evidence

    def shape(self, value: Ref) -> tuple[int, ...]:
        return self._graph.node(value[0]).outputs[value[1]][0]

    def is_weight(self, value: Ref) -> bool:
        return self._graph.node(value[0]).kind in ("param", "const")

    def _visit(self, node: Node) -> None:
        if node.kind in ("param", "const"):
            for dim, size in enumerate(node.outputs[0][0]):
                if size != 1:
                    self.mark(self.at((node.id, 0), dim), STRONG)
            return
        shape, dtype = node.outputs[0] if node.outputs else ((), "f32")
        if node.kind == "input":
            if self._whole:
                for dim in range(len(shape)):
                    self.mark(self.at((node.id, 0), dim), STRONG)
            elif len(shape) > 1 and dtype not in ("i64", "i32", "bool", "u8", "i16", "i8"):
                self.mark(self.at((node.id, 0), -1), WEAK)
            return
        if not node.operands:
            if self._whole:
                for dim in range(len(shape)):
                    self.mark(self.at((node.id, 0), dim), STRONG)
            elif len(shape) > 1:
                self.mark(self.at((node.id, 0), -1), WEAK)
            return
        name = base_name(node.op)
        if node.id in self._pieces:
            return _piece(self, node)
        _RULES.get(name, _generic if name not in POINTWISE_OPS else _pointwise)(self, node)


POINTWISE_OPS = frozenset(
    "neg rsub exp log log1p expm1 sqrt rsqrt abs sin cos tan atan tanh sigmoid relu erf "
    "reciprocal sign sgn floor ceil round trunc silu gelu logical_not bitwise_not isnan "
    "_to_copy clone add sub mul div pow maximum minimum fmod remainder floor_divide atan2 "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge "
    "where clamp_min clamp_max".split()
)


def _pointwise(d: Dims, node: Node) -> None:
    out = (node.id, 0)
    rank = len(d.shape(out))
    for value in node.operands:
        shape = d.shape(value)
        for dim, size in enumerate(shape):
            if size != 1 or d.shape(out)[rank - len(shape) + dim] == 1:
                d.tie(d.at(value, dim), d.at(out, rank - len(shape) + dim))


def _generic(d: Dims, node: Node) -> None:
    for port, (shape, _) in enumerate(node.outputs):
        for dim in range(len(shape)):
            d.mark(d.at((node.id, port), dim), WEAK)


def _reduce(d: Dims, node: Node) -> None:
    source, out = node.operands[0], (node.id, 0)
    rank = len(d.shape(source))
    if base_name(node.op) in ("argmax", "argmin", "prod", "any", "all"):
        dims = argument(node, 1, "dim")
        keepdim = bool(argument(node, 2, "keepdim", False))
    else:
        dims = argument(node, 1, "dim")
        keepdim = bool(argument(node, 2, "keepdim", False))
    if dims is None or dims == []:
        return
    gone = {x % max(rank, 1) for x in (dims if isinstance(dims, list) else [dims])}
    kept = [i for i in range(rank) if keepdim or i not in gone]
    for position, i in enumerate(kept):
        if i not in gone:
            d.tie(d.at(source, i), d.at(out, position))


def _mm(d: Dims, node: Node) -> None:
    """[.., n, k] x [.., k, m]; also a vector on either side."""
    a, b = node.operands[:2]
    out = (node.id, 0)
    sa, sb = d.shape(a), d.shape(b)
    ka, kb = d.at(a, -1), d.at(b, len(sb) - 2 if len(sb) > 1 else 0)
    d.tie(ka, kb)
    if len(sa) == 1 or sa[-2] != 1:  # one row times a matrix: a sum of positions, weighted
        d.mark(ka, WEAK)
    batch = len(sa) - 2
    for i in range(batch):
        d.tie(d.at(a, i), d.at(out, i))
        d.tie(d.at(b, i), d.at(out, i))
    rank = len(d.shape(out))
    if len(sa) > 1:
        d.tie(d.at(a, len(sa) - 2), d.at(out, rank - (2 if len(sb) > 1 else 1)))
    if len(sb) > 1:
        d.tie(d.at(b, len(sb) - 1), d.at(out, rank - 1))


def _embedding(d: Dims, node: Node) -> None:
    table, index = node.operands[:2]
    if base_name(node.op) == "index_select":
        index = node.operands[-1]
        if argument(node, 1, "dim") != 0:
            return _generic(d, node)
    out, rank = (node.id, 0), len(d.shape(index))
    for i in range(rank):
        d.tie(d.at(index, i), d.at(out, i))
    for i in range(1, len(d.shape(table))):
        d.tie(d.at(table, i), d.at(out, rank + i - 1))


def _select(d: Dims, node: Node) -> None:
    source, out = node.operands[0], (node.id, 0)
    dim = argument(node, 1, "dim", 0) % len(d.shape(source))
    if not d.is_weight(source):
        d.mark(d.at(source, dim), STEP)
    kept = [i for i in range(len(d.shape(source))) if i != dim]
    for position, i in enumerate(kept):
        d.tie(d.at(source, i), d.at(out, position))


def _slice(d: Dims, node: Node) -> None:
    source = node.operands[0]
    dim = argument(node, 1, "dim", 0) % len(d.shape(source))
    _pieces_of(d, node, source, dim)


def _split(d: Dims, node: Node) -> None:
    source = node.operands[0]
    dim = argument(node, 2, "dim", 0) % len(d.shape(source))
    _pieces_of(d, node, source, dim)


def _pieces_of(d: Dims, node: Node, source: Ref, dim: int) -> None:
    weight = d.is_weight(source)
    for port in range(len(node.outputs)):
        piece = (node.id, port)
        size = d.shape(piece)[dim]
        if size == 1 and d.shape(source)[dim] > 1 and not weight:
            d.mark(d.at(source, dim), STEP)
        for i in range(len(d.shape(source))):
            if i != dim or not (weight and size != d.shape(source)[dim]):
                d.tie(d.at(source, i), d.at(piece, i))


def _unbind(d: Dims, node: Node) -> None:
    source = node.operands[0]
    dim = argument(node, 1, "dim", 0) % len(d.shape(source))
    d.mark(d.at(source, dim), STEP)
    kept = [i for i in range(len(d.shape(source))) if i != dim]
    for port in range(len(node.outputs)):
        for position, i in enumerate(kept):
            d.tie(d.at(source, i), d.at((node.id, port), position))


def _cat(d: Dims, node: Node) -> None:
    pieces = tensors(node.args[0], node.operands)
    out = (node.id, 0)
    rank = len(d.shape(out))
    dim = argument(node, 1, "dim", 0) % rank
    for piece in pieces:
        shape = d.shape(piece)
        if len(shape) != rank:
            continue
        for i in range(rank):
            d.tie(d.at(piece, i), d.at(out, i))
        if shape[dim] == 1 and len(pieces) > 1:
            d.mark(d.at(out, dim), STEP)


def _stack(d: Dims, node: Node) -> None:
    out = (node.id, 0)
    rank = len(d.shape(out))
    dim = argument(node, 1, "dim", 0) % rank
    d.mark(d.at(out, dim), STEP)
    for piece in tensors(node.args[0], node.operands):
        for i in range(rank - 1):
            d.tie(d.at(piece, i), d.at(out, i + (i >= dim)))


def _permute(d: Dims, node: Node) -> None:
    source, out = node.operands[0], (node.id, 0)
    for position, i in enumerate(permutation(node, len(d.shape(source)))):
        d.tie(d.at(source, i), d.at(out, position))


def _view(d: Dims, node: Node) -> None:
    source, out = node.operands[0], (node.id, 0)
    if 0 in d.shape(source):
        return
    for left, right in segments(d.shape(source), d.shape(out)):
        anchor = d.at(source, left[0])
        for i in left:
            d.tie(d.at(source, i), anchor)
        for j in right:
            d.tie(d.at(out, j), anchor)


def _expand(d: Dims, node: Node) -> None:
    source, out = node.operands[0], (node.id, 0)
    shape, target = d.shape(source), d.shape(out)
    for i, size in enumerate(shape):
        j = len(target) - len(shape) + i
        if size == target[j]:
            d.tie(d.at(source, i), d.at(out, j))


def _scatter(d: Dims, node: Node) -> None:
    base, piece, out = node.operands[0], node.operands[1], (node.id, 0)
    rank = len(d.shape(out))
    dim = argument(node, 2, "dim", 0) % rank
    select = base_name(node.op) == "select_scatter"
    d.mark(d.at(out, dim), STEP if select or d.shape(piece)[dim] == 1 else 0)
    for i in range(rank):
        d.tie(d.at(base, i), d.at(out, i))
        if not select:
            d.tie(d.at(piece, i), d.at(out, i))
        elif i != dim:
            d.tie(d.at(piece, i - (i > dim)), d.at(out, i))


def _piece(d: Dims, node: Node) -> None:
    """A window of an input has a dimension of its own."""
    source, out = node.operands[0], (node.id, 0)
    many = base_name(node.op) == "unfold"
    for i in range(1, len(d.shape(source))):
        d.tie(d.at(source, i), d.at(out, i))
    d.mark(d.at(source, 0), STEP)
    if many:
        d.mark(d.at(out, 0), STEP)


def _unfold(d: Dims, node: Node) -> None:
    source, out = node.operands[0], (node.id, 0)
    dim = argument(node, 1, "dim") % max(len(d.shape(source)), 1)
    for i in range(len(d.shape(source))):
        d.tie(d.at(source, i), d.at(out, i))
    if dim == 0 and len(d.shape(source)) > 1:
        d.mark(d.at(out, dim), STEP)
    d.mark(d.at(out, -1), WEAK)


def _convolution(d: Dims, node: Node) -> None:
    """Along one dimension it is time, unless windows are long or of bare numbers."""
    x, weight, out = node.operands[0], node.operands[1], (node.id, 0)
    rank, sizes = len(d.shape(out)), d.shape(weight)
    if len(d.shape(x)) != rank or len(sizes) != rank:
        return _generic(d, node)
    d.tie(d.at(x, 0), d.at(out, 0))
    for value in (x, out):
        d.mark(d.at(value, 1), STRONG)
    steps = rank == 3 and sizes[2] <= STEPS and sizes[1] > 1
    for dim in range(2, rank):
        d.tie(d.at(x, dim), d.at(out, dim))
        d.mark(d.at(out, dim), STEP if steps else WEAK)


def _flip(d: Dims, node: Node) -> None:
    for i in range(len(d.shape((node.id, 0)))):
        d.tie(d.at(node.operands[0], i), d.at((node.id, 0), i))


_RULES: dict[str, Callable[[Dims, Node], None]] = {
    **dict.fromkeys("sum mean amax amin prod any all argmax argmin max min".split(), _reduce),
    **dict.fromkeys("mm bmm mv".split(), _mm),
    **dict.fromkeys("embedding index_select".split(), _embedding),
    **dict.fromkeys("view _unsafe_view _reshape_alias reshape squeeze unsqueeze".split(), _view),
    **dict.fromkeys("permute transpose t".split(), _permute),
    **dict.fromkeys("split split_with_sizes unsafe_split unsafe_split_with_sizes".split(), _split),
    **dict.fromkeys("select_scatter slice_scatter".split(), _scatter),
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "flip": _flip,
    "convolution": _convolution,
    "unfold": _unfold,
}
