from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.errors import VerifyError
from cellc.graph import Graph
from cellc.ops import RowType
from cellc.verify import verify_cell, verify_graph

X, Y, XS = Operand("input", 0), Operand("input", 1), Operand("input", 2)
WEIGHT, BIAS, TABLE = (Operand("param", i) for i in range(3))
ONE = Operand("scalar", value=1)
FIRST = Operand("op", 0)


def row(dtype: str, *shape: int) -> RowType:
    return RowType(shape, dtype)


F4, I0, B4 = row("f32", 4), row("i64"), row("bool", 4)
INPUTS = (CellInput("x", F4), CellInput("y", I0), CellInput("xs", F4, ragged=True))
PARAMS = (
    Param("w", row("f32", 4, 6)),
    Param("b", row("f32", 6)),
    Param("table", row("f32", 9, 4)),
)


def cell(*ops: CellOp, outputs: Sequence[Operand] = (FIRST,)) -> Cell:
    return Cell("cell", INPUTS, PARAMS, ops, tuple(outputs))


def op(name: str, operands: Sequence[Operand], type: RowType, **attrs: int) -> CellOp:
    return CellOp(name, tuple(operands), tuple(attrs.items()), (type,), "model.py:7")


GOOD = {
    "pointwise": op("add", [X, ONE], F4),
    "linear": op("linear", [X, WEIGHT, BIAS], row("f32", 6)),
    "embedding": op("embedding", [TABLE, Y], F4),
    "compare": op("lt", [X, X], B4),
    "cast": op("cast", [X], row("f16", 4)),
    "slice": op("slice", [X], row("f32", 2), dim=0, start=1, stop=3, step=1),
    "ragged": op("ragged_sum", [XS], F4),
    "unknown": op("sort_of", [X], row("i32", 7)),
}
BAD = {
    "earlier": (op("tanh", [FIRST], F4), "reads op 0"),
    "input": (op("tanh", [Operand("input", 3)], F4), "reads input 3"),
    "param": (op("tanh", [Operand("param", 3)], F4), "reads param 3"),
    "shape": (op("tanh", [X], row("f32", 5)), "has shape"),
    "broadcast": (op("add", [X, WEIGHT], row("f32", 4, 6)), "do not fit"),
    "attribute": (op("slice", [X], F4, dim=0), "do not fit"),
    "linear": (op("linear", [BIAS, WEIGHT], row("f32", 6)), "do not fit"),
    "compare result": (op("lt", [X, X], F4), "expected bool"),
    "compare operands": (op("lt", [X, Y], B4), "compares f32 with i64"),
    "arithmetic": (op("add", [X, Y], F4), "operands are f32, i64"),
    "where": (op("where", [X, X, X], F4), "expected bool, f32, f32"),
    "index": (op("embedding", [TABLE, X], row("f32", 4, 4)), "expected f32, i64"),
    "dtype": (op("cast", [X], row("float", 4)), "has dtype float"),
    "no result": (dataclasses.replace(op("tanh", [X], F4), types=()), "no result"),
    "ragged": (op("ragged_sum", [X], F4), "reduces a row"),
}


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD)
def test_good_operation(good: CellOp) -> None:
    verify_cell(cell(good))


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_operation(bad: CellOp, message: str) -> None:
    with pytest.raises(VerifyError, match=message) as error:
        verify_cell(cell(bad), "fusing")
    assert "after fusing" in str(error.value) and "model.py:7" in str(error.value)


def test_result_of_many() -> None:
    pair = CellOp("opaque", (X,), (), (F4, F4))
    verify_cell(cell(pair, outputs=[Operand("op", 0, port=1)]))
    with pytest.raises(VerifyError, match="reads result 2 of 2"):
        verify_cell(cell(pair, outputs=[Operand("op", 0, port=2)]))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Operand("op", 1), "reads op 1"),
        (ONE, "is a scalar"),
        (WEIGHT, "is a param"),
        (XS, "is ragged"),
    ],
    ids=["op", "scalar", "param", "ragged"],
)
def test_bad_cell_output(output: Operand, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify_cell(cell(GOOD["pointwise"], outputs=[output]))


def test_raggedness_spreads_until_it_is_reduced() -> None:
    tanh, total = op("tanh", [XS], F4), op("ragged_sum", [FIRST], F4)
    verify_cell(cell(tanh, total, outputs=[Operand("op", 1)]))
    with pytest.raises(VerifyError, match="is ragged"):
        verify_cell(cell(tanh))


def test_names_are_unique() -> None:
    good = cell(GOOD["pointwise"])
    with pytest.raises(VerifyError, match="parameters share a name"):
        verify_cell(dataclasses.replace(good, params=(PARAMS[0], PARAMS[0])))
    with pytest.raises(VerifyError, match="inputs share a name"):
        verify_cell(dataclasses.replace(good, inputs=(INPUTS[0], INPUTS[0])))


def graph() -> Graph:
    graph = Graph()
    x = graph.add_input("x", (3,), "f32")
    y = graph.add_op("aten.tanh.default", [("t", 0)], [], [(x, 0)], [((3,), "f32")], "model.py:2")
    graph.outputs = [(y, 0)]
    return graph


def later(g: Graph) -> None:
    g.add_op("aten.neg.default", [("t", 0)], [], [(2, 0)], [((3,), "f32")])


def port(g: Graph) -> None:
    g.add_op("aten.neg.default", [("t", 0)], [], [(1, 1)], [((3,), "f32")])


def missing_operand(g: Graph) -> None:
    g.add_op("aten.add.Tensor", [("t", 0), ("l", (("t", 2),))], [], [(1, 0)], [((3,), "f32")])


def dtype(g: Graph) -> None:
    g.add_op("aten.neg.default", [("t", 0)], [], [(1, 0)], [((3,), "torch.float32")])


def outputs(g: Graph) -> None:
    g.outputs = [(1, 0), (5, 0)]


def test_good_graph() -> None:
    verify_graph(graph())


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (later, "reads node 2, expected one before 2"),
        (port, "reads output 1 of tanh, which has 1"),
        (missing_operand, r"use operands \[0, 2\] of 1"),
        (dtype, "has dtype torch.float32"),
        (outputs, "graph output: reads node 5"),
    ],
    ids=["later", "port", "missing", "dtype", "outputs"],
)
def test_bad_graph(breaks: Callable[[Graph], None], message: str) -> None:
    broken = graph()
    breaks(broken)
    with pytest.raises(VerifyError, match=message):
        verify_graph(broken)
