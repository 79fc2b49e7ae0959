from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from cellc.errors import UsageError
from cellc.export import CellBox, CellEdge, CellGraph, to_dot, to_html, to_svg, write

SVG = "{http://www.w3.org/2000/svg}"


def tagger() -> CellGraph:
    boxes = [
        CellBox("embed", 7, parameters=("emb.weight",), flops_per_row=0),
        CellBox("lstm", 7, True, ("rnn.weight_hh_l0",), 1_054_720, ("kernels: cpp",)),
        CellBox("decide", 3, flops_per_row=250),
        CellBox("out <b>", 7, flops_per_row=2560),
    ]
    edges = [
        CellEdge("tokens", "embed", "i64[]"),
        CellEdge("embed", "lstm", "f32[16]"),
        CellEdge("lstm", "lstm", "h, c"),
        CellEdge("lstm", "out <b>"),
        CellEdge("lstm", "decide"),
        CellEdge("decide", "lstm", "next"),
        CellEdge("out <b>", "tags"),
        CellEdge("tokens", "tags", "mask"),
    ]
    return CellGraph('a "tagger"', boxes, edges)


def texts(svg: str) -> dict[str, tuple[float, float]]:
    """Place of every text."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return {t.text or "": (float(t.attrib["x"]), float(t.attrib["y"])) for t in found}


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of every box."""
    rects = [rect.attrib for rect in ElementTree.fromstring(svg).iterfind(f"{SVG}g/{SVG}rect")]
    return [
        (x, y, x + float(r["width"]), y + float(r["height"]))
        for r in rects
        for x, y in [(float(r["x"]), float(r["y"]))]
    ]


def test_svg_says_what_the_cells_are() -> None:
    found = texts(to_svg(tagger()))
    assert {"tokens", "embed", "lstm", "decide", "out <b>", "tags", 'a "tagger"'} <= set(found)
    assert {"7 calls, 1.05 MFLOP a row", "@rnn.weight_hh_l0", "kernels: cpp", "h, c"} <= set(found)


def test_svg_flows_down() -> None:
    found = texts(to_svg(tagger()))
    down = [found[name][1] for name in ("tokens", "embed", "lstm", "out <b>", "tags")]
    assert down == sorted(down) and len(set(down)) == 5


def test_svg_boxes_do_not_overlap_and_lie_inside() -> None:
    svg = to_svg(tagger())
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    rects = boxes(svg)
    assert len(rects) == 6
    for i, (left, top, right, bottom) in enumerate(rects):
        assert 0 < left < right < width and 0 < top < bottom < height
        for l2, t2, r2, b2 in rects[:i]:
            assert right <= l2 or r2 <= left or bottom <= t2 or b2 <= top


def test_svg_draws_every_edge_once() -> None:
    drawn = [
        path
        for path in ElementTree.fromstring(to_svg(tagger())).iter(f"{SVG}path")
        if "marker-end" in path.attrib
    ]
    assert len(drawn) == len(tagger().edges)


def test_recurrent_cell_has_a_loop_without_an_edge() -> None:
    graph = CellGraph("loop", [CellBox("rnn", 3, recurrent=True)], [])
    assert to_svg(graph).count("marker-end") == 1
    assert "n0 -> n0;" in to_dot(graph)


def test_empty_graph() -> None:
    assert ElementTree.fromstring(to_svg(CellGraph("nothing", [], []))).tag == f"{SVG}svg"


def test_dot_quotes_and_rounds() -> None:
    dot = to_dot(tagger())
    assert dot.startswith('digraph "a \\"tagger\\"" {')
    assert 'n0 [label="tokens", style="rounded"];' in dot
    assert 'n0 -> n1 [label="i64[]"];' in dot
    assert dot.count("n2 -> n2") == 1


def test_same_name_may_be_input_and_output() -> None:
    dot = to_dot(CellGraph("identity", [], [CellEdge("x", "x")]))
    assert "n0 -> n1;" in dot


def test_deterministic() -> None:
    assert to_svg(tagger()) == to_svg(tagger())


def test_write_by_ending(tmp_path: Path) -> None:
    for name, form in (("a.svg", to_svg), ("a.html", to_html), ("a.dot", to_dot)):
        write(tagger(), tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8") == form(tagger())
    with pytest.raises(UsageError, match=r"\.svg, \.html, \.dot"):
        write(tagger(), tmp_path / "a.pdf")
