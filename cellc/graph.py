"""Graph: the dataflow graph of one traced request.

Duty: hold what tracing saw, one node an operation, parameter, constant or input, numbered in trace
order. Comes in from `frontends` (which adds nodes); goes to `cellc.extract` (which reads nodes,
operands and users) and, as a networkx graph, to whoever asks. Adding a node costs one object: the
networkx graph is made when it is first read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cellc.ops import Shape

if TYPE_CHECKING:
    import networkx

Ref: TypeAlias = tuple[int, int]  # node, output port
Output: TypeAlias = tuple[Shape, str]  # shape, dtype
# ("t", i): tensor operand i; ("v", constant); ("d", dtype); ("l", (template, ...)): a list
Template: TypeAlias = tuple[str, Any]
Kind: TypeAlias = Literal["input", "param", "const", "op"]


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `args` and `kwargs` are the call's, with operand numbers in place of tensors."""

    id: int
    kind: Kind
    name: str  # unique in its graph
    outputs: tuple[Output, ...]
    op: str = ""  # "aten.addmm.default"
    args: tuple[Template, ...] = ()
    kwargs: tuple[tuple[str, Template], ...] = ()
    operands: tuple[Ref, ...] = ()
    origin: str = ""  # "model.py:14", in the user's code
    point: Hashable = None  # program point: equal for operations that the same code made


class Graph:
    """Nodes 0..n-1 in trace order, so that every operand comes before its user.

    >>> graph = Graph()
    >>> x = graph.add_input("x", (3, 4), "f32")
    >>> y = graph.add_op("aten.tanh.default", [("t", 0)], [], [(x, 0)], [((3, 4), "f32")])
    >>> graph.outputs = [(y, 0)]
    >>> graph.node(y).name, graph.operands(y), graph.nx.number_of_edges()
    ('tanh', ((0, 0),), 1)
    """

    def __init__(self) -> None:
        self.outputs: Sequence[Ref] = ()  # set once, when the forward has returned
        self.reads_weights = False  # the trace depends on what a weight or constant holds
        self._nodes: list[Node] = []
        self._names: set[str] = set()
        self._name_counts: dict[str, int] = {}
        self._nx: networkx.MultiDiGraph | None = None

    def add_input(self, name: str, shape: Sequence[int], dtype: str) -> int:
        return self._add_leaf("input", name, shape, dtype)

    def add_param(self, name: str, shape: Sequence[int], dtype: str) -> int:
        return self._add_leaf("param", name, shape, dtype)

    def add_const(self, name: str, shape: Sequence[int], dtype: str) -> int:
        return self._add_leaf("const", name, shape, dtype)

    def add_op(
        self,
        op: str,
        args: Sequence[Template],
        kwargs: Sequence[tuple[str, Template]],
        operands: Sequence[Ref],
        outputs: Sequence[Output],
        origin: str = "",
        point: Hashable = None,
    ) -> int:
        """Add an operation, named after `op` ("aten.addmm.default": addmm, addmm_1, ...)."""
        return self._append(
            Node(
                id=len(self._nodes),
                kind="op",
                name=self._unique(_base_name(op)),
                outputs=tuple(outputs),
                op=op,
                args=tuple(args),
                kwargs=tuple(kwargs),
                operands=tuple(operands),
                origin=origin,
                point=point,
            )
        )

    def node(self, node: int) -> Node:
        return self._nodes[node]

    def operands(self, node: int) -> tuple[Ref, ...]:
        return self._nodes[node].operands

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    @property
    def nx(self) -> networkx.MultiDiGraph:
        """As networkx: node data "node" (a Node), edge data "arg" and "out" (operand, output)."""
        if self._nx is None:
            import networkx  # here: tracing and `import cellc` do without it

            self._nx = networkx.MultiDiGraph()
            self._nx.add_nodes_from((node.id, {"node": node}) for node in self._nodes)
            self._nx.add_edges_from(
                (source, node.id, {"arg": arg, "out": port})
                for node in self._nodes
                for arg, (source, port) in enumerate(node.operands)
            )
        return self._nx

    def _add_leaf(self, kind: Kind, name: str, shape: Sequence[int], dtype: str) -> int:
        outputs = ((tuple(shape), dtype),)
        if kind == "param":  # found by its name, whatever else has that
            self._names.add(name)
        else:
            name = self._unique(name)
        return self._append(Node(len(self._nodes), kind, name, outputs))

    def _append(self, node: Node) -> int:
        self._nodes.append(node)
        self._nx = None
        return node.id

    def _unique(self, base: str) -> str:
        count = self._name_counts.get(base, 0)
        name = f"{base}_{count}" if count else base
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._name_counts[base] = count + 1
        self._names.add(name)
        return name


def _base_name(op: str) -> str:
    parts = op.split(".")
    return parts[1] if len(parts) > 2 else parts[-1]
