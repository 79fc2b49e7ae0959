"""Hand-made cells, and what every kernel test needs to run them.

Duty: small cells that between them hold every kind of operation; random weights, arenas with
shuffled slots, launches (chains too), the comparison with a reference kernel, and true compilation.
No test in here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellc import ops
from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.kernels.eager import DTYPES
from cellc.launch import Index, Kernel, Launch, Ragged
from cellc.ops import RowType, Shape

Scalar = bool | int | float
BOOLEAN = ops.COMPARE | {
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "isnan",
    "any",
    "all",
}


@dataclass
class Builder:
    """Builds a cell operation by operation, inferring row types."""

    dtype: str = "f32"
    inputs: list[CellInput] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    ops: list[CellOp] = field(default_factory=list)

    def input(
        self, name: str, *shape: int, dtype: str | None = None, ragged: bool = False
    ) -> Operand:
        self.inputs.append(CellInput(name, RowType(shape, dtype or self.dtype), ragged))
        return Operand("input", len(self.inputs) - 1)

    def param(self, name: str, *shape: int, dtype: str | None = None) -> Operand:
        self.params.append(Param(name, RowType(shape, dtype or self.dtype)))
        return Operand("param", len(self.params) - 1)

    def cell(self, name: str, *outputs: Operand, recurrent: bool = False) -> Cell:
        return Cell(
            name, tuple(self.inputs), tuple(self.params), tuple(self.ops), outputs, recurrent
        )

    def __call__(
        self,
        op: str,
        *args: Operand | Scalar,
        dtype: str | None = None,
        types: Sequence[RowType] = (),
        **attrs: Hashable,
    ) -> Operand:
        operands = tuple(a if isinstance(a, Operand) else Operand("scalar", value=a) for a in args)
        if not types:
            shape = ops.result_shape(op, [self._shape(x) for x in operands], attrs)
            types = (RowType(shape, dtype or self._dtype(op, operands)),)
        origin = f"cells.py:{len(self.ops) + 1}"
        self.ops.append(CellOp(op, operands, tuple(sorted(attrs.items())), tuple(types), origin))
        return Operand("op", len(self.ops) - 1)

    def _so_far(self) -> Cell:
        return self.cell("")

    def _shape(self, x: Operand) -> Shape:
        shape: Shape = self._so_far().shape_of(x)
        return shape

    def _dtype(self, op: str, operands: Sequence[Operand]) -> str:
        if op in BOOLEAN:
            return "bool"
        if op in ("argmax", "argmin"):
            return "i64"
        skip = 1 if op == "where" else 0
        types = [self._so_far().type_of(x) for x in operands[skip:] if x.kind != "scalar"]
        return types[0].dtype if types else self.dtype

    def slice(self, x: Operand, start: int, stop: int, dim: int = 0, step: int = 1) -> Operand:
        return self("slice", x, dim=dim, start=start, stop=stop, step=step)

    def chunks(self, x: Operand, n: int) -> list[Operand]:
        size = self._shape(x)[0] // n
        return [self.slice(x, i * size, (i + 1) * size) for i in range(n)]


def _lstm_gates(b: Builder, gates: Operand, c: Operand) -> tuple[Operand, Operand]:
    i, f, z, o = b.chunks(gates, 4)
    kept = b("mul", b("sigmoid", f), c)
    c1 = b("add", kept, b("mul", b("sigmoid", i), b("tanh", z)))
    return b("mul", b("sigmoid", o), b("tanh", c1)), c1


def lstm_cell(D: int, H: int, dtype: str = "f32") -> Cell:
    """Inputs x, h, c; outputs h, c."""
    b = Builder(dtype)
    x, h, c = b.input("x", D), b.input("h", H), b.input("c", H)
    wx, wh, bias = b.param("wx", D, 4 * H), b.param("wh", H, 4 * H), b.param("b", 4 * H)
    gates = b("add", b("linear", x, wx, bias), b("linear", h, wh))
    return b.cell("lstm", *_lstm_gates(b, gates, c), recurrent=True)


def lstm_folded(V: int, H: int, dtype: str = "f32") -> Cell:
    """Inputs token, h, c: the embedding and its product are one table."""
    b = Builder(dtype)
    token, h, c = b.input("token", dtype="i64"), b.input("h", H), b.input("c", H)
    table, wh = b.param("table", V, 4 * H), b.param("wh", H, 4 * H)
    gates = b("add", b("embedding", table, token), b("linear", h, wh))
    return b.cell("lstm_folded", *_lstm_gates(b, gates, c), recurrent=True)


def gru_cell(D: int, H: int, dtype: str = "f32") -> Cell:
    b = Builder(dtype)
    x, h = b.input("x", D), b.input("h", H)
    wx, wh = b.param("wx", D, 3 * H), b.param("wh", H, 3 * H)
    gx = b("linear", x, wx, b.param("bx", 3 * H))
    gh = b("linear", h, wh, b.param("bh", 3 * H))
    (rx, zx, nx), (rh, zh, nh) = b.chunks(gx, 3), b.chunks(gh, 3)
    r, z = b("sigmoid", b("add", rx, rh)), b("sigmoid", b("add", zx, zh))
    n = b("tanh", b("add", nx, b("mul", r, nh)))
    return b.cell("gru", b("add", n, b("mul", z, b("sub", h, n))), recurrent=True)


def _layer_norm(b: Builder, x: Operand, size: int, weight: Operand, bias: Operand) -> Operand:
    centred = b("sub", x, b("reshape", b("mean", x, dims=(0,)), shape=(1,)))
    variance = b("reshape", b("mean", b("mul", centred, centred), dims=(0,)), shape=(1,))
    normal = b("mul", centred, b("rsqrt", b("add", variance, 1e-5)))
    return b("add", b("mul", normal, weight), bias)


def layernorm_lstm(D: int, H: int, dtype: str = "f32") -> Cell:
    """Layer norm on the gates and on the new cell state."""
    b = Builder(dtype)
    x, h, c = b.input("x", D), b.input("h", H), b.input("c", H)
    wx, wh, bias = b.param("wx", D, 4 * H), b.param("wh", H, 4 * H), b.param("b", 4 * H)
    g1, b1, g2, b2 = (
        b.param(n, s) for n, s in (("g1", 4 * H), ("b1", 4 * H), ("g2", H), ("b2", H))
    )
    gates = b("add", b("linear", x, wx, bias), b("linear", h, wh))
    i, f, z, o = b.chunks(_layer_norm(b, gates, 4 * H, g1, b1), 4)
    c1 = b("add", b("mul", b("sigmoid", f), c), b("mul", b("sigmoid", i), b("tanh", z)))
    h1 = b("mul", b("sigmoid", o), b("tanh", _layer_norm(b, c1, H, g2, b2)))
    return b.cell("layernorm_lstm", h1, c1, recurrent=True)


def softmax_head(H: int, V: int, dtype: str = "f32") -> Cell:
    """Scores, log probabilities and the best token."""
    b = Builder(dtype)
    h = b.input("h", H)
    scores = b("linear", h, b.param("w", H, V), b.param("b", V))
    top = b("reshape", b("amax", scores, dims=(0,)), shape=(1,))
    e = b("exp", b("sub", scores, top))
    total = b("reshape", b("sum", e, dims=(0,)), shape=(1,))
    logp = b("sub", b("sub", scores, top), b("log", total))
    return b.cell("softmax_head", b("div", e, total), logp, b("argmax", scores, dims=(0,)))


def attention_cell(T: int, H: int, D: int, dtype: str = "f32") -> Cell:
    """Attention of D heads over T remembered rows of H: products of data with data."""
    b = Builder(dtype)
    q, memory = b.input("q", D, H), b.input("memory", T, H)
    keys = b("linear", memory, b.param("wk", H, H))
    scores = b("matmul", q, b("permute", keys, dims=(1, 0)))  # [D, T]
    scores = b("mul", scores, H**-0.5)
    top = b("reshape", b("amax", scores, dims=(1,)), shape=(D, 1))
    e = b("exp", b("sub", scores, top))
    p = b("div", e, b("reshape", b("sum", e, dims=(1,)), shape=(D, 1)))
    return b.cell("attention", b("matmul", p, memory), p)


def mv_cell(H: int, dtype: str = "f32") -> Cell:
    """MV-RNN: a phrase is a vector and a matrix; each child's matrix meets the other's vector."""
    b = Builder(dtype)
    x, y, A, B = b.input("x", H), b.input("y", H), b.input("A", H, H), b.input("B", H, H)
    bx = b("reshape", b("matmul", B, b("reshape", x, shape=(H, 1))), shape=(H,))
    ay = b("reshape", b("matmul", A, b("reshape", y, shape=(H, 1))), shape=(H,))
    vector = b(
        "tanh", b("linear", b("cat", bx, ay, dim=0), b.param("w", 2 * H, H), b.param("b", H))
    )
    stacked = b("permute", b("cat", A, B, dim=0), dims=(1, 0))  # [H, 2H]
    matrix = b("permute", b("linear", stacked, b.param("wm", 2 * H, H)), dims=(1, 0))
    return b.cell("mv", vector, matrix, recurrent=True)


def ragged_cell(H: int, dtype: str = "f32") -> Cell:
    """Mean, sum and maximum of a variable number of rows, then a product."""
    b = Builder(dtype)
    x, rows = b.input("x", H), b.input("rows", H, ragged=True)
    mean, total, most = b("ragged_mean", rows), b("ragged_sum", rows), b("ragged_amax", rows)
    y = b("linear", b("cat", mean, x, dim=0), b.param("w", 2 * H, H), b.param("b", H))
    return b.cell("ragged", b("tanh", y), b("add", total, x), most)


def attend(b: Builder, scores: Operand, rows: Operand) -> Operand:
    """The sum of rows, weighted by the softmax of scores, both along a vector."""
    e = b("exp", b("sub", scores, b("ragged_amax", scores)))
    return b("ragged_sum", b("mul", b("div", e, b("ragged_sum", e)), rows))


def dot_cell(H: int, dtype: str = "f32") -> Cell:
    """Attention to a variable number of rows by the dot score, the query made here."""
    b = Builder(dtype)
    q, memory = b.input("q", H), b.input("memory", H, ragged=True)
    query = b("tanh", b("linear", q, b.param("w", H, H)))
    row = b("reshape", memory, shape=(1, H))
    scores = b("reshape", b("matmul", row, b("reshape", query, shape=(H, 1))), shape=())
    return b.cell("dot", attend(b, scores, memory), query)


def additive_cell(H: int, dtype: str = "f32") -> Cell:
    """Attention by the additive score: keys and values of other sizes, a bias."""
    b = Builder(dtype)
    q, keys = b.input("q", H), b.input("keys", H, ragged=True)
    values = b.input("values", H + 2, ragged=True)
    hidden = b("tanh", b("add", keys, b("tanh", q)))
    scores = b("linear", hidden, b.param("v", H, 1), b.param("bias", 1))
    return b.cell("additive", attend(b, scores, values))


def heads_cell(N: int, D: int, dtype: str = "f32") -> Cell:
    """Attention of N heads of D each, some of the memory masked, and a product of what it gives."""
    b = Builder(dtype)
    q, memory = b.input("q", N * D), b.input("memory", N * D, ragged=True)
    mask = b.input("mask", dtype="bool", ragged=True)
    keys = b("reshape", memory, shape=(N, D, 1))
    scores = b("mul", b("matmul", b("reshape", q, shape=(N, 1, D)), keys), D**-0.5)
    scores = b("where", mask, scores, -9.0)
    rows = b("reshape", memory, shape=(N, 1, D))
    context = b("reshape", attend(b, scores, rows), shape=(N * D,))
    return b.cell("heads", b("linear", context, b.param("w", N * D, 3)))


def pool_cell(H: int, dtype: str = "f32") -> Cell:
    """Pooling after a map, of rows and of their halves side by side."""
    b = Builder(dtype)
    x, rows = b.input("x", H), b.input("rows", H, ragged=True)
    y = b("tanh", b("mul", rows, b("sigmoid", x)))
    wide = b("cat", b("mul", y, 0.5), rows, dim=0)
    return b.cell("pool", b("ragged_amax", y), b("ragged_mean", wide), b("ragged_sum", y))


def pointwise_zoo(H: int, dtype: str = "f32") -> Cell:
    """Every float pointwise operation once; a number of outputs."""
    b = Builder(dtype)
    x, y, s = b.input("x", H), b.input("y", H), b.input("s")
    positive = b("add", b("abs", y), 0.5)
    acc = b("mul", x, s)
    for name in "log log1p sqrt rsqrt reciprocal".split():
        acc = b("add", acc, b(name, positive))
    for name in (
        "neg exp expm1 abs sin cos atan tanh sigmoid relu erf sign silu gelu gelu_tanh softplus"
    ).split():
        acc = b("add", acc, b(name, x))
    acc = b("add", acc, b("tan", b("mul", b("tanh", x), 0.5)))
    round_offs = [b(n, b("mul", x, 3.0)) for n in "floor ceil round trunc".split()]
    for z in round_offs:
        acc = b("add", acc, z)
    pairs = [
        b("sub", 1.0, x),
        b("div", x, positive),
        b("pow", positive, x),
        b("maximum", x, y),
        b("minimum", x, y),
    ]
    pairs += [b(n, b("mul", x, 4.0), positive) for n in "fmod remainder floor_div atan2".split()]
    pairs.append(b("pow", x, 2.0))
    other = pairs[0]
    for z in pairs[1:]:
        other = b("add", other, z)
    picked = b("where", b("gt", x, y), other, 0.0)
    return b.cell("zoo", acc, other, picked, b("cast", x, dtype="bf16"), b("isnan", b("log", x)))


def views_cell(A: int, B: int, dtype: str = "f32") -> Cell:
    """Slices with steps, cat, permute, reshape, expand, flip, and a product of the result."""
    b = Builder(dtype)
    m, x = b.input("m", A, 2 * B), b.input("x", 2 * B)
    t = b("permute", m, dims=(1, 0))  # [2B, A]
    even, odd = b.slice(t, 0, 2 * B, step=2), b("flip", b.slice(t, 1, 2 * B, step=2), dims=(0,))
    wide = b("cat", odd, even, b("mul", even, 2.0), dim=1)  # [B, 3A]
    flat = b("reshape", wide, shape=(3 * A * B,))
    grown = b("expand", b("reshape", x, shape=(1, 2 * B)), shape=(A, 2 * B))
    y = b("linear", wide, b.param("w", 3 * A, A), b.param("b", A))
    return b.cell("views", flat, b("add", grown, m), y, b("sum", b("mul", m, x), dims=(0,)), t)


def int_cell(H: int) -> Cell:
    """Integers and booleans: arithmetic, comparisons, bit operations, reductions, casts."""
    b = Builder("i64")
    n, m, k, flag = (
        b.input("n", H),
        b.input("m", H),
        b.input("k", H, dtype="i32"),
        b.input("flag", H, dtype="bool"),
    )
    divisor = b("add", b("abs", m), 1)
    acc = b("add", b("mul", n, 3), b("floor_div", n, divisor))
    acc = b("add", acc, b("sub", b("remainder", n, divisor), b("fmod", n, divisor)))
    for name in "bitwise_and bitwise_or bitwise_xor maximum minimum".split():
        acc = b("add", acc, b(name, n, m))
    acc = b("add", acc, b("add", b("bitwise_not", n), b("add", b("sign", m), b("neg", m))))
    cond = b("logical_or", b("logical_and", flag, b("le", n, m)), b("logical_not", b("ne", n, 0)))
    cond = b("logical_xor", cond, b("eq", b("cast", k, dtype="i64"), m))
    picked = b("where", cond, acc, 7)
    outs = [
        b("sum", acc, dims=(0,)),
        b("amin", k, dims=(0,)),
        b("any", cond, dims=(0,)),
        b("all", flag, dims=(0,)),
    ]
    ratio = b("div", b("cast", n, dtype="f32"), b("cast", divisor, dtype="f32"))
    ints = b("cast", b("mul", ratio, 5.0), dtype="i32")
    return b.cell(
        "ints",
        acc,
        cond,
        picked,
        *outs,
        ratio,
        ints,
        b("ge", k, 0),
        b("prod", b("sign", n), dims=(0,)),
    )


def reduce_cell(A: int, B: int, C: int, dtype: str = "f32") -> Cell:
    """Reductions over each kind of dimension, several at once, and their use in a product."""
    b = Builder(dtype)
    x = b.input("x", A, B, C)
    first, middle, last = (b("sum", x, dims=(d,)) for d in range(3))
    both, total = b("mean", x, dims=(0, 2)), b("amax", x, dims=(0, 1, 2))
    y = b("linear", first, b.param("w", C, C))
    outs = [first, middle, last, both, total, b("argmin", x, dims=(1,)), b("prod", x, dims=(2,)), y]
    return b.cell("reduce", *outs)


def embedding_cell(V: int, D: int, dtype: str = "f32") -> Cell:
    """Three tokens a row, embedded and multiplied: an index that is not a scalar."""
    b = Builder(dtype)
    tokens = b.input("tokens", 3, dtype="i64")
    rows = b("embedding", b.param("table", V, D), tokens)
    y = b("linear", rows, b.param("w", D, D))
    return b.cell("embedding", b("sum", b("tanh", y), dims=(0,)), rows)


def child_sum_cell(D: int, H: int, dtype: str = "f32") -> Cell:
    """A node of a child-sum TreeLSTM: any number of children's states, and of what each keeps."""
    b = Builder(dtype)
    x, h, kept = b.input("x", D), b.input("h", H, ragged=True), b.input("kept", H, ragged=True)
    wx, wh, bias = b.param("wx", D, 3 * H), b.param("wh", H, 3 * H), b.param("b", 3 * H)
    gates = b("add", b("linear", x, wx, bias), b("linear", b("ragged_sum", h), wh))
    i, o, u = b.chunks(gates, 3)
    c1 = b("add", b("mul", b("sigmoid", i), b("tanh", u)), b("ragged_sum", kept))
    return b.cell("child_sum", b("mul", b("sigmoid", o), b("tanh", c1)), c1, recurrent=True)


def decoder_cell(V: int, H: int, dtype: str = "f32") -> Cell:
    """A step of greedy decoding: a GRU on the last token, and the best of the next."""
    b = Builder(dtype)
    token, h = b.input("token", dtype="i64"), b.input("h", H)
    gx = b("embedding", b.param("table", V, 3 * H), token)
    gh = b("linear", h, b.param("wh", H, 3 * H), b.param("bh", 3 * H))
    (rx, zx, nx), (rh, zh, nh) = b.chunks(gx, 3), b.chunks(gh, 3)
    r, z = b("sigmoid", b("add", rx, rh)), b("sigmoid", b("add", zx, zh))
    n = b("tanh", b("add", nx, b("mul", r, nh)))
    h1 = b("add", n, b("mul", z, b("sub", h, n)))
    scores = b("linear", h1, b.param("w", H, V), b.param("b", V))
    return b.cell("decoder", h1, b("argmax", scores, dims=(0,)), recurrent=True)


def fallback_cell(H: int) -> Cell:
    """Operators without a row operation: a constant, two results, a list."""
    b = Builder()
    x, y = b.input("x", H), b.input("y", H)
    t0, t1, zero = ("t", 0), ("t", 1), ("v", 0)
    total = b("aten:cumsum.default", x, types=[RowType((H,), "f32")], args=(t0, zero))
    two = [RowType((H,), "f32"), RowType((H,), "i64")]
    order = b("aten:sort.default", total, types=two, args=(t0, zero, ("v", True)))
    pair = b(
        "aten:stack.default", x, y, types=[RowType((2, H), "f32")], args=(("l", (t0, t1)), zero)
    )
    where = Operand("op", order.index, port=1)
    return b.cell("fallback", b("mul", total, y), order, where, pair)


CELLS: dict[str, Callable[[], Cell]] = {
    "lstm-I5-H3": lambda: lstm_cell(5, 3),
    "lstm-I1-H1": lambda: lstm_cell(1, 1),
    "lstm-I16-H32": lambda: lstm_cell(16, 32),
    "lstm_folded-V11-H17": lambda: lstm_folded(11, 17),
    "gru-I7-H17": lambda: gru_cell(7, 17),
    "layernorm_lstm-I6-H8": lambda: layernorm_lstm(6, 8),
    "softmax_head-H8-V19": lambda: softmax_head(8, 19),
    "attention-T5-H8-D2": lambda: attention_cell(5, 8, 2),
    "mv-H5": lambda: mv_cell(5),
    "ragged-H9": lambda: ragged_cell(9),
    "dot-H9": lambda: dot_cell(9),
    "dot-H300": lambda: dot_cell(300),
    "additive-H17": lambda: additive_cell(17),
    "heads-N2-D5": lambda: heads_cell(2, 5),
    "pool-H13": lambda: pool_cell(13),
    "zoo-H13": lambda: pointwise_zoo(13),
    "views-A3-B4": lambda: views_cell(3, 4),
    "ints-H7": lambda: int_cell(7),
    "reduce-A3-B4-C5": lambda: reduce_cell(3, 4, 5),
    "embedding-V6-D7": lambda: embedding_cell(6, 7),
}
"""Cells that every backend must run (the fallback cell, beside them, only the eager one)."""


def random_rows(kind: RowType, n: int, rng: torch.Generator, limit: int = 5) -> torch.Tensor:
    """[n, *shape]; integers below `limit`, never negative where they may be an index (i64)."""
    shape, dtype = (n, *kind.shape), DTYPES[kind.dtype]
    if kind.dtype == "bool":
        return torch.rand(shape, generator=rng) < 0.5
    if kind.dtype in ops.INT_DTYPES:
        return torch.randint(
            0 if kind.dtype in ("i64", "u8") else -limit, limit, shape, generator=rng
        ).to(dtype)
    return torch.randn(shape, generator=rng).to(dtype)


def random_params(cell: Cell, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {p.name: random_rows(p.type, 1, rng)[0] * 0.5 for p in cell.params}


@dataclass
class Run:
    """A launch with its own arenas; `feed` pairs (output, input) that a chain connects."""

    cell: Cell
    launch: Launch
    arenas: dict[RowType, torch.Tensor]

    def copy(self) -> Run:
        return Run(self.cell, self.launch, {k: v.clone() for k, v in self.arenas.items()})

    def slots(self, i: int) -> Index:
        """The slots of an input that is not ragged."""
        table = self.launch.inputs[i]
        assert not isinstance(table, Ragged)
        return table

    def input_rows(self) -> list[torch.Tensor]:
        """What the launch reads, [N, *shape] an input."""
        slots = [
            torch.from_numpy(self.slots(i).astype(np.int64)) for i in range(len(self.cell.inputs))
        ]
        return [self.arenas[i.type][s] for i, s in zip(self.cell.inputs, slots, strict=True)]

    def outputs(self) -> list[torch.Tensor]:
        """What the launch wrote, [N, *shape] an output, in row order."""
        pairs = zip(self.launch.outputs, self.cell.output_types, strict=True)
        return [self.arenas[t][torch.from_numpy(s.astype(np.int64))] for s, t in pairs]

    def rows(self, picked: Sequence[int]) -> Run:
        """The same arenas, only these rows of a launch of one step."""
        at = np.asarray(picked)
        inputs = [_pick(t, at) for t in self.launch.inputs]
        launch = Launch(np.array([0, len(at)], np.int32), inputs, self.launch.outputs[:, at])
        return Run(self.cell, launch, {k: v.clone() for k, v in self.arenas.items()})


def _pick(table: Index | Ragged, at: Index) -> Index | Ragged:
    if not isinstance(table, Ragged):
        return table[at]
    parts = [table.slots[table.offsets[i] : table.offsets[i + 1]] for i in at]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return Ragged(offsets, np.concatenate([*parts, np.zeros(0, np.int32)]).astype(np.int32))


def make_run(
    cell: Cell,
    B: int,
    K: int = 1,
    feed: Mapping[int, int] | None = None,
    seed: int = 0,
    shrink: bool = False,
) -> Run:
    """A launch of K steps of B rows (`shrink`: fewer each step), every slot distinct, shuffled.

    `feed` maps an output to the input that reads it at the next step.
    """
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sizes = [max(1, B - k) if shrink else B for k in range(K)]
    steps = np.cumsum([0, *sizes]).astype(np.int32)
    N = int(steps[-1])
    kinds = [i.type for i in cell.inputs] + list(cell.output_types)
    free: dict[RowType, list[int]] = {}
    arenas = {}
    for kind in dict.fromkeys(kinds):
        capacity = kinds.count(kind) * 3 * N + 7
        free[kind] = rng.permutation(capacity).tolist()
        arenas[kind] = random_rows(kind, capacity, torch_rng)

    def take(kind: RowType, n: int) -> Index:
        return np.array([free[kind].pop() for _ in range(n)], np.int32)

    inputs: list[Index | Ragged] = []
    known: dict[int, Index] = {}  # lengths of vectors that are used together
    for number, i in enumerate(cell.inputs):
        if i.ragged:
            lengths = known.setdefault(cell.lengths[number], rng.integers(1, 4, N))
            offsets = np.cumsum([0, *lengths]).astype(np.int32)
            inputs.append(Ragged(offsets, take(i.type, int(offsets[-1]))))
        else:
            inputs.append(take(i.type, N))
    outputs = np.stack([take(t, N) for t in cell.output_types])
    for out, into in (feed or {}).items():
        table = inputs[into]
        assert not isinstance(table, Ragged)
        for k in range(1, K):
            table[steps[k] : steps[k + 1]] = outputs[out, steps[k - 1] : steps[k - 1] + sizes[k]]
    return Run(cell, Launch(steps, inputs, outputs), arenas)


def check(
    kernel: Kernel, reference: Kernel, run: Run, rtol: float = 2e-5, atol: float = 2e-5
) -> None:
    """Both kernels on copies of one launch: outputs, other rows and bad rows must agree."""
    got, want = run.copy(), run.copy()
    bad, expected = kernel(got.launch, got.arenas), reference(want.launch, want.arenas)
    assert sorted(bad) == sorted(expected)
    keep = np.setdiff1d(np.arange(run.launch.num_rows), np.asarray(expected, np.int64))
    for i, (a, b) in enumerate(zip(got.outputs(), want.outputs(), strict=True)):
        exact, half = not a.dtype.is_floating_point, a.dtype in (torch.bfloat16, torch.float16)
        # kernels keep f32 between operations on half types, the reference rounds each
        relative, absolute = (0.0, 0.0) if exact else (2e-2, 2e-2) if half else (rtol, atol)
        torch.testing.assert_close(
            a[keep], b[keep], rtol=relative, atol=absolute, equal_nan=True,
            msg=partial("{}, output {}: {}".format, run.cell.name, i),
        )  # fmt: skip
    for kind, arena in got.arenas.items():
        written = [
            s for s, t in zip(run.launch.outputs, run.cell.output_types, strict=True) if t == kind
        ]
        rest = np.setdiff1d(
            np.arange(len(arena)), np.concatenate([*written, np.zeros(0, np.int32)])
        )
        at = torch.from_numpy(rest)
        torch.testing.assert_close(
            arena[at], run.arenas[kind][at], rtol=0, atol=0, equal_nan=True,
            msg=partial("{}: a row was overwritten: {}".format, kind),
        )  # fmt: skip


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A matrix product that adds in one order, however many rows there are; BLAS need not."""
    out = np.zeros((*a.shape[:-1], b.shape[-1]), dtype or a.dtype)
    for k in range(a.shape[-1]):
        out += a[..., :, k, None] * b[..., None, k, :]
    return out


def compiled(code: str) -> Any:
    """What code prints, as JSON, in a process where Triton does not interpret, but compiles."""
    here = Path(__file__).parent
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(here.parent), str(here)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
