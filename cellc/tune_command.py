"""`cellc tune`: batch-size curves of a model's cells, measured here and kept for the scheduler.

Duty: load a target, measure, print tables or JSON. Comes in: parsed arguments; goes out: text on
the console, an exit code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellc import target
from cellc.demo_steps import Steps
from cellc.errors import UsageError
from cellc.report import QUIET
from cellc.tuning import BATCH_SIZES, Tuned, Tuning, tune


def run(args: argparse.Namespace, console: Console) -> int:
    """The command; returns its exit code."""
    loaded = target.load(args.target, args.input)
    if not loaded.requests:
        raise UsageError(f"{args.target}: there are no example requests to take rows from")
    found = tune(
        loaded.model,
        loaded.requests,
        args.backend,
        batch_sizes=args.batch or BATCH_SIZES,
        seconds=args.seconds,
        tiles=not args.no_tiles,
        step=Steps(Console(stderr=True, highlight=False)).step,
    )
    if args.json:
        console.out(json.dumps(as_json(found), indent=2), highlight=False)
    else:
        _print(found, args.target, console)
    return 0


def as_json(found: Tuning) -> dict[str, Any]:
    """What `cellc tune --json` prints."""
    return {
        "backend": found.place.backend,
        "device": found.place.device,
        "threads": found.place.threads,
        "file": found.path,
        "cells": [_cell_json(one) for one in found.cells],
    }


def _cell_json(one: Tuned) -> dict[str, Any]:
    curve = one.curve
    return {
        "name": one.cell.name,
        "key": one.cell.key,
        "left": one.left,
        "rows": list(curve.rows) if curve else [],
        "seconds_a_step": list(curve.seconds) if curve else [],
        "seconds_a_launch": curve.launch if curve else None,
        "enough_rows": curve.enough() if curve else None,
        "tiles": [{"kernel": k, "tried": n, "best": b} for k, n, b in one.choices],
        "others": one.disturbed,
    }


def _print(found: Tuning, text: str, console: Console) -> None:
    place = found.place
    where = f"{place.backend} on {place.device}"
    threads = f", {place.threads} threads" if place.backend != "triton" else ""
    table = Table(title=f"{text}: {where}{threads}", title_justify="left")
    table.add_column("cell", overflow="fold")
    for name in ("rows", "us a step", "rows/s", "GFLOP/s", "of the best"):
        table.add_column(name, justify="right")
    for one in found.cells:
        for i, row in enumerate(_rows(one)):
            table.add_row(escape(one.cell.name) if i == 0 else "", *row)
        table.add_section()
    console.print(table)
    for one in found.cells:
        console.print(_remark(one), markup=False)
    console.print(f"kept in {found.path}", markup=False)


def _rows(one: Tuned) -> Sequence[Sequence[str]]:
    curve = one.curve
    if curve is None:
        return [("", "", "", "", "")]
    rows = []
    for n, seconds in zip(curve.rows, curve.seconds, strict=True):
        rate = n / curve.of_launch(n)
        rows.append(
            (
                f"{n:,}",
                f"{seconds * 1e6:,.1f}",
                f"{rate:,.0f}",
                f"{rate * one.cell.flops_per_row / 1e9:,.1f}",
                f"{rate / curve.best_rate:.0%}",
            )
        )
    return rows


def _remark(one: Tuned) -> str:
    if one.curve is None:
        return f"{one.cell.name}: not measured: {one.left}"
    text = (
        f"{one.cell.name}: a launch takes {one.curve.launch * 1e6:.1f} us beside its steps; "
        f"{one.curve.enough():,} rows reach 90% of its best"
    )
    for kernel, tried, best in one.choices:
        text += f"; {kernel}: {best} of {tried}"
    if one.disturbed is not None and one.disturbed >= QUIET:
        text += f"; others took up to {one.disturbed:.0%} of the machine: measure again"
    return text
