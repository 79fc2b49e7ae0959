"""Call graphs as tests compare them."""

from __future__ import annotations

from typing import Any

from cellc.calls import CallGraph
from cellc.rows import RaggedRefs


def told(graph: CallGraph) -> Any:
    """Everything a call graph says, with where values come from instead of their numbers."""
    name: dict[int, Any] = {}
    for key, value in graph.constants.items():
        name[value] = ("constant", key)
    for data in graph.data:
        name |= {data.base + i: ("data", data.leaf, i) for i in range(data.count)}
    for g, group in enumerate(graph.groups):
        for o, made in enumerate(group.outputs):
            name |= {int(v): ("made", g, o, j) for j, v in enumerate(made)}

    def names(values: Any) -> list[Any]:
        return [name[int(v)] for v in values.reshape(-1)]

    return (
        [(d.leaf, d.name, d.count, d.type, d.row_dims) for d in graph.data],
        [
            (
                g.cell.key,
                g.num_calls,
                [
                    (names(c.refs), c.offsets.tolist()) if isinstance(c, RaggedRefs) else names(c)
                    for c in g.inputs
                ],
            )
            for g in graph.groups
        ],
        [(names(o.refs), o.refs.shape, o.shape, o.type, o.row_dims) for o in graph.outputs],
    )
