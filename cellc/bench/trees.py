"""Trees: cellc against eager recursion, levels batched by hand, and DyNet. `python -m
cellc.bench.trees`.

Every round draws new trees and runs each way once on them, in turn; results are checked against
eager recursion before anything is timed. Printed: medians, their ratio to eager, and what a cell of
a structure never seen costs to unfold.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cellc.bench.measure import Patience, Round, alternate, machine_name, noise
from cellc.bench.tree_data import draw_tree
from cellc.bench.tree_dynet import DynetTreeLSTM
from cellc.bench.tree_models import ArrayTreeLSTM, TreeLSTM, as_arrays, run_levels
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.request import as_call
from cellc.trees import Tree

EAGER_SAMPLE = 96  # trees of a round that run eagerly: it takes long
EAGER, LEVELS, DYNET = "eager recursion, one tree at a time", "levels by hand", "DyNet autobatching"
SEEN, NEW = "cellc, recursion, structures seen", "cellc, recursion, every tree new"
TREE_SEEN, TREE_NEW = "cellc.Tree, structures seen", "cellc.Tree, every tree new"


@dataclass
class Batch:
    """A round's trees: nested, and as arrays."""

    nested: list[Any]
    children: list[Any]
    tokens: list[torch.Tensor]

    @classmethod
    def of(cls, trees: Sequence[Any]) -> Batch:
        arrays = [as_arrays(t) for t in trees]
        return cls(list(trees), [c for c, _ in arrays], [torch.tensor(t) for _, t in arrays])

    @property
    def num_nodes(self) -> int:
        return sum(len(c) for c in self.children)


class Bench:
    """The model, and each way to run it."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.model = TreeLSTM(size).eval()
        self.recursion: Compiled = compile(self.model)
        self.arrays: Compiled = compile(ArrayTreeLSTM(self.model).eval())
        self.dynet: DynetTreeLSTM | None = None
        try:
            self.dynet = DynetTreeLSTM(self.model)
        except ImportError:
            self.dynet = None

    def ways(self) -> dict[str, Callable[[Batch], Any]]:
        ways: dict[str, Callable[[Batch], Any]] = {
            EAGER: lambda b: [self.model(t) for t in b.nested[:EAGER_SAMPLE]],
            LEVELS: lambda b: run_levels(self.model, list(zip(b.children, b.tokens, strict=True))),
        }
        if self.dynet is not None:
            ways[DYNET] = lambda b: self.dynet(b.nested)  # type: ignore[misc]
        ways[NEW] = lambda b: self.recursion.map([(t,) for t in b.nested])
        ways[SEEN] = lambda b: self.recursion.map([(t,) for t in b.nested])
        ways[TREE_NEW] = lambda b: self.arrays.map(self.array_requests(b))
        ways[TREE_SEEN] = lambda b: self.arrays.map(self.array_requests(b))
        return ways

    @staticmethod
    def array_requests(b: Batch) -> list[Any]:
        return [(Tree(c), t) for c, t in zip(b.children, b.tokens, strict=True)]

    def check(self, batch: Batch) -> float:
        """The largest difference to eager recursion; raises SystemExit where a way is wrong."""
        want = torch.stack([self.model(t) for t in batch.nested])
        worst = 0.0
        for name, run in self.ways().items():
            got = run(batch)
            got = torch.stack(list(got)) if isinstance(got, list) else got
            difference = float((got - want[: len(got)]).abs().max())
            if difference > 1e-4:
                raise SystemExit(f"{name}: differs from eager recursion by {difference:.1e}")
            worst = max(worst, difference)
        return worst

    def unfold_cost(self, compiled: Compiled, requests: Sequence[Any]) -> tuple[float, float]:
        """Microseconds a cell call: from requests of new structures to calls, and on to plans."""
        calls = [as_call(r) for r in requests]
        stats = compiled._compiler.unfolder.stats
        start, planning = time.perf_counter(), stats.planning
        tickets = compiled._tickets(calls)
        seconds, planning = time.perf_counter() - start, stats.planning - planning
        cells = sum(t.entry.plan.num_calls for t in tickets)
        return (seconds - planning) * 1e6 / cells, planning * 1e6 / cells


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m cellc.bench.trees",
        description="Throughput of a binary TreeLSTM on trees of many shapes: cellc against eager "
        "PyTorch, PyTorch batched by hand level by level, and DyNet (pip install dynet38).",
    )
    parser.add_argument("--size", type=int, default=256, help="hidden units (256)")
    parser.add_argument("--batch", type=int, default=512, help="trees at once (512)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to keep (5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(argv)
    console = Console()
    bench = Bench(args.size)
    draw = random.Random(0)

    def batch() -> Batch:
        return Batch.of([draw_tree(draw) for _ in range(args.batch)])

    with torch.no_grad():
        for _ in range(2):  # kernels, and what is learned of the model
            worst = bench.check(batch())
        rounds, costs, cells = _measure(bench, batch, args.rounds, console)
    table, figures = _table(rounds, list(bench.ways()), args.batch)
    console.print(table)
    for name, values in costs.items():
        unfold, plan = (statistics.median(v) for v in zip(*values, strict=True))
        console.print(
            f"a structure never seen, {name}: {unfold:.2f} us a cell call to unfold, "
            f"{plan:.2f} to plan"
        )
        figures[f"us a cell call to unfold, {name}"] = unfold
        figures[f"us a cell call to plan, {name}"] = plan
    share = noise(rounds)
    console.print(
        f"{machine_name()}, {torch.get_num_threads()} threads; {cells:,.0f} nodes a round; largest "
        f"difference to eager {worst:.1e}; others took at most "
        f"{'an unknown share' if share is None else f'{share:.0%}'} of the machine"
    )
    if bench.dynet is None:
        console.print("DyNet: not installed (pip install dynet38)")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    bench.recursion.close()
    bench.arrays.close()
    return 0


def _measure(
    bench: Bench, batch: Callable[[], Batch], wanted: int, console: Console
) -> tuple[list[Round[float]], dict[str, list[tuple[float, float]]], float]:
    """(rounds of seconds a tree for each way, microseconds a cell to unfold, nodes a round)."""
    current = [batch()]
    nodes: list[int] = []
    costs: dict[str, list[tuple[float, float]]] = {"recursion": [], "cellc.Tree": []}
    ways = bench.ways()
    first = next(iter(ways))

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            if name == first:
                fresh = batch()
                costs["recursion"].append(
                    bench.unfold_cost(bench.recursion, [(t,) for t in fresh.nested])
                )
                costs["cellc.Tree"].append(
                    bench.unfold_cost(bench.arrays, bench.array_requests(fresh))
                )
                current[0] = batch()
                nodes.append(current[0].num_nodes)
                console.print(f"round {len(nodes)}", style="dim")
            count = len(current[0].nested)
            start = time.perf_counter()
            ways[name](current[0])
            seconds = time.perf_counter() - start
            return seconds / (min(EAGER_SAMPLE, count) if name == EAGER else count)

        return run

    rounds = alternate([timed(name) for name in ways], wanted, 3 * wanted, Patience(120.0))
    return rounds, costs, statistics.mean(nodes)


def _table(
    rounds: Sequence[Round[float]], names: Sequence[str], batch: int
) -> tuple[Table, dict[str, float]]:
    table = Table(title=f"binary TreeLSTM, {batch} trees at once: medians of {len(rounds)} rounds")
    table.add_column("way")
    for column in ("trees/s", "x eager", "x levels", "x DyNet"):
        table.add_column(column, justify="right")
    columns = list(zip(*(r.results for r in rounds), strict=True))
    seconds = {name: statistics.median(c) for name, c in zip(names, columns, strict=True)}
    times = dict(zip(names, columns, strict=True))
    figures = {}
    for name in names:
        figures[name] = 1 / seconds[name]
        cells = [name, f"{1 / seconds[name]:,.0f}"]
        for other in (EAGER, LEVELS, DYNET):
            if other not in times or name == other:
                cells.append("")
                continue
            ratio = statistics.median(
                [a / b for a, b in zip(times[other], times[name], strict=True)]
            )
            figures[f"{name} / {other}"] = ratio
            cells.append(f"{ratio:.2f}")
        table.add_row(*cells)
    return table, figures


if __name__ == "__main__":
    sys.exit(main())
