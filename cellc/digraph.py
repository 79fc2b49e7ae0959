"""Directed graphs of numbers, for the few questions that compiling asks of them.

Duty: who reads whom, strongly connected components, an order of dependence. As networkx has it,
whose import alone takes longer than compiling a model whose kernels are cached.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence


class Digraph:
    """Nodes and edges, each once, in the order in which they came."""

    def __init__(self, edges: Iterable[tuple[int, int]] = ()) -> None:
        self.successors: dict[int, dict[int, None]] = {}
        self.predecessors: dict[int, dict[int, None]] = {}
        for u, v in edges:
            self.add_edge(u, v)

    def __iter__(self) -> Iterator[int]:
        return iter(self.successors)

    def __contains__(self, node: int) -> bool:
        return node in self.successors

    def add_node(self, node: int) -> None:
        if node not in self.successors:
            self.successors[node], self.predecessors[node] = {}, {}

    def add_edge(self, u: int, v: int) -> None:
        self.add_node(u)
        self.add_node(v)
        self.successors[u][v] = self.predecessors[v][u] = None

    def has_edge(self, u: int, v: int) -> bool:
        return u in self.successors and v in self.successors[u]

    def edges(self) -> Iterator[tuple[int, int]]:
        return ((u, v) for u, targets in self.successors.items() for v in targets)

    def components(self) -> list[set[int]]:
        """Strongly connected components, what is reached before what reaches it (Tarjan's way)."""
        number: dict[int, int] = {}  # when a node was first met
        low: dict[int, int] = {}
        open_nodes: dict[int, None] = {}  # a stack
        found: list[set[int]] = []
        for root in self:
            if root in number:
                continue
            number[root] = low[root] = len(number)
            open_nodes[root] = None
            path = [(root, iter(self.successors[root]))]
            while path:
                node, rest = path[-1]
                for other in rest:
                    if other not in number:
                        number[other] = low[other] = len(number)
                        open_nodes[other] = None
                        path.append((other, iter(self.successors[other])))
                        break
                    if other in open_nodes:
                        low[node] = min(low[node], number[other])
                else:
                    path.pop()
                    if path:
                        low[path[-1][0]] = min(low[path[-1][0]], low[node])
                    if low[node] == number[node]:
                        found.append(_popped(open_nodes, node))
        return found

    def ordered(self, key: Callable[[set[int]], int]) -> Sequence[set[int]]:
        """Components after all that they read; of those that may be next, the least by `key`."""
        components = self.components()
        home = {node: i for i, component in enumerate(components) for node in component}
        after: list[set[int]] = [set() for _ in components]
        waits = [0] * len(components)
        for u, v in self.edges():
            a, b = home[u], home[v]
            if a != b and b not in after[a]:
                after[a].add(b)
                waits[b] += 1
        ready = [(key(c), i) for i, c in enumerate(components) if not waits[i]]
        heapq.heapify(ready)
        found = []
        while ready:
            _, i = heapq.heappop(ready)
            found.append(components[i])
            for j in after[i]:
                waits[j] -= 1
                if not waits[j]:
                    heapq.heappush(ready, (key(components[j]), j))
        return found


def _popped(stack: dict[int, None], node: int) -> set[int]:
    """What was put onto the stack since `node`, and it."""
    found = set[int]()
    while node not in found:
        found.add(stack.popitem()[0])
    return found


def joined(nodes: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[set[int]]:
    """Nodes that pairs connect, over any number of others, together."""
    home = {node: {node} for node in nodes}
    for u, v in pairs:
        if home[u] is not home[v]:
            small, large = sorted((home[u], home[v]), key=len)
            large |= small
            home.update(dict.fromkeys(small, large))
    return list({id(group): group for group in home.values()}.values())
