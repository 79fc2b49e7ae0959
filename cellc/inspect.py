"""`cellc inspect`: the cells of a model, for a person or as JSON.

Duty: print what `cellc.survey` found, a stage of the compiler, the source of kernels, or draw the
graph of cells. Comes in: parsed arguments; goes out: text on the console, an exit code.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellc import export, target
from cellc.cells import Cell
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.errors import UnsupportedError, UsageError
from cellc.kernels.narrow import narrowed
from cellc.launch import Backend
from cellc.options import BackendName
from cellc.stages import Stage
from cellc.survey import CellReport, Survey, cell_graph, short_ops, survey

STAGES = ("graph", "rows", "extract", "passes", "plan")


def run(args: argparse.Namespace, console: Console) -> int:
    """The command; returns its exit code."""
    if args.ir is not None and args.ir not in STAGES:
        raise UsageError(f"there is no stage {args.ir!r}; there are {', '.join(STAGES)}")
    loaded = target.load(args.target, args.input)
    backend = _backend(args)
    only_text = backend == "eager" != args.backend
    options = {"weights": None if only_text else args.weights}
    with compile(loaded.model, backend=backend, options=options) as compiled:
        found = survey(compiled, loaded.requests)
        if args.json:
            console.out(json.dumps(found.as_json(), indent=2), highlight=False)
        elif args.ir is not None:
            console.out(str(_stage(compiled, args.ir)), highlight=False)
        elif args.code is not None:
            _print_code(compiled, found, args, console)
        elif args.graph is not None:
            export.write(cell_graph(found), args.graph)
            console.out(f"wrote {args.graph}", highlight=False)
        else:
            _print_survey(found, args.target, console)
    return 0


def _backend(args: argparse.Namespace) -> BackendName:
    """What runs the requests: nothing need be compiled to see the IR or another backend's text."""
    if args.ir is not None or (args.code is not None and args.backend != "auto"):
        return "eager"
    name: BackendName = args.backend or "auto"
    return name


# -- tables ----------------------------------------------------------------------------------------


def _print_survey(found: Survey, text: str, console: Console) -> None:
    console.print(cells_table(found, f"{found.model} ({text})"))
    console.print(_summary(found), markup=False)
    for line in _hints(found):
        console.print(line, markup=False)


def cells_table(found: Survey, title: str) -> Table:
    """Every cell, calls being those of the largest request."""
    table = Table(title=title, title_justify="left", show_lines=len(found.cells) < 9)
    table.add_column("cell", overflow="fold")
    table.add_column("recurrent")
    table.add_column("calls", justify="right")
    table.add_column("FLOPs a row", justify="right")
    table.add_column("bytes a row", justify="right")
    table.add_column("weights", overflow="fold")
    table.add_column("operations", overflow="fold")
    table.add_column("kernel")
    for cell in found.cells:
        table.add_row(*_row(cell, found.bytes_per_row[cell.name], found.weights.get(cell.name)))
    return table


def _row(cell: CellReport, num_bytes: int, weights: str | None) -> Sequence[str]:
    return (
        cell.name,
        "yes" if cell.recurrent else "no",
        f"{cell.calls:,}",
        f"{cell.flops_per_row:,}",
        f"{num_bytes:,}",
        escape("\n".join(cell.parameters)) or "none",
        short_ops(cell.ops),
        ", ".join([*cell.kernels, *[f"{weights} weights"] * bool(weights)]),
    )


def _stage(compiled: Compiled, name: str) -> Stage:
    stages = {stage.name: stage for stage in compiled.stages}
    if name not in stages:
        raise UsageError(
            f"requests of this model are unfolded by cells: its stages are {', '.join(stages)}"
        )
    return stages[name]


def _summary(found: Survey) -> str:
    calls = sum(cell.calls for cell in found.cells)
    return (
        f"largest request: {found.nodes:,} nodes and {found.edges:,} edges traced, {calls:,} cell "
        f"calls\ncoverage: {found.coverage:.1%} of its FLOPs are in generated cells with weights\n"
        f"a new structure: {found.unfold.kind}, {found.unfold.us_per_cell:,.1f} us a cell call"
    )


def _hints(found: Survey) -> list[str]:
    lines = [
        f"left to torch: {', '.join(names)} in {cell}" for cell, names in found.leftovers.items()
    ]
    unfold = found.unfold
    if unfold.kind == "cell-level unfolding" and unfold.lines:
        lines.append(
            f"faster yet where these lines are one method, or a function marked @cellc.cell: "
            f"{_listed(unfold.lines)}"
        )
    if unfold.kind == "operator-level tracing":
        lines.append(
            "each new structure is traced once, then kept; example requests of at least three "
            "sizes show whether plans of other sizes follow from them"
        )
        if unfold.reason:
            lines.append(f"it is not unfolded by cells: {unfold.reason}")
        if unfold.lines:
            lines.append(
                "move these lines into a method marked @cellc.cell to have it unfolded by cells: "
                f"{_listed(unfold.lines)}"
            )
    return lines


def _listed(lines: Sequence[str]) -> str:
    return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")


# -- kernels ---------------------------------------------------------------------------------------


def _print_code(
    compiled: Compiled, found: Survey, args: argparse.Namespace, console: Console
) -> None:
    printers = _printers(compiled, args.backend, args.weights)
    for name in _chosen([cell.name for cell in found.cells], args.code):
        for language, source_of in printers.items():
            if language or (args.code == "" and len(found.cells) > 1):
                heading = f"{name}, {language}" if language else name
                console.out(f"{'#' * 8} {heading}", highlight=False)
            console.out(source_of(compiled.cells[name].cell).rstrip("\n"), highlight=False)


def _chosen(names: Sequence[str], wanted: str) -> Sequence[str]:
    """All names; the one wanted; or those that hold it."""
    if wanted in ("", *names):
        return [wanted] if wanted else names
    holding = [name for name in names if wanted in name]
    if holding:
        return holding
    near = difflib.get_close_matches(wanted, names)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}"
    raise UsageError(f"there is no cell {wanted!r}; {hint}")


def _printers(
    compiled: Compiled, backend: BackendName | None, weights: str | None
) -> Mapping[str, Callable[[Cell], str]]:
    """What prints a cell's kernel: C++ and Triton, or one backend, which need not run here."""

    def cpp(cell: Cell) -> str:
        return _cpp_source(cell, weights)

    def triton(cell: Cell) -> str:
        return _triton_source(cell, weights)

    if backend is None:
        return {"C++": cpp, "Triton": triton}
    if backend == "auto":
        return {"": lambda cell: _own_source(compiled, cell)}
    return {"": {"triton": triton, "cpp": cpp, "eager": _eager_source}[backend]}


def _own_source(compiled: Compiled, cell: Cell) -> str:
    maker: Backend = compiled._compiler.backend
    return maker.kernel(cell, compiled._compiler.params).source


def _triton_source(cell: Cell, weights: str | None) -> str:
    from cellc.kernels.triton_backend import print_cell

    try:
        return print_cell(narrowed(cell, weights).cell)[1].source
    except UnsupportedError as error:
        return f"# {error}\n{_eager_source(cell)}"


def _cpp_source(cell: Cell, weights: str | None) -> str:
    from cellc.kernels.cpp_expr import C_TYPES
    from cellc.kernels.cpp_printer import print_cpp
    from cellc.kernels.tile import schedule, unsupported

    reason = unsupported(cell, C_TYPES)
    if reason:
        return f"# no C++ for {reason}: this cell runs through torch\n{_eager_source(cell)}"
    return print_cpp(schedule(narrowed(cell, weights).cell)).text


def _eager_source(cell: Cell) -> str:
    from cellc.kernels.eager import source

    return source(cell)
