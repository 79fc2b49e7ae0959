from __future__ import annotations

import dataclasses

import networkx
import pytest

from cellc.graph import Graph


def diamond() -> Graph:
    """x -> split -> (tanh of part 0, part 1) -> add."""
    graph = Graph()
    x = graph.add_input("x", (4, 6), "f32")
    halves = [((4, 3), "f32"), ((4, 3), "f32")]
    split = graph.add_op(
        "aten.split.Tensor", [("t", 0), ("v", 3), ("v", 1)], [], [(x, 0)], halves, "model.py:3"
    )
    tanh = graph.add_op("aten.tanh.default", [("t", 0)], [], [(split, 0)], halves[:1])
    add = graph.add_op(
        "aten.add.Tensor", [("t", 0), ("t", 1)], [], [(tanh, 0), (split, 1)], halves[:1]
    )
    graph.outputs = [(add, 0)]
    return graph


def test_nodes_are_numbered_in_trace_order() -> None:
    graph = diamond()
    assert [node.id for node in graph] == list(range(len(graph))) == [0, 1, 2, 3]
    assert [node.kind for node in graph] == ["input", "op", "op", "op"]
    assert graph.node(1).origin == "model.py:3"


def test_operands() -> None:
    graph = diamond()
    assert graph.operands(3) == ((2, 0), (1, 1))


def test_names_are_unique() -> None:
    graph = Graph()
    names = [
        graph.node(node).name
        for node in (
            graph.add_input("add_1", (), "f32"),
            graph.add_param("rnn.weight", (3,), "f32"),
            graph.add_const("rnn.weight", (3,), "f32"),
            graph.add_op("aten.add.Tensor", [], [], [], [((), "f32")]),
            graph.add_op("aten.add.Scalar", [], [], [], [((), "f32")]),
            graph.add_op("stack", [], [], [], [((), "f32")]),
        )
    ]
    assert names == ["add_1", "rnn.weight", "rnn.weight_1", "add", "add_2", "stack"]


def test_networkx_view() -> None:
    graph = diamond()
    nx = graph.nx
    assert isinstance(nx, networkx.MultiDiGraph)
    assert nx is graph.nx
    assert nx.nodes[1]["node"] is graph.node(1)
    assert sorted(nx.edges(data=True), key=lambda e: (e[1], e[2]["arg"])) == [
        (0, 1, {"arg": 0, "out": 0}),
        (1, 2, {"arg": 0, "out": 0}),
        (2, 3, {"arg": 0, "out": 0}),
        (1, 3, {"arg": 1, "out": 1}),
    ]


def test_networkx_view_follows_new_nodes() -> None:
    graph = diamond()
    assert len(graph.nx) == 4
    graph.add_input("y", (), "i64")
    assert len(graph.nx) == 5


def test_node_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        diamond().node(0).name = "y"  # type: ignore[misc]
