"""Export: the graph of cells as a picture, without graphviz.

Duty: draw cells and what flows between them as DOT, SVG or a page of HTML, for `cellc inspect
--graph`. Comes in as boxes and edges; goes out as one self-contained, deterministic text. Layers by
longest path, as Sugiyama, Tagawa and Toda (1981) do it; an edge across several layers is led past
the boxes between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import networkx

from cellc.errors import UsageError

_CHAR, _LINE, _PAD = 7.3, 17.0, 12.0  # of the 12 px monospace font
_GAP_X, _GAP_Y, _MARGIN, _TITLE = 36.0, 56.0, 28.0, 34.0
_SWEEPS = 4
_MAX_CHARS = 48


@dataclass(frozen=True)
class CellBox:
    """One cell; `calls` of one request, `lines` are details to print below."""

    name: str
    calls: int
    recurrent: bool = False
    parameters: tuple[str, ...] = ()
    flops_per_row: int = 0
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellEdge:
    """From `source` to `target`; a name that is no cell's is an input or an output."""

    source: str
    target: str
    label: str = ""


@dataclass(frozen=True)
class CellGraph:
    """What is drawn: cells in the order they were found, and the edges between them."""

    title: str
    boxes: Sequence[CellBox]
    edges: Sequence[CellEdge]


@dataclass
class _Item:
    """A box, an input or output, or the place where a long edge passes a layer."""

    lines: tuple[str, ...] = ()
    kind: str = "pass"  # "cell", "input", "output", "pass"
    recurrent: bool = False
    layer: int = 0
    width: float = 8.0
    height: float = 0.0
    x: float = 0.0  # of the centre
    y: float = 0.0  # of the top


@dataclass
class _Layout:
    items: dict[str, _Item]
    paths: list[tuple[CellEdge, list[str]]]  # every edge but loops, through the items it passes
    back: list[tuple[CellEdge, list[str]]]  # edges against the direction, from source to target
    loops: dict[str, str] = field(default_factory=dict)  # item -> label
    width: float = 0.0
    height: float = 0.0


def write(graph: CellGraph, path: str | Path) -> None:
    """Write .svg, .html or .dot, as the name ends; raises UsageError for another ending."""
    formats = {".svg": to_svg, ".html": to_html, ".dot": to_dot}
    form = formats.get(Path(path).suffix)
    if form is None:
        raise UsageError(f"cannot draw into {path}; the name must end in {', '.join(formats)}")
    try:
        Path(path).write_text(form(graph), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def to_dot(graph: CellGraph) -> str:
    """The picture in graphviz's language."""
    names = {key: f"n{i}" for i, key in enumerate(_labels(graph))}
    lines = [f"digraph {_quoted(graph.title)} {{", '  node [shape=box, fontname="monospace"];']
    for key, item in _labels(graph).items():
        style = "" if item.kind == "cell" else ', style="rounded"'
        lines.append(f"  {names[key]} [label={_quoted(*item.lines)}{style}];")
    looped = set()
    for source, target, edge in _keyed(graph):
        looped.add(edge.source if source == target else "")
        label = f" [label={_quoted(edge.label)}]" if edge.label else ""
        lines.append(f"  {names[source]} -> {names[target]}{label};")
    for box in graph.boxes:
        if box.recurrent and box.name not in looped:
            lines.append(f"  {names['cell ' + box.name]} -> {names['cell ' + box.name]};")
    return "\n".join([*lines, "}", ""])


def to_html(graph: CellGraph) -> str:
    """The picture as a page that needs nothing else."""
    style = "body{margin:0;padding:24px;background:#f6f7f9}svg{max-width:100%;height:auto}"
    title = escape(graph.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head>\n<body>\n{to_svg(graph)}</body>\n</html>\n"
    )


def to_svg(graph: CellGraph) -> str:
    """The picture as SVG: inputs on top, cells below what they read, loops at the right."""
    layout = _layout(graph)
    width, height = f"{layout.width:.0f}", f"{layout.height:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="ui-monospace, Menlo, monospace" '
        'font-size="12">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="#56606e"/>'
        "</marker></defs>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        f'<text x="{_MARGIN:.0f}" y="26" font-size="14" font-weight="600" fill="#1c2530">'
        f"{escape(graph.title)}</text>",
        *_svg_edges(layout),
        *(_svg_item(item) for item in layout.items.values() if item.kind != "pass"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


# -- what is drawn ---------------------------------------------------------------------------------


def _keyed(graph: CellGraph) -> Iterator[tuple[str, str, CellEdge]]:
    """Every edge once with the keys of its ends: a name may be an input, a cell and an output."""
    cells = {box.name for box in graph.boxes}
    for edge in dict.fromkeys(graph.edges):
        source = f"{'cell' if edge.source in cells else 'input'} {edge.source}"
        target = f"{'cell' if edge.target in cells else 'output'} {edge.target}"
        yield source, target, edge


def _labels(graph: CellGraph) -> dict[str, _Item]:
    """Inputs, cells and outputs with their texts, in a fixed order."""
    ends = list(_keyed(graph))
    inputs = dict.fromkeys(source for source, _, _ in ends if source.startswith("input "))
    outputs = dict.fromkeys(target for _, target, _ in ends if target.startswith("output "))
    items = {key: _Item((key.partition(" ")[2],), "input") for key in inputs}
    for box in graph.boxes:
        items[f"cell {box.name}"] = _Item(tuple(_box_lines(box)), "cell", box.recurrent)
    items.update((key, _Item((key.partition(" ")[2],), "output")) for key in outputs)
    return items


def _box_lines(box: CellBox) -> Iterator[str]:
    yield box.name
    calls = f"{box.calls} call{'' if box.calls == 1 else 's'}"
    yield f"{calls}, {_short(box.flops_per_row)}FLOP a row"
    if box.parameters:
        yield _clipped("@" + " @".join(box.parameters))
    yield from map(_clipped, box.lines)


def _clipped(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…"


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} G"


# -- where it is drawn -----------------------------------------------------------------------------


def _layout(graph: CellGraph) -> _Layout:
    layout = _Layout(_labels(graph), [], [])
    for item in layout.items.values():
        item.width = max(len(line) for line in item.lines) * _CHAR + 2 * _PAD
        item.height = len(item.lines) * _LINE + _PAD
        item.x = 0.0
    _route(layout, _assign_layers(layout, graph))
    for key, item in layout.items.items():
        if item.recurrent:
            layout.loops.setdefault(key, "")
    rows = _rows(layout)
    _order(layout, rows)
    _place(layout, rows, graph.title)
    return layout


def _assign_layers(layout: _Layout, graph: CellGraph) -> list[tuple[str, str, CellEdge]]:
    """Set each item's layer, the longest path to it; returns the forward edges."""
    edges = list(_keyed(graph))
    full = networkx.DiGraph((source, target) for source, target, _ in edges)
    component = {
        key: number
        for number, keys in enumerate(networkx.strongly_connected_components(full))
        for key in keys
    }
    place = {key: i for i, key in enumerate(layout.items)}
    forward = []
    for source, target, edge in edges:
        if source == target:
            layout.loops[source] = edge.label
        elif component[source] == component[target] and place[source] > place[target]:
            layout.back.append((edge, [source, target]))
        else:
            forward.append((source, target, edge))
    acyclic = networkx.DiGraph((source, target) for source, target, _ in forward)
    acyclic.add_nodes_from(layout.items)
    for number, keys in enumerate(networkx.topological_generations(acyclic)):
        for key in keys:
            layout.items[key].layer = number
    last = max((item.layer for item in layout.items.values()), default=0)
    for key, item in layout.items.items():
        if item.kind == "output":
            item.layer = last
        elif item.kind == "input":  # just above who reads it first
            item.layer = min(layout.items[target].layer for target in acyclic[key]) - 1
    return forward


def _route(layout: _Layout, forward: list[tuple[str, str, CellEdge]]) -> None:
    """Give each forward edge an item in every layer it passes."""
    for number, (source, target, edge) in enumerate(forward):
        path = [source]
        for layer in range(layout.items[source].layer + 1, layout.items[target].layer):
            path.append(f"pass {number} {layer}")
            layout.items[path[-1]] = _Item(layer=layer)
        layout.paths.append((edge, [*path, target]))


def _rows(layout: _Layout) -> list[list[str]]:
    rows: dict[int, list[str]] = defaultdict(list)
    for key, item in layout.items.items():
        rows[item.layer].append(key)
    return [rows[layer] for layer in sorted(rows)]


def _order(layout: _Layout, rows: list[list[str]]) -> None:
    """Sort rows by the mean place of what each item is connected to, down and up in turn."""
    above, below = defaultdict(list), defaultdict(list)
    for _, path in layout.paths:
        for upper, lower in zip(path, path[1:], strict=False):
            above[lower].append(upper)
            below[upper].append(lower)
    place = {key: i - len(row) / 2 for row in rows for i, key in enumerate(row)}
    for sweep in range(_SWEEPS):
        near = below if sweep % 2 else above
        for row in reversed(rows) if sweep % 2 else rows:
            means = {
                key: sum(place[n] for n in near[key]) / len(near[key]) if near[key] else place[key]
                for key in row
            }
            row.sort(key=means.__getitem__)
            place.update((key, i - len(row) / 2) for i, key in enumerate(row))


def _place(layout: _Layout, rows: list[list[str]], title: str) -> None:
    """Rows centred below each other; a loop needs room at its right."""
    loop_room = 64.0
    rooms = [
        [layout.items[key].width + (loop_room if key in layout.loops else 0.0) for key in row]
        for row in rows
    ]
    widths = [sum(room) + _GAP_X * (len(room) - 1) for room in rooms]
    inner = max([*widths, len(title) * _CHAR * 1.2, 120.0])
    y = _MARGIN + _TITLE
    for row, room, width in zip(rows, rooms, widths, strict=True):
        x = _MARGIN + (inner - width) / 2
        height = max(layout.items[key].height for key in row)
        for key, taken in zip(row, room, strict=True):
            item = layout.items[key]
            item.x, item.y = x + item.width / 2, y + (height - item.height) / 2
            x += taken + _GAP_X
        y += height + _GAP_Y
    layout.width = inner + 2 * _MARGIN + (loop_room if layout.back else 0.0)
    layout.height = y - _GAP_Y + _MARGIN


# -- how it is drawn -------------------------------------------------------------------------------


def _svg_item(item: _Item) -> str:
    fill, stroke = {
        "cell": ("#e8f0fe", "#3b6fd4") if item.recurrent else ("#f3f4f6", "#7b8794"),
        "input": ("#e9f7ef", "#3f9b68"),
        "output": ("#fff4e2", "#c98a24"),
    }[item.kind]
    radius = 6 if item.kind == "cell" else item.height / 2
    left = item.x - item.width / 2
    parts = [
        f'<g><rect x="{left:.1f}" y="{item.y:.1f}" width="{item.width:.1f}" '
        f'height="{item.height:.1f}" rx="{radius:.1f}" fill="{fill}" stroke="{stroke}"/>'
    ]
    for number, line in enumerate(item.lines):
        y = item.y + _PAD / 2 + (number + 0.75) * _LINE
        weight = ' font-weight="600"' if number == 0 else ""
        parts.append(
            f'<text x="{item.x:.1f}" y="{y:.1f}" text-anchor="middle" fill="#1c2530"{weight}>'
            f"{escape(line)}</text>"
        )
    return "".join([*parts, "</g>"])


def _svg_edges(layout: _Layout) -> Iterator[str]:
    fan_out = _ports(layout, [(path[0], path[1]) for _, path in layout.paths])
    fan_in = _ports(layout, [(path[-1], path[-2]) for _, path in layout.paths])
    for number, (edge, path) in enumerate(layout.paths):
        items = [layout.items[key] for key in path]
        points = [(fan_out[number], items[0].y + items[0].height)]
        for item in items[1:-1]:
            points.append((item.x, item.y))
        points.append((fan_in[number], items[-1].y - 1))
        curve = "".join(
            f" C{x0:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {y1:.1f}"
            for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False)
        )
        (x0, y0), (x1, y1) = points[:2]
        yield _svg_path(f"M{x0:.1f} {y0:.1f}{curve}")
        yield _svg_label(edge.label, x0 + (x1 - x0) * 0.5, y0 + (y1 - y0) * 0.5 + 4)
    for edge, (source, target) in layout.back:
        yield from _svg_back_edge(layout, edge, layout.items[source], layout.items[target])
    for key, label in layout.loops.items():
        yield from _svg_loop(layout.items[key], label)


def _ports(layout: _Layout, ends: list[tuple[str, str]]) -> list[float]:
    """Where each edge touches its item: spread along the side, in the order of the other ends."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, (key, _) in enumerate(ends):
        groups[key].append(number)
    places = [0.0] * len(ends)
    for key, numbers in groups.items():
        numbers.sort(key=[layout.items[other].x for _, other in ends].__getitem__)
        item = layout.items[key]
        for i, number in enumerate(numbers):
            places[number] = item.x + item.width * 0.7 * ((i + 0.5) / len(numbers) - 0.5)
    return places


def _svg_loop(item: _Item, label: str) -> Iterator[str]:
    x, far = item.x + item.width / 2, item.x + item.width / 2 + 34
    top, bottom = item.y + item.height * 0.3, item.y + item.height * 0.7
    control = f"C{far:.1f} {bottom + 10:.1f} {far:.1f} {top - 10:.1f}"
    yield _svg_path(f"M{x:.1f} {bottom:.1f} {control} {x + 1:.1f} {top:.1f}")
    yield _svg_label(label, x + 30, (top + bottom) / 2 + 4, anchor="start")


def _svg_back_edge(layout: _Layout, edge: CellEdge, source: _Item, target: _Item) -> Iterator[str]:
    right = layout.width - _MARGIN
    x0, y0 = source.x + source.width / 2, source.y + source.height / 2
    x1, y1 = target.x + target.width / 2 + 1, target.y + target.height / 2
    control = f"C{right:.1f} {y0:.1f} {right:.1f} {y1:.1f}"
    yield _svg_path(f"M{x0:.1f} {y0:.1f} {control} {x1:.1f} {y1:.1f}")
    yield _svg_label(edge.label, right - 12, (y0 + y1) / 2, anchor="end")


def _svg_path(data: str) -> str:
    line = 'fill="none" stroke="#56606e" stroke-width="1.3" marker-end="url(#arrow)"'
    return f'<path d="{data}" {line}/>'


def _svg_label(text: str, x: float, y: float, anchor: str = "middle") -> str:
    if not text:
        return ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="#56606e" '
        f'stroke="#ffffff" stroke-width="4" paint-order="stroke">{escape(_clipped(text))}</text>'
    )


def _quoted(*lines: str) -> str:
    text = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return f'"{text}"'
