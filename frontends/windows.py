"""Windows: slices of a request's tensor that move along it.

Duty: find, in a traced request, an input that is cut into pieces of one length (`x[i : i + n]` in a
loop, `x.unfold(0, n, hop)`), and say where they begin. Each piece is then a row of the request's
data, copied when the request is admitted, whatever its place and the tensor's length: all pieces of
all requests are rows of one type. Comes in: a `Graph`; goes out: to `frontends.dims`, which keeps
the pieces' dimensions apart from the input's, and to `frontends.context`, which makes the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cellc.graph import Graph, Node, Template
from cellc.ops import FLOAT_DTYPES
from cellc.rows import Windows

MOST = 16  # windows that an element may be in: so often it is copied


@dataclass
class Cut:
    """An input's windows, and where in them the pieces are that operations take: (first, number),
    by node; `whole`: it is read otherwise, too.
    """

    windows: Windows
    pieces: dict[int, tuple[int, int]] = field(default_factory=dict)
    whole: bool = False


def find(graph: Graph) -> dict[int, Cut]:
    """By input node, those along whose first dimension windows move."""
    readers: dict[int, list[Node]] = {}
    for node in graph:
        for source, _ in node.operands:
            readers.setdefault(source, []).append(node)
    found = {}
    returned = {node for node, _ in graph.outputs}
    for node in graph:
        if node.kind == "input" and node.outputs[0][1] in FLOAT_DTYPES and node.outputs[0][0]:
            cut = _cut(node, readers.get(node.id, ()))
            if cut is not None:
                cut.whole |= node.id in returned
                found[node.id] = cut
    return found


def _cut(source: Node, readers: list[Node] | tuple[()]) -> Cut | None:
    length = source.outputs[0][0][0]
    taken = {node.id: piece for node in readers if (piece := _piece(node, length)) is not None}
    sizes = {size for _, size, _ in taken.values()}
    if len(sizes) != 1:
        return None
    (size,) = sizes
    starts = sorted({start for begin, _, _ in taken.values() for start in begin})
    step = math.gcd(*(b - a for a, b in zip(starts, starts[1:], strict=False))) or size
    if size < 2 or size > MOST * step:
        return None
    windows = Windows(starts[0], step, size)
    pieces = {
        node: ((begin[0] - starts[0]) // step, len(begin) if many else -1)
        for node, (begin, _, many) in taken.items()
    }
    if any(many and begin.step != step for begin, _, many in taken.values() if len(begin) > 1):
        return None
    return Cut(windows, pieces, any(node.id not in taken for node in readers))


def _piece(node: Node, length: int) -> tuple[range, int, bool] | None:
    """Where the windows begin that an operation takes, how long they are, and whether it is an
    `unfold`, which may take several.
    """
    name, numbers = node.op.split(".")[1], [_number(a) for a in node.args[1:]]
    if name == "unfold" and numbers[0] == 0 and len(node.outputs[0][0]) > 1:
        _, size, step = numbers
        assert size is not None and step is not None
        return range(0, length - size + 1, step), size, True
    if name != "slice":
        return None
    dim, start, stop, step = numbers + [0, None, None, 1][len(numbers) :]
    begin, end, by = slice(start, stop, step).indices(length)
    if dim or by != 1 or end - begin in (0, length) or end < begin:
        return None
    return range(begin, begin + 1), end - begin, False


def _number(template: Template) -> int | None:
    value = template[1]
    return value if isinstance(value, int) else None
