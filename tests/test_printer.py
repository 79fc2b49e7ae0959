from __future__ import annotations

from collections.abc import Callable

from cellc.cells import Cell, CellInput, CellOp, Operand, Param
from cellc.graph import Graph
from cellc.ops import RowType
from cellc.printer import op_names, print_cell, print_graph


def f32(*shape: int) -> RowType:
    return RowType(shape, "f32")


def of(index: int) -> Operand:
    return Operand("op", index)


def row(index: int) -> Operand:
    return Operand("input", index)


def op(
    name: str, op: str, operands: list[Operand], type: RowType, line: int, **attrs: object
) -> CellOp:
    pairs = tuple((key, value) for key, value in attrs.items())
    return CellOp(op, tuple(operands), pairs, (type,), f"model.py:{line}", name)  # type: ignore[arg-type]


def lstm() -> Cell:
    weight, bias, one = Operand("param", 0), Operand("param", 1), Operand("scalar", value=1.0)
    gates = f32(16)
    part = [{"dim": 0, "start": 4 * i, "stop": 4 * i + 4, "step": 1} for i in range(4)]
    cell_ops = (
        op("xh", "cat", [row(0), row(1)], f32(7), 14, dim=0),
        op("gates", "linear", [of(0), weight, bias], gates, 14),
        op("i", "slice", [of(1)], f32(4), 15, **part[0]),
        op("f", "slice", [of(1)], f32(4), 15, **part[1]),
        op("z", "slice", [of(1)], f32(4), 15, **part[2]),
        op("o", "slice", [of(1)], f32(4), 15, **part[3]),
        op("", "sigmoid", [of(3)], f32(4), 16),
        op("", "mul", [of(6), row(2)], f32(4), 16),
        op("", "sigmoid", [of(2)], f32(4), 16),
        op("", "tanh", [of(4)], f32(4), 16),
        op("", "mul", [of(8), of(9)], f32(4), 16),
        op("c1", "add", [of(7), of(10)], f32(4), 16),
        op("", "neg", [of(5)], f32(4), 17),
        op("", "sub", [one, of(12)], f32(4), 17),
        op("h", "mul", [of(13), of(11)], f32(4), 17),
    )
    inputs = (CellInput("x", f32(3)), CellInput("h", f32(4)), CellInput("c", f32(4)))
    params = (Param("rnn.weight", f32(7, 16)), Param("rnn.bias", f32(16)))
    return Cell("lstm", inputs, params, cell_ops, (of(14), of(11)), recurrent=True)


def test_cell(golden: Callable[[str, str], None]) -> None:
    golden("printer_lstm.txt", print_cell(lstm()))


def test_graph(golden: Callable[[str, str], None]) -> None:
    graph = Graph()
    x = graph.add_input("x", (4, 6), "f32")
    weight = graph.add_param("out.weight", (2, 6), "f32")
    table = graph.add_const("const", (), "i64")
    parts = [((4, 2), "f32"), ((4, 4), "f32")]
    args = [("t", 0), ("l", (("v", 2), ("v", 4))), ("v", 1)]
    split = graph.add_op("aten.split_with_sizes.default", args, [], [(x, 0)], parts, "model.py:3")  # type: ignore[arg-type]
    cat = graph.add_op(
        "aten.cat.default",
        [("l", (("t", 0), ("t", 1))), ("v", -1)],
        [],
        [(split, 1), (split, 0)],
        [((4, 6), "f32")],
        "model.py:4",
    )
    linear = graph.add_op(
        "aten.linear.default",
        [("t", 0), ("t", 1)],
        [],
        [(cat, 0), (weight, 0)],
        [((4, 2), "f32")],
        "model.py:5",
    )
    cast = graph.add_op(
        "aten._to_copy.default",
        [("t", 0)],
        [("dtype", ("d", "bf16"))],
        [(linear, 0)],
        [((4, 2), "bf16")],
        "model.py:6",
    )
    graph.outputs = [(cast, 0), (split, 0), (table, 0)]
    golden("printer_graph.txt", print_graph(graph, "graph tagger, after tracing"))


def test_empty_graph() -> None:
    assert print_graph(Graph()) == "# graph: 0 nodes\nreturn"


def test_names_are_unique_among_inputs_and_operations() -> None:
    names = op_names(lstm())
    assert names[-1] == "h_1"  # an input is named h
    assert len(set(names)) == len(names)


def test_ragged_input_and_plain_note() -> None:
    value = CellOp("ragged_sum", (row(0),), (), (f32(4),))
    cell = Cell("pool", (CellInput("xs", f32(4), ragged=True),), (), (value,), (of(0),))
    assert print_cell(cell).splitlines() == [
        "cell pool(xs: ragged f32[4]) -> (ragged_sum):  # 0 weights",
        "    ragged_sum: f32[4] = ragged_sum(xs)",
    ]


def test_long_header_is_one_input_a_line() -> None:
    inputs = tuple(CellInput(f"a_rather_long_name_{i}", f32(4)) for i in range(5))
    lines = print_cell(Cell("wide", inputs, (), (), (row(0),))).splitlines()
    assert lines[0] == "cell wide("
    assert lines[1] == "    a_rather_long_name_0: f32[4],"
    assert lines[-1] == ") -> (a_rather_long_name_0):  # 0 weights"
