"""`cellc check`: what `cellc.check` found, in tables or as JSON.

Duty: load a target, compare, print; exit 1 where anything differs. Comes in: parsed arguments; goes
out: text on the console, an exit code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from math import isnan
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellc import target
from cellc.check_cells import CellCheck
from cellc.checking import BATCH_SIZES, NOTHING, CheckReport, RequestCheck, check
from cellc.comparing import Comparison
from cellc.demo_steps import Steps
from cellc.errors import UsageError

T = TypeVar("T")
MOST_ROWS = 60  # of a table; failures are always shown


def run(args: argparse.Namespace, console: Console) -> int:
    """The command; returns its exit code."""
    loaded = target.load(args.target, args.input)
    if not loaded.requests:
        raise UsageError(f"{args.target}: there are no example requests to compare")
    report = check(
        loaded.model,
        loaded.requests,
        backends=args.backend,
        dtypes=args.dtype,
        batch_sizes=args.batch or BATCH_SIZES,
        rtol=args.rtol,
        atol=args.atol,
        weights=args.weights,
        step=Steps(Console(stderr=True, highlight=False)).step,
    )
    if args.json:
        console.out(json.dumps(report.as_json(), indent=2), highlight=False)
    else:
        _print(report, args.target, console)
    return 0 if report.equal else 1


def _print(report: CheckReport, text: str, console: Console) -> None:
    console.print(_requests_table(report, f"{report.model} ({text}): results"))
    if report.cells:
        console.print(_cells_table(report.cells))
    for name, reason in report.skipped.items():
        console.print(
            f"not run: {name}: {reason.removeprefix(f'backend {name!r}: ')}", markup=False
        )
    for line in report.failures:
        text = line if line == NOTHING else f"differs: {line}"
        console.print(text, markup=False, style="red")
    if not report.all_raise:
        console.print(_counts(report))


def _counts(report: CheckReport) -> str:
    results = [r for r in report.requests if not r.raises]
    good = sum(r.found.equal for r in results), sum(c.found.equal for c in report.cells)
    text = f"{good[0]} of {len(results)} results and {good[1]} of {len(report.cells)} kernels "
    if report.weights is None:
        return f"{text}equal PyTorch's"
    return (
        f"{text}with {report.weights} weights are near PyTorch's; their differences are shares of "
        "norms"
    )


def _requests_table(report: CheckReport, title: str) -> Table:
    """A row a request, a column a backend."""
    backends = list(dict.fromkeys(r.backend for r in report.requests))
    rows: dict[int, list[RequestCheck]] = {}
    for one in report.requests:
        rows.setdefault(one.request, []).append(one)
    table = Table(title=title, title_justify="left")
    table.add_column("request", justify="right")
    table.add_column("outputs", overflow="fold")
    for name in backends:
        table.add_column(f"{name}: difference", justify="right")
    for name in backends:
        table.add_column(f"{name}: equal")
    shown = _shown(list(rows.values()), lambda group: all(r.found.equal for r in group))
    for group in shown:
        table.add_row(
            str(group[0].request),
            escape(_outputs(group[0])),
            *(_difference(r.found) for r in group),
            *(_verdict(r.found, "raises, too" if r.raises else "yes") for r in group),
        )
    _say_left(table, len(rows) - len(shown))
    return table


def _cells_table(cells: Sequence[CellCheck]) -> Table:
    """A row a kernel, against the same cell as plain torch calls."""
    sizes = ", ".join(map(str, cells[0].batch_sizes))
    table = Table(title=f"kernels of cells, {sizes} rows a step", title_justify="left")
    table.add_column("cell", overflow="fold")
    for name in ("backend", "dtype"):
        table.add_column(name)
    table.add_column("largest difference", justify="right")
    table.add_column("equal")
    table.add_column("left to torch", overflow="fold")
    shown = _shown(cells, lambda c: c.found.equal)
    for c in shown:
        left = escape(", ".join(c.left))
        table.add_row(
            escape(c.cell), c.backend, c.dtype, _difference(c.found), _verdict(c.found), left
        )
    _say_left(table, len(cells) - len(shown))
    return table


def _shown(rows: Sequence[T], good: Callable[[T], bool]) -> Sequence[T]:
    """Not too many, and all that failed."""
    if len(rows) <= MOST_ROWS:
        return rows
    failed = [r for r in rows if not good(r)]
    return [*failed, *[r for r in rows if good(r)][: max(0, MOST_ROWS - len(failed))]]


def _say_left(table: Table, count: int) -> None:
    if count:
        table.caption, table.caption_justify = f"and {count} more, all equal", "left"


def _outputs(check: RequestCheck) -> str:
    """Their forms, or what PyTorch raises in their place."""
    outputs = check.outputs
    if check.raises:
        return f"PyTorch raises {check.raises}"
    more = f" and {len(outputs) - 4} more" if len(outputs) > 4 else ""
    return ", ".join(outputs[:4]) + more


def _difference(found: Comparison) -> str:
    return "" if isnan(found.difference) else f"{found.difference:.1e}" if found.difference else "0"


def _verdict(found: Comparison, yes: str = "yes") -> str:
    return f"[green]{yes}[/]" if found.equal else "[red]NO[/]"
