"""A child-sum TreeLSTM over the syntax trees of the functions of Python's standard library.

Tai, Socher, Manning: Improved Semantic Representations From Tree-Structured Long Short-Term Memory
Networks, ACL 2015, arXiv:1503.00075 (equations 2 to 8). `python examples/tree_lstm.py` measures
it on functions of different shapes; `cellc inspect examples/tree_lstm.py:model` shows its cells.
"""

from __future__ import annotations

import argparse
import ast
import gc
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import cellc

Tree = tuple[int, tuple[Any, ...]]  # kind of the node, trees of its children
Forward = Callable[[list[tuple[Tree]]], list[Tensor]]

CLASSES = [n for n, v in vars(ast).items() if isinstance(v, type) and issubclass(v, ast.AST)]
KINDS = {name: kind for kind, name in enumerate(sorted(CLASSES))}
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
CHUNK, SAMPLE, WARM_UP = 512, 300, 512


class ChildSumCell(nn.Module):
    """A node's input and its children's states to its state."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(size, 4 * hidden)
        self.sum = nn.Linear(hidden, 3 * hidden, bias=False)
        self.forget = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, hs: list[Tensor], cs: list[Tensor]) -> tuple[Tensor, Tensor]:
        i, o, u, f = self.input(x).chunk(4, -1)
        if not hs:  # a leaf
            c = torch.sigmoid(i) * torch.tanh(u)
            return torch.sigmoid(o) * torch.tanh(c), c
        h, c = torch.stack(hs), torch.stack(cs)  # [children, hidden]
        i_h, o_h, u_h = self.sum(h.sum(0)).chunk(3, -1)
        kept = (torch.sigmoid(f + self.forget(h)) * c).sum(0)
        c = torch.sigmoid(i + i_h) * torch.tanh(u + u_h) + kept
        return torch.sigmoid(o + o_h) * torch.tanh(c), c


class TreeLSTM(nn.Module):
    """A syntax tree to class scores of its root."""

    def __init__(self, hidden: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(KINDS), hidden)
        self.cell = ChildSumCell(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def encode(self, tree: Tree) -> tuple[Tensor, Tensor]:
        kind, children = tree
        states = [self.encode(child) for child in children]
        x = self.embedding(torch.tensor(kind))
        h, c = self.cell(x, [h for h, _ in states], [c for _, c in states])
        return h, c

    def forward(self, tree: Tree) -> Tensor:
        h, _ = self.encode(tree)
        scores: Tensor = self.head(h)
        return scores


def make_model(hidden: int = 256) -> TreeLSTM:
    torch.manual_seed(0)
    return TreeLSTM(hidden).eval()


model = make_model()


def to_tree(node: ast.AST) -> Tree:
    """Kinds and children of a syntax tree, without Load and Store."""
    children = [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr_context)]
    return KINDS[type(node).__name__], tuple([to_tree(child) for child in children])


def functions_of(source: bytes) -> list[Tree]:
    """The functions of a module, methods and inner functions too."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [to_tree(n) for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]


def shape_of(tree: Tree) -> tuple[Any, ...]:
    """The tree without its kinds: cellc plans by that, kinds are data."""
    return tuple([shape_of(child) for child in tree[1]])


def num_nodes(tree: Tree) -> int:
    return 1 + sum([num_nodes(child) for child in tree[1]])


def example_inputs() -> list[tuple[Tree]]:
    """Small functions of one module."""
    functions = functions_of(Path(ast.__file__).read_bytes())
    return [(tree,) for tree in functions if num_nodes(tree) <= 80][:12]


@contextmanager
def progress(console: Console, text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line elsewhere; gives what to call when more are done."""
    if not console.is_terminal:
        console.print(f"{text}: {total:,}")
        yield lambda count: None
        return
    with Progress(console=console, refresh_per_second=2) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def collect(console: Console) -> list[Tree]:
    """One function of every shape in the standard library, in a fixed shuffled order."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [p for p in library.rglob("*.py") if not SKIPPED & {*p.relative_to(library).parts}]
    found: dict[tuple[Any, ...], Tree] = {}
    with warnings.catch_warnings(), progress(console, "parsing modules", len(modules)) as advance:
        warnings.simplefilter("ignore")  # about what is parsed
        for path in sorted(modules):
            try:
                found.update((shape_of(tree), tree) for tree in functions_of(path.read_bytes()))
            except (SyntaxError, ValueError, RecursionError):  # no Python, or too deep to recurse
                pass
            advance(1)
    trees = list(found.values())
    random.Random(0).shuffle(trees)
    return trees


def measure(console: Console, hidden: int, limit: int) -> Table:
    """Eager on a sample, then cellc twice on all functions."""
    trees = collect(console)
    gc.freeze()  # millions of tuples, which the collector need not look at again and again
    warm_up, trees = trees[:WARM_UP], trees[WARM_UP:][: limit or None]
    chosen = random.Random(0).sample(range(len(trees)), min(SAMPLE, len(trees)))
    sample, net = [trees[i] for i in chosen], make_model(hidden)
    table = Table("", "functions", "nodes", "seconds", "nodes/s", "to eager")
    rates: list[float] = []

    def run(text: str, chunk: int, forward: Forward, given: Sequence[Tree]) -> list[Tensor]:
        results: list[Tensor] = []
        with progress(console, text, len(given)) as advance:
            start = time.perf_counter()
            for at in range(0, len(given), chunk):
                part = [(tree,) for tree in given[at : at + chunk]]
                results += forward(part)
                advance(len(part))
            seconds = time.perf_counter() - start
        nodes = sum(map(num_nodes, given))
        rates.append(rate := nodes / seconds)
        numbers = f"{len(given):,} {nodes:,} {seconds:.2f} {rate:,.0f} {rate / rates[0]:.1f}x"
        table.add_row(text, *numbers.split())
        return results

    with torch.no_grad(), cellc.compile(net) as compiled:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more, operations this small only wait for each other
        net(warm_up[0])
        expected = run("eager, one at a time", 1, lambda part: [net(*part[0])], sample)
        torch.set_num_threads(threads)
        console.print(
            f"cells are found and kernels compiled on {len(warm_up)} other functions, not counted"
        )
        compiled.map([(tree,) for tree in warm_up])
        first = run("cellc, new shapes", CHUNK, compiled.map, trees)
        second = run("cellc, known shapes", CHUNK, compiled.map, trees)
    want = torch.stack(expected)
    both = [torch.stack([results[i] for i in chosen]) for results in (first, second)]
    error = max((got - want).abs().max().item() for got in both)
    table.caption = f"hidden {hidden}; largest difference to eager: {error:.1e}"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="A TreeLSTM over Python's standard library.")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--hidden", type=int, default=256, metavar="H", help="state size")
    args, console = parser.parse_args(), Console(highlight=False)
    try:
        console.print(measure(console, args.hidden, args.functions))
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


if __name__ == "__main__":
    main()
